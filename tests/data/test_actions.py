import pickle

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value

from diffusers_far.data.latents import LatentDataset, LatentSource, write_shard
from diffusers_far.data.rows import (
    COMBINATION_RULES,
    ActionCombiner,
    align_actions,
    group_actions,
    join_actions,
    split_joint_actions,
)


DISCRETE = np.array([[0, 1, 2], [2, 2, 1]])  # two kept frames, an interval of 3
CONTINUOUS = np.arange(12, dtype=np.float32).reshape(2, 3, 2)


def test_actions_one_per_frame_are_left_as_they_are():
    assert align_actions([2, 0, 1], 3).tolist() == [2, 0, 1]
    assert align_actions([2, 0, 1], 3).dtype == np.int64
    assert align_actions([[0.5], [1], [2]], 3).tolist() == [[0.5], [1], [2]]
    assert align_actions([[0.5], [1], [2]], 3).dtype == np.float32
    for dtype in (np.int32, np.uint8, np.float32, np.float64, bool):
        aligned = align_actions(np.array([1, 0, 1], dtype), 3)
        assert aligned.dtype == np.int64 and aligned.tolist() == [1, 0, 1]


def test_the_missing_action_that_leads_out_of_the_video_repeats_the_last():
    assert align_actions(np.array([2, 0, 1]), 4).tolist() == [2, 0, 1, 1]
    assert align_actions([[0.5, 1]], 2).tolist() == [[0.5, 1], [0.5, 1]]


@pytest.mark.parametrize(
    ("actions", "num_frames", "message"),
    [
        ([0, 1], 4, "has 2 for 4 frames"),
        ([0, 1, 2, 0, 1], 4, "has 5 for 4 frames"),
        ([], 1, r"shape \(0,\)"),
        ([0, -1, 0], 3, r"`actions\[1\]` is -1"),
        ([[0.0, 1], [float("nan"), 0]], 2, r"`actions\[1\]` is \[nan, 0.0\]"),
        ([[1e300]], 1, r"`actions\[0\]` is \[inf\]"),
        ([0.5, 1.0], 2, r"shape \(2,\) and type float64"),
        ([[0.5], [1.0, 2.0]], 2, "number of channels"),
        ([None, 1], 2, "object"),
        (["left"], 1, "give \\(F,\\) whole numbers"),
        (np.zeros((2, 0)), 2, r"shape \(2, 0\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_actions_that_do_not_fit_are_refused_with_the_place_and_the_value(actions, num_frames, message):
    with pytest.raises(ValueError, match=message):
        align_actions(actions, num_frames)


def test_an_incomplete_last_group_is_filled_with_the_last_action():
    assert group_actions(np.array([0, 1, 2, 3, 4]), 3).tolist() == [[0, 1, 2], [3, 4, 4]]
    assert group_actions(CONTINUOUS[0], 2).tolist() == [[[0, 1], [2, 3]], [[4, 5], [4, 5]]]


@pytest.mark.parametrize("interval", [1, 2, 3, 7])
def test_a_group_holds_the_actions_from_its_kept_frame_to_the_next(interval):
    actions = np.arange(14)
    for group, kept_frame in zip(group_actions(actions, interval), range(0, 14, interval), strict=True):
        assert group[0] == actions[kept_frame]
        assert set(group) == set(actions[kept_frame : kept_frame + interval])


@pytest.mark.parametrize(
    ("rule", "actions", "combined"),
    [
        ("first", DISCRETE, [0, 2]),
        ("last", DISCRETE, [2, 1]),
        ("first", CONTINUOUS, [[0, 1], [6, 7]]),
        ("last", CONTINUOUS, [[4, 5], [10, 11]]),
        ("sum", CONTINUOUS, [[6, 9], [24, 27]]),
        ("mean", CONTINUOUS, [[2, 3], [8, 9]]),
        ("stack", CONTINUOUS, [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]),
    ],
)
def test_each_rule_combines_as_it_says(rule, actions, combined):
    result = ActionCombiner(rule)(actions)
    assert result.tolist() == combined
    assert result.dtype == actions.dtype


def test_joint_actions_are_digits_the_first_action_highest():
    assert ActionCombiner("joint", num_actions=3)(DISCRETE).tolist() == [0 * 9 + 1 * 3 + 2, 2 * 9 + 2 * 3 + 1]


def test_joint_actions_lose_nothing():
    sequences = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    joint = join_actions(sequences, num_actions=4)
    assert sorted(joint) == list(range(64))
    assert np.array_equal(split_joint_actions(joint, num_actions=4, interval=3), sequences)


@pytest.mark.parametrize("rule", COMBINATION_RULES)
def test_with_every_frame_kept_no_rule_changes_an_action(rule):
    if rule not in ("sum", "mean", "stack"):
        actions = np.array([2, 0, 1])
        assert ActionCombiner(rule, 3 if rule == "joint" else None)(actions[:, None]).tolist() == [2, 0, 1]
    if rule != "joint":
        actions = CONTINUOUS[0]
        assert np.array_equal(ActionCombiner(rule)(actions[:, None]), actions)


@pytest.mark.parametrize("rule", ["sum", "mean", "stack"])
def test_rules_of_continuous_actions_refuse_discrete_ones(rule):
    with pytest.raises(ValueError, match=f"{rule}.*discrete.*'joint', 'first', 'last'"):
        ActionCombiner(rule)(DISCRETE)


def test_a_joint_action_of_continuous_actions_is_refused():
    with pytest.raises(ValueError, match="continuous.*'sum'"):
        ActionCombiner("joint", num_actions=3)(CONTINUOUS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("median",), "`rule` is 'median'"),
        (("joint",), "`num_actions` is None"),
        (("sum", 3), "`num_actions` is 3"),
        (("joint", 0), "`num_actions` is 0"),
    ],
)
def test_a_wrong_combiner_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ActionCombiner(*arguments)


def test_a_joint_action_needs_actions_below_their_number_and_a_table_of_reasonable_size():
    with pytest.raises(ValueError, match="has 0 to 2, but `num_actions` is 2"):
        join_actions(DISCRETE, num_actions=2)
    with pytest.raises(ValueError, match="joint actions, above 65536"):
        join_actions(np.zeros((1, 20), np.int64), num_actions=3)


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_clips_of_cached_latents_combine_as_a_prepared_dataset_does(tmp_path, kind):
    actions = np.array([0, 1, 2, 1, 0, 2, 2]) if kind == "discrete" else np.arange(14.0).reshape(7, 2)
    features = Features({"actions": List(Value("int64") if kind == "discrete" else List(Value("float32")))})
    carried = Dataset.from_dict({"actions": [actions.tolist()]}, features=features)
    source = LatentSource("vae", 1.0, "dataset", num_trajectories=1, trajectories_per_shard=1)
    (tmp_path / "train").mkdir()
    latents = np.zeros((7, 1, 1, 1), np.float16)
    write_shard(source.shard_path(tmp_path / "train", 0), [latents], carried.with_format("arrow")[:], features, source)

    combiner = pickle.loads(pickle.dumps(ActionCombiner("joint", 3) if kind == "discrete" else ActionCombiner("sum")))
    clip = LatentDataset(tmp_path, combine_actions=combiner).clip(0, 0, 3, interval=3)
    assert np.array_equal(clip.actions, combiner(group_actions(actions, 3)))
