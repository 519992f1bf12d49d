"""Small videos for tests, whose frames can be told apart after lossy compression."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


LEVEL = 10


def gray_frames(num_frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    """`(F, height, width, 3)` uint8, frame t all of the level `10 * t`; at most 25 frames."""
    return np.broadcast_to(
        (LEVEL * np.arange(num_frames, dtype=np.uint8))[:, None, None, None], (num_frames, height, width, 3)
    )


def frame_numbers(frames: np.ndarray) -> list[int]:
    """Which of [`gray_frames`] they are."""
    return np.round(np.asarray(frames, dtype=float).mean(axis=(1, 2, 3)) / LEVEL).astype(int).tolist()


def write_video(
    path: Path,
    frames: np.ndarray,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    rotation: int = 0,
    container_options: dict[str, str] | None = None,
    codec_options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    audio: bool = False,
    codec_tag: str | None = None,
    hflip: bool = False,
    frame_format: str = "rgb24",
) -> Path:
    """Encode at 25 frames a second, or with each frame shown at its time in `times`, in units of 1/25 second; with a second
    of silence if `audio`. The container says to show it turned by `rotation` degrees counter-clockwise and then mirrored
    if `hflip`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=25, options=codec_options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        if codec_tag:
            stream.codec_context.codec_tag = codec_tag
        if rotation or hflip:
            stream.set_display_rotation(rotation, hflip=hflip)
        if audio:
            sound = container.add_stream("mp2", rate=44100)
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.int16), format="s16", layout="mono")
            silence.sample_rate = 44100
            container.mux(sound.encode(silence) + sound.encode())
        for number, frame in enumerate(frames):
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format=frame_format)
            if times is not None:
                image.pts, image.time_base = times[number], Fraction(1, 25)
            container.mux(stream.encode(image))
        container.mux(stream.encode())
    return path


def remux(
    source: Path,
    path: Path,
    first_shown: int = 0,
    num_lost: int = 0,
    container_options: dict[str, str] | None = None,
    edit: Callable[[int, bytes], bytes] = lambda number, content: content,
) -> Path:
    """Copy packets without encoding, as a fast cut does: `num_lost` are left out, an mp4 says that frames before number
    `first_shown` are not to be shown, and `edit` changes the bytes of a packet."""
    with av.open(str(source)) as given, av.open(str(path), "w", options=container_options or {}) as container:
        old = given.streams.video[0]
        new = container.add_stream_from_template(old)
        packets = [packet for packet in given.demux(old) if packet.size]
        for number, packet in enumerate(packets[num_lost:], num_lost):
            copy = av.Packet(edit(number, bytes(packet)))
            shift = int(first_shown / 25 / packet.time_base)
            copy.pts, copy.dts, copy.time_base = packet.pts - shift, packet.dts - shift, packet.time_base
            copy.is_keyframe, copy.stream = packet.is_keyframe, new
            container.mux(copy)
    return path


def truncate(path: Path, share: float) -> Path:
    """Leave only the first `share` of a file's bytes."""
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path
