"""Every row is looked at before work on it begins, and a fault is told by the row's name."""

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from video_files import gray_frames, write_video

from diffusers_far.data.latents import LatentDataset, LatentSource, write_shard
from diffusers_far.data.loading import load_split
from diffusers_far.data.rows import ActionCombiner, BadExampleError, check_actions, count_actions
from diffusers_far.data.video_clips import VideoClips


DISCRETE, CONTINUOUS = pa.list_(pa.int64()), pa.list_(pa.list_(pa.float32()))
NAN = float("nan")


def name(row: int) -> str:
    return f"row {row}"


@pytest.mark.parametrize(
    ("column_type", "actions", "message"),
    [
        (DISCRETE, [[0, 1, 2], [0, -1, 2]], r"row 1: `actions\[1\]` is -1"),
        (DISCRETE, [[0, 1, 2], [0, 1, 2], [-2, 0]], r"row 2: `actions\[0\]` is -2"),
        (DISCRETE, [[0, 1, 2], [0]], "row 1: `actions` has 1 for 3 frames"),
        (DISCRETE, [[0, 1, 2], [0, 1, 2, 0]], "row 1: `actions` has 4 for 3 frames"),
        (DISCRETE, [[0, 1, 2], []], "row 1: `actions` has"),
        (DISCRETE, [[0, 1, 2], None], "row 1: `actions` are missing"),
        (DISCRETE, [[0, 1, 2], [0, None, 1]], "row 1: `actions` are missing"),
        (DISCRETE, [[0, 1, 2], [0, 1, 2], [1, 2, 3]], "row 2 has the action 3 at frame 2, but there are 3 actions"),
        (pa.list_(pa.float32()), [[0, 1, 2], [0, 0.5, 1]], "row 1: `actions` has shape"),
        (pa.list_(pa.float64()), [[0, 1], [0, NAN, 1]], "row 1: `actions` has shape"),
        (pa.list_(pa.float32()), [[0, 1, 2], [0, 7, 1]], "row 1 has the action 7"),
        (CONTINUOUS, [[[0.5, 1]] * 3, [[0.5, 1], [NAN, 1], [0, 0]]], r"row 1: `actions\[1\]` is \[nan, 1.0\]"),
        (CONTINUOUS, [[[0.5, 1]] * 3, [[0.5, 1]] * 2, [[0.5]] * 3], "row 2: `actions` have 1 channels"),
        (CONTINUOUS, [[[0.5, 1]] * 3, [[0.5, 1], [1], [0, 1]]], "row 1: `actions` differ in their number of channels"),
        (CONTINUOUS, [[[0.5, 1]] * 3, [[0.5, None]] * 3], "row 1: `actions` has shape"),
    ],
)
def test_a_row_whose_actions_cannot_be_trained_on_is_named(column_type, actions, message):
    with pytest.raises(BadExampleError, match=message):
        check_actions(pa.chunked_array([pa.array(actions, column_type)]), np.full(len(actions), 3), 3, name)


@pytest.mark.parametrize(
    ("column_type", "actions", "num_actions"),
    [
        (DISCRETE, [[0, 1, 2], [2, 0]], 3),
        (pa.list_(pa.uint8()), [[0, 1], [2, 0]], 3),
        (pa.list_(pa.float32()), [[0, 1], [2, 0]], 3),
        (CONTINUOUS, [[[0.5, -1]] * 3, [[-0.5, 1]] * 2], None),
        (pa.list_(pa.list_(pa.int64())), [[[3, -1]] * 3], None),
    ],
)
def test_actions_that_fit_pass_and_the_discrete_ones_are_counted(column_type, actions, num_actions):
    column = pa.chunked_array([pa.array(actions, column_type)])
    check_actions(column, np.full(len(actions), 3), 3, name)
    assert count_actions(column) == num_actions


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("actions", [["a", "b"]]),
        ("actions", [1]),
        ("actions", [[[[0.5]], [[1.0]]]]),
        ("label", ["town"]),
        ("label", [0.5]),
    ],
)
def test_a_column_that_can_hold_no_actions_or_labels_is_refused_by_name(name, values):
    with pytest.raises(ValueError, match=f"`{name}` is a column of type"):
        rows = dataset_of([images([(8, 8)] * 2)]).add_column(name, values)
        VideoClips(rows).check_rows(num_classes=3)


