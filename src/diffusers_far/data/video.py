"""Videos, decoded with PyAV, which brings its own FFmpeg. A file that ends too early is an error, not a short video."""

import io
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from ..pictures import upright_rgb
from .rows import BadExampleError


VIDEO_SUFFIXES = (".avi", ".mkv", ".mov", ".mp4", ".webm")
MAX_PIXELS = 2**26  # of one frame, unless a reader is told otherwise

# FFmpeg's own decoders leave the transparency of a webm out.
TRANSPARENCY_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


def iter_video(
    path: str | Path | bytes,
    frame_interval: int = 1,
    start_time: float | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[np.ndarray]:
    """Decode every `frame_interval`-th frame that is shown, whatever its time stamp, see [`upright_rgb`].

    Of several videos in one file it is the default one, else the first. A cover picture is no video.

    Args:
        path (`str`, `Path` or `bytes`): A file, or its content, in a container and a codec that FFmpeg reads.
        frame_interval (`int`): At least 1.
        start_time (`float`, *optional*): Seconds; earlier frames are passed over. `None`: all frames.
        max_pixels (`int`): Of one frame, height times width; larger ones are not decoded.

    Yields:
        `np.ndarray` of shape `(H, W, 3)`, uint8, RGB.

    Raises:
        BadExampleError: If the file is missing, truncated, damaged or holds no video, or its frames are too large or
            shown askew. A truncated mkv or webm is read as a shorter one: these files do not say how much they hold.
    """
    if frame_interval < 1:
        raise ValueError(f"`frame_interval` is {frame_interval}; it must be at least 1, which keeps every frame.")
    num_passed = 0
    with _open_video(path, max_pixels) as (container, stream):
        if start_time is not None:
            container.seek(int(start_time / stream.time_base), stream=stream)
        half_frame = 0.5 / float(stream.average_rate or 25)
        for frame in _decode(path, container, stream):
            if start_time is not None and frame.time is None:
                raise BadExampleError(f"{_name(path)} does not say when its frames are shown; encode it again.")
            if start_time is not None and frame.time < start_time - half_frame:
                continue
            _require_whole(path, frame, num_passed)
            if num_passed % frame_interval == 0:
                require_pixels(_name(path), (frame.height, frame.width), max_pixels)
                yield upright_rgb(frame)
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

    Reads the file from end to end. It is decoded only if its packets do not say which frames are shown.

    Raises:
        BadExampleError: As [`iter_video`].
    """
    shown = _shown_frames(path)
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
    return _stack(path, frames)


def count_frames(path: str | Path | bytes) -> int:
    """The number of frames that are shown, as [`iter_video`] yields them; a header may count hidden ones.

    Reads the file from end to end, see [`read_frame_times`].

    Raises:
        BadExampleError: As [`iter_video`].
    """
    return len(_shown_frames(path))


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
    return _stack(path, frames)


def _shown_frames(path: str | Path | bytes) -> list[tuple[int | None, bool]]:
    """Time stamp, and whether decoding can start there, of each frame that is shown."""
    with _open_video(path) as (container, stream):
        codec, shown = stream.codec_context.name, []
        start, is_clear = None, True
        for number, packet in enumerate(packet for packet in container.demux(stream) if packet.size):
            if number == 0:
                start, is_clear = packet.pts, packet.is_keyframe
            # What was cut out of another video may begin with frames that refer to lost ones, and are not decoded. Those
            # come before the first one, or have no time in mkv.
            may_be_lost = start is not None and (packet.pts is None or packet.pts < start)
            is_clear = is_clear and not may_be_lost and not _may_hold_no_frame(codec, packet)
            if not packet.is_discard:
                shown.append((packet.pts, packet.is_keyframe))
    if is_clear:
        return shown
    with _open_video(path) as (container, stream):
        shown = []
        for frame in _decode(path, container, stream):
            _require_whole(path, frame, len(shown))
            shown.append((frame.pts, frame.key_frame))
    return shown


def _may_hold_no_frame(codec: str, packet) -> bool:
    """Whether a packet may be there only for others to refer to, or to say that nothing changed. Newer codecs have such
    frames too, but pack them together with one that is shown."""
    if codec == "vp8":
        return not memoryview(packet)[0] & 0x10
    return codec == "mpeg4" and packet.size < 20


def require_pixels(name: str, size: tuple[int, int], max_pixels: int) -> None:
    """Raise a `BadExampleError` if a file has frames of too large a `(height, width)`."""
    if size[0] * size[1] > max_pixels:
        raise BadExampleError(
            f"{name} has frames of {size[0]}x{size[1]}, above {max_pixels / 1e6:.3g} million pixels; make them smaller."
        )


def _stack(path: str | Path | bytes, frames: list[np.ndarray]) -> np.ndarray:
    sizes = sorted({frame.shape[:2] for frame in frames})
    if len(sizes) > 1:
        raise BadExampleError(f"{_name(path)} has frames of sizes {sizes} (height, width); encode it in one size.")
    return np.stack(frames)


def _read_from_the_beginning(path, start: int, length: int, interval: int) -> list[np.ndarray]:
    frames = []
    with _open_video(path) as (container, stream):
        for number, frame in enumerate(_decode(path, container, stream)):
            _require_whole(path, frame, number)
            if number >= start and (number - start) % interval == 0:
                frames.append(upright_rgb(frame))
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
                frames.append(upright_rgb(decoded))
                if len(frames) == length:
                    return frames
    return None


@contextmanager
def _open_video(path: str | Path | bytes, max_pixels: int = MAX_PIXELS):
    """The container and its video stream, checked to be there, not too large and not cut off; errors are explained."""
    import av

    try:
        # A title in an older encoding is no reason not to read a video.
        with av.open(
            io.BytesIO(path) if isinstance(path, bytes) else str(path), metadata_errors="replace"
        ) as container:
            stream = _choose_stream(path, container)
            require_pixels(_name(path), (stream.height, stream.width), max_pixels)
            _require_indexed_bytes(path, stream)
            if multiprocessing.parent_process() is None:  # processes that load data are many already
                stream.thread_type = "AUTO"
            stream.codec_context.options = _decoder_options(max_pixels)
            yield container, stream
    except BadExampleError:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        raise BadExampleError(f"{_name(path)} cannot be decoded ({error}); copy or encode it again.") from error


def _choose_stream(path: str | Path | bytes, container):
    """The video that a player would show."""
    from av.stream import Disposition

    no_video = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & no_video]
    if not streams:
        what = "but a cover picture" if container.streams.video else "it may be truncated"
        raise BadExampleError(f"{_name(path)} holds no video, {what}; copy it again, or give another.")
    return next((stream for stream in streams if stream.disposition & Disposition.default), streams[0])


def _decoder_options(max_pixels: int) -> dict[str, str]:
    """Frames may grow within a video. Decoders count padded ones, so twice as many pixels are allowed."""
    return {"max_pixels": str(2 * max_pixels)}


def _decode(path: str | Path | bytes, container, stream) -> Iterator:
    """PyAV's frames in the order in which they are shown, from where the container stands."""
    decode = stream.decode
    if stream.metadata.get("alpha_mode") == "1" and stream.codec_context.name in TRANSPARENCY_DECODERS:
        import av

        context = av.CodecContext.create(TRANSPARENCY_DECODERS[stream.codec_context.name], "r")
        context.options = stream.codec_context.options
        decode = context.decode
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise BadExampleError(f"{_name(path)} is truncated or damaged; copy it again.")
        yield from decode(packet)


def _require_whole(path: str | Path | bytes, frame, number: int) -> None:
    if frame.is_corrupt:
        raise BadExampleError(f"{_name(path)} is truncated or damaged at frame {number}; copy it again.")


def _name(path: str | Path | bytes) -> str:
    return f"a video of {len(path)} bytes" if isinstance(path, bytes) else repr(str(path))


def _require_indexed_bytes(path, stream) -> None:
    """An index at the front of the file (mp4 for streaming) tells where the last frame would end."""
    end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    size = len(path) if isinstance(path, bytes) else Path(path).stat().st_size
    if end > size:
        raise BadExampleError(f"{_name(path)} is truncated: {size} bytes, its frames need {end}; copy it again.")
