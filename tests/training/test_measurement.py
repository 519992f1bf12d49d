import argparse

import numpy as np
import pytest
import torch
from tiny_models import tiny_pipeline, tiny_transformer

from diffusers_far.data.latents import LatentClip
from diffusers_far.training.measurement import describe_metrics, measure, side_by_side


class Trajectories:
    """Three trajectories of six random frames."""

    num_frames = np.array([6, 6, 6])
    latent_shape = (4, 4, 4)

    def clip(self, trajectory, start, length, interval=1):
        latents = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(trajectory))
        return LatentClip(latents[start : start + length * interval : interval], torch.ones(length).long(), None)


def arguments(**overrides) -> argparse.Namespace:
    defaults = {
        "num_frames": 5,
        "frame_interval": 1,
        "train_batch_size": 2,
        "num_validation_clips": 3,
        "num_validation_videos": 2,
        "num_validation_frames": 2,
        "num_validation_inference_steps": 2,
    }
    return argparse.Namespace(**{**defaults, **overrides})


@pytest.fixture
def pipe():
    return tiny_pipeline(tiny_transformer(num_actions=3, action_shift=1))


def test_a_measurement_has_losses_psnr_and_the_videos_and_comes_out_the_same_again(pipe):
    measured = measure(arguments(), pipe, Trajectories())
    assert measured.predicted.shape == measured.truth.shape == (2, 2, 3, 8, 8)
    assert {"loss", "loss_at_500", "psnr", "psnr_of_frame_1", "psnr_of_frame_2"} <= measured.metrics.keys()
    frames = [measured.metrics[f"psnr_of_frame_{horizon}"] for horizon in (1, 2)]
    assert measured.metrics["psnr"] == pytest.approx(np.mean(frames))
    assert measure(arguments(), pipe, Trajectories()).metrics == measured.metrics


@pytest.mark.parametrize("nothing", [{"num_validation_videos": 0}, {"num_validation_frames": 5}])
def test_without_videos_only_losses_are_measured(pipe, nothing):
    measured = measure(arguments(**nothing), pipe, Trajectories())
    assert measured.predicted is None and measured.truth is None
    assert all(name.startswith("loss") for name in measured.metrics)


def test_truth_is_on_the_left_and_a_row_is_a_video():
    truth = torch.rand(3, 2, 3, 4, 6)
    predicted = torch.rand(3, 2, 3, 4, 6)
    video = side_by_side(truth, predicted, num_videos=2, gap=1)
    assert video.shape == (2, 3, 2 * 6, 2 * 8)
    assert torch.equal(video[:, :, 1:5, 1:7], truth[0]) and torch.equal(video[:, :, 7:11, 1:7], truth[1])
    assert torch.equal(video[:, :, 1:5, 9:15], predicted[0]) and torch.equal(video[:, :, 7:11, 9:15], predicted[1])
    assert (video[:, :, 5:7] == 1).all() and (video[:, :, :, 7:9] == 1).all()


def test_metrics_fit_a_line():
    assert describe_metrics({"loss": 0.12345, "psnr": 20.0}) == "loss 0.123, psnr 20.000"
