import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value

from diffusers_far.data.rows import ActionCombiner, BadExampleError
from diffusers_far.data.video_clips import VideoClips


def dataset_of(num_frames: int, **columns) -> Dataset:
    """One trajectory of so many small frames."""
    features = {"video": List(Image()), "label": Value("int64"), "seed": Value("int64")}
    features["actions"] = (
        List(Value("int64")) if isinstance(columns["actions"][0], int) else List(List(Value("float32")))
    )
    frames = [np.full((4, 4, 3), number, np.uint8) for number in range(num_frames)]
    row = {"video": [frames], "label": [2], "seed": [5], "actions": [columns["actions"]]}
    return Dataset.from_dict(row, features=Features(features))


def test_a_clip_has_its_frames_their_actions_and_the_label(trajectories, videos):
    clip = VideoClips(trajectories).clip(3, 2, 3)
    assert np.array_equal(clip.frames.permute(0, 2, 3, 1), videos[3][2:5])
    assert clip.actions.tolist() == [32, 33, 34] and clip.label is None
    assert VideoClips(dataset_of(3, actions=[0, 1, 2])).clip(0, 0, 1).label == 2


def test_an_action_fewer_than_frames_is_no_fault_wherever_the_clip_ends():
    clips = VideoClips(dataset_of(4, actions=[0, 1, 2]))
    assert clips.clip(0, 1, 3).actions.tolist() == [1, 2, 2]
    assert clips.clip(0, 3, 1).actions.tolist() == [2]


def test_continuous_actions_are_combined_where_frames_are_skipped():
    clips = VideoClips(dataset_of(4, actions=[[0.5], [1], [2], [4]]), combine_actions=ActionCombiner("sum"))
    assert clips.clip(0, 0, 2, interval=2).actions.tolist() == [[1.5], [6]]
    assert clips.num_actions is None


def test_actions_that_do_not_fit_the_frames_are_named():
    with pytest.raises(BadExampleError, match="Trajectory 0: `actions` has 2 for 4 frames"):
        VideoClips(dataset_of(4, actions=[0, 1])).clip(0, 0, 1)


def test_a_selection_of_rows_has_its_own_actions(trajectories):
    assert VideoClips(trajectories.select([3, 0])).clip(1, 0, 2).actions.tolist() == [0, 1]