def images(sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    return [np.zeros((*size, 3), np.uint8) for size in sizes]


def dataset_of(videos: list, **columns) -> Dataset:
    types = {"actions": List(Value("int64")), "label": ClassLabel(names=list("abc")), "source": Value("string")}
    features = Features({"video": List(Image())} | {column: types[column] for column in columns})
    return Dataset.from_dict({"video": videos} | columns, features=features)


@pytest.mark.parametrize("sizes", [[(8, 8), (8, 4)], [(8, 4), (8, 4)]])
def test_a_frame_of_another_size_is_named_wherever_it_is(sizes):
    rows = dataset_of([images([(8, 8)] * 2), images(sizes)], source=["a.npz", "b.npz"])
    with pytest.raises(BadExampleError, match=r"Trajectory 1 \('b.npz'\) has frames of .*\(8, 4\).*`--size`"):
        VideoClips(rows).check_rows()


def test_a_video_file_of_another_size_is_named(tmp_path):
    for file, size in (("a", (32, 48)), ("b", (48, 32))):
        write_video(tmp_path / "videos" / f"{file}.mp4", gray_frames(3, *size))
    (tmp_path / "videos" / "metadata.jsonl").write_text('{"file_name": "a.mp4"}\n{"file_name": "b.mp4"}\n')
    with pytest.raises(BadExampleError, match=r"Trajectory 1 \('.*b.mp4'\) has frames of \[\(48, 32\)\]"):
        VideoClips(load_split(str(tmp_path / "videos"), "train")).check_rows()


def test_what_a_clip_cannot_read_is_named():
    rows = dataset_of([images([(8, 8), (8, 4)])])
    with pytest.raises(BadExampleError, match="Trajectory 0 has frames that cannot be read"):
        VideoClips(rows).clip(0, 0, 2)


def test_rows_that_were_selected_are_checked_and_no_others():
    videos, actions = [images([(8, 8)] * 2)] * 3, [[0, 1], [0, 5], [1, 1]]
    rows = dataset_of(videos, actions=actions, label=[0, 1, 2])
    VideoClips(rows.select([2, 0])).check_rows(num_actions=2)
    with pytest.raises(BadExampleError, match="Trajectory 1 has the action 5 at frame 1"):
        VideoClips(rows.select([2, 1])).check_rows(num_actions=2)
    with pytest.raises(BadExampleError, match="Trajectory 2 has the label 2, but there are 2 classes"):
        VideoClips(rows).check_rows(num_classes=2)


def test_actions_that_are_joined_are_counted_before_they_are():
    rows = dataset_of([images([(8, 8)] * 2)], actions=[[0, 3]])
    VideoClips(rows, combine_actions=ActionCombiner("joint", 4)).check_rows(num_actions=16)
    with pytest.raises(BadExampleError, match="the action 3 at frame 1"):
        VideoClips(rows, combine_actions=ActionCombiner("joint", 3)).check_rows(num_actions=9)


def test_rows_of_cached_latents_are_checked_and_an_action_fewer_than_frames_is_no_fault(tmp_path):
    actions = [[0, 1, 2], [2, 1], [0, -1, 1]]
    features = Features({"actions": List(Value("int64")), "source": Value("string")})
    for split, rows in (("train", actions), ("good", actions[:2])):
        carried = Dataset.from_dict({"actions": rows, "source": list("abc"[: len(rows)])}, features=features)
        source, folder = LatentSource("vae", 1.0, "dataset", len(rows), 8), tmp_path / split
        folder.mkdir()
        latents = [np.zeros((3, 4, 2, 2), np.float16)] * len(rows)
        write_shard(source.shard_path(folder, 0), latents, carried.with_format("arrow")[:], features, source)
    with pytest.raises(BadExampleError, match=r"Trajectory 2 \('c'\): `actions\[1\]` is -1"):
        LatentDataset(tmp_path).check_rows()
    latents = LatentDataset(tmp_path, "good")
    latents.check_rows(3)
    assert latents.clip(1, 0, 3).actions.tolist() == [2, 1, 1] and latents.clip(1, 2, 1).actions.tolist() == [1]
    with pytest.raises(BadExampleError, match=r"Trajectory 0 \('a'\) has the action 2 at frame 2"):
        latents.check_rows(2)
