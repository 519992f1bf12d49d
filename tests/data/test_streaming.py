import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value, Video
from video_files import frame_numbers, gray_frames, truncate, write_video

from diffusers_far.data.loading import load_split, stream_split
from diffusers_far.data.rows import ActionCombiner, BadExampleError
from diffusers_far.data.streaming import fetch_file
from diffusers_far.data.video_clips import EncodedDataset, VideoClips


@pytest.fixture
def image_folder(trajectories, tmp_path) -> Path:
    """The five trajectories in two parquet files, three in the first."""
    folder = tmp_path / "images"
    (folder / "data").mkdir(parents=True)
    trajectories.select(range(3)).to_parquet(folder / "data" / "train-00000-of-00002.parquet")
    trajectories.select(range(3, 5)).to_parquet(folder / "data" / "train-00001-of-00002.parquet")
    return folder


@pytest.fixture
def video_folder(tmp_path) -> Path:
    """Three mp4 files of 12, 9 and 10 frames, with actions and labels."""
    lines = []
    for number, num_frames in enumerate((12, 9, 10)):
        write_video(tmp_path / "videos" / f"{number}.mp4", gray_frames(num_frames))
        actions = [frame % 3 for frame in range(num_frames)]
        lines.append(json.dumps({"file_name": f"{number}.mp4", "actions": actions, "label": number}))
    (tmp_path / "videos" / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path / "videos"


def assert_same_clip(clip, expected) -> None:
    assert np.array_equal(clip.frames, expected.frames)
    assert clip.label == expected.label
    assert (clip.actions is None) == (expected.actions is None)
    assert clip.actions is None or clip.actions.tolist() == expected.actions.tolist()


@pytest.mark.parametrize("kind", ["image_folder", "video_folder"])
def test_streamed_clips_are_those_of_the_dataset_read_as_a_whole(kind, request):
    folder, combine = str(request.getfixturevalue(kind)), ActionCombiner("last")
    expected = VideoClips(load_split(folder, "train"), combine_actions=combine)
    split = stream_split(folder, "train")
    for number, row in enumerate(split.all_rows()):
        trajectory = split.trajectory(row, f"row {number}")
        assert trajectory.num_frames == expected.num_frames[number]
        for start, length, interval in ((0, 1, 1), (1, 1, 1), (0, 2, 1), (trajectory.num_frames - 2, 2, 1)):
            clip = trajectory.clip(start, length, interval, combine)
            assert_same_clip(clip, expected.clip(number, start, length, interval))
    clip = split.trajectory(next(split.all_rows()), "row 0").clip(0, 3, 2, combine)
    assert_same_clip(clip, expected.clip(0, 0, 3, 2))


def test_rows_are_read_from_any_place_of_any_shard(image_folder):
    split = stream_split(str(image_folder), "train")
    assert split.num_shards == 2 and split.num_rows == 5
    assert [row["seed"] for row in split.rows(0)] == [100, 101, 102]
    assert [row["seed"] for row in split.rows(1, 1)] == [104]
    assert [row["seed"] for row in split.all_rows(2)] == [102, 103, 104]
    assert list(split.rows(1, 2)) == []


def test_many_small_shards_are_read_as_fewer(trajectories, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_far.data.streaming.MAX_SHARDS", 2)
    (tmp_path / "many").mkdir()
    for number in range(5):
        trajectories.select([number]).to_parquet(tmp_path / "many" / f"train-{number}.parquet")
    split = stream_split(str(tmp_path / "many"), "train")
    assert split.num_shards == 2
    assert [[row["seed"] for row in split.rows(shard)] for shard in range(2)] == [[100, 101, 102], [103, 104]]


def test_the_rows_of_a_video_folder_are_counted(video_folder):
    split = stream_split(str(video_folder), "train")
    assert split.holds_files and split.points_to_files and split.num_rows == 3


def test_video_files_inside_parquet_are_streamed_with_their_rows(video_folder, tmp_path):
    files = [{"path": None, "bytes": path.read_bytes()} for path in sorted(video_folder.glob("*.mp4"))]
    Dataset.from_dict({"video": files}, features=Features({"video": Video(decode=False)})).to_parquet(
        tmp_path / "embedded" / "train.parquet"
    )
    split = stream_split(str(tmp_path / "embedded"), "train")
    assert split.holds_files and not split.points_to_files
    trajectory = split.trajectory(next(split.rows(0, 1)), "row 1")
    clip = trajectory.without_other_images(3, 4).clip(3, 4)
    assert frame_numbers(clip.frames.permute(0, 2, 3, 1)) == [3, 4, 5, 6] and clip.actions is None


@pytest.mark.parametrize("kind", ["image_folder", "video_folder"])
def test_the_first_rows_are_a_dataset_like_any_other(kind, request, vae):
    folder = str(request.getfixturevalue(kind))
    head = EncodedDataset(stream_split(folder, "train").head(2), vae)
    whole = EncodedDataset(load_split(folder, "train"), vae)
    assert head.latent_shape == whole.latent_shape and head.num_frames.tolist() == whole.num_frames[:2].tolist()
    assert np.array_equal(head.clip(1, 1, 2).frames, whole.clip(1, 1, 2).frames)


def test_discrete_actions_are_told_from_continuous_ones(image_folder, tmp_path):
    assert stream_split(str(image_folder), "train").has_discrete_actions
    features = Features({"video": List(Image()), "actions": List(List(Value("float32")))})
    rows = {"video": [[np.zeros((4, 4, 3), np.uint8)]], "actions": [[[0.5, 1]]]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "arm" / "train.parquet")
    assert not stream_split(str(tmp_path / "arm"), "train").has_discrete_actions


# What a stream is known by


@pytest.mark.parametrize("kind", ["image_folder", "video_folder"])
def test_a_stream_is_known_by_its_files_wherever_and_whenever_they_were_written(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    expected = stream_split(str(folder), "train").fingerprint
    copy = shutil.copytree(folder, tmp_path / "moved" / "here")
    for path in copy.rglob("*.*"):
        os.utime(path, (1, 1))
    (copy / "README.md").write_text("Another card.")
    assert stream_split(str(copy), "train").fingerprint == expected


def test_another_file_another_name_or_another_action_is_another_stream(video_folder, tmp_path):
    fingerprints = {stream_split(str(video_folder), "train").fingerprint}
    metadata = video_folder / "metadata.jsonl"
    original = metadata.read_text()
    metadata.write_text(original.replace('"label": 2', '"label": 1'))
    fingerprints.add(stream_split(str(video_folder), "train").fingerprint)
    metadata.write_text(original)
    write_video(video_folder / "1.mp4", gray_frames(9)[::-1])
    fingerprints.add(stream_split(str(video_folder), "train").fingerprint)
    (video_folder / "1.mp4").rename(video_folder / "4.mp4")
    metadata.write_text(original.replace("1.mp4", "4.mp4"))
    fingerprints.add(stream_split(str(video_folder), "train").fingerprint)
    assert len(fingerprints) == 4


def test_changed_actions_in_a_parquet_file_make_another_stream(image_folder):
    expected = stream_split(str(image_folder), "train").fingerprint
    path = image_folder / "data" / "train-00001-of-00002.parquet"
    rows = Dataset.from_parquet(str(path))
    actions = [list(row) for row in rows["actions"]]
    actions[0][2] += 1
    rows.remove_columns("actions").add_column("actions", actions).select_columns(rows.column_names).to_parquet(path)
    assert stream_split(str(image_folder), "train").fingerprint != expected


# What is refused


def test_what_cannot_be_streamed_is_refused(image_folder, video_folder):
    with pytest.raises(ValueError, match="a stream has no slices; pass 'train'"):
        stream_split(str(image_folder), "train[:2]")
    with pytest.raises(ValueError, match="'dev'.*'train'"):
        stream_split(str(image_folder), "dev")
    with pytest.raises(ValueError, match="`column` is 'actions'"):
        stream_split(str(image_folder), "train", "actions")


def test_a_damaged_video_file_is_named_and_so_are_actions_that_do_not_fit(video_folder):
    truncate(video_folder / "1.mp4", 0.5)
    split = stream_split(str(video_folder), "train")
    rows = list(split.all_rows())
    with pytest.raises(BadExampleError, match="1.mp4"):
        split.trajectory(rows[1], "row 1")
    rows[2]["actions"] = rows[2]["actions"][:4]
    with pytest.raises(BadExampleError, match="2.mp4.*`actions` has 4 for 10 frames"):
        split.trajectory(rows[2], "row 2").clip(0, 2)
    with pytest.raises(BadExampleError, match="cannot be fetched"):
        fetch_file({"path": "memory://nothing.mp4", "bytes": None})
