"""Draw the README's moving picture: held-out walks, what was recorded above what the model predicts.

    python scripts/animate_prediction.py --output docs/images/prediction.webp

The model is shown `--num_context_frames` of a recorded walk and then predicts frame after frame at the recorded actions, from
its own frames. Walk k draws its noise from a generator seeded `--seed` + k.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffusers_far.command_line import HelpWithDefaults


ROOT = Path(__file__).resolve().parent.parent

# Pixels
TEXT_HEIGHT = 26
LABEL_WIDTH = 86
GAP = 8  # between walks
ARROW_HEIGHT = 20  # between what was recorded and what is predicted
FONT_SIZE = 15

INK, PALE, MARKED = "#24292f", "#8c959f", "#e8590c"
ARROWS = {  # corners in a square from -1 to 1, y down
    "up": [(0, -0.8), (0.8, 0.6), (-0.8, 0.6)],
    "down": [(0, 0.8), (0.8, -0.6), (-0.8, -0.6)],
    "left": [(-0.8, 0), (0.6, -0.8), (0.6, 0.8)],
    "right": [(0.8, 0), (-0.6, -0.8), (-0.6, 0.8)],
}
ARROWS["forward"] = ARROWS["up"]


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    model, walks = ROOT / "checkpoints" / "far-crafter", ROOT / "examples" / "crafter_walks"
    parser.add_argument("--model", default=str(model), help="Pipeline folder or Hub id.")
    parser.add_argument("--dataset_name", default=str(walks), help="Folder or Hub id of recorded walks.")
    parser.add_argument("--dataset_split", default="test")
    parser.add_argument("--walks", type=int, nargs="+", default=[0, 1, 2, 3], help="Which of them, from 0.")
    parser.add_argument("--first_context_frame", type=int, default=96)
    parser.add_argument("--num_context_frames", type=int, default=32)
    parser.add_argument("--num_frames", type=int, default=64, help="Frames to predict.")
    parser.add_argument("--num_shown_context_frames", type=int, default=10, help="The last ones of the context.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=int, default=3, help="Repeats pixels.")
    parser.add_argument("--quality", type=int, help="Of the webp, 0 to 100; by default it is lossless.")
    parser.add_argument("--output", type=Path, required=True, help="A .webp; replaced.")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    args = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

import numpy as np
import torch
from datasets import load_dataset
from PIL import Image, ImageDraw, ImageFont

from diffusers_far import FARPipeline


class Panel:
    """Draws one moment of all walks.

    Args:
        side (`tuple`): `(height, width)` of a frame as it is drawn.
        num_walks (`int`).
        action_names (`list[str]`): Those with an arrow are drawn as one.
    """

    def __init__(self, side: tuple[int, int], num_walks: int, action_names: list[str]):
        self.height, self.width = side
        self.action_names = action_names
        self.font = ImageFont.load_default(FONT_SIZE)
        self.lefts = [LABEL_WIDTH + walk * (self.width + GAP) for walk in range(num_walks)]
        self.tops = (TEXT_HEIGHT, TEXT_HEIGHT + self.height + ARROW_HEIGHT)  # of the recorded and the predicted frames
        self.size = (self.lefts[-1] + self.width + GAP, self.tops[1] + self.height + GAP)

    def draw(
        self, recorded: np.ndarray, predicted: np.ndarray, actions: list[int], title: str, *, is_context: bool
    ) -> Image.Image:
        """One moment.

        Args:
            recorded, predicted (`np.ndarray` of shape `(walks, h, w, 3)`): uint8.
            actions (`list[int]`): Those that lead to these frames.
            title (`str`): Stands above them.
            is_context (`bool`): The frames below were given to the model, not predicted.
        """
        image = Image.new("RGB", self.size, "white")
        canvas = ImageDraw.Draw(image)
        colour = PALE if is_context else MARKED
        self._write(canvas, (LABEL_WIDTH, TEXT_HEIGHT / 2), title, colour)
        labels = ("recorded", "context" if is_context else "predicted")
        for top, label, frames, ink in zip(self.tops, labels, (recorded, predicted), (INK, colour)):
            self._write(canvas, (GAP, top + self.height / 2), label, ink)
            for left, frame in zip(self.lefts, frames):
                enlarged = Image.fromarray(frame).resize((self.width, self.height), Image.Resampling.NEAREST)
                image.paste(enlarged, (left, top))
        for left, action in zip(self.lefts, actions):
            centre = (left + self.width / 2, self.tops[0] + self.height + ARROW_HEIGHT / 2)
            self._draw_action(canvas, centre, self.action_names[action])
        return image

    def _write(self, canvas: ImageDraw.ImageDraw, place: tuple[float, float], text: str, ink: str) -> None:
        canvas.text(place, text, fill=ink, font=self.font, anchor="lm")

    def _draw_action(self, canvas: ImageDraw.ImageDraw, centre: tuple[float, float], name: str) -> None:
        directions = [word for word in name.split("_") if word in ARROWS]  # of "move_left", "left"
        if not directions:
            canvas.text(centre, name, fill=INK, font=self.font, anchor="mm")
            return
        radius = ARROW_HEIGHT / 2 - 4
        canvas.polygon([(centre[0] + radius * x, centre[1] + radius * y) for x, y in ARROWS[directions[0]]], fill=INK)


def read_walks(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Frames `(walks, F, h, w, 3)`, uint8, and actions `(walks, F)` of context and new frames."""
    rows = load_dataset(args.dataset_name, split=args.dataset_split).select(args.walks)
    end = args.first_context_frame + args.num_context_frames + args.num_frames
    frames = [
        [np.asarray(image.convert("RGB")) for image in row["video"][args.first_context_frame : end]] for row in rows
    ]
    actions = [row["actions"][args.first_context_frame : end] for row in rows]
    return np.array(frames), np.array(actions)


