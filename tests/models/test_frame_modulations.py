"""All steps of a frame share what depends on time and conditions alone, and that changes nothing but the time it takes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import fill_cache, models_with_clips, predict, property_test, random_clip, tiny_transformer

from diffusers_far.models.frame_network import FARAdaLayerNorm
from diffusers_far.models.frame_transformer import MAX_MODULATION_ROWS
from diffusers_far.models.frames import FrameBatch


def frame_modulations(model, clip, timesteps: torch.Tensor):
    """Of the clip's last frame."""
    last = clip.frames(clip.num_frames - 1, clip.num_frames)
    frame = FrameBatch(last.latents, last.actions)
    return model.frame_modulations(frame, timesteps, last.class_labels)


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
    timesteps, last = torch.tensor(timesteps), clip.num_frames - 1
    kv_cache, frame = fill_cache(model, clip.frames(0, last)), clip.frames(last, last + 1)
    for timestep, modulation in zip(timesteps, frame_modulations(model, clip, timesteps)):
        alone = replace(frame, timestep=torch.full_like(frame.timestep, float(timestep)))
        expected = predict(model, alone, kv_cache=kv_cache)
        found = model(frame.latents, kv_cache=kv_cache, modulation=modulation).sample
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("long_patch_size", [None, 2], ids=["base", "long"])
def test_each_modulation_runs_once_a_frame_and_not_once_a_step(long_patch_size):
    model = tiny_transformer(long_patch_size=long_patch_size, num_actions=3)
    clip, timesteps = random_clip(model, 5), torch.tensor([900.0, 500.0, 100.0])
    kv_cache = fill_cache(model, clip.frames(0, 4))
    rows = count_rows(model)
    for modulation in frame_modulations(model, clip, timesteps):
        model(clip.latents[:, 4:], kv_cache=kv_cache, modulation=modulation)
    assert rows == [2 * 3] * 5  # two samples at three steps, for norm1 and norm2 of two blocks and for norm_out


def test_the_steps_of_a_large_batch_are_taken_one_by_one():
    model, timesteps = tiny_transformer(), torch.arange(MAX_MODULATION_ROWS // 2 + 1, 0, -1)
    clip = random_clip(model, 1)  # of two samples
    assert frame_modulations(model, clip, timesteps) is None
    assert len(frame_modulations(model, clip, timesteps[1:])) == MAX_MODULATION_ROWS // 2


def test_blocks_that_are_compiled_or_offloaded_compute_their_own():
    timesteps = torch.tensor([900.0, 100.0])
    compiled, offloaded = tiny_transformer(), tiny_transformer()
    compiled.compile_repeated_blocks()
    offloaded.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    for model in (compiled, offloaded):
        assert frame_modulations(model, random_clip(model, 1), timesteps) is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"timestep": 500}, "`timestep` was given beside `modulation`"),
        ({"actions": torch.zeros(2, 1, dtype=torch.int64)}, "`actions` was given beside `modulation`"),
        ({"update_cache": True}, "`modulation` was given, but it is for one noisy frame"),
        ({"kv_cache": None}, "`modulation` was given, but it is for one noisy frame"),
        ({"hidden_states": torch.zeros(1, 1, 4, 4, 6)}, "hidden_states` has a batch of 1"),
        ({"modulation": None}, "`timestep` is None"),
    ],
)
def test_what_a_modulation_knows_is_not_given_twice(arguments, message):
    model = tiny_transformer(num_actions=3)
    clip = random_clip(model, 2)
    (modulation,) = frame_modulations(model, clip, torch.tensor([500.0]))
    given = {"hidden_states": clip.latents[:, 1:], "kv_cache": fill_cache(model, clip.frames(0, 1), max_frames=3)}
    with pytest.raises(ValueError, match=message):
        model(**given | {"modulation": modulation} | arguments)


def test_the_modulation_of_another_model_is_refused():
    model, other = tiny_transformer(), tiny_transformer(num_layers=1)
    clip = random_clip(model, 1)
    (modulation,) = frame_modulations(other, clip, torch.tensor([500.0]))
    with pytest.raises(ValueError, match="make it with `frame_modulations` of this model"):
        model(clip.latents, kv_cache=fill_cache(model, clip.frames(0, 0)), modulation=modulation)
