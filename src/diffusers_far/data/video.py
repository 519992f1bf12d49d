"""Videos decoded with PyAV, which brings its own FFmpeg; a file that ends too early is an error, not a short video."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    if frame_interval < 1:
        raise ValueError(f"`frame_interval` is {frame_interval}; it must be at least 1, which keeps every frame.")
    num_passed = 0
    with _open_video(path) as (container, stream):
        if start_time is not None:
            container.seek(int(start_time / stream.time_base), stream=stream)
        half_frame = 0.5 / float(stream.average_rate or 25)
        for frame in _decode(path, container, stream):
            if start_time is not None and frame.time < start_time - half_frame:
                continue
            _require_whole(path, frame, num_passed)
            if num_passed % frame_interval == 0:
                yield _to_rgb(frame)
            num_passed += 1


@dataclass(frozen=True)
class FrameTimes:
    """When the frames of a video are shown, so that one of them is found without decoding all that come before.

    Args:
        times (`np.ndarray` of shape `(F,)`, int64): Time stamp of each frame, ascending, in the stream's own unit.
        key_frames (`np.ndarray` of shape `(K,)`, int64): The frames that decoding can start at, ascending.
    """

    times: np.ndarray
    key_frames: np.ndarray

    def last_key_frame(self, frame: int) -> int | None:
        """The last one at or before `frame`; `None` if there is none."""
        place = int(np.searchsorted(self.key_frames, frame, side="right")) - 1
        return int(self.key_frames[place]) if place >= 0 else None

    def number_of(self, time: int | None) -> int | None:
        """The frame that is shown at `time`; `None` if there is none."""
        if time is None:
            return None
        frame = int(np.searchsorted(self.times, time))
        return frame if frame < len(self.times) and self.times[frame] == time else None


def read_frame_times(path: str | Path | bytes) -> FrameTimes | None:
    """The time stamps of a video; `None` where it gives none, or one twice.

    Reads the file from end to end, but decodes nothing.

    Raises:
        BadExampleError: As [`iter_video`].
    """
    with _open_video(path) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        shown = [(packet.pts, packet.is_keyframe) for packet in packets]
    if not shown or any(time is None for time, _ in shown):
        return None
    shown.sort()
    times = np.array([time for time, _ in shown], dtype=np.int64)
    if (np.diff(times) <= 0).any():
        return None
    return FrameTimes(times, np.flatnonzero([is_key for _, is_key in shown]))


def read_frames(
    path: str | Path | bytes, start: int, length: int, interval: int = 1, times: FrameTimes | None = None
) -> np.ndarray:
    """Decode `length` frames, `interval` apart, from frame `start` on.

    Args:
        path (`str`, `Path` or `bytes`): As for [`iter_video`].
        start (`int`): First frame, from 0.
        length (`int`): Number of frames, at least 1.
        interval (`int`): Distance between them in frames, at least 1.
        times (`FrameTimes`, *optional*): Of this video: decoding then starts at the last key frame before `start`
            instead of at frame 0. The frames are the same.

    Returns:
        `np.ndarray` of shape `(length, H, W, 3)`, uint8, RGB.

    Raises:
        BadExampleError: As [`iter_video`], or if the video ends before the last of these frames.
    """
    key_frame = None if times is None else times.last_key_frame(start)
    frames = None
    if key_frame:  # frame 0 needs no search
        frames = _read_from_key_frame(path, start, length, interval, times, key_frame)
    if frames is None:
        frames = _read_from_the_beginning(path, start, length, interval)
    if len(frames) < length:
        end = start + (length - 1) * interval + 1
        raise BadExampleError(f"{_name(path)} ends before frame {end}; copy or encode it again.")
    return np.stack(frames)


def count_frames(path: str | Path | bytes) -> int:
    """The number of frames of a video: what its container says, else counted by decoding it.

    Raises:
        BadExampleError: As [`iter_video`].
    """
    with _open_video(path) as (container, stream):
        num_frames = stream.frames
        if container.format.name == "avi":  # counts an empty chunk wherever a frame is shown longer than the others
            num_frames = sum(entry.size > 0 for entry in stream.index_entries)
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


def _read_from_the_beginning(path, start: int, length: int, interval: int) -> list[np.ndarray]:
    frames = []
    with _open_video(path) as (container, stream):
        for number, frame in enumerate(_decode(path, container, stream)):
            _require_whole(path, frame, number)
            if number >= start and (number - start) % interval == 0:
                frames.append(_to_rgb(frame))
                if len(frames) == length:
                    break
    return frames


def _read_from_key_frame(
    path, start: int, length: int, interval: int, times: FrameTimes, key_frame: int
) -> list[np.ndarray] | None:
    """`None` where the file cannot be searched or numbers its frames otherwise."""
    frames = []
    with _open_video(path) as (container, stream):
        container.seek(int(times.times[key_frame]), stream=stream)
        for decoded in _decode(path, container, stream):
            number = times.number_of(decoded.pts)
            if number is not None and number < key_frame:
                continue  # it refers to frames before the key frame, and may be damaged for want of them
            expected = start + len(frames) * interval
            if number is None or (not frames and number > start) or number > expected:
                return None
            _require_whole(path, decoded, number)
            if number == expected:
                frames.append(_to_rgb(decoded))
                if len(frames) == length:
                    break
    return frames


@contextmanager
def _open_video(path: str | Path | bytes):
    """The container and its first video stream, checked to be there and not cut off; PyAV's errors are explained."""
    import av

    try:
        with av.open(io.BytesIO(path) if isinstance(path, bytes) else str(path)) as container:
            if not container.streams.video:
                raise BadExampleError(f"{_name(path)} holds no video; it may be truncated, copy it again.")
            stream = container.streams.video[0]
            _require_indexed_bytes(path, stream)
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise BadExampleError(f"{_name(path)} cannot be decoded ({error}); copy or encode it again.") from error


def _decode(path: str | Path | bytes, container, stream) -> Iterator:
    """PyAV's frames in the order in which they are shown, from where the container stands."""
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise BadExampleError(f"{_name(path)} is truncated or damaged; copy it again.")
        yield from packet.decode()


def _require_whole(path: str | Path | bytes, frame, number: int) -> None:
    if frame.is_corrupt:
        raise BadExampleError(f"{_name(path)} is truncated or damaged at frame {number}; copy it again.")


def _to_rgb(frame) -> np.ndarray:
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


def _name(path: str | Path | bytes) -> str:
    return f"a video of {len(path)} bytes" if isinstance(path, bytes) else repr(str(path))


def _require_indexed_bytes(path, stream) -> None:
    """An index at the front of the file (mp4 for streaming) tells where the last frame would end."""
    end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    size = len(path) if isinstance(path, bytes) else Path(path).stat().st_size
    if end > size:
        raise BadExampleError(f"{_name(path)} is truncated: {size} bytes, its frames need {end}; copy it again.")
