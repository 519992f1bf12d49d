"""Videos that are written appear whole or not at all."""

import errno
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from video_files import frame_numbers, gray_frames

from diffusers_far.data.media_files import read_clip
from diffusers_far.evaluation import media
from diffusers_far.evaluation.media import encode_mp4, write_frames, write_mp4


@pytest.fixture
def fails_half_way(monkeypatch):
    """Every writer leaves half a file, and then the disk is full."""

    def half(path, *arguments, **options):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(media, "_write_mp4", half)
    monkeypatch.setattr(PIL.Image.Image, "save", lambda image, path, *arguments, **options: half(path))


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp", "frames"])
def test_a_full_disk_is_said_with_its_place_and_leaves_what_was_there(tmp_path, request, name):
    write_frames(tmp_path / name, gray_frames(3), 8)
    request.getfixturevalue("fails_half_way")
    with pytest.raises(OSError, match=rf"{name}' was not written .*No space left.*MiB are free in .*{tmp_path.name}"):
        write_frames(tmp_path / name, gray_frames(5), 8, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert frame_numbers(read_clip(tmp_path / name).frames) == [0, 1, 2]


@pytest.mark.parametrize("write", [encode_mp4, write_mp4])
def test_a_sample_of_a_run_is_replaced_whole_or_not_at_all(tmp_path, request, write):
    frames = gray_frames(3) if write is encode_mp4 else torch.full((3, 3, 32, 48), 10 / 255)
    write(tmp_path / "a.mp4", frames, 8)
    before = (tmp_path / "a.mp4").read_bytes()
    write(tmp_path / "a.mp4", frames, 8)
    assert len(read_clip(tmp_path / "a.mp4").frames) == 3
    request.getfixturevalue("fails_half_way")
    with pytest.raises(OSError, match="a.mp4' was not written .*MiB are free"):
        write(tmp_path / "a.mp4", frames, 8)
    assert (tmp_path / "a.mp4").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_ffmpegs_own_full_disk_is_said_with_its_place(tmp_path, monkeypatch):
    original = media._write_mp4

    def write_to_full_disk(path, *arguments):
        path.symlink_to("/dev/full")
        original(path, *arguments)

    monkeypatch.setattr(media, "_write_mp4", write_to_full_disk)
    noise = np.random.default_rng(0).integers(0, 256, (50, 64, 64, 3), dtype=np.uint8)
    with pytest.raises(OSError, match="a.mp4' was not written .*No space left on device"):
        encode_mp4(tmp_path / "a.mp4", noise, 8)
    assert not (tmp_path / "a.mp4").exists()


def test_an_mp4_of_odd_sides_is_refused_before_there_is_a_file(tmp_path):
    with pytest.raises(ValueError, match="a.mp4' and its frames would be 31x48, but mp4 needs even sides"):
        encode_mp4(tmp_path / "a.mp4", gray_frames(2, 31, 48), 8)
    assert not list(tmp_path.iterdir())
