import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from launched import in_threads
from tiny_models import tiny_pipeline, tiny_transformer

from diffusers_far.data.clips import ClipBatch
from diffusers_far.evaluation.metrics import frame_psnr
from diffusers_far.evaluation.world_model import (
    Predictions,
    WorldModelProtocol,
    check_dataset,
    format_scores,
    load_walks,
    measure_walks,
    predict_walks,
    score_walks,
)


@pytest.fixture
def protocol() -> WorldModelProtocol:
    return WorldModelProtocol(
        num_walks=3, first_context_frame=1, num_context_frames=3, num_frames=4, mirrored_actions=(1, 2)
    )


@pytest.fixture
def walks(dataset, protocol) -> ClipBatch:
    return load_walks(dataset, protocol)


@pytest.fixture
def perfect(walks) -> Predictions:
    """The truth as prediction; where the action was the mirrored one, another frame."""
    truth = walks.video[:, 3:]
    return Predictions(
        truth=truth,
        predicted=truth,
        mirrored=1 - truth[:, :1],
        repeated=walks.video[:, 2:3].expand_as(truth),
        reconstructed=truth,
    )


def test_walks_are_the_frames_actions_and_poses_of_the_protocol(walks, videos):
    assert walks.video.shape == (3, 7, 3, 16, 16)
    torch.testing.assert_close(walks.video[1] * 255, torch.from_numpy(videos[1, 1:]).movedim(-1, 1).float())
    assert walks.actions[0].tolist() == [1, 2, 0, 1, 2, 0, 1]
    assert walks.pose[0, :, 2].tolist() == [20.0 * frame for frame in range(1, 8)]


def test_the_truth_is_the_ceiling_and_follows_every_turn(perfect, walks, protocol):
    turns = replace(walks, actions=walks.actions.clone().index_fill(1, torch.tensor(2), 1))
    scores = score_walks(perfect, turns, protocol)
    assert scores["psnr"]["predicted"]["mean"] == 100 and scores["gradient_ratio"] == pytest.approx(1)
    assert scores["gain_on_all_frames"]["mean"] == pytest.approx(100 - scores["psnr"]["repeated"]["mean"])
    assert scores["follows_actions"] == {"mean": 1.0, "half_width": 0.0, "num_samples": 3}
    assert "nearer to the truth than mirrored  100%" in format_scores(scores)


def test_walks_without_a_turn_say_nothing_about_following(perfect, walks, protocol):
    scores = score_walks(perfect, walks, protocol)
    assert scores["follows_actions"]["num_samples"] == 0
    assert "nearer to the truth than mirrored  0 turns" in format_scores(scores)


def test_figures_that_there_are_none_of_are_neither_shown_nor_written_as_numbers(perfect, walks, protocol):
    other_places = walks.pose + 1e4 * torch.arange(walks.pose.shape[1])[:, None]
    scores = score_walks(perfect, replace(walks, pose=other_places), protocol)
    assert scores["by_view"]["seen"]["psnr"]["num_samples"] == 0
    assert "of views seen in the context    no frames" in format_scores(scores)
    json.dumps(scores, allow_nan=False)

    recent = replace(protocol, num_recent_frames=1)
    scores = score_walks(replace(perfect, forgetful=perfect.truth), replace(walks, pose=other_places), recent)
    assert "gain over the last 1 frames, remembered  no frames" in format_scores(scores)
    json.dumps(scores, allow_nan=False)


@pytest.mark.parametrize("short_cache", ["rolling", "2"])
def test_walks_are_predicted_with_the_cache_that_is_asked_for(walks, protocol, short_cache):
    # A window of 3 frames, so that the 4 new ones move it again and again.
    pipe = tiny_pipeline(tiny_transformer(num_actions=3, action_shift=1, long_patch_size=2, short_window=3))
    protocol = replace(protocol, num_inference_steps=2, guidance_scale=1.0)
    exact = predict_walks(pipe, walks, protocol).predicted
    cheap = predict_walks(pipe, walks, replace(protocol, short_cache=short_cache)).predicted
    assert not torch.equal(cheap, exact)


