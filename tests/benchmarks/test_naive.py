"""The naive reference is equal in result, and works as wastefully as it says."""

import re
from pkgutil import resolve_name

import pytest
import torch
from tiny_models import predict, predict_cached, random_clip, tiny_transformer

from benchmarks import naive as naive_module
from benchmarks.naive import NaiveFAR


ROUNDING = {"atol": 1e-5, "rtol": 1e-5}  # float32
KINDS = [{}, {"long_patch_size": 2}, {"long_patch_size": 4, "patch_size": 2}]


def model_and_clip(config: dict, num_frames: int = 7):
    model = tiny_transformer(num_actions=3, **config)
    return model, random_clip(model, num_frames, 4, 8)


def write(naive: NaiveFAR, clip, parts: list[int]):
    """A cache of the first frames of a clip, written in parts."""
    cache, first = None, 0
    for num_frames in parts:
        part = clip.frames(first, first + num_frames)
        cache, first = naive.write(part.latents, part.actions, cache), first + num_frames
    return cache


@pytest.mark.parametrize("config", KINDS)
@pytest.mark.parametrize("parts", [[6], [1] * 6, [2, 1, 3]])
def test_a_step_is_equal_however_the_context_was_written(config, parts):
    model, clip = model_and_clip(config)
    clip = clip.clean_but_last()
    clip.timestep[:, -1] = 400
    naive = NaiveFAR(model)
    step = naive.step(clip.latents[:, -1:], 400.0, clip.actions[:, -1:], write(naive, clip, parts))
    torch.testing.assert_close(step, predict_cached(model, clip), **ROUNDING)


@pytest.mark.parametrize("config", KINDS)
def test_the_velocity_of_a_whole_clip_is_equal(config):
    model, clip = model_and_clip(config)
    velocity = NaiveFAR(model)(clip.latents, clip.timestep, clip.actions)
    torch.testing.assert_close(velocity, predict(model, clip), **ROUNDING)


@pytest.mark.parametrize("config", KINDS)
def test_training_has_equal_gradients(config):
    model, clip = model_and_clip(config)
    gradients = []
    for velocity in (model(clip.latents, clip.timestep, clip.actions).sample, NaiveFAR(model)(*inputs_of(clip))):
        model.zero_grad(set_to_none=True)
        velocity.square().mean().backward()
        # What nobody reads is not trained.
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.requires_grad})
    for name, theirs in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], theirs, **ROUNDING, msg=name)


def inputs_of(clip) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return clip.latents, clip.timestep, clip.actions


def test_forgetting_is_writing_without_the_forgotten_frames_where_nobody_saw_them():
    """In the first layer keys depend on their own frame alone, so with one layer to read nothing is left of others."""
    model, clip = model_and_clip({"long_patch_size": 2, "num_layers": 1})
    naive = NaiveFAR(model)
    forgotten = write(naive, clip, [6]).without_first(2)
    anew = write(naive, clip.frames(2, 7), [4])
    noisy = clip.frames(6, 7)
    steps = [naive.step(noisy.latents, 400.0, noisy.actions, cache) for cache in (forgotten, anew)]
    torch.testing.assert_close(*steps, **ROUNDING)


def test_every_step_rotates_all_keys_in_every_layer_and_masks_all_tokens(monkeypatch):
    model, clip = model_and_clip({"long_patch_size": 2})
    naive, rotated, masked = NaiveFAR(model), [], []
    cache = write(naive, clip, [6])
    rotate, mask = naive_module.apply_rotary_emb, naive_module.dense_mask

    def watch_rotation(states, tables):
        rotated.append(states.shape[2])
        return rotate(states, tables)

    def watch_mask(frames):
        masked.append(len(frames))
        return mask(frames)

    monkeypatch.setattr(naive_module, "apply_rotary_emb", watch_rotation)
    monkeypatch.setattr(naive_module, "dense_mask", watch_mask)
    noisy = clip.frames(6, 7)
    naive.step(noisy.latents, 400.0, noisy.actions, cache)
    plan = model.context_plan(7, 4, 8)
    assert rotated == [plan.tokens_per_short_frame, plan.num_tokens] * 2
    assert masked == [plan.num_tokens]


def test_only_a_write_keeps_the_keys_of_all_layers(monkeypatch):
    """Else each step would ask the system for memory as large as the cache."""
    model, clip = model_and_clip({})
    naive, kept = NaiveFAR(model), []
    run = naive._run
    monkeypatch.setattr(naive, "_run", lambda *inputs, **named: kept.append(run(*inputs, **named)) or kept[-1])
    cache = write(naive, clip, [6])
    naive.step(clip.latents[:, -1:], 400.0, clip.actions[:, -1:], cache)
    assert [len(keys.layers) for _, keys in kept] == [model.config.num_layers, 0]


def test_its_head_names_rooms_that_exist():
    names = re.findall(r"`([a-z_]+\.[a-z_]+\.[A-Za-z_]+)`", naive_module.__doc__)
    assert len(names) > 6
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(resolve_name(f"diffusers_far.{module}"), attribute), name
