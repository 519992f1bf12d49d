import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from tiny_models import tiny_pipeline, tiny_separable, tiny_transformer

from diffusers_far.data.clips import Clip
from diffusers_far.data.rows import BadExampleError
from diffusers_far.data.video_clips import EncodedDataset
from diffusers_far.models.codec import decode_video
from diffusers_far.training.config import FARSettings
from diffusers_far.training.validation import (
    describe_metrics,
    measure,
    psnr_per_horizon,
    side_by_side,
    validation_clips,
)


class Trajectories:
    """Three trajectories of six random frames."""

    num_frames = np.array([6, 6, 6])
    latent_shape = (4, 4, 4)

    def clip(self, trajectory, start, length, interval=1):
        latents = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(trajectory))
        return Clip(latents[start : start + length * interval : interval], torch.ones(length).long(), None)


def arguments(**overrides) -> FARSettings:
    defaults = {
        "num_frames": 5,
        "frame_interval": 1,
        "train_batch_size": 2,
        "num_validation_clips": 3,
        "num_validation_videos": 2,
        "num_validation_frames": 2,
        "num_validation_inference_steps": 2,
    }
    return FARSettings(output_dir="run", latents_dir="latents", **{**defaults, **overrides})


@pytest.fixture(params=[tiny_transformer, tiny_separable], ids=["FAR", "separable"])
def pipe(request):
    return tiny_pipeline(request.param(num_actions=3, action_shift=1))


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


def test_the_log_shows_a_table_of_the_loss_by_noise_level_and_of_psnr_beside_what_nobody_had_to_learn():
    metrics = {"loss_at_100": 0.5, "loss_at_900": 0.25, "loss": 0.375}
    for name, first, second in (("psnr", 20.0, 18.0), ("repeated_psnr", 15.0, 12.0), ("vae_psnr", 32.6, 32.4)):
        mean = (first + second) / 2
        metrics |= {f"{name}_of_frame_1": first, f"{name}_of_frame_2": second, name: mean}
    assert describe_metrics(metrics).split("\n") == [
        "  noise level                    100     900    mean",
        "  loss                        0.5000  0.2500  0.3750",
        "  predicted frame                  1       2    mean",
        "  PSNR, dB: model              20.00   18.00   19.00",
        "    repeating the last frame   15.00   12.00   13.50",
        "    VAE, of the true frames    32.60   32.40   32.50",
    ]
    assert describe_metrics({"loss": 1.5}) == "  loss                        1.5000"


def test_a_table_of_many_frames_fits_the_screen():
    metrics = {"loss": 1.0, "psnr": 2.0} | {f"psnr_of_frame_{frame}": float(frame) for frame in range(1, 41)}
    lines = describe_metrics(metrics).split("\n")
    assert max(map(len, lines)) <= 100
    assert lines[1].split()[2:] == ["1", "7", "12", "18", "23", "29", "34", "40", "mean"]


def test_repeating_is_measured_on_the_last_frame_of_the_context(pipe):
    measured = measure(arguments(), pipe, Trajectories())
    clips = validation_clips(Trajectories(), 2, 5)
    last = decode_video(pipe.vae, clips.latents[:, 2])[:, None]
    expected = psnr_per_horizon(last, measured.truth)
    assert [measured.metrics[f"repeated_psnr_of_frame_{horizon}"] for horizon in (1, 2)] == pytest.approx(expected)
    assert "vae_psnr" not in measured.metrics  # of cached latents there are no pixels


def test_what_the_vae_loses_is_measured_where_there_are_pixels(pipe):
    videos = np.random.default_rng(0).integers(0, 256, (3, 6, 8, 8, 3), dtype=np.uint8)
    rows = {"video": [list(video) for video in videos], "actions": [[1] * 6] * 3}
    data = Dataset.from_dict(rows, features=Features({"video": List(Image()), "actions": List(Value("int64"))}))
    clips = EncodedDataset(data, pipe.vae)
    measured = measure(arguments(), pipe, clips)
    true = validation_clips(clips, 2, 5, vae=pipe.vae, keep_frames=True).frames[:, 3:] / 255
    assert measured.metrics["vae_psnr"] == pytest.approx(np.mean(psnr_per_horizon(measured.truth, true)))


def test_a_validation_without_steps_of_its_own_takes_those_of_the_pipeline(pipe, monkeypatch):
    pipe.register_to_config(num_inference_steps=3)
    measure(arguments(num_validation_inference_steps=None), pipe, Trajectories())
    assert pipe.num_timesteps == 3 * 2


def test_held_out_latents_that_are_not_finite_are_named():
    class Faulty(Trajectories):
        def clip(self, trajectory, *place):
            clip = super().clip(trajectory, *place)
            clip.latents[0, 0, 0, 0] = float("inf") if trajectory == 1 else 0
            return clip

    with pytest.raises(BadExampleError, match="held out has NaN or infinite values in trajectory 1; mend or remove"):
        validation_clips(Faulty(), 3, 5)
