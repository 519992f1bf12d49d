"""Continue walks through Crafter that the model has never seen, from recorded frames and actions that lie in this folder.

    python examples/demo.py --output_dir outputs/demo

Writes for each walk an mp4 (truth on the left, prediction on the right), one contact sheet (truth above prediction) and
scores.json; prints how many tiles are right, as `far evaluate --protocol tiles` measures it in full.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from diffusers_far.command_line import HelpWithDefaults


ROOT = Path(__file__).resolve().parent.parent
SHOWN = (1, 2, 4, 8, 16, 32)  # new frames on the contact sheet
PRINTED = (1, 8, 32)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    model, walks = ROOT / "checkpoints" / "far-crafter", ROOT / "examples" / "crafter_walks"
    parser.add_argument("--model", default=str(model), help="Pipeline folder or Hub id.")
    parser.add_argument("--dataset_name", default=str(walks), help="Folder or Hub id of walks through Crafter.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--num_walks", type=int, default=8)
    parser.add_argument("--first_context_frame", type=int, default=96, help="Walks out and back turn at frame 128.")
    parser.add_argument("--num_frames", type=int, default=32, help="Frames to predict.")
    parser.add_argument("--num_inference_steps", type=int, help="By default the pipeline's own.")
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

import torch
from datasets import load_dataset

from diffusers_far import FARPipeline
from diffusers_far.evaluation.media import contact_sheet, write_mp4
from diffusers_far.evaluation.protocols import TilesProtocol
from diffusers_far.evaluation.tile_worlds import check_dataset, load_walks, score_known_tiles
from diffusers_far.evaluation.world_model import Predictions, predict_walks
from diffusers_far.files import written_whole


def main(args: argparse.Namespace) -> None:
    # 1. Recorded walks and the model
    pipe = FARPipeline.from_pretrained(args.model)
    protocol = TilesProtocol(
        num_walks=args.num_walks,
        first_context_frame=args.first_context_frame,
        num_frames=args.num_frames,
        num_inference_steps=args.num_inference_steps,
        num_made_frames=0,
        return_steps=(),
    ).with_defaults_of(pipe)
    dataset = load_dataset(args.dataset_name, split="test")
    check_dataset(dataset, pipe, protocol)
    walks = load_walks(dataset, protocol).wandering

    # 2. Predict
    start = time.perf_counter()
    predictions = predict_walks(pipe, walks.clips, protocol.continuation)
    seconds = time.perf_counter() - start

    # 3. Show
    args.output_dir.mkdir(parents=True, exist_ok=True)
    context = walks.clips.video[:, : protocol.num_context_frames]
    for walk in range(args.num_walks):
        truth = torch.cat([context[walk], predictions.truth[walk]])
        predicted = torch.cat([context[walk], predictions.predicted[walk]])
        path = args.output_dir / f"walk_{walk}.mp4"
        write_mp4(path, torch.cat([truth, predicted], dim=-1), fps=pipe.config.fps or 8, scale=4)
    shown = [frame for frame in SHOWN if frame <= args.num_frames]
    draw_sheet(predictions, [frame - 1 for frame in shown], args.output_dir)

    known = score_known_tiles(predictions, walks, protocol)
    with written_whole(args.output_dir / "scores.json") as file:
        scores = {"protocol": asdict(protocol), "known": {"wandering": known}}
        file.write_text(json.dumps(scores, indent=2) + "\n")
    made = f"{protocol.num_context_frames} frames of context, {protocol.num_inference_steps} steps a frame"
    print(f"{args.num_walks} held-out walks, {made}, {seconds:.0f} s. In brackets: the last frame repeated.\n")
    print_table(known, [frame - 1 for frame in PRINTED if frame <= args.num_frames])
    frames = ", ".join(map(str, shown))
    print(f"\nLook at {args.output_dir / 'walk_0.mp4'} and {args.output_dir / 'contact_sheet.png'} (frames {frames}).")


def draw_sheet(predictions: Predictions, frames: list[int], output_dir: Path) -> None:
    """Two walks beside each other, in each the true frames above the predicted ones."""
    walks = torch.cat([predictions.truth, predictions.predicted], dim=-2)[:, frames]
    strips = torch.cat(torch.nn.functional.pad(walks, (1, 1, 1, 1), value=1.0).unbind(1), dim=-1)  # (walks, 3, h, w)
    contact_sheet(strips.split(1 + (len(strips) % 2 == 0)), gap=6).save(output_dir / "contact_sheet.png")


def print_table(known: dict, frames: list[int]) -> None:
    """The share of tiles that are right, by what could be known of them, and PSNR."""

    def cell(of_source: dict, frame: int, factor: int = 1) -> str:
        ours, theirs = (of_source[name]["by_frame"][frame]["mean"] for name in ("predicted", "repeated"))
        return "none" if ours is None else f"{factor * ours:.1f} ({factor * theirs:.1f})"

    rows = {
        "tiles right in %": [f"frame {frame + 1}" for frame in frames],
        "share of tiles that are scored": [f"{known['share_scored'][frame]:.0%}" for frame in frames],
    }
    for label, of_label in known["accuracy"].items():
        title = f"{label}, {of_label['share_of_tiles']:.1%} of all tiles"
        rows[title] = [cell(of_label, frame, factor=100) for frame in frames]
    rows["PSNR in dB"] = [cell(known["psnr"], frame) for frame in frames]
    for title, cells in rows.items():
        print(f"{title:<40}" + "".join(f"{each:>15}" for each in cells))


if __name__ == "__main__":
    main(args)
