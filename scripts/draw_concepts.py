"""Draw the pictures of docs/concepts.md, with what the library itself computes.

    python scripts/draw_concepts.py

writes SVG files to docs/images, the same each time.
"""

import argparse
from pathlib import Path

from docs_site.svg import INK, QUIET, Drawing

from diffusers_far.command_line import HelpWithDefaults


IMAGES = Path(__file__).parents[1] / "docs" / "images"

# Colours that people with any kind of colour vision tell apart (Okabe and Ito).
LONG, SHORT, NOISY, CLEAN, NOISE = "#56b4e9", "#f0b53a", "#d55e00", "#ffffff", "#9aa3ad"
FREE = "#f1f3f5"
CURVES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    parser.add_argument("--output_dir", type=Path, default=IMAGES, help="Files of the same names are replaced.")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    args = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

import torch

from diffusers_far import ContextPlan, FARTransformer3DModel, FlexRoPEConfig
from diffusers_far.hooks.flex_rope import FlexRoPEHook
from diffusers_far.models.frame_network import AttentionFrames
from diffusers_far.models.functional import frame_causal_mask, frame_ids


def draw_noise_levels() -> Drawing:
    """A clip in training, and a video at inference: the same kind of context."""
    drawing = Drawing(
        760, 330, "Noise levels of the frames of a clip in training, and of a video while its next frame is made"
    )
    training = [310, -1, 720, 540, -1, 860, 150, 430]
    steps = [("step 1", 1000), ("step 2", 667), ("step 3", 333), ("done", -1)]

    drawing.text(
        20, 28, "Training: each frame has a noise level of its own; some are clean, and have no loss", anchor="start"
    )
    draw_frames(drawing, 20, 44, training)
    drawing.text(20, 150, "Inference: finished frames are clean; the next one is denoised in steps", anchor="start")
    for number, (name, timestep) in enumerate(steps):
        x = 20 + number * 184
        draw_frames(drawing, x, 176, [-1, -1, timestep], size=44)
        drawing.text(x + 74, 260, name, fill=QUIET)
        if number + 1 < len(steps):
            drawing.arrow(x + 154, 198, x + 176)
    drawing.legend(20, 300, {"noise, by timestep": NOISE, "clean, timestep -1": CLEAN})
    return drawing


def draw_frames(drawing: Drawing, x: float, y: float, timesteps: list[int], size: float = 56) -> None:
    """Frames in a row, filled up to their noise level, their timesteps below."""
    for timestep in timesteps:
        level = max(timestep, 0) / 1000 * size
        drawing.rect(x, y + size - level, size, level, NOISE)
        drawing.rect(x, y, size, size, "none", INK, stroke_width=2 if timestep < 0 else 1)
        drawing.text(x + size / 2, y + size + 17, str(timestep), size=12, fill=QUIET)
        x += size + 8


def draw_window(num_rows: int = 10, short_window: int = 4) -> Drawing:
    """Which frames are long and short while a video grows."""
    cell, left, top = 44, 128, 48
    drawing = Drawing(
        left + num_rows * (cell + 4) + 150, top + num_rows * 34 + 50, "Long and short frames while a video grows"
    )
    drawing.text(left, 28, "frames of the video", anchor="start", fill=QUIET)
    drawing.arrow(left + 140, 24, left + 240)
    for row in range(num_rows):
        plan = ContextPlan.for_frames(
            row + 1, short_window=short_window, height=4, width=4, patch_size=1, long_patch_size=2
        )
        y = top + row * 34
        drawing.text(left - 12, y + 19, f"frame {row} is made", size=12, anchor="end")
        for frame in range(plan.num_frames):
            is_long, is_noisy = frame < plan.num_long_frames, frame == row
            tokens = plan.tokens_per_long_frame if is_long else plan.tokens_per_short_frame
            drawing.rect(
                left + frame * (cell + 4), y, cell, 28, LONG if is_long else NOISY if is_noisy else SHORT, QUIET, rx=3
            )
            fill = "#ffffff" if is_noisy else INK
            drawing.text(left + frame * (cell + 4) + cell / 2, y + 18, str(tokens), size=12, fill=fill)
        x = left + plan.num_frames * (cell + 4) + 8
        drawing.text(x, y + 19, f"{plan.num_tokens} tokens", size=12, anchor="start", fill=QUIET)
    names = {"long": LONG, "short": SHORT, "short, and being made": NOISY}
    drawing.legend(left, top + num_rows * 34 + 28, names)
    return drawing


