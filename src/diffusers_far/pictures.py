"""Decoded pictures, of Pillow or of PyAV, in the one form that every reader of this library works with; brought to a size,
and stored without loss."""

import io
from typing import Any

import numpy as np
from PIL import Image, ImageOps


def upright_rgb(picture: Any) -> np.ndarray:
    """A picture as a viewer would show it on a black screen.

    It is turned and mirrored as it says of itself (EXIF, display matrix). 16-bit values and floats in [0, 1] are scaled
    to 8 bits. What is transparent lies on black.

    Args:
        picture (`PIL.Image.Image` or `av.VideoFrame`): Is left as it is.

    Returns:
        `np.ndarray` of shape `(H, W, 3)`, uint8, RGB.

    Raises:
        ValueError: Nobody knows which of its values is white (32-bit integers, floats outside [0, 1]), or it is to be
            shown askew.
    """
    return _image_to_rgb(picture) if isinstance(picture, Image.Image) else _frame_to_rgb(picture)


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


def encode_png(frame: np.ndarray) -> bytes:
    """`(H, W, 3)` uint8 -> a PNG file."""
    png = io.BytesIO()
    # Level 1 writes up to five times as fast as the default, files a sixth larger.
    Image.fromarray(frame).save(png, "PNG", compress_level=1)
    return png.getvalue()


def _image_to_rgb(picture: Image.Image) -> np.ndarray:
    # Pillow keeps the 16 bits of some formats in 32.
    is_16_bit = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))
    image = ImageOps.exif_transpose(picture)
    transparency = image.info.get("transparency")
    if is_16_bit:
        values = np.asarray(image).astype(np.int64)
        values = np.where(values == transparency, 0, values)
        return _grey_to_rgb((values * 255 + 32767) // 65535)
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(f"its pixels are floats from {values.min():g} to {values.max():g}; scale them to [0, 1]")
        return _grey_to_rgb((values * 255).round())
    if image.mode == "I":
        raise ValueError(
            "its pixels are 32-bit integers, of which nobody knows which is white; make them 8 or 16 bits"
        )
    if image.has_transparency_data:
        if isinstance(transparency, tuple) and max(transparency) > 255:  # of 16 bits, as the file says it
            image.info["transparency"] = tuple(value >> 8 for value in transparency)
        return _on_black(np.asarray(image.convert("RGBA")))
    return np.asarray(image.convert("RGB"))


def _frame_to_rgb(frame: Any) -> np.ndarray:
    layout = frame.format
    if layout.has_palette or any(component.is_alpha for component in layout.components):
        pixels = _on_black(frame.to_ndarray(format="rgba"))
    else:
        pixels = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return pixels if matrix is None else _displayed(pixels, np.frombuffer(matrix, np.int32).reshape(3, 3))


def _displayed(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Move pixels to where a display matrix, `(x, y, 1) @ matrix`, has them; how large it shows them does not count."""
    (a, b), (c, d) = np.abs(matrix[:2, :2].astype(np.int64))
    if 100 * max(b, c) <= min(a, d):  # the sine of a turn is rounded in some files
        towards_left, towards_top = matrix[0, 0] < 0, matrix[1, 1] < 0
    elif 100 * max(a, d) <= min(b, c):
        pixels = pixels.swapaxes(0, 1)
        towards_left, towards_top = matrix[1, 0] < 0, matrix[0, 1] < 0
    else:
        raise ValueError(f"its display matrix {matrix.tolist()} is no quarter turn or mirror image; encode it upright")
    return pixels[:: -1 if towards_top else 1, :: -1 if towards_left else 1]


def _grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    return grey.astype(np.uint8)[..., None].repeat(3, axis=-1)


def _on_black(rgba: np.ndarray) -> np.ndarray:
    return ((rgba[..., :3] * rgba[..., 3:].astype(np.uint16) + 127) // 255).astype(np.uint8)
