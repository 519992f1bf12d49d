"""Continue mazes that the model has never seen, from recorded frames and actions that lie in this folder.

    python examples/demo.py --output_dir outputs/demo

Writes for each walk an mp4 (truth on the left, prediction on the right) and one contact sheet (truth above prediction),
and prints the figures that examples/evaluate.py measures in full.
"""

import argparse
import json
import time
from pathlib import Path

from diffusers_far.command_line import HelpWithDefaults


ROOT = Path(__file__).resolve().parent.parent


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "far-maze"), help="Pipeline folder or Hub id.")
    parser.add_argument("--mazes", default=str(ROOT / "examples" / "mazes"), help="Dataset with recorded walks.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--num_walks", type=int, default=8)
    parser.add_argument("--num_frames", type=int, default=8, help="Frames to predict.")
    parser.add_argument("--num_inference_steps", type=int, help="By default the pipeline's own.")
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

import torch
from datasets import load_dataset

from diffusers_far import FARPipeline
from diffusers_far.evaluation.media import contact_sheet, write_mp4
from diffusers_far.evaluation.world_model import (
    WorldModelProtocol,
    format_scores,
    load_walks,
    predict_walks,
    score_walks,
)
from diffusers_far.files import written_whole


def main(args: argparse.Namespace) -> None:
    # 1. Recorded walks and the model
    pipe = FARPipeline.from_pretrained(args.model)
    protocol = WorldModelProtocol(
        num_walks=args.num_walks,
        num_frames=args.num_frames,
        num_inference_steps=args.num_inference_steps,
    ).with_defaults_of(pipe)
    walks = load_walks(load_dataset(args.mazes, split="test"), protocol)

    # 2. Predict
    start = time.perf_counter()
    predictions = predict_walks(pipe, walks, protocol)
    seconds = time.perf_counter() - start

    # 3. Show
    args.output_dir.mkdir(parents=True, exist_ok=True)
    context = walks.video[:, : protocol.num_context_frames]
    for walk in range(args.num_walks):
        truth = torch.cat([context[walk], predictions.truth[walk]])
        predicted = torch.cat([context[walk], predictions.predicted[walk]])
        path = args.output_dir / f"walk_{walk}.mp4"
        write_mp4(path, torch.cat([truth, predicted], dim=-1), fps=pipe.config.fps or 8, scale=4)
    rows = [video[walk] for walk in range(args.num_walks) for video in (predictions.truth, predictions.predicted)]
    contact_sheet(rows).save(args.output_dir / "contact_sheet.png")

    scores = score_walks(predictions, walks, protocol)
    with written_whole(args.output_dir / "scores.json") as file:
        file.write_text(json.dumps(scores, indent=2) + "\n")
    print(f"{args.num_walks} held-out walks, {protocol.num_context_frames} frames of context, {seconds:.0f} s\n")
    print(format_scores(scores))
    print(f"\nLook at {args.output_dir / 'contact_sheet.png'} and {args.output_dir / 'walk_0.mp4'}.")


if __name__ == "__main__":
    main(args)
