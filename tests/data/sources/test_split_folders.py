import json
from functools import partial

import numpy as np
import pytest
from video_files import frame_numbers, gray_frames, write_video

from diffusers_far.data.sources import ClassFolderSource, NpzSource, VideoFolderSource, open_split_folders


def write_npz(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, video=gray_frames(2), actions=np.zeros(2, int))


def write_metadata(folder, *names):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": name}) for name in names))


def test_folders_named_after_splits_are_these_splits(tmp_path):
    for name in ("train/b.npz", "train/0/a.npz", "Val/a.npz", "test/a.npz"):
        write_npz(tmp_path / name)
    source = open_split_folders(NpzSource, tmp_path)
    assert source.names == ["Val/a.npz", "test/a.npz", "train/0/a.npz", "train/b.npz"]
    assert source.splits == ["validation", "test", "train", "train"] and source.class_names is None
    assert source[0].name == "Val/a.npz" and len(source[0].frames) == 2


def test_each_split_has_its_own_metadata_or_shares_those_above(tmp_path):
    for name in ("train/a.mp4", "valid/b.mp4"):
        write_video(tmp_path / name, gray_frames(2))
        write_metadata((tmp_path / name).parent, (tmp_path / name).name)
    source = open_split_folders(VideoFolderSource, tmp_path)
    assert source.names == ["train/a.mp4", "valid/b.mp4"] and source.splits == ["train", "validation"]
    for folder in ("train", "valid"):
        (tmp_path / folder / "metadata.jsonl").unlink()
    write_metadata(tmp_path, "valid/b.mp4", "train/a.mp4")
    source = open_split_folders(VideoFolderSource, tmp_path)
    assert source.splits == ["validation", "train"] and frame_numbers(list(source[1].frames)) == [0, 1]


def test_classes_are_those_of_all_splits(tmp_path):
    for name in ("train/Surfing/a.mp4", "train/Archery/a.mp4", "test/Diving/a.mp4"):
        write_video(tmp_path / name, gray_frames(2))
    source = open_split_folders(ClassFolderSource, tmp_path)
    assert source.class_names == ["Archery", "Diving", "Surfing"] and source.splits == ["test", "train", "train"]
    assert source[0].label == "Diving"


def test_a_class_that_is_called_train_is_no_split(tmp_path):
    for name in ("bus/a.mp4", "train/a.mp4"):
        write_video(tmp_path / name, gray_frames(2))
    source = open_split_folders(ClassFolderSource, tmp_path)
    assert source.splits is None and source.class_names == ["bus", "train"]


def test_without_such_folders_a_source_is_what_it_was(tmp_path):
    write_npz(tmp_path / "0" / "a.npz")
    source = open_split_folders(partial(NpzSource, action_key="actions"), tmp_path)
    assert source.splits is None and source.names == ["0/a.npz"]


@pytest.mark.parametrize("name", ["a.npz", "more/a.npz"])
def test_trajectories_outside_of_the_splits_are_refused(tmp_path, name):
    for path in ("train/a.npz", "test/a.npz", name):
        write_npz(tmp_path / path)
    with pytest.raises(ValueError, match=f"1 trajectories outside of them, such as '{name}'.*`--split`"):
        open_split_folders(NpzSource, tmp_path)
    write_metadata(tmp_path, "train/a.mp4", name)
    with pytest.raises(ValueError, match="1 trajectories outside of them"):
        open_split_folders(VideoFolderSource, tmp_path)


def test_a_split_that_cannot_be_opened_is_not_passed_over(tmp_path):
    write_npz(tmp_path / "train" / "a.npz")
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match="test' holds no `.npz`"):
        open_split_folders(NpzSource, tmp_path)