def draw_attention_mask() -> Drawing:
    """Who sees whom, a token a cell: a pass over a clip, and one with noisy twins for teacher forcing."""
    drawing = Drawing(760, 440, "Attention masks: frame-causal, and with noisy twins")
    plan = ContextPlan(num_long_frames=2, num_short_frames=3, height=4, width=4, patch_size=2, long_patch_size=4)
    frames = frame_ids(plan)
    kinds = [LONG] * plan.num_long_tokens + [SHORT] * plan.num_short_tokens
    drawing.text(52, 28, "Two long frames and three short ones", anchor="start")
    draw_mask(drawing, 52, 60, frame_causal_mask(frames, frames), kinds, frames.tolist())

    plan = ContextPlan(num_long_frames=0, num_short_frames=3, height=2, width=4, patch_size=2)
    frames = frame_ids(plan).repeat(2)
    is_twin = torch.arange(len(frames)) >= plan.num_tokens
    kinds = [SHORT] * plan.num_short_tokens + [NOISY] * plan.num_short_tokens
    drawing.text(430, 28, "Teacher forcing: clean frames, then noisy twins", anchor="start")
    draw_mask(drawing, 430, 60, frame_causal_mask(frames, frames, is_twin), kinds, frames.tolist())
    drawing.text(
        52,
        398,
        "A row is a token that asks, a column one that is asked; a filled cell is seen.",
        anchor="start",
        fill=QUIET,
    )
    drawing.legend(52, 424, {"long": LONG, "short": SHORT, "noisy twin": NOISY})
    return drawing


def draw_mask(drawing: Drawing, x: float, y: float, mask: torch.Tensor, kinds: list[str], frames: list[int]) -> None:
    """A mask with the colours of its tokens along both sides, and lines between frames."""
    cell = 300 / len(kinds)
    for number, kind in enumerate(kinds):
        drawing.rect(x + number * cell, y - 14, cell, 10, kind)
        drawing.rect(x - 14, y + number * cell, 10, cell, kind)
    drawing.rect(x, y, 300, 300, FREE)
    for row, column in mask.nonzero().tolist():
        drawing.rect(x + column * cell, y + row * cell, cell, cell, kinds[column], "#ffffff", stroke_width=0.7)
    order = list(zip(frames, kinds))
    for number in range(len(kinds) + 1):
        if number in (0, len(kinds)) or order[number] != order[number - 1]:
            place = number * cell
            drawing.line([(x + place, y), (x + place, y + 300)], INK, 1)
            drawing.line([(x, y + place), (x + 300, y + place)], INK, 1)


def draw_cache(num_frames: int = 7) -> Drawing:
    """Where the frames lie in the stores of a real cache while it is filled, and what the noisy one sees."""
    model = FARTransformer3DModel(
        in_channels=1, num_layers=1, num_attention_heads=1, attention_head_dim=16, axes_dims_rope=(4, 6, 6),
        short_window=3, patch_size=1, long_patch_size=2,
    )  # fmt: skip
    cache = model.init_kv_cache(batch_size=1, height=2, width=2, max_frames=num_frames + 1)
    left, top, unit = 150, 66, 26
    num_tokens = model.context_plan(num_frames + 1, 2, 2).num_tokens
    drawing = Drawing(
        left + num_tokens * unit + 30, top + num_frames * 40 + 44, "Layout of the cache's stores while a video grows"
    )
    drawing.text(left, 26, "one store of a layer; a cell is the key or value of a token", anchor="start", fill=QUIET)
    for row in range(num_frames):
        y = top + row * 40
        drawing.text(left - 14, y + 18, f"{row} finished frames", size=12, anchor="end")
        drawing.rect(left, y, num_tokens * unit, 26, FREE, QUIET)
        _, cache_pass = cache.begin_noisy()
        draw_store(drawing, left, y, unit, cache.key_frames(cache_pass).tolist(), cache_pass.view_start, cache.plan)
        with torch.no_grad():
            model(torch.zeros(1, 1, 1, 2, 2), -1, kv_cache=cache, update_cache=True)
    drawing.legend(left, top + num_frames * 40 + 20, {"long": LONG, "short": SHORT, "noisy": NOISY, "free": FREE})
    drawing.text(
        left + num_tokens * unit,
        48,
        "the line below a row: what the noisy frame sees",
        size=12,
        anchor="end",
        fill=QUIET,
    )
    return drawing


