"""Videos and contact sheets for people to look at. Videos are (F, 3, h, w) in [0, 1], frames (F, h, w, 3) uint8."""

import os
import re
import shutil
import tempfile
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from ..files import UNFINISHED, free_space, written_whole


FRAME_NAME = "frame_{:05d}.png"
WRITTEN_SUFFIXES = (".mp4", ".gif", ".webp")
MAX_SIDE = 8192  # of a scaled frame; encoders fail in ways of their own beyond
FASTEST_GIF = 50.0  # frames per second; players show what is meant to be faster at a tenth of it


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

    Raises:
        ValueError, OSError: As [`encode_mp4`].
    """
    encode_mp4(path, repeat_pixels(to_uint8(video), scale), fps)


def repeat_pixels(frames: np.ndarray, scale: int) -> np.ndarray:
    """`(F, h, w, 3)` -> `(F, scale * h, scale * w, 3)`."""
    return frames.repeat(scale, axis=1).repeat(scale, axis=2)


def encode_mp4(path: str | Path, frames: np.ndarray, fps: float) -> None:
    """Encode `(F, h, w, 3)` uint8 as H.264; what is at `path` is replaced when all is written.

    Raises:
        ValueError: Sides that are odd or too long.
        OSError: It cannot be written, for want of room or of a folder.
    """
    check_frame_size(path, frames.shape[1:3], 1)
    with written_whole(path) as unfinished:
        _write(unfinished, frames, fps)


def _write_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    import av

    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "16"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def check_output(path: str | Path, fps: float, *, overwrite: bool = False) -> None:
    """Refuse a place where [`write_frames`] would not write, before there is anything to write.

    Raises:
        ValueError: An unknown suffix, a folder that is missing, something that is there already, or a gif too fast for
            its format.
        ModuleNotFoundError: PyAV is not there to write an mp4.
    """
    path = Path(path)
    if path.suffix.lower() not in (*WRITTEN_SUFFIXES, "") or path.name.lower() in WRITTEN_SUFFIXES:
        raise ValueError(
            f"`output` is {str(path)!r}; end it in {', '.join(WRITTEN_SUFFIXES)}, or in no suffix for a folder of PNG "
            "frames."
        )
    if path.suffix.lower() == ".mp4" and find_spec("av") is None:
        raise ModuleNotFoundError(
            f"`output` is {str(path)!r}, and PyAV, which writes mp4, is not installed.", name="av"
        )
    parent = path.absolute().parent
    if path.name in ("", ".", "..") or not os.path.isdir(parent):
        raise ValueError(
            f"`output` is {str(path)!r}, but there is no folder {str(parent)!r}; make it, or name another."
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"`output` is {str(path)!r}, but {str(parent)!r} may not be written to; name another folder.")
    if path.suffix.lower() == ".gif" and fps > FASTEST_GIF:
        raise ValueError(f"`fps` is {fps:g}, but a gif has at most {FASTEST_GIF:g}; lower it, or write mp4 or webp.")
    try:
        os.lstat(path)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # too long, or with a zero in it
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"`output` is {str(path)!r}, which can be no file's name ({reason}); name another."
        ) from error
    if not overwrite:
        raise ValueError(f"`output` {str(path)!r} exists; name another, or pass `--overwrite`.")
    if path.suffix and not os.path.isfile(path):
        what = "a folder" if os.path.isdir(path) else "no file"
        raise ValueError(f"`output` {str(path)!r} is {what} and would be replaced by a file; name another.")
    if not path.suffix and not is_frame_folder(path):
        raise ValueError(f"`output` {str(path)!r} holds other things than frames, which would be lost; name another.")


def is_frame_folder(path: str | Path) -> bool:
    """Whether a folder, no link to one, holds nothing but frames as [`write_frames`] names them."""
    path = Path(path)
    return (
        path.is_dir()
        and not path.is_symlink()
        and all(re.fullmatch(r"frame_\d{5,}\.png", entry.name) for entry in path.iterdir())
    )


def write_frames(path: str | Path, frames: np.ndarray, fps: float, scale: int = 1, *, overwrite: bool = False) -> None:
    """Write a video, whole or not at all: under another name beside it, then renamed.

    Args:
        path (`str` or `Path`): `.mp4` (H.264), `.gif` (256 colours, times in hundredths of a second), `.webp` (lossless),
            or without suffix a folder of PNG files. In gif and webp, frames that are equal become one that lasts longer.
        frames (`np.ndarray` of shape `(F, h, w, 3)`): uint8, at least one.
        fps (`float`): Frames per second, above 0.
        scale (`int`): Repeats pixels, for small frames.
        overwrite (`bool`): Replace what is there; a folder only if it holds nothing but frames.

    Raises:
        ValueError: As [`check_output`], frames that are too large, or an mp4 of odd sides.
        OSError: There is no room left; what was there before is still there.
    """
    path = Path(path)
    check_output(path, fps, overwrite=overwrite)
    check_frame_size(path, frames.shape[1:3], scale)
    frames = repeat_pixels(frames, scale)
    if path.suffix:
        with written_whole(path, overwrite=overwrite) as unfinished:
            _write(unfinished, frames, fps)
        return
    workplace = Path(tempfile.mkdtemp(prefix=f".{UNFINISHED}", dir=path.absolute().parent))
    try:
        _write(workplace / path.name, frames, fps)
        check_output(path, fps, overwrite=overwrite)  # somebody else may have written there meanwhile
        if os.path.lexists(path):
            path.rename(workplace / "replaced")
        (workplace / path.name).rename(path)
    except OSError as error:
        reason = f"{str(path)!r} was not written ({error}); {free_space(path.absolute().parent)}"
        raise OSError(error.errno, reason) from error
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def check_frame_size(path: str | Path, size: tuple[int, int], scale: int) -> None:
    """Refuse frames of `(height, width)` that the format of `path` cannot hold once they are scaled."""
    height, width = size[0] * scale, size[1] * scale
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"`scale` is {scale}, which makes frames of {height}x{width}; stay within {MAX_SIDE} a side.")
    if Path(path).suffix.lower() == ".mp4" and (height % 2 or width % 2):
        raise ValueError(
            f"`output` is {str(path)!r} and its frames would be {height}x{width}, but mp4 needs even sides; pass an even "
            "`scale`, or write gif, webp or a folder."
        )


def _write(path: Path, frames: np.ndarray, fps: float) -> None:
    suffix = path.suffix.lower()
    if suffix == ".mp4":
        _write_mp4(path, frames, fps)
        return
    first, *others = [PIL.Image.fromarray(frame) for frame in frames]
    if suffix == ".gif":
        # Hundredths of a second are all that a gif can say; below two of them, players slow down.
        first.save(path, save_all=True, append_images=others, duration=max(2, round(100 / fps)) * 10, loop=0)
    elif suffix == ".webp":
        first.save(path, save_all=True, append_images=others, duration=round(1000 / fps), loop=0, lossless=True)
    else:
        path.mkdir()
        for number, frame in enumerate([first, *others]):
            frame.save(path / FRAME_NAME.format(number))


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
