"""Encode every frame of a dataset once, so that training reads latents and never runs the VAE.

    python examples/cache_latents.py --dataset_name mazes --dataset_split train --vae vae-maze --output_dir latents

Writes `output_dir/split/latents-*.arrow`: a row per trajectory with `latents` (F, C, H, W) in float16, already
multiplied by the VAE's scaling factor, and the dataset's other columns. Of a `VQModel` it writes codes, (F, 1, H, W)
unsigned integers. Interrupted, it goes on with the shards that are missing or damaged. With `--streaming` a dataset on
the Hub is encoded as it comes, in one pass, and takes no room on the disk. `accelerate launch` shares the shards among GPUs.
"""

import argparse
import logging
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

from diffusers_far.command_line import HelpWithDefaults, Progress, set_up_logging


logger = logging.getLogger(__name__)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    parser.add_argument("--dataset_name", required=True, help="Folder or Hub id that `load_dataset` opens.")
    parser.add_argument("--dataset_config_name", help="Of a dataset with several configurations.")
    parser.add_argument("--dataset_split", default="train")
    parser.add_argument("--video_column", default="video")
    parser.add_argument("--vae", required=True, help="Folder or Hub id of the VAE.")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--num_processes", type=int, default=1)
    parser.add_argument("--trajectories_per_shard", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=64, help="Frames that the VAE encodes at once.")
    parser.add_argument("--device", help="By default the GPU, where there is one.")
    parser.add_argument("--streaming", action="store_true", help="Read the dataset as it is needed; copy nothing.")
    args = parser.parse_args(arguments)
    if args.streaming and args.num_processes > 1:
        parser.error(
            f"--num_processes is {args.num_processes}, but a stream is read from its front, by one process; leave out "
            "one of the two."
        )
    return args


if __name__ == "__main__":
    args = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

import numpy as np
import torch
from datasets import Dataset
from diffusers import AutoModel, VQModel

from diffusers_far.data.latents import LatentSource, read_source, require_intact, write_shard
from diffusers_far.data.loading import dataset_fingerprint, load_split, stream_split
from diffusers_far.data.rows import BadExampleError
from diffusers_far.data.streaming import StreamedSplit
from diffusers_far.data.video_clips import VideoClips
from diffusers_far.data.workers import Share, share_work
from diffusers_far.files import UNFINISHED
from diffusers_far.models.codec import encode_codes, encode_video
from diffusers_far.models.identity import vae_hash


def load_vae(args: argparse.Namespace) -> torch.nn.Module:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return AutoModel.from_pretrained(args.vae).to(device, memory_format=torch.channels_last).eval()


