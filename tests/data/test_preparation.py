import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image
from video_files import frame_numbers, gray_frames

from diffusers_far.data.preparation import Preparation, RowForm, write_trajectories
from diffusers_far.data.rows import ActionCombiner, BadExampleError
from diffusers_far.data.sources import Trajectory
from diffusers_far.pictures import fit_frame


def decode(frames: list[bytes]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(frame))) for frame in frames])


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 6, 8, 3), dtype=np.uint8)


def test_frames_are_kept_to_the_bit(noise):
    prepared = Preparation()(Trajectory("a", iter(noise), [0, 1, 2, 0, 1, 2, 0]))
    assert np.array_equal(decode(prepared.frames), noise)
    assert prepared.frame_size == (6, 8)
    assert prepared.actions.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_an_interval_keeps_every_kth_frame_and_the_sum_of_the_actions_between():
    actions = np.arange(7.0)[:, None]
    preparation = Preparation(frame_interval=3, combine_actions=ActionCombiner("sum"))
    prepared = preparation(Trajectory("a", iter(gray_frames(7)), actions))
    assert frame_numbers(decode(prepared.frames)) == [0, 3, 6]
    assert prepared.actions.tolist() == [[0 + 1 + 2], [3 + 4 + 5], [6 + 6 + 6]]


@pytest.mark.parametrize(
    ("actions", "choices"),
    [([0, 1, 2], "joint.*first.*last"), ([[0.5], [1.0], [2.0]], "sum.*mean.*first.*last.*stack")],
)
def test_an_interval_that_would_lose_actions_is_refused_with_the_choices(actions, choices):
    with pytest.raises(ValueError, match=f"`frame_interval` is 2.*{choices}") as raised:
        Preparation(frame_interval=2)(Trajectory("a", gray_frames(3), actions))
    assert not isinstance(raised.value, BadExampleError), "a wrong request must not be skipped example by example"


def test_a_rule_that_does_not_suit_the_actions_is_no_fault_of_the_example():
    with pytest.raises(ValueError, match="'a.npz'.*discrete") as raised:
        Preparation(2, combine_actions=ActionCombiner("sum"))(Trajectory("a.npz", gray_frames(3), [0, 1, 2]))
    assert not isinstance(raised.value, BadExampleError)


@pytest.mark.parametrize(
    ("frames", "actions", "message"),
    [
        (gray_frames(4), [0, 1], "has 2 for 4 frames"),
        (gray_frames(2), [[0.0], [float("nan")]], r"`actions\[1\]` is \[nan\]"),
        ([], None, "has 0 frames"),
        ([gray_frames(1, 4, 4)[0], gray_frames(1, 4, 6)[0]], None, r"sizes \[\(4, 4\), \(4, 6\)\]"),
    ],
)
def test_a_damaged_trajectory_is_named(frames, actions, message):
    with pytest.raises(BadExampleError, match=f"'a.npz'.*{message}"):
        Preparation()(Trajectory("a.npz", frames, actions))


def test_fitting_cuts_the_largest_centred_part():
    frame = np.zeros((24, 32, 3), np.uint8)
    frame[:, 4:28] = 200  # The centred square; what is outside it must not be seen.
    assert (fit_frame(frame, (12, 12)) == 200).all()
    assert fit_frame(frame, (6, 16)).shape == (6, 16, 3)


def test_fitting_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    inner = fit_frame(stripes, (8, 8))[1:-1, 1:-1]
    assert abs(inner.astype(int) - 100).max() <= 2


def test_a_frame_that_has_its_size_is_left_as_it_is(noise):
    for size in ((6, 8), None):
        assert np.array_equal(fit_frame(noise[0], size), noise[0])


@pytest.mark.parametrize(
    ("settings", "message"), [({"frame_interval": 0}, "`frame_interval` is 0"), ({"size": (0, 8)}, "`size` is")]
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Preparation(**settings)


@pytest.mark.parametrize(
    ("trajectory", "message"),
    [
        (Trajectory("b", gray_frames(2, 8, 8), [0, 1], "run"), r"frames of \(8, 8\).*`size`"),
        (Trajectory("b", gray_frames(2), None, "run"), "actions of shape None"),
        (Trajectory("b", gray_frames(2), [[0.5], [1]], "run"), r"actions of shape \(1,\)"),
        (Trajectory("b", gray_frames(2), [0, 1]), "label None"),
    ],
)
def test_a_trajectory_unlike_the_others_is_named(trajectory, message):
    form = RowForm((32, 48), (), ("run", "walk"))
    Preparation()(Trajectory("a", gray_frames(2), [0, 1], "walk")).require_form(form)
    with pytest.raises(BadExampleError, match=f"'b' has .*{message}"):
        Preparation()(trajectory).require_form(form)


@pytest.mark.parametrize("actions", [[0, 1, 2, 0, 1, 2, 0], np.arange(14, dtype=np.float32).reshape(7, 2), None])
def test_a_written_file_gives_back_its_rows_each_a_row_group(tmp_path, noise, actions):
    prepared = [Preparation()(Trajectory("a", noise, actions, label)) for label in ("walk", "run")]
    features = RowForm((6, 8), prepared[0].action_shape, ("run", "walk")).features
    write_trajectories(tmp_path / "train-00000.parquet", prepared, features)

    assert pq.read_metadata(tmp_path / "train-00000.parquet").num_row_groups == 2
    rows = load_dataset(str(tmp_path), split="train")
    assert rows.features == features
    assert rows["label"] == [1, 0]
    assert all(np.array_equal(np.stack([np.asarray(image) for image in row["video"]]), noise) for row in rows)
    if actions is not None:
        assert np.array_equal(rows[1]["actions"], actions)


def test_kept_columns_follow_the_kept_frames_where_there_is_a_value_for_each(noise):
    columns = {"position": np.arange(14).reshape(7, 2) / 2, "weather": "rain", "seed": 5, "goals": [1, 2, 3]}
    trajectory = Trajectory("a", noise, columns=columns)
    kept = Preparation(frame_interval=3)(trajectory).columns
    assert kept["position"].tolist() == [[0, 0.5], [3, 3.5], [6, 6.5]]
    assert kept["weather"] == "rain" and kept["seed"] == 5 and kept["goals"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0] * 6, "6 of 'rewards' for 7 frames"),
        ([0] * 8, "8 of 'rewards' for 7 frames"),
        ([[0], [0, 1]], "cannot be kept"),
        ([{}] * 7, "cannot be kept: it holds object"),
        (np.array(["2026-01-01"], "datetime64[D]"), "cannot be kept: it holds datetime64"),
    ],
)
def test_a_column_that_cannot_be_kept_is_named(noise, values, message):
    with pytest.raises(BadExampleError, match=f"'a.npz' has .*{message}"):
        Preparation(frame_interval=3)(Trajectory("a.npz", noise, columns={"rewards": values}))


@pytest.mark.parametrize("other", [[0.5, 1.5], 3, ["a", "b"], [[1], [2]], [True, False]])
def test_a_column_unlike_the_first_trajectorys_is_named(other):
    form = Preparation()(Trajectory("a", gray_frames(2), columns={"score": [1, 2]})).form(None)
    Preparation()(Trajectory("b", gray_frames(2), columns={"score": [4]})).require_form(form)
    with pytest.raises(BadExampleError, match="'b' has 'score' as .*the first trajectory's is"):
        Preparation()(Trajectory("b", gray_frames(2), columns={"score": other})).require_form(form)
