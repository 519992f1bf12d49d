"""Videos decoded with PyAV, which brings its own FFmpeg; a file that ends too early is an error, not a short video."""

import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from .faults import BadExampleError


VIDEO_SUFFIXES = (".avi", ".mkv", ".mov", ".mp4", ".webm")


def iter_video(
    path: str | Path | bytes, frame_interval: int = 1, start_time: float | None = None
) -> Iterator[np.ndarray]:
    """Decode every `frame_interval`-th frame, whatever its time stamp, turned upright where the file says so.

    Args:
        path (`str`, `Path` or `bytes`): A file, or its content, in a container and a codec that FFmpeg reads.
        frame_interval (`int`): At least 1.
        start_time (`float`, *optional*): Seconds; earlier frames are passed over. `None`: all frames.

    Yields:
        `np.ndarray` of shape `(H, W, 3)`, uint8, RGB.

    Raises:
        BadExampleError: If the file is missing, truncated, damaged or holds no video. What a truncated mkv or webm
            lacks cannot be told, as they do not say how much they hold.
    """
    import av

    if frame_interval < 1:
        raise ValueError(f"`frame_interval` is {frame_interval}; it must be at least 1, which keeps every frame.")
    num_decoded = 0
    try:
        with av.open(_readable(path)) as container:
            if not container.streams.video:
                raise BadExampleError(f"{_name(path)} holds no video; it may be truncated, copy it again.")
            stream = container.streams.video[0]
            _require_indexed_bytes(path, stream)
            stream.thread_type = "AUTO"
            if start_time is not None:
                container.seek(int(start_time / stream.time_base), stream=stream)
            half_frame = 0.5 / float(stream.average_rate or 25)
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise _truncated(path, num_decoded)
                for frame in packet.decode():
                    if start_time is not None and frame.time < start_time - half_frame:
                        continue
                    if frame.is_corrupt:
                        raise _truncated(path, num_decoded)
                    if num_decoded % frame_interval == 0:
                        yield np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                    num_decoded += 1
    except (av.FFmpegError, OSError) as error:
        raise BadExampleError(
            f"{_name(path)} cannot be decoded after {num_decoded} frames ({error}); copy or encode it again."
        ) from error


def count_frames(path: str | Path | bytes) -> int:
    """The number of frames of a video: what its container says, else counted by decoding it.

    Raises:
        BadExampleError: As [`iter_video`].
    """
    import av

    try:
        with av.open(_readable(path)) as container:
            num_frames = container.streams.video[0].frames if container.streams.video else 0
    except (av.FFmpegError, OSError) as error:
        raise BadExampleError(f"{_name(path)} cannot be opened ({error}); copy or encode it again.") from error
    return num_frames or sum(1 for _ in iter_video(path))


def read_video(path: str | Path | bytes, frame_interval: int = 1, max_frames: int | None = None) -> np.ndarray:
    """Decode every `frame_interval`-th frame, at most `max_frames` of them, into memory.

    Returns:
        `np.ndarray` of shape `(F, H, W, 3)`, uint8, RGB.

    Raises:
        BadExampleError: As [`iter_video`], or if there is no frame.
    """
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"`max_frames` is {max_frames}; it must be at least 1, or `None` for all frames.")
    frames = list(islice(iter_video(path, frame_interval), max_frames))
    if not frames:
        raise BadExampleError(f"{_name(path)} holds no frames; copy or encode it again.")
    return np.stack(frames)


def _readable(path: str | Path | bytes) -> str | io.BytesIO:
    return io.BytesIO(path) if isinstance(path, bytes) else str(path)


def _name(path: str | Path | bytes) -> str:
    return f"a video of {len(path)} bytes" if isinstance(path, bytes) else repr(str(path))


def _truncated(path: str | Path | bytes, num_decoded: int) -> BadExampleError:
    return BadExampleError(f"{_name(path)} is truncated or damaged after frame {num_decoded}; copy it again.")


def _require_indexed_bytes(path, stream) -> None:
    """An index at the front of the file (mp4 for streaming) tells where the last frame would end."""
    end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    size = len(path) if isinstance(path, bytes) else Path(path).stat().st_size
    if end > size:
        raise BadExampleError(f"{_name(path)} is truncated: {size} bytes, its frames need {end}; copy it again.")
