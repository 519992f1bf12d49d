from types import SimpleNamespace

import av
import numpy as np
import pytest
from video_files import frame_numbers, gray_frames, truncate, write_video

from diffusers_far.data import video as video_module
from diffusers_far.data.faults import BadExampleError
from diffusers_far.data.video import FrameTimes, count_frames, iter_video, read_frame_times, read_frames, read_video


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


# Runs of frames, found by the key frame before them


@pytest.fixture
def counts(monkeypatch) -> dict[str, int]:
    """How many frames were decoded, and how many of them became arrays."""
    counts = {"decoded": 0, "converted": 0}
    decode, to_rgb = video_module._decode, video_module._to_rgb

    def counted_decode(*arguments):
        for frame in decode(*arguments):
            counts["decoded"] += 1
            yield frame

    def counted_to_rgb(frame):
        counts["converted"] += 1
        return to_rgb(frame)

    monkeypatch.setattr(video_module, "_decode", counted_decode)
    monkeypatch.setattr(video_module, "_to_rgb", counted_to_rgb)
    return counts


CODECS = [
    ("a.mp4", "libx264", {"g": "7", "bf": "0"}),
    ("a.mp4", "libx264", {"g": "7", "bf": "2"}),
    ("a.mp4", "libx264", {"g": "7", "bf": "3", "x264-params": "open-gop=1"}),
    ("a.mkv", "libx264", {"g": "7", "bf": "2"}),
    ("a.avi", "libx264", {"g": "7", "bf": "2"}),
    ("a.avi", "mpeg4", {"g": "7"}),
    ("a.avi", "mpeg4", {"g": "7", "bf": "2"}),
    ("a.webm", "libvpx-vp9", {"g": "7"}),
]


@pytest.mark.parametrize(
    ("name", "codec", "options"), CODECS, ids=[f"{name} {codec} {options}" for name, codec, options in CODECS]
)
def test_a_run_of_frames_is_the_same_wherever_decoding_starts(tmp_path, noise, name, codec, options):
    path = write_video(tmp_path / name, noise, codec, codec_options=options)
    whole, times = read_video(path), read_frame_times(path)
    for start in range(30):
        assert np.array_equal(read_frames(path, start, 1, times=times), whole[start : start + 1])
    assert np.array_equal(read_frames(path, 9, 5, 3, times), whole[9:22:3])
    assert np.array_equal(read_frames(path.read_bytes(), 23, 7, times=times), whole[23:])


def test_only_the_frames_since_the_last_key_frame_are_decoded_and_only_those_that_are_kept_become_arrays(
    tmp_path, noise, counts
):
    path = write_video(tmp_path / "a.mp4", noise, "libx264", codec_options={"g": "7", "bf": "0", "sc_threshold": "0"})
    read_frames(path, 22, 3, 2, read_frame_times(path))
    assert counts == {"decoded": 6, "converted": 3}  # 21 to 26: a key frame is every seventh
    counts.update(decoded=0, converted=0)
    read_frames(path, 22, 3, 2)
    assert counts == {"decoded": 27, "converted": 3}


def test_damage_before_the_key_frame_does_not_count_and_after_it_does(tmp_path, noise, monkeypatch):
    path = write_video(tmp_path / "a.mp4", noise, codec_options={"g": "7", "bf": "0", "sc_threshold": "0"})
    whole, times, decode = read_video(path), read_frame_times(path), video_module._decode

    def decode_with_damage(damaged: int):
        def decode_and_damage(*arguments):
            yield SimpleNamespace(pts=times.times[damaged], is_corrupt=True)
            yield from decode(*arguments)

        return decode_and_damage

    monkeypatch.setattr(video_module, "_decode", decode_with_damage(6))
    assert np.array_equal(read_frames(path, 9, 2, times=times), whole[9:11])
    monkeypatch.setattr(video_module, "_decode", decode_with_damage(7))
    with pytest.raises(BadExampleError, match="a.mp4.*damaged at frame 7"):
        read_frames(path, 9, 2, times=times)


def test_frames_that_lie_apart_unevenly_are_counted_and_not_timed(tmp_path):
    path = write_video(
        tmp_path / "a.mkv", gray_frames(20), "libx264", codec_options={"g": "5"}, times=[n * n for n in range(20)]
    )
    times = read_frame_times(path)
    assert (np.diff(times.times, n=2) > 0).all()
    assert [frame_numbers(read_frames(path, start, 1, times=times)) for start in range(20)] == [[n] for n in range(20)]


def test_times_that_do_not_fit_are_not_trusted(tmp_path, noise):
    path = write_video(tmp_path / "a.mp4", noise, codec_options={"g": "5"})
    whole, times = read_video(path), read_frame_times(path)
    for wrong in (FrameTimes(times.times + 1, times.key_frames), FrameTimes(times.times[::2], np.array([0, 12]))):
        assert np.array_equal(read_frames(path, 13, 4, times=wrong), whole[13:17])


@pytest.mark.parametrize("name", ["a.avi", "a.mkv", "a.mp4", "a.mov"])
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_as_many_frames_are_counted_as_are_decoded_however_long_each_is_shown(tmp_path, name, codec):
    path = write_video(tmp_path / name, gray_frames(20), codec, times=[n * n for n in range(20)])
    assert count_frames(path) == count_frames(path.read_bytes()) == len(read_video(path)) == 20


def test_a_video_without_time_stamps_is_read_from_its_front(tmp_path, counts):
    path = write_video(tmp_path / "a.h264", gray_frames(20))
    assert read_frame_times(path) is None
    assert frame_numbers(read_frames(path, 12, 2, 3, read_frame_times(path))) == [12, 15]
    assert counts["decoded"] == 16


def test_a_run_beyond_the_end_is_an_error_that_names_the_file(tmp_path):
    path = write_video(tmp_path / "a.mp4", gray_frames(10))
    for times in (None, read_frame_times(path)):
        with pytest.raises(BadExampleError, match="a.mp4.*ends before frame 11"):
            read_frames(path, 8, 2, 2, times)


def test_an_audio_stream_beside_the_frames_is_passed_over(tmp_path):
    path = write_video(tmp_path / "a.avi", gray_frames(20), "mpeg4", audio=True)
    with av.open(str(path)) as container:
        assert len(container.streams.audio) == 1
    assert count_frames(path) == 20 and frame_numbers(read_video(path)) == list(range(20))
    assert frame_numbers(read_frames(path, 5, 3, 2, read_frame_times(path))) == [5, 7, 9]
