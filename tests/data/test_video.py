import av
import numpy as np
import pytest
from video_files import frame_numbers, gray_frames, truncate, write_video

from diffusers_far.data.faults import BadExampleError
from diffusers_far.data.video import iter_video, read_video


STREAMABLE = {"movflags": "faststart"}


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (30, 32, 48, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.avi", "libx264"), ("a.avi", "mpeg4"), ("a.webm", "libvpx-vp9")]
)
def test_all_frames_come_in_the_order_of_presentation(tmp_path, name, codec):
    video = read_video(write_video(tmp_path / name, gray_frames(20), codec))
    assert video.shape == (20, 32, 48, 3) and video.dtype == np.uint8
    assert frame_numbers(video) == list(range(20))


def test_a_lossless_video_comes_back_to_the_bit(tmp_path, noise):
    path = write_video(tmp_path / "a.mkv", noise, "ffv1", "bgr0")
    assert np.array_equal(read_video(path), noise)


@pytest.mark.parametrize(
    ("interval", "max_frames", "kept"), [(3, None, [0, 3, 6, 9]), (3, 2, [0, 3]), (20, None, [0])]
)
def test_an_interval_keeps_the_first_frame_and_every_kth_after_it(tmp_path, interval, max_frames, kept):
    path = write_video(tmp_path / "a.mp4", gray_frames(11))
    assert frame_numbers(read_video(path, interval, max_frames)) == kept


def test_frames_from_a_time_on_are_those_of_a_whole_read(tmp_path):
    path = write_video(tmp_path / "a.mp4", gray_frames(20))
    for first in (0, 1, 7, 19):
        assert frame_numbers(list(iter_video(path, start_time=first / 25))) == list(range(first, 20))


def test_a_video_that_was_filmed_sideways_is_turned_upright(tmp_path):
    frames = np.zeros((2, 16, 32, 3), np.uint8)
    frames[:, :, :16] = 255  # Left: at the bottom after a quarter turn counter-clockwise.
    video = read_video(write_video(tmp_path / "a.mp4", frames, rotation=90))
    assert video.shape == (2, 32, 16, 3)
    assert video[:, 20:].min() > 200 and video[:, :12].max() < 50


@pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.9])
@pytest.mark.parametrize(("name", "options"), [("a.mp4", {}), ("a.mp4", STREAMABLE), ("a.avi", {})])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, noise, name, options, share):
    path = truncate(write_video(tmp_path / name, noise, "mpeg4", container_options=options), share)
    with pytest.raises(BadExampleError, match=name):
        read_video(path)


def test_an_mp4_that_ends_between_two_frames_is_truncated(tmp_path, noise):
    path = write_video(tmp_path / "a.mp4", noise, "mpeg4", container_options=STREAMABLE)
    with av.open(str(path)) as container:
        ends = sorted(packet.pos + packet.size for packet in container.demux(video=0) if packet.size)
    path.write_bytes(path.read_bytes()[: ends[19]])
    with pytest.raises(BadExampleError, match="truncated"):
        read_video(path)


def test_what_is_no_video_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("text.mp4", "missing.mp4"):
        with pytest.raises(BadExampleError, match=name):
            read_video(tmp_path / name)


def test_a_wrong_interval_or_number_of_frames_is_refused(tmp_path):
    path = write_video(tmp_path / "a.mp4", gray_frames(3))
    with pytest.raises(ValueError, match="`frame_interval` is 0"):
        read_video(path, frame_interval=0)
    with pytest.raises(ValueError, match="`max_frames` is 0"):
        read_video(path, max_frames=0)
