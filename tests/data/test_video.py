from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from av.stream import Disposition
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import property_test
from video_files import frame_numbers, gray_frames, remux, truncate, write_video

from diffusers_far.data import video as video_module
from diffusers_far.data.media_files import read_clip
from diffusers_far.data.rows import BadExampleError
from diffusers_far.data.video import FrameTimes, count_frames, iter_video, read_frame_times, read_frames, read_video


NOISE = np.random.default_rng(0).integers(0, 256, (30, 32, 48, 3), dtype=np.uint8)
STREAMABLE = {"movflags": "faststart"}


@pytest.fixture
def noise() -> np.ndarray:
    return NOISE


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


@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize(
    ("name", "codec", "pixel_format"), [("a.mp4", "libx264rgb", "rgb24"), ("a.mkv", "ffv1", "bgr0")]
)
def test_a_video_is_turned_and_mirrored_as_its_container_says(tmp_path, name, codec, pixel_format, rotation, hflip):
    options = {"crf": "0"} if codec == "libx264rgb" else {}
    path = write_video(tmp_path / name, NOISE[:2], codec, pixel_format, rotation, codec_options=options, hflip=hflip)
    expected = np.rot90(NOISE[:2], rotation // 90, axes=(1, 2))
    assert np.array_equal(read_video(path), expected[:, :, ::-1] if hflip else expected)


def test_a_video_that_is_shown_askew_is_refused(tmp_path):
    path = write_video(tmp_path / "a.mp4", gray_frames(2), rotation=30)
    with pytest.raises(BadExampleError, match="a.mp4.*display matrix.*encode it"):
        read_video(path)


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
    decode, to_rgb = video_module._decode, video_module.upright_rgb

    def counted_decode(*arguments):
        for frame in decode(*arguments):
            counts["decoded"] += 1
            yield frame

    def counted_to_rgb(frame):
        counts["converted"] += 1
        return to_rgb(frame)

    monkeypatch.setattr(video_module, "_decode", counted_decode)
    monkeypatch.setattr(video_module, "upright_rgb", counted_to_rgb)
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


# What a container hides


def require_that_all_readers_agree(path: Path) -> int:
    """Returns the number of frames."""
    whole, times = list(iter_video(path)), read_frame_times(path)
    assert count_frames(path) == count_frames(path.read_bytes()) == len(whole)
    assert times is None or len(times.times) == len(whole)
    for start in range(len(whole)):
        assert np.array_equal(read_frames(path, start, 1, times=times), whole[start : start + 1])
    assert np.array_equal(read_frames(path, 1, (len(whole) - 1 + 2) // 3, 3, times), whole[1::3])
    return len(whole)


@property_test
@given(
    suffix=st.sampled_from(["mp4", "mov", "mkv"]),
    codec_options=st.sampled_from(
        [{"bf": "0"}, {"bf": "2"}, {"bf": "3", "x264-params": "open-gop=1:scenecut=0"}, {"bf": "2", "refs": "4"}]
    ),
    key_frame_interval=st.integers(4, 13),
    first_shown=st.integers(0, 27),
    num_lost=st.integers(0, 9),
)
def test_all_readers_agree_on_a_video_that_was_cut_without_encoding(
    tmp_path, suffix, codec_options, key_frame_interval, first_shown, num_lost
):
    whole = write_video(tmp_path / "a.mp4", NOISE, codec_options=codec_options | {"g": str(key_frame_interval)})
    cut = remux(whole, tmp_path / f"cut.{suffix}", first_shown, num_lost)
    num_shown = require_that_all_readers_agree(cut)
    if suffix != "mkv" and num_lost == 0:
        assert num_shown == 30 - first_shown


@pytest.mark.parametrize(("first_shown", "num_lost"), [(10, 9), (12, 12)])
def test_frames_that_a_cut_left_without_a_time_and_without_what_they_refer_to_are_not_counted(
    tmp_path, first_shown, num_lost
):
    options = {"g": "10", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}
    cut = remux(
        write_video(tmp_path / "a.mp4", NOISE, codec_options=options), tmp_path / "b.mkv", first_shown, num_lost
    )
    with av.open(str(cut)) as container:
        assert None in [packet.pts for packet in container.demux(video=0) if packet.size]
    require_that_all_readers_agree(cut)


@pytest.mark.parametrize(
    ("bf", "movflags"), [("0", "frag_keyframe"), ("2", "frag_keyframe"), ("2", "frag_keyframe+empty_moov")]
)
def test_all_fragments_of_an_mp4_are_counted_though_its_header_knows_the_first(tmp_path, bf, movflags):
    whole = write_video(tmp_path / "a.mp4", NOISE, codec_options={"g": "7", "bf": bf})
    assert (
        require_that_all_readers_agree(remux(whole, tmp_path / "b.mp4", container_options={"movflags": movflags}))
        == 30
    )


def hide_in_vp8(number: int, content: bytes) -> bytes:
    return bytes([content[0] & ~0x10]) + content[1:] if number % 5 == 4 else content


def drop_in_mpeg4(number: int, content: bytes) -> bytes:
    return b"\0\0\1\xb6\x50\xcf" if number in (3, 4) else content  # a picture that says: as before


@pytest.mark.parametrize(
    ("name", "codec", "edit", "num_shown"),
    [
        ("a.webm", "libvpx", hide_in_vp8, 16),
        ("a.avi", "mpeg4", drop_in_mpeg4, 18),
    ],
)
def test_frames_that_a_codec_hides_are_not_counted(tmp_path, name, codec, edit, num_shown):
    whole = write_video(tmp_path / name, NOISE[:20], codec, codec_options={"g": "9"})
    assert require_that_all_readers_agree(remux(whole, tmp_path / f"hidden_{name}", edit=edit)) == num_shown


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format", "times"),
    [
        ("a.gif", "gif", "rgb8", None),
        ("a.gif", "gif", "rgb8", [n * n for n in range(20)]),
        ("a.ts", "libx264", "yuv420p", None),
        ("a.mpg", "mpeg2video", "yuv420p", None),
        ("a.avi", "mpeg4", "yuv420p", [n * n for n in range(20)]),
        ("a.webm", "libvpx-vp9", "yuv420p", [n * n for n in range(20)]),
    ],
)
def test_all_readers_agree_whatever_the_container(tmp_path, name, codec, pixel_format, times):
    options = {} if name.endswith("gif") else {"g": "7"}
    path = write_video(tmp_path / name, NOISE[:20], codec, pixel_format, codec_options=options, times=times)
    assert require_that_all_readers_agree(path) == 20


# Which stream, and what it says about itself


def write_streams(path: Path, *, dispositions: list[Disposition], with_sound: bool = False) -> Path:
    """A video per disposition: frame t of the one number n has the level `10 * (5 * n + t)`."""
    with av.open(str(path), "w") as container:
        streams = []
        for disposition in dispositions:
            is_cover = bool(disposition & Disposition.attached_pic)
            streams.append(container.add_stream("mjpeg" if is_cover else "libx264", rate=25))
            streams[-1].height, streams[-1].width = 32, 48
            streams[-1].pix_fmt = "yuvj420p" if is_cover else "yuv420p"
            streams[-1].disposition = disposition
        if with_sound:
            sound = container.add_stream("aac", rate=8000, layout="mono")
        for number, (stream, disposition) in enumerate(zip(streams, dispositions)):
            num_frames = 1 if disposition & Disposition.attached_pic else 5
            for frame in gray_frames(25)[5 * number :][:num_frames]:
                image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                container.mux(stream.encode(image))
            container.mux(stream.encode())
        if with_sound:
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            samples.sample_rate, samples.time_base = 8000, Fraction(1, 8000)
            container.mux(sound.encode(samples) + sound.encode())
    return path


NONE, DEFAULT, COVER = Disposition(0), Disposition.default, Disposition.attached_pic


@pytest.mark.parametrize(
    ("name", "dispositions", "chosen"),
    [
        ("a.mkv", [NONE, DEFAULT], 1),
        ("a.mkv", [NONE, NONE], 0),
        ("a.mkv", [DEFAULT, DEFAULT], 0),
        ("a.mp4", [COVER, DEFAULT], 1),
    ],
)
def test_the_default_video_is_read_else_the_first_and_no_cover(tmp_path, name, dispositions, chosen):
    path = write_streams(tmp_path / name, dispositions=dispositions)
    assert frame_numbers(read_video(path)) == list(range(5 * chosen, 5 * chosen + 5))
    assert require_that_all_readers_agree(path) == 5


def test_a_song_with_a_cover_is_no_video(tmp_path):
    path = write_streams(tmp_path / "song.mp4", dispositions=[COVER], with_sound=True)
    for read in (read_video, count_frames, read_frame_times, read_clip, lambda path: read_frames(path, 0, 1)):
        with pytest.raises(BadExampleError, match="song.mp4.*no video, but a cover picture"):
            read(path)


def test_a_title_in_an_older_encoding_does_not_matter(tmp_path):
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "TITLE"
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(NOISE[0], format="rgb24")) + stream.encode())
    path.write_bytes(path.read_bytes().replace(b"TITLE", "Café!".encode("latin-1")))
    assert count_frames(path) == len(read_video(path)) == 1


def test_frames_that_are_too_large_are_not_decoded(tmp_path, counts):
    path = write_video(tmp_path / "a.mp4", gray_frames(2))
    with pytest.raises(BadExampleError, match="a.mp4.*frames of 32x48, above .* million pixels"):
        list(iter_video(path, max_pixels=1000))
    assert counts["decoded"] == 0


@pytest.mark.parametrize("later", [(16, 16), (64, 96)], ids=["smaller", "larger"])
def test_frames_of_several_sizes_are_an_error_that_names_the_file(tmp_path, later):
    first = write_video(tmp_path / "a.h264", gray_frames(3)).read_bytes()
    (tmp_path / "b.h264").write_bytes(first + write_video(tmp_path / "c.h264", gray_frames(3, *later)).read_bytes())
    for read in (read_video, lambda path: read_frames(path, 0, 6)):
        with pytest.raises(BadExampleError, match="b.h264.*sizes"):
            read(tmp_path / "b.h264")