@pytest.mark.parametrize("num_processes", [2, 4])
def test_several_processes_have_each_the_figures_of_one(walks, protocol, num_processes, monkeypatch):
    pipe = tiny_pipeline(tiny_transformer(num_actions=3, action_shift=1))
    protocol = replace(protocol, num_recent_frames=1, num_inference_steps=1, guidance_scale=1.0, batch_size=2)
    expected = measure_walks(pipe, walks, protocol)
    done = []

    def measure(share):
        return measure_walks(pipe, walks, protocol, done.append, share)

    assert in_threads(num_processes, measure, monkeypatch) == [expected] * num_processes
    assert sorted(done) == [1, 2] and {"memory", "follows_actions"} <= set(expected)


def test_memory_is_what_old_frames_gain_on_views_that_only_they_showed(perfect, walks, protocol):
    # Three shown, the last of them recent; of four new ones the first walk has two old views, the recent one and a new one.
    # In the others the recent view was shown before too, so it is neither remembered nor unseen.
    places = torch.tensor([[0.0, 100, 200, 0, 100, 200, 300]] + 2 * [[0.0, 100, 100, 0, 100, 200, 300]])
    pose = torch.stack([places, torch.zeros(3, 7), torch.zeros(3, 7)], dim=2)
    is_lost = torch.tensor([[True, True, True, False]] + 2 * [[True, True, False, False]])[..., None, None, None]
    truth = perfect.truth
    scores = score_walks(
        replace(perfect, forgetful=torch.where(is_lost, 0.5 * truth, truth)),
        replace(walks, pose=pose),
        replace(protocol, num_recent_frames=1),
    )
    remembered, unseen = scores["memory"]["remembered"], scores["memory"]["unseen"]
    assert remembered["share_of_frames"] == pytest.approx(4 / 12) and unseen["share_of_frames"] == pytest.approx(
        5 / 12
    )
    lost = 100 - frame_psnr(0.5 * truth, truth)
    by_walk = [lost[0, :2].mean(), lost[1, 0], lost[2, 0]]
    assert remembered["gain"]["mean"] == pytest.approx(torch.stack(by_walk).mean().item())
    assert unseen["gain"] == {"mean": 0.0, "half_width": 0.0, "num_samples": 3}
    assert "gain over the last 1 frames, remembered" in format_scores(scores)


def test_the_forgetful_prediction_is_that_of_the_recent_frames_alone(walks, protocol):
    pipe = tiny_pipeline(tiny_transformer(num_actions=3, action_shift=1))
    protocol = replace(protocol, num_inference_steps=2, guidance_scale=1.0)
    recent = ClipBatch(frames=walks.frames[:, 2:], actions=walks.actions[:, 2:], pose=walks.pose[:, 2:])
    expected = predict_walks(pipe, recent, replace(protocol, num_context_frames=1))
    predictions = predict_walks(pipe, walks, replace(protocol, num_recent_frames=1))
    assert torch.equal(predictions.forgetful, expected.predicted)
    assert not torch.equal(predictions.forgetful, predictions.predicted)
    assert expected.forgetful is None
    assert "memory" not in score_walks(expected, recent, replace(protocol, num_context_frames=1))


@pytest.mark.parametrize("num_recent_frames", [-1, 3])
def test_recent_frames_that_are_not_some_of_the_context_are_refused(protocol, num_recent_frames):
    with pytest.raises(ValueError, match=f"`num_recent_frames` is {num_recent_frames}"):
        replace(protocol, num_recent_frames=num_recent_frames)


def test_too_few_walks_and_too_short_ones_are_refused(dataset, protocol):
    with pytest.raises(ValueError, match="num_walks"):
        load_walks(dataset, replace(protocol, num_walks=4))
    with pytest.raises(ValueError, match="0 of 3 recordings reach frame 9"):
        load_walks(dataset, replace(protocol, num_frames=5))


def test_only_walks_that_are_long_enough_count(dataset, protocol, walks):
    rows = dataset.to_list()
    rows[0] = {name: value[:7] if isinstance(value, list) else value for name, value in rows[0].items()}
    kept = load_walks(Dataset.from_list(rows, features=dataset.features), replace(protocol, num_walks=2))
    assert torch.equal(kept.video, walks.video[1:])


