"""Measure a world model on held-out walks: PSNR by horizon, sharpness, and whether it follows actions.

python examples/evaluate.py --model checkpoints/far-maze --dataset_name mazes --output maze_scores.json
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from diffusers_far import FARPipeline
from diffusers_far.data.loading import load_split
from diffusers_far.evaluation.world_model import (
    WorldModelProtocol,
    format_scores,
    load_walks,
    predict_walks,
    score_walks,
)


def parse_args() -> argparse.Namespace:
    defaults = WorldModelProtocol()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Pipeline folder or Hub id.")
    parser.add_argument("--dataset_name", required=True, help="Dataset with columns video, actions and pose.")
    parser.add_argument("--dataset_split", default="test")
    parser.add_argument("--num_walks", type=int, default=defaults.num_walks)
    parser.add_argument("--first_context_frame", type=int, default=defaults.first_context_frame)
    parser.add_argument("--num_context_frames", type=int, default=defaults.num_context_frames)
    parser.add_argument("--num_frames", type=int, default=defaults.num_frames, help="Frames to predict.")
    parser.add_argument("--num_inference_steps", type=int, default=defaults.num_inference_steps)
    parser.add_argument("--guidance_scale", type=float, default=defaults.guidance_scale)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--batch_size", type=int, default=defaults.batch_size)
    parser.add_argument("--output", type=Path, help="JSON file for the figures; must not exist.")
    args = parser.parse_args()
    if args.output is not None and args.output.exists():
        parser.error(f"--output {args.output} exists; name another file, or move it away.")
    return args


def main(args: argparse.Namespace) -> None:
    protocol = WorldModelProtocol(
        num_walks=args.num_walks,
        first_context_frame=args.first_context_frame,
        num_context_frames=args.num_context_frames,
        num_frames=args.num_frames,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    walks = load_walks(load_split(args.dataset_name, args.dataset_split), protocol)
    pipe = FARPipeline.from_pretrained(args.model).to("cuda" if torch.cuda.is_available() else "cpu")

    start = time.perf_counter()
    scores = score_walks(predict_walks(pipe, walks, protocol), walks, protocol)
    scores["seconds"] = time.perf_counter() - start
    scores["machine"] = {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    scores["date"] = time.strftime("%Y-%m-%d")
    print(format_scores(scores))
    if args.output is not None:
        args.output.write_text(json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_args())
