"""A walk as HTML: the present frame, the true one beside it, and the last frames under them."""

import base64
from html import escape

import numpy as np

from ...pictures import encode_png
from .world import World


STRIP_FRAMES = 10

CSS = """
.gradio-container { width: 100% !important; max-width: 1120px !important; margin: 0 auto !important; }
.far-scene { display: flex; flex-direction: column; gap: 10px; }
.far-scene img { image-rendering: pixelated; border-radius: 4px; display: block; }
.far-pair { display: grid; grid-template-columns: repeat(auto-fit, min(100%, 320px)); gap: 12px; }
.far-pair figure { margin: 0; }
.far-pair img, .far-pair .far-blank { width: 100%; aspect-ratio: 1; object-fit: contain; }
.far-blank { border: 1px dashed var(--border-color-primary); border-radius: 4px; display: flex; align-items: center;
  justify-content: center; text-align: center; color: var(--body-text-color-subdued); padding: 12px; box-sizing: border-box; }
.far-pair figcaption, .far-strip figcaption { font-size: 0.85em; color: var(--body-text-color-subdued); padding: 2px 0; }
.far-strip { display: grid; grid-template-columns: 5em repeat(10, minmax(0, 64px)); gap: 3px; align-items: center;
  font-size: 0.8em; color: var(--body-text-color-subdued); }
.far-strip img { width: 100%; }
.far-status { font-size: 0.95em; }
.far-actions button { min-height: 48px; }
"""


def scene_html(world: World, branch: int = 0, num_branches: int = 1) -> str:
    """The walk in view.

    Args:
        world ([`World`]).
        branch (`int`), num_branches (`int`): Which of the visitor's walks it is, from 0.
    """
    true_frames = world.true_frames
    has_truth = world.follows_record and (world.num_new_frames > 0)
    truth = true_frames[-1] if has_truth else None
    present = world.frames[-1]
    made = "predicted frame" if world.num_new_frames else "last frame of the context"
    pair = figure(present, f"The {made}", made.capitalize())
    if world.tile_map is not None:
        pair += figure(
            world.tile_map.draw(), "All that the frames showed of the world", "Map of what was drawn so far"
        )
    if truth is not None:
        pair += figure(truth, "The recorded frame", f"Recorded frame ({psnr(present, truth):.1f} dB)")
    elif world.start.true_frames is not None:
        left = (
            "No truth: this is another way than the recorded one."
            if world.num_new_frames
            else "The truth, after a step."
        )
        pair += f'<figure><div class="far-blank">{left}</div></figure>'
    return (
        f'<div class="far-scene" data-new-frames="{world.num_new_frames}"><div class="far-pair">{pair}</div>'
        f"{strip_html(world)}<div class='far-status'>{escape(status(world, branch, num_branches))}</div></div>"
    )


def status(world: World, branch: int, num_branches: int) -> str:
    """Where the walk is, in words."""
    parts = [world.start.title, f"{world.num_new_frames} new frames after {len(world.start.frames)} of context"]
    if num_branches > 1:
        parts.append(f"branch {branch + 1} of {num_branches}")
    names = world.model.action_names
    if world.recorded_action is not None:
        parts.append(f"recorded next: {names[world.recorded_action]}" if names else "as recorded")
    if world.start.note:
        parts.append(world.start.note)
    return " · ".join(parts)


def strip_html(world: World) -> str:
    """The last frames, oldest first, and under each new one what was recorded."""
    frames, num_context = world.frames, len(world.start.frames)
    shown = range(max(0, len(frames) - STRIP_FRAMES), len(frames))
    first_column = STRIP_FRAMES - len(shown) + 2  # the newest frame always stands on the right
    cells = ["<span style='grid-column: 1'>frames</span>"]
    cells += [cell(frames[index], first_column + place, 1) for place, index in enumerate(shown)]
    true_frames = world.true_frames
    true_cells = [
        cell(true_frames[index - num_context], first_column + place, 2)
        for place, index in enumerate(shown)
        if 0 <= index - num_context < len(true_frames)
    ]
    if true_cells:
        cells += ["<span style='grid-column: 1; grid-row: 2'>recorded</span>", *true_cells]
    return f'<div class="far-strip">{"".join(cells)}</div>'


def cell(frame: np.ndarray, column: int, row: int) -> str:
    return f'<img alt="" src="{image_source(frame)}" style="grid-column: {column}; grid-row: {row}">'


def figure(frame: np.ndarray, alternative: str, caption: str) -> str:
    image = f'<img alt="{escape(alternative)}" src="{image_source(frame)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def image_source(frame: np.ndarray) -> str:
    """A frame as the address of a picture that needs no file on the server."""
    return "data:image/png;base64," + base64.b64encode(encode_png(np.ascontiguousarray(frame))).decode()


def psnr(ours: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 frames, in dB; at most 100."""
    error = np.mean((ours.astype(np.float64) - truth.astype(np.float64)) ** 2)
    return min(100.0, 10 * np.log10(255**2 / error)) if error else 100.0