def encode_shard(args: argparse.Namespace, source: LatentSource, shard: int, count: Callable[[], None]) -> None:
    """Encode the trajectories of one shard, perhaps in a process of its own."""
    torch.set_num_threads(max(1, torch.get_num_threads() // args.num_processes))
    dataset = load_split(args.dataset_name, args.dataset_split, args.dataset_config_name)
    encode_trajectories(args, load_vae(args), dataset.select(source.shard_rows(shard)), source, shard, count)


def encode_stream(
    args: argparse.Namespace, split: StreamedSplit, source: LatentSource, shards: list[int], count: Callable[[], None]
) -> None:
    """Encode the missing `shards` of a stream, in one pass over it."""
    vae, first = load_vae(args), shards[0]
    rows = split.all_rows(source.shard_rows(first).start)
    for shard in range(first, shards[-1] + 1):
        read = list(islice(rows, len(source.shard_rows(shard))))
        if shard in shards:
            trajectories = split.in_memory(read)
            try:
                VideoClips(trajectories, args.video_column).check_rows()
            except BadExampleError as error:
                raise BadExampleError(f"Counted from row {source.shard_rows(shard).start}: {error}") from error
            encode_trajectories(args, vae, trajectories, source, shard, count)


def encode_trajectories(
    args: argparse.Namespace,
    vae: torch.nn.Module,
    trajectories: Dataset,
    source: LatentSource,
    shard: int,
    count: Callable[[], None],
) -> None:
    """Encode the trajectories of one shard and write it."""
    videos = VideoClips(trajectories, args.video_column)
    latents = []
    for trajectory, num_frames in enumerate(videos.num_frames):
        video = videos.frames(trajectory, 0, int(num_frames))
        if isinstance(vae, VQModel):
            codes = encode_codes(vae, video, args.batch_size)[:, None]
            latents.append(codes.cpu().numpy().astype(np.min_scalar_type(vae.config.num_vq_embeddings - 1)))
        else:
            latents.append(encode_video(vae, video, args.batch_size).cpu().numpy().astype(np.float16))
        count()
    carried = trajectories.remove_columns(args.video_column)
    path = source.shard_path(Path(args.output_dir) / args.dataset_split, shard)
    write_shard(path, latents, carried.with_format("arrow")[:], carried.features, source)


def find_missing_shards(folder: Path, source: LatentSource) -> list[int]:
    """The shards of `source` that are not in `folder`, or are damaged there: all that are there are read.

    Raises:
        ValueError: If `folder` holds shards of another source.
    """
    for path in folder.glob(f"{UNFINISHED}*"):  # of a run that was killed; `load_dataset` would take it for a shard
        path.unlink()
    intact = set()
    for path in sorted(folder.glob("latents-*.arrow")):
        try:
            found = read_source(path)
            require_intact(path)
        except ValueError as error:
            if path not in {source.shard_path(folder, shard) for shard in range(source.num_shards)}:
                raise
            logger.warning(f"{error} It is encoded again.")
            continue
        if found != source:
            raise ValueError(
                f"{str(path)!r} was made of {found}, but this run has {source}; give another `--output_dir`, or delete the "
                "folder to encode anew."
            )
        intact.add(path)
    return [shard for shard in range(source.num_shards) if source.shard_path(folder, shard) not in intact]


def main(args: argparse.Namespace) -> None:
    set_up_logging(__name__)
    share = Share.of_launch("cache_latents.py")
    args.device = args.device or share.device
    # 1. What the latents are made of
    if args.streaming:
        dataset = stream_split(args.dataset_name, args.dataset_split, args.video_column, args.dataset_config_name)
        fingerprint, num_trajectories = dataset.fingerprint, dataset.num_rows
    else:
        dataset = load_split(args.dataset_name, args.dataset_split, args.dataset_config_name)
        fingerprint, num_trajectories = dataset_fingerprint(dataset), len(dataset)
    vae = AutoModel.from_pretrained(args.vae)
    source = LatentSource(
        vae_hash=vae_hash(vae),
        scaling_factor=vae.config.scaling_factor,
        dataset_fingerprint=fingerprint,
        num_trajectories=num_trajectories,
        trajectories_per_shard=args.trajectories_per_shard,
    )

    # 2. What is there already, and what is wrong with the rest
    folder = Path(args.output_dir) / args.dataset_split
    folder.mkdir(parents=True, exist_ok=True)
    # One process looks, before any of them writes.
    (shards,) = share.do(partial(find_missing_shards, folder), [source])
    num_missing = sum(len(source.shard_rows(shard)) for shard in shards)
    if share.is_main:
        logger.info(f"{num_missing:,} of {num_trajectories:,} trajectories are to be encoded; looking at the rows")
    shards = share.of(shards)
    if shards and not args.streaming:
        VideoClips(dataset, args.video_column).check_rows()

    # 3. Encode the rest
    num_ours = sum(len(source.shard_rows(shard)) for shard in shards)
    progress = Progress(num_ours, unit="trajectory", seconds_between_lines=10, is_silent=not share.is_main)
    if args.streaming and shards:
        encode_stream(args, dataset, source, shards, progress.update)
    else:
        share_work(partial(encode_shard, args, source), shards, args.num_processes, progress)
    share.leave()


if __name__ == "__main__":
    main(args)