def draw_store(
    drawing: Drawing, left: float, y: float, unit: float, key_frames: list[int], start: int, plan: ContextPlan
) -> None:
    """The tokens in view, with the number of their frame."""
    for token, frame in enumerate(key_frames, start):
        is_noisy = frame == plan.end_frame
        fill = LONG if frame < plan.first_short_frame else NOISY if is_noisy else SHORT
        drawing.rect(left + token * unit, y, unit, 26, fill, "#ffffff", stroke_width=0.7)
        ink = "#ffffff" if is_noisy else INK
        drawing.text(left + (token + 0.5) * unit, y + 18, str(frame), size=12, fill=ink)
    ends = (left + start * unit + 1, left + (start + len(key_frames)) * unit - 1)
    drawing.line([(ends[0], y + 30), (ends[1], y + 30)], INK, 2)


def draw_flex_rope(trained_frames: int = 40) -> Drawing:
    """The slope of each query frame, and the bias that it gives over the distance."""
    drawing = Drawing(780, 330, "FlexRoPE: the slope by query frame, and the bias by distance")
    slopes = {
        schedule: slopes_of(FlexRoPEConfig(0.1, schedule, trained_frames), 120)
        for schedule in ("constant", "beyond_training")
    }

    axes = Axes(drawing, 60, (0, 40, 80, 120), (0, 0.05, 0.1))
    axes.label("slope", "query frame i")
    axes.curve([(trained_frames, 0), (trained_frames, 0.1)], QUIET, 1, stroke_dasharray="4 4")
    axes.name((2, 0.075), "trained: 40", QUIET)
    for colour, schedule in zip(CURVES, slopes):
        axes.curve(list(enumerate(slopes[schedule])), colour)
    axes.name((4, 0.093), "constant", CURVES[0])
    axes.name((65, 0.045), "beyond_training", CURVES[1])

    axes = Axes(drawing, 450, (0, 40, 80, 120), (-12, -6, 0))
    axes.label("bias", "frames between query i and key")
    for colour, frame in zip(CURVES, (30, 50, 60, 119)):
        biases = [(distance, -slopes["beyond_training"][frame] * distance) for distance in range(frame + 1)]
        axes.curve(biases, colour)
        axes.name((min(frame + 2, 95), biases[-1][1]), f"i = {frame}", colour)
    return drawing


class Axes:
    """A frame of 280 x 210 pixels for curves, with ticks."""

    def __init__(self, drawing: Drawing, left: float, x_ticks: tuple[float, ...], y_ticks: tuple[float, ...]):
        self.drawing = drawing
        self.left, self.top = left, 50
        self.x_ticks, self.y_ticks = x_ticks, y_ticks
        for tick in x_ticks:
            x, y = self.place(tick, y_ticks[0])
            drawing.line([(x, y), (x, y - 210)], FREE, 1)
            drawing.text(x, y + 18, f"{tick:g}", size=12, fill=QUIET)
        for tick in y_ticks:
            x, y = self.place(x_ticks[0], tick)
            drawing.line([(x, y), (x + 280, y)], FREE, 1)
            drawing.text(x - 8, y + 4, f"{tick:g}", size=12, anchor="end", fill=QUIET)

    def place(self, x: float, y: float) -> tuple[float, float]:
        x_share = (x - self.x_ticks[0]) / (self.x_ticks[-1] - self.x_ticks[0])
        y_share = (y - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return self.left + 280 * x_share, self.top + 210 * (1 - y_share)

    def label(self, title: str, x_name: str) -> None:
        self.drawing.text(self.left, self.top - 22, title, anchor="start")
        self.drawing.text(self.left + 280, self.top + 248, x_name, size=12, anchor="end", fill=QUIET)

    def curve(self, points: list[tuple[float, float]], stroke: str, width: float = 2.5, **more) -> None:
        self.drawing.line([self.place(*point) for point in points], stroke, width, **more)

    def name(self, point: tuple[float, float], text: str, fill: str) -> None:
        x, y = self.place(*point)
        self.drawing.text(x, y + 4, text, size=12, anchor="start", fill=fill)


def slopes_of(config: FlexRoPEConfig, num_frames: int) -> list[float]:
    """What the hook adds for each query frame, as a model that asks for it would get it."""
    slopes = FlexRoPEHook(config).slopes(AttentionFrames(ContextPlan(0, num_frames, 1, 1, patch_size=1)))
    return slopes.tolist()


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWINGS.items():
        draw().save(args.output_dir / f"{name}.svg")


DRAWINGS = {
    "noise-levels": draw_noise_levels,
    "window": draw_window,
    "attention-mask": draw_attention_mask,
    "cache": draw_cache,
    "flex-rope": draw_flex_rope,
}


if __name__ == "__main__":
    main(args)
