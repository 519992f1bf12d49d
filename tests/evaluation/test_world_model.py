import json
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_pipeline, tiny_transformer

from diffusers_far.evaluation.metrics import frame_psnr
from diffusers_far.evaluation.world_model import (
    Predictions,
    Walks,
    WorldModelProtocol,
    format_scores,
    load_walks,
    predict_walks,
    score_walks,
)


@pytest.fixture
def protocol() -> WorldModelProtocol:
    return WorldModelProtocol(num_walks=3, first_context_frame=1, num_context_frames=3, num_frames=4)


@pytest.fixture
def walks(dataset, protocol) -> Walks:
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
    recent = Walks(*(part[:, 2:] for part in (walks.video, walks.actions, walks.pose)))
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
    with pytest.raises(ValueError, match="ends before frame 9"):
        load_walks(dataset, replace(protocol, num_frames=5))
