"""All steps of a frame share what depends on time and conditions alone, and that changes nothing but the time it takes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import fill_cache, models_with_clips, predict, property_test, random_clip, tiny_transformer

from diffusers_far.models.denoising_steps import MAX_ROWS, DenoisingSteps
from diffusers_far.models.transformer_far import FARAdaLayerNorm


def velocities(model, clip, timesteps: torch.Tensor, steps: DenoisingSteps | None) -> list[torch.Tensor]:
    """Of the clip's last frame at each timestep, against a cache of the others."""
    kv_cache, last = fill_cache(model, clip.frames(0, clip.num_frames - 1)), clip.num_frames - 1
    frame, found = clip.frames(last, last + 1), []
    for index, timestep in enumerate(timesteps):
        if steps is not None:
            steps.index = index
        at_step = replace(frame, timestep=torch.full_like(frame.timestep, float(timestep)))
        found.append(predict(model, at_step, kv_cache=kv_cache, denoising_steps=steps))
    return found


def count_rows(model) -> list[int]:
    """Rows that the modulations multiply from here on, call by call."""
    rows = []
    for module in model.modules():
        if isinstance(module, FARAdaLayerNorm):
            module.linear.register_forward_pre_hook(lambda linear, args: rows.append(args[0][..., 0].numel()))
    return rows


@property_test
@given(models_with_clips(min_frames=2), st.lists(st.integers(1, 1000), min_size=1, max_size=4))
def test_every_step_is_what_it_is_alone(model_and_clip, timesteps):
    model, clip = model_and_clip
    timesteps = torch.tensor(timesteps)
    together = velocities(model, clip, timesteps, DenoisingSteps(timesteps))
    for found, expected in zip(together, velocities(model, clip, timesteps, None)):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("long_patch_size", [None, 2], ids=["base", "long"])
def test_each_modulation_runs_once_a_frame_and_not_once_a_step(long_patch_size):
    model = tiny_transformer(long_patch_size=long_patch_size, num_actions=3)
    clip, timesteps = random_clip(model, 5), torch.tensor([900.0, 500.0, 100.0])
    kv_cache = fill_cache(model, clip.frames(0, 4))
    steps, rows = DenoisingSteps(timesteps), count_rows(model)
    for steps.index in range(3):
        predict(model, clip.frames(4, 5), kv_cache=kv_cache, denoising_steps=steps)
    assert rows == [2 * 3] * 5  # two samples at three steps, for norm1 and norm2 of two blocks and for norm_out


def test_the_steps_of_a_large_batch_are_taken_one_by_one():
    model, timesteps = tiny_transformer(), torch.arange(MAX_ROWS // 2 + 1, 0, -1)
    clip = random_clip(model, 1)  # of two samples
    kv_cache, steps, rows = fill_cache(model, clip.frames(0, 0)), DenoisingSteps(timesteps), count_rows(model)
    predict(model, clip, kv_cache=kv_cache, denoising_steps=steps)
    assert rows == [2] * 5
