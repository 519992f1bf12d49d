from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import tiny_transformer

from diffusers_far.data.clips import Clip
from diffusers_far.data.rows import BadExampleError
from diffusers_far.training import data
from diffusers_far.training.config import FARSettings
from diffusers_far.training.data import check_data


class Latents:
    """Cached latents as far as these functions look at them."""

    dataset_fingerprint, vae_hash = "data", "vae"

    def __init__(self, channels=4, actions=None, label=None):
        self.latent_shape = (channels, 4, 4)
        self.first_clip = Clip(torch.zeros(1, channels, 4, 4), actions, label)

    def check_rows(self, num_actions, num_classes):
        if self.first_clip.actions is not None and (self.first_clip.actions >= num_actions).any():
            raise BadExampleError("Trajectory 0 has the action 3")

    def clip(self, trajectory, start, length):
        return self.first_clip


@pytest.mark.parametrize(
    "model, latents, message",
    [
        ({}, Latents(channels=3), "3 channels but the transformer has `in_channels` 4"),
        ({"num_actions": 3}, Latents(), "takes actions but the latents have none"),
        ({"num_classes": 3}, Latents(), "takes classes but the latents have none"),
        ({"num_actions": 3}, Latents(actions=torch.zeros(1)), "are continuous, but the transformer's are discrete"),
        ({"action_dim": 2}, Latents(actions=torch.zeros(1, dtype=int)), "are discrete, but"),
        (
            {"num_actions": 3},
            Latents(actions=torch.zeros(1, dtype=int)),
            "go up to 4 but the transformer has `num_actions` 3",
        ),
    ],
)
def test_data_that_does_not_fit_the_model_is_refused(model, latents, message):
    with pytest.raises(ValueError, match=message):
        check_data(latents, tiny_transformer(**model), num_fed_actions=5)


def test_data_that_fits_passes():
    check_data(Latents(actions=torch.zeros(1, dtype=int), label=0), tiny_transformer(num_actions=3, num_classes=2), 3)
    check_data(Latents(), tiny_transformer(), None)


def test_the_split_that_is_held_out_is_looked_at_before_the_first_step_too():
    good, bad = (Latents(actions=torch.full((1,), action)) for action in (2, 3))
    check_data(good, tiny_transformer(num_actions=3), 3, good)
    with pytest.raises(BadExampleError, match="Of the split that is held out: Trajectory 0 has the action 3"):
        check_data(good, tiny_transformer(num_actions=3), 3, bad)
    with pytest.raises(ValueError, match="Of the split that is held out: .*3 channels"):
        check_data(good, tiny_transformer(num_actions=3), 3, Latents(channels=3))


def test_a_split_that_is_held_out_and_too_short_is_refused_at_the_start(monkeypatch, tmp_path):
    (tmp_path / "validation").mkdir()
    settings = FARSettings(latents_dir=str(tmp_path), output_dir=str(tmp_path / "run"), num_frames=4)
    monkeypatch.setattr(data, "open_clips", lambda *_: SimpleNamespace(num_frames=np.full(4, 3)))
    with pytest.raises(ValueError, match="split 'validation', which is held out: .* the longest of 4 .* has 3"):
        data.open_validation_clips(settings, None)
    settings.num_frames = 3
    assert data.open_validation_clips(settings, None) is not None
