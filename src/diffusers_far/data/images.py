"""Single frames: brought to a size, and stored without loss."""

import io

import numpy as np
from PIL import Image

from .rows import BadExampleError


MAX_PIXELS = 2**26  # of one frame, unless a reader is told otherwise


def fit_frame(frame: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Cut the largest centred part of the wanted shape and resize it, antialiased.

    Args:
        frame (`np.ndarray` of shape `(H, W, 3)`): uint8.
        size (`tuple`): `(height, width)`; `None` leaves the frame as it is, as does its own size.
    """
    if size is None or frame.shape[:2] == tuple(size):
        return frame
    height, width = size
    scale = min(frame.shape[0] / height, frame.shape[1] / width)
    cut_height, cut_width = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (frame.shape[0] - cut_height) // 2, (frame.shape[1] - cut_width) // 2
    # Cut before resizing, or the filter would reach over the edge.
    image = Image.fromarray(frame[top : top + cut_height, left : left + cut_width])
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def require_pixels(name: str, size: tuple[int, int], max_pixels: int) -> None:
    """Raise a `BadExampleError` if a file has frames of too large a `(height, width)`."""
    if size[0] * size[1] > max_pixels:
        raise BadExampleError(
            f"{name} has frames of {size[0]}x{size[1]}, above {max_pixels / 1e6:.3g} million pixels; make them smaller."
        )


def encode_png(frame: np.ndarray) -> bytes:
    """`(H, W, 3)` uint8 -> a PNG file."""
    png = io.BytesIO()
    # Level 1 writes up to five times as fast as the default, files a sixth larger.
    Image.fromarray(frame).save(png, "PNG", compress_level=1)
    return png.getvalue()