def predict(pipe: FARPipeline, frames: np.ndarray, actions: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    """New frames `(walks, F, h, w, 3)`, uint8."""
    video = pipe(
        video=frames[:, : args.num_context_frames],
        actions=torch.from_numpy(actions),
        num_frames=args.num_frames,
        generator=[torch.Generator().manual_seed(args.seed + walk) for walk in args.walks],
        output_type="np",
    ).frames
    return (video * 255).round().astype(np.uint8)


def draw_moments(
    recorded: np.ndarray, predicted: np.ndarray, actions: np.ndarray, action_names: list[str], args: argparse.Namespace
) -> list[Image.Image]:
    """The last frames of the context, then the predicted ones."""
    num_context = args.num_context_frames
    height, width = (args.scale * pixels for pixels in recorded.shape[2:4])
    panel = Panel((height, width), len(recorded), action_names)
    moments = []
    for frame in range(num_context - args.num_shown_context_frames, num_context + args.num_frames):
        is_context = frame < num_context
        below = recorded[:, frame] if is_context else predicted[:, frame - num_context]
        title = f"context, frame {frame + 1} of {num_context}"
        if not is_context:
            title = f"prediction, frame {frame + 1 - num_context} of {args.num_frames}"
        moments.append(
            panel.draw(recorded[:, frame], below, actions[:, frame - 1].tolist(), title, is_context=is_context)
        )
    return moments


def main(args: argparse.Namespace) -> None:
    pipe = FARPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    recorded, actions = read_walks(args)
    predicted = predict(pipe, recorded, actions, args)
    first, *others = draw_moments(recorded, predicted, actions, list(pipe.config.action_names), args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    durations = [round(1000 / pipe.config.fps)] * len(others) + [2000]  # rests at the end
    lossless = {"lossless": True, "quality": 60, "method": 4}  # there quality is the effort
    encoding = lossless if args.quality is None else {"quality": args.quality}
    first.save(args.output, save_all=True, append_images=others, duration=durations, loop=0, **encoding)
    print(
        f"{args.output}: {len(others) + 1} frames of {first.width}x{first.height}, {args.output.stat().st_size} bytes"
    )


if __name__ == "__main__":
    main(args)
