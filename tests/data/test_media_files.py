"""Clips and images as people have them."""

import numpy as np
import pytest
from PIL import Image
from video_files import frame_numbers, gray_frames, write_video

from diffusers_far.data.media_files import MediaLimits, media_kind, read_clip
from diffusers_far.data.rows import BadExampleError


def write_images(folder, names) -> None:
    folder.mkdir()
    for name, frame in zip(names, gray_frames(len(names))):
        Image.fromarray(np.ascontiguousarray(frame)).save(folder / name)


def test_images_of_a_folder_come_in_the_order_of_their_numbers(tmp_path):
    write_images(tmp_path / "frames", ["f_1.png", "f_2.jpg", "f_10.png", "f_11.webp"])
    (tmp_path / "frames" / "notes.txt").write_text("left alone")
    assert frame_numbers(read_clip(tmp_path / "frames").frames) == [0, 1, 2, 3]


def test_the_last_frames_are_kept_at_the_wanted_size(tmp_path):
    clip = read_clip(write_video(tmp_path / "a.mp4", gray_frames(9)), num_frames=3, size=(8, 8))
    assert frame_numbers(clip.frames) == [6, 7, 8] and clip.frames.shape == (3, 8, 8, 3)
    assert (clip.num_frames_in_file, clip.original_size) == (9, (32, 48))


def test_what_a_file_is_is_told_by_its_content(tmp_path):
    write_video(tmp_path / "a.mp4", gray_frames(2)).rename(tmp_path / "a.png")
    assert media_kind(tmp_path / "a.png") == "video"
    (tmp_path / "list.mp4").write_text("#EXTM3U\nhttp://127.0.0.1/a.ts\n")
    with pytest.raises(BadExampleError, match="neither a video nor an image"):
        read_clip(tmp_path / "list.mp4")


@pytest.mark.parametrize(
    ("name", "image_format", "options", "levels"),
    [("phone.jpg", "MPO", {}, [1]), ("animation.png", "PNG", {"default_image": True}, [2, 3])],
)
def test_pictures_that_no_viewer_shows_are_no_frames(tmp_path, name, image_format, options, levels):
    first, *others = [Image.new("RGB", (4, 4), (level,) * 3) for level in (1, 2, 3)]
    first.save(tmp_path / name, image_format, save_all=True, append_images=others, **options)
    assert read_clip(tmp_path / name).frames[:, 0, 0, 0].tolist() == levels


def test_frames_of_several_sizes_need_a_size(tmp_path):
    write_images(tmp_path / "frames", ["0.png"])
    Image.new("RGB", (20, 20)).save(tmp_path / "frames" / "1.png")
    with pytest.raises(BadExampleError, match="make them one size"):
        read_clip(tmp_path / "frames")
    assert read_clip(tmp_path / "frames", size=(8, 8)).frames.shape == (2, 8, 8, 3)


@pytest.mark.parametrize(
    "limits",
    [
        MediaLimits(max_frames=3),
        MediaLimits(max_bytes=50),
        MediaLimits(max_pixels=1000),
        MediaLimits(max_total_pixels=4000),
    ],
)
def test_files_beyond_the_limits_are_refused(tmp_path, limits):
    write_images(tmp_path / "frames", [f"{number}.png" for number in range(4)])
    for path in (tmp_path / "frames", write_video(tmp_path / "a.mp4", gray_frames(4))):
        assert len(read_clip(path).frames) == 4
        with pytest.raises(BadExampleError):
            read_clip(path, limits=limits)
