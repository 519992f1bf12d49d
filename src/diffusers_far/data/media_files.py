"""Clips and images as people have them: a video, an animation, one picture, or a folder of numbered pictures.

The first bytes of a file tell what it is, and not its name: an upload may have any name, and FFmpeg would follow the files
and addresses in a playlist.

F frames; h/w pixels.
"""

import os
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from ..pictures import fit_frame, upright_rgb
from .rows import BadExampleError
from .video import MAX_PIXELS, VIDEO_SUFFIXES, iter_video, require_pixels


IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
MEDIA_SUFFIXES = (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES)

ACCEPTED = "give a video (mp4, mov, mkv, webm, avi), a gif or webp, an image, or a folder of images"


@dataclass(frozen=True)
class MediaLimits:
    """What a reader accepts; larger files are refused. For files of strangers.

    Args:
        max_bytes (`int`, *optional*): Of the file, or of all images of a folder together.
        max_frames (`int`, *optional*): In the file; more are an error, not cut off.
        max_pixels (`int`, defaults to 2**26): Of one frame, height times width, before it is cut and resized.
        max_total_pixels (`int`, *optional*): Of all frames in the file together: what decoding them costs.
    """

    max_bytes: int | None = None
    max_frames: int | None = None
    max_pixels: int = MAX_PIXELS
    max_total_pixels: int | None = None


@dataclass(frozen=True)
class MediaClip:
    """The last frames of a file.

    Args:
        frames (`np.ndarray` of shape `(F, h, w, 3)`): uint8, RGB.
        num_frames_in_file (`int`): F or more.
        original_size (`tuple`): `(height, width)` of the first of these frames in the file.
    """

    frames: np.ndarray
    num_frames_in_file: int
    original_size: tuple[int, int]


def read_clip(
    path: str | Path,
    num_frames: int | None = None,
    size: tuple[int, int] | None = None,
    limits: MediaLimits = MediaLimits(),
) -> MediaClip:
    """Read the last frames of a video, an animation, an image or a folder of images.

    Only the frames that are returned are held in memory, at their final size.

    Args:
        path (`str` or `Path`): Its content tells what it holds. The images of a folder are ordered by the numbers
            in their names, `frame_2.png` before `frame_10.png`; other files in it are left alone.
        num_frames (`int`, *optional*): At least 1; all by default, or where there are fewer.
        size (`tuple`, *optional*): `(height, width)`: frames are cut around their centre and resized, see [`fit_frame`].
        limits (`MediaLimits`).

    Raises:
        BadExampleError: Nothing there, another kind of file, damaged, beyond the limits, or, without `size`, frames of
            several sizes.
    """
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"`num_frames` is {num_frames}; it must be at least 1, or `None` for all frames.")
    last_frames: deque[tuple[np.ndarray, tuple[int, int]]] = deque(maxlen=num_frames)
    num_frames_in_file = 0
    for frame in iter_media(path, limits):
        num_frames_in_file += 1
        last_frames.append((fit_frame(frame, size), frame.shape[:2]))
    if not last_frames:
        raise BadExampleError(f"{str(path)!r} holds no frames; {ACCEPTED}.")
    sizes = sorted({frame.shape[:2] for frame, _ in last_frames})
    if len(sizes) > 1:
        raise BadExampleError(f"{str(path)!r} has frames of sizes {sizes} (height, width); make them one size.")
    frames = np.stack([frame for frame, _ in last_frames])
    return MediaClip(frames, num_frames_in_file, last_frames[0][1])


def iter_media(path: str | Path, limits: MediaLimits = MediaLimits()) -> Iterator[np.ndarray]:
    """Decode frame after frame, see [`read_clip`].

    Yields:
        `np.ndarray` of shape `(h, w, 3)`, uint8, RGB.

    Raises:
        BadExampleError: As [`read_clip`].
    """
    path, is_folder = Path(path), os.path.isdir(path)
    num_frames, num_bytes, num_pixels = 0, 0, 0
    for file in image_files(path) if is_folder else [path]:
        kind = media_kind(file)
        if is_folder and kind != "image":
            raise BadExampleError(f"{str(file)!r} is not an image; a folder may hold nothing else under such names.")
        num_bytes += file.stat().st_size
        if limits.max_bytes is not None and num_bytes > limits.max_bytes:
            raise BadExampleError(
                f"{path.name!r} has more than {limits.max_bytes / 2**20:.3g} MiB; cut it, or make its frames smaller."
            )
        frames = _iter_image(file, limits) if kind == "image" else iter_video(file, max_pixels=limits.max_pixels)
        for frame in frames:
            num_frames += 1
            if limits.max_frames is not None and num_frames > limits.max_frames:
                raise BadExampleError(f"{path.name!r} has more than {limits.max_frames} frames; cut it.")
            num_pixels += frame.shape[0] * frame.shape[1]
            if limits.max_total_pixels is not None and num_pixels > limits.max_total_pixels:
                raise BadExampleError(
                    f"{path.name!r} has more than {limits.max_total_pixels:,} pixels in all of its frames together; "
                    "cut it, or make its frames smaller."
                )
            yield frame


def image_files(folder: str | Path) -> list[Path]:
    """The images of a folder, by the numbers in their names and then by name.

    Raises:
        BadExampleError: There is none.
    """
    files = [path for path in Path(folder).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    if not files:
        raise BadExampleError(f"{str(folder)!r} has no images ({', '.join(IMAGE_SUFFIXES)}); {ACCEPTED}.")

    def by_number(path: Path) -> tuple:
        # Digits and other text alternate, starting with text: numbers are compared with numbers only.
        parts = re.split(r"([0-9]+)", path.name)
        return [int(part) if place % 2 else part for place, part in enumerate(parts)], path.name

    return sorted(files, key=by_number)


def media_kind(path: str | Path) -> str:
    """`"image"`, animations included, or `"video"`, by the first bytes of a file.

    Raises:
        BadExampleError: There is no such file, it cannot be read or it is neither.
    """
    if not os.path.isfile(path):  # a pipe would be waited for
        what = "is not a file" if os.path.exists(path) else "does not exist"
        raise BadExampleError(f"{str(path)!r} {what}; {ACCEPTED}.")
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadExampleError(f"{str(path)!r} cannot be read ({reason}); {ACCEPTED}.") from error
    is_riff = start[:4] == b"RIFF"
    if start.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM")) or (is_riff and start[8:12] == b"WEBP"):
        return "image"
    is_quicktime = start[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
    if is_quicktime or start.startswith(b"\x1a\x45\xdf\xa3") or (is_riff and start[8:12] == b"AVI "):
        return "video"
    what = "is empty" if not start else "is neither a video nor an image that is known here"
    raise BadExampleError(f"{str(path)!r} {what}; {ACCEPTED}.")


def _iter_image(path: Path, limits: MediaLimits) -> Iterator[np.ndarray]:
    """Every frame of an image or animation, upright."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            # These are no frames: the picture for viewers that show no animation (PNG), and what a phone stores with a photo,
            # such as its depth (MPO).
            first, last = int(bool(image.info.get("default_image"))), 1 if image.format == "MPO" else None
            for frame in islice(ImageSequence.Iterator(image), first, last):
                require_pixels(repr(path.name), frame.size[::-1], limits.max_pixels)
                yield upright_rgb(frame)
    except BadExampleError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever the broken bytes lead them to
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadExampleError(f"{str(path)!r} is damaged or no image ({reason}); copy it again.") from error
