"""Videos and contact sheets for people to look at. Videos are (F, 3, h, w) in [0, 1]."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import PIL.Image
import torch


def to_uint8(video: torch.Tensor) -> np.ndarray:
    """`(..., 3, h, w)` in [0, 1] -> `(..., h, w, 3)`, uint8."""
    return (video.clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1).cpu().numpy()


def write_mp4(path: str | Path, video: torch.Tensor, fps: float, scale: int = 1) -> None:
    """Encode a video as H.264.

    Args:
        path (`str` or `Path`): Ends in `.mp4`.
        video (`torch.Tensor` of shape `(F, 3, h, w)`): In [0, 1]; sides that are even after scaling.
        fps (`float`): Frames per second.
        scale (`int`): Repeats pixels, for small frames.
    """
    import av

    frames = to_uint8(video).repeat(scale, axis=1).repeat(scale, axis=2)
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "16"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def contact_sheet(rows: list[torch.Tensor], scale: int = 2, gap: int = 2) -> PIL.Image.Image:
    """Videos of equal length under each other, a frame beside the next, on white.

    Args:
        rows (list of `torch.Tensor` of shape `(F, 3, h, w)`): In [0, 1].
        scale (`int`): Repeats pixels.
        gap (`int`): Pixels between frames, before scaling.
    """
    padded = [torch.nn.functional.pad(row, (gap, gap, gap, gap), value=1.0) for row in rows]
    sheet = torch.cat([torch.cat(list(row), dim=-1) for row in padded], dim=-2)
    return PIL.Image.fromarray(to_uint8(sheet).repeat(scale, axis=0).repeat(scale, axis=1))