def test_frames_that_do_not_change_are_scored_apart(perfect, walks, protocol):
    """Where nothing moves, repeating wins; here the first two new frames are the last one of the context."""
    truth = perfect.truth.clone()
    truth[:, :2] = perfect.repeated[:, :2]
    predicted = (truth + 0.01).clamp(max=1)
    scores = score_walks(replace(perfect, truth=truth, predicted=predicted, reconstructed=truth), walks, protocol)
    changed = scores["changed"]
    assert changed["share_of_frames"] == 0.5
    assert [each["num_samples"] for each in changed["psnr_by_horizon"]["predicted"]] == [0, 0, 3, 3]
    assert changed["psnr_by_horizon"]["predicted"][2:] == scores["psnr_by_horizon"]["predicted"][2:]
    assert scores["gain_on_first_frame"]["mean"] < 0 < changed["gain_over_repeating"]["mean"]
    assert "of the 50% that change" in format_scores(scores)
    json.dumps(scores, allow_nan=False)


def test_recordings_where_nothing_changes_have_no_figures_of_change(perfect, walks, protocol):
    scores = score_walks(replace(perfect, truth=perfect.repeated, predicted=perfect.repeated), walks, protocol)
    assert scores["changed"]["share_of_frames"] == 0 and "frames that change   no frames" in format_scores(scores)
    json.dumps(scores, allow_nan=False)


@pytest.mark.parametrize("columns", [["video"], ["video", "actions"], ["video", "actions", "label"]])
def test_poses_and_mirrored_actions_count_only_where_they_are_given(dataset, protocol, columns):
    conditions = {"actions": {"num_actions": 3, "action_shift": 1}, "label": {"num_classes": 3}}
    pipe = tiny_pipeline(tiny_transformer(**{k: v for name in columns for k, v in conditions.get(name, {}).items()}))
    protocol = replace(protocol, mirrored_actions=None, num_inference_steps=1).with_defaults_of(pipe)
    rows = dataset.select_columns(columns)
    check_dataset(rows, pipe, protocol)
    walks = load_walks(rows, protocol)
    scores = score_walks(predict_walks(pipe, walks, protocol), walks, protocol)
    assert {"by_view", "follows_actions", "memory"}.isdisjoint(scores)
    assert "mirrored" not in format_scores(scores) and "views" not in format_scores(scores)


@pytest.mark.parametrize(
    ("column", "conditions"), [("actions", {"num_actions": 3}), ("label", {"num_classes": 3}), ("pose", {})]
)
def test_a_missing_column_that_is_needed_is_named_before_anything_is_read(dataset, protocol, column, conditions):
    pipe = tiny_pipeline(tiny_transformer(**conditions))
    with pytest.raises(ValueError, match=f"no `{column}`"):
        check_dataset(dataset.remove_columns(column), pipe, replace(protocol, num_recent_frames=column == "pose"))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("actions", [0, 1, -1, 0, 1, 2, 0, 1], r"Trajectory 1: `actions\[2\]` is -1"),
        ("actions", [0, 1, 2], "Trajectory 1: .*has 3 for 8 frames"),
        ("pose", [[0.0, 0.0]] * 8, r"Trajectory 1: `pose` has shape \(8, 2\)"),
    ],
)
def test_conditions_that_do_not_fit_are_told_with_their_row(dataset, protocol, column, value, message):
    rows = dataset.to_list()
    rows[1][column] = value
    with pytest.raises(ValueError, match=message):
        load_walks(Dataset.from_list(rows, features=dataset.features), protocol)


def test_mirrored_actions_are_those_that_the_pipeline_names_left_and_right(protocol):
    transformer = tiny_transformer(num_actions=3, action_shift=1)
    names = ["noop", "Left", "right"]
    protocol = replace(protocol, mirrored_actions=None)
    assert protocol.with_defaults_of(tiny_pipeline(transformer, action_names=names)).mirrored_actions == (1, 2)
    assert protocol.with_defaults_of(tiny_pipeline(transformer)).mirrored_actions is None


@pytest.mark.parametrize("mirrored_actions", [(1, 3), (-1, 1), (1, 1)])
def test_mirrored_actions_that_the_model_does_not_have_are_refused(protocol, mirrored_actions):
    pipe = tiny_pipeline(tiny_transformer(num_actions=3, action_shift=1))
    with pytest.raises(ValueError, match="`mirrored_actions`"):
        replace(protocol, mirrored_actions=mirrored_actions).with_defaults_of(pipe)
