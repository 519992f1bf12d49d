"""Training with clean context: every short frame is denoised as if all frames before it were finished."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import (
    base_and_long,
    models_with_clips,
    predict,
    property_test,
    random_clip,
    tiny_transformer,
    using_backend,
)

from diffusers_far import FlexRoPEConfig, apply_flex_rope


def twins_of(clip):
    """Noisy latents and noise levels for a clip whose own latents are the clean ones."""
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(clip.latents.shape, generator=generator)
    timestep = torch.randint(1, 1001, clip.latents.shape[:2], generator=generator).float()
    return replace(clip, latents=noisy, timestep=timestep)


def one_by_one(model, clip, noisy):
    """Each short frame alone noisy, behind and before clean frames."""
    num_short = predict(model, clip).shape[1]
    velocities = []
    for short_frame in range(num_short):
        frame = clip.num_frames - num_short + short_frame
        latents, timestep = clip.latents.clone(), torch.full(clip.latents.shape[:2], -1.0)
        latents[:, frame], timestep[:, frame] = noisy.latents[:, frame], noisy.timestep[:, frame]
        velocities.append(predict(model, replace(clip, latents=latents, timestep=timestep))[:, short_frame])
    return torch.stack(velocities, dim=1)


@property_test
@given(models_with_clips(min_frames=1), st.booleans())
def test_each_twin_is_denoised_as_after_finished_frames(model_and_clip, decays):
    model, clip = model_and_clip
    if decays:
        apply_flex_rope(model, FlexRoPEConfig(0.2, "constant"))
    noisy = twins_of(clip)
    velocity = predict(model, noisy, clean_hidden_states=clip.latents)
    torch.testing.assert_close(velocity, one_by_one(model, clip, noisy), atol=1e-5, rtol=1e-5)


@base_and_long
def test_flex_attention_equals_native_attention(long_patch_size):
    model = tiny_transformer(long_patch_size=long_patch_size)
    clip = random_clip(model, 6)
    noisy = twins_of(clip)
    expected = predict(model, noisy, clean_hidden_states=clip.latents)
    with using_backend(model, "flex"):
        velocity = predict(model, noisy, clean_hidden_states=clip.latents)
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-4)


def test_the_arguments_are_unchanged_after_a_call():
    model = tiny_transformer(long_patch_size=2, num_actions=3)
    clip = random_clip(model, 6)
    noisy = twins_of(clip)
    tensors = (clip.latents, clip.actions, noisy.latents, noisy.timestep)
    copies = [tensor.clone() for tensor in tensors]
    predict(model, noisy, clean_hidden_states=clip.latents)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies))


def test_clean_frames_beside_a_cache_are_refused():
    model = tiny_transformer()
    clip = random_clip(model, 1)
    kv_cache = model.init_kv_cache(len(clip.latents), *clip.latents.shape[-2:], max_frames=2)
    with pytest.raises(ValueError, match="`clean_hidden_states` was given but `kv_cache` holds the clean frames"):
        predict(model, clip, kv_cache=kv_cache, clean_hidden_states=clip.latents)


def test_clean_frames_of_a_model_without_causality_are_refused():
    model = tiny_transformer(frame_causal=False)
    clip = random_clip(model, 3)
    with pytest.raises(ValueError, match="`clean_hidden_states` was given but no frame is causal"):
        predict(model, clip, clean_hidden_states=clip.latents)


def test_clean_frames_of_another_shape_are_refused():
    model = tiny_transformer()
    clip = random_clip(model, 3)
    with pytest.raises(ValueError, match="`clean_hidden_states` has shape"):
        predict(model, clip, clean_hidden_states=clip.latents[:, 1:])
