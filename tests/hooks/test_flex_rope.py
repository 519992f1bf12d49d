import copy
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import (
    base_and_long,
    compiled_rollout,
    fill_cache,
    half_precision_error,
    models_with_clips,
    predict,
    predict_cached,
    property_test,
    random_clip,
    randomize,
    sharpened,
    spy_attention,
    tiny_pipeline,
    tiny_transformer,
    using_backend,
)
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_far import FlexRoPEConfig, apply_flex_rope, remove_flex_rope


def slope_growing_with_time(frame_index, step_index, num_inference_steps):
    return 0.02 * frame_index**2


FRAME_SCHEDULES = ("constant", "beyond_training", slope_growing_with_time)


def masks_of(calls: list[tuple]) -> list[torch.Tensor | None]:
    return [mask for *_, mask in calls]


def rollout(model, clip) -> list[torch.Tensor]:
    """Each frame of the clip, denoised against the clean frames before it; cached, one frame at a time."""
    kv_cache = model.init_kv_cache(*clip.latents.shape[::2][:1], *clip.latents.shape[-2:], max_frames=clip.num_frames)
    velocities = []
    for frame in range(clip.num_frames):
        noisy = clip.frames(frame, frame + 1)
        velocities.append(predict(model, noisy, kv_cache=kv_cache))
        if frame + 1 < clip.num_frames:
            predict(model, replace(noisy, timestep=-1), kv_cache=kv_cache, update_cache=True)
    return velocities


# What is added to the logits


@base_and_long
def test_a_constant_slope_takes_slope_per_frame_of_distance_from_each_logit(long_patch_size):
    model = tiny_transformer(long_patch_size=long_patch_size)
    apply_flex_rope(model, FlexRoPEConfig(0.3, "constant"))
    with spy_attention() as calls:
        predict(model, random_clip(model, 5))
    tokens_per_frame = [24] * 5 if long_patch_size is None else [6] * 2 + [24] * 3
    frames = torch.tensor([frame for frame, count in enumerate(tokens_per_frame) for _ in range(count)])
    expected = 0.3 * (frames[None] - frames[:, None])
    expected[frames[None] > frames[:, None]] = float("-inf")
    for mask in masks_of(calls):
        assert mask.dtype == torch.float32
        # The last layer has no queries of long frames.
        torch.testing.assert_close(mask[0, 0], expected[expected.shape[0] - mask.shape[-2] :])


def test_beyond_training_the_slope_grows_over_one_more_trained_length():
    model = tiny_transformer()
    clip = random_clip(model, 12, 1, 1)
    apply_flex_rope(model, FlexRoPEConfig(0.3, "beyond_training", trained_frames=4))
    with spy_attention() as calls:
        predict(model, clip)
    slope = torch.tensor([0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1]) * 0.3
    for mask in masks_of(calls):
        torch.testing.assert_close(mask[0, 0, :, 0], -slope * torch.arange(12))


def test_a_single_frame_decays_from_nothing():
    model = tiny_transformer()
    clip = random_clip(model, 1)
    expected = predict(model, clip)
    apply_flex_rope(model, FlexRoPEConfig(0.3, "constant"))
    torch.testing.assert_close(predict(model, clip), expected, atol=1e-6, rtol=1e-6)


@base_and_long
def test_at_inference_the_bias_is_one_row_of_keys_for_each_frame(long_patch_size):
    model = tiny_transformer(long_patch_size=long_patch_size)
    clip = random_clip(model, 8)
    apply_flex_rope(model, FlexRoPEConfig(0.3, "constant"))
    with spy_attention() as calls:
        kv_cache = fill_cache(model, clip.frames(0, 7), chunks=[1, 4, 2])
        predict(model, clip.frames(7, 8), kv_cache=kv_cache)
    for _, key, _, mask in calls:
        assert mask.shape == (1, 1, 1, key.shape[1])
        assert mask.dtype == torch.float32
    key_frames = kv_cache.key_frames(kv_cache.begin_noisy()[1])
    torch.testing.assert_close(calls[-1][-1][0, 0, 0], 0.3 * (key_frames - 7))


# Plain RoPE, bit for bit


@pytest.mark.parametrize("config", [FlexRoPEConfig(0.0, "constant"), FlexRoPEConfig(1.0, lambda *position: 0.0)])
@base_and_long
def test_slope_0_is_bit_equal_to_no_hook_and_builds_no_bias(long_patch_size, config):
    model = tiny_transformer(long_patch_size=long_patch_size)
    clip = random_clip(model, 6).clean_but_last()
    expected, expected_cached = predict(model, clip), predict_cached(model, clip)
    apply_flex_rope(model, config)
    assert torch.equal(predict(model, clip), expected)
    with spy_attention() as calls:
        assert torch.equal(predict_cached(model, clip), expected_cached)
    assert all(mask is None for mask in masks_of(calls))


@base_and_long
def test_beyond_training_is_bit_equal_to_plain_rope_inside_the_trained_length(long_patch_size):
    model = tiny_transformer(long_patch_size=long_patch_size, trained_frames=6)
    clip = random_clip(model, 8)
    expected, expected_clip = rollout(model, clip), predict(model, clip.frames(0, 6))
    apply_flex_rope(model, FlexRoPEConfig(0.3))
    with spy_attention() as calls:
        velocities = rollout(model, clip.frames(0, 6))
    assert all(mask is None for mask in masks_of(calls))
    for velocity, plain_velocity in zip(velocities, expected):
        assert torch.equal(velocity, plain_velocity)
    assert torch.equal(predict(model, clip.frames(0, 6)), expected_clip)
    for velocity, plain_velocity in zip(rollout(model, clip)[6:], expected[6:]):
        assert (velocity - plain_velocity).abs().max() > 1e-4


@base_and_long
def test_removed_it_restores_the_model_bit_for_bit(long_patch_size):
    model = tiny_transformer(long_patch_size=long_patch_size)
    clip = random_clip(model, 6).clean_but_last()
    expected, expected_cached = predict(model, clip), predict_cached(model, clip)
    apply_flex_rope(model, FlexRoPEConfig(0.3, "constant"))
    assert not torch.allclose(predict(model, clip), expected, atol=1e-3)
    assert not torch.allclose(predict_cached(model, clip), expected_cached, atol=1e-3)
    remove_flex_rope(model)
    remove_flex_rope(model)
    assert torch.equal(predict(model, clip), expected)
    assert torch.equal(predict_cached(model, clip), expected_cached)


def test_applied_twice_the_new_config_replaces_the_old_one():
    model, once = tiny_transformer(), tiny_transformer()
    clip = random_clip(model, 6)
    apply_flex_rope(model, FlexRoPEConfig(5.0, slope_growing_with_time))
    apply_flex_rope(model, FlexRoPEConfig(0.5, "constant"))
    apply_flex_rope(model, FlexRoPEConfig(0.3, "beyond_training", trained_frames=2))
    apply_flex_rope(once, FlexRoPEConfig(0.3, "beyond_training", trained_frames=2))
    assert torch.equal(predict(model, clip), predict(once, clip))
    remove_flex_rope(model)
    assert torch.equal(predict(model, clip), predict(tiny_transformer(), clip))


def test_other_models_do_not_decay():
    model, other = tiny_transformer(), tiny_transformer()
    clip = random_clip(model, 4)
    expected = predict(other, clip)
    apply_flex_rope(model, FlexRoPEConfig(0.3, "constant"))
    assert torch.equal(predict(other, clip), expected)


def test_a_copy_of_a_model_that_decays_has_weights_of_its_own():
    model = tiny_transformer()
    apply_flex_rope(model, FlexRoPEConfig(0.3, "constant"))
    copied = copy.deepcopy(model)
    clip = random_clip(model, 4)
    expected = predict(model, clip)
    randomize(model, seed=1)
    assert torch.equal(predict(copied, clip), expected)


def test_a_copy_of_a_model_that_decays_has_a_config_of_its_own():
    model = tiny_transformer()
    apply_flex_rope(model, FlexRoPEConfig(0.3, "constant"))
    clip = random_clip(model, 4)
    expected = predict(model, clip)
    copied = copy.deepcopy(model)
    apply_flex_rope(copied, FlexRoPEConfig(0.9, "constant"))
    assert torch.equal(predict(model, clip), expected)
    assert not torch.equal(predict(copied, clip), expected)


@pytest.mark.parametrize("schedule", ["constant", slope_growing_with_time], ids=["constant", "function"])
def test_a_pickled_pipeline_decays_as_before(schedule):
    pipe = tiny_pipeline()
    pipe.enable_flex_rope(FlexRoPEConfig(0.3, schedule))
    arguments = {"height": 8, "width": 8, "num_frames": 4, "num_inference_steps": 2, "output_type": "pt"}
    before = pipe(**arguments, generator=torch.Generator().manual_seed(0)).frames
    loaded = pickle.loads(pickle.dumps(pipe))
    assert torch.equal(loaded(**arguments, generator=torch.Generator().manual_seed(0)).frames, before)
    loaded.disable_flex_rope()
    assert not torch.equal(loaded(**arguments, generator=torch.Generator().manual_seed(0)).frames, before)


def test_a_pickled_model_is_still_told_the_step():
    model, steps = tiny_transformer(), []
    apply_flex_rope(model, FlexRoPEConfig(schedule=slope_growing_with_time))
    with model.cache_context("denoise", step_index=1, num_inference_steps=3):  # remembers where the hooks are
        pass
    loaded = pickle.loads(pickle.dumps(model))
    apply_flex_rope(loaded, FlexRoPEConfig(schedule=lambda *arguments: steps.append(arguments) or 0.0))
    with loaded.cache_context("denoise", step_index=1, num_inference_steps=3):
        predict(loaded, random_clip(loaded, 2))
    assert steps == [(0, 1, 3), (1, 1, 3)]


# Cached equals uncached


@property_test
@given(
    model_and_clip=models_with_clips(min_frames=2),
    slope=st.floats(0.01, 2),
    schedule=st.sampled_from(FRAME_SCHEDULES),
    trained_frames=st.integers(1, 6),
    num_first=st.integers(1, 7),
)
def test_cached_equals_uncached_with_every_schedule_of_frames(
    model_and_clip, slope, schedule, trained_frames, num_first
):
    model, clip = model_and_clip
    clip = clip.clean_but_last()
    apply_flex_rope(model, FlexRoPEConfig(slope, schedule, trained_frames))
    expected = predict(model, clip)[:, -1:]
    num_context_frames = clip.num_frames - 1
    num_first = min(num_first, num_context_frames)
    for chunks in ([1] * num_context_frames, [num_first] + [1] * (num_context_frames - num_first)):
        torch.testing.assert_close(predict_cached(model, clip, chunks), expected, atol=1e-5, rtol=1e-5)


@property_test
@given(models_with_clips(min_frames=2))
def test_the_future_never_changes_the_past(model_and_clip):
    model, clip = model_and_clip
    apply_flex_rope(model, FlexRoPEConfig(0.3, "constant"))
    expected = predict(model, clip)
    changed = clip.latents.clone()
    changed[:, -1] += 1
    assert torch.equal(predict(model, replace(clip, latents=changed))[:, :-1], expected[:, :-1])


# Schedules of frames and steps


def test_a_callable_schedule_sees_the_step_while_denoising_and_none_while_writing():
    model = tiny_transformer(num_layers=1)
    clip = random_clip(model, 4)
    seen = []
    apply_flex_rope(model, FlexRoPEConfig(schedule=lambda *position: seen.append(position) or 0.1))
    kv_cache = model.init_kv_cache(2, 4, 6, max_frames=4)
    with model.cache_context("context"):
        predict(model, replace(clip.frames(0, 3), timestep=-1), kv_cache=kv_cache, update_cache=True)
    assert seen == [(0, None, None), (1, None, None), (2, None, None)]
    seen.clear()
    for step_index in range(2):
        with model.cache_context("denoise", step_index=step_index, num_inference_steps=2):
            predict(model, clip.frames(3, 4), kv_cache=kv_cache)
    assert seen == [(3, 0, 2), (3, 1, 2)]
    seen.clear()
    predict(model, clip.frames(3, 4), kv_cache=kv_cache)
    assert seen == [(3, None, None)]


def test_a_schedule_of_steps_changes_what_a_step_predicts():
    model = tiny_transformer()
    clip = random_clip(model, 4)
    apply_flex_rope(model, FlexRoPEConfig(schedule=lambda frame, step, num_steps: 0.0 if step is None else step * 1.0))
    kv_cache = fill_cache(model, clip.frames(0, 3))
    velocities = []
    for step_index in (0, 1):
        with model.cache_context("denoise", step_index=step_index, num_inference_steps=2):
            velocities.append(predict(model, clip.frames(3, 4), kv_cache=kv_cache))
    remove_flex_rope(model)
    assert torch.equal(velocities[0], predict(model, clip.frames(3, 4), kv_cache=kv_cache))
    assert (velocities[1] - velocities[0]).abs().max() > 1e-3


# Half precision


@base_and_long
def test_half_precision_is_as_exact_at_frame_700_as_at_frame_100(long_patch_size):
    def decaying(model):
        apply_flex_rope(model, FlexRoPEConfig(0.02, "constant"))
        return model

    model = sharpened(tiny_transformer(1, patch_size=2, long_patch_size=long_patch_size, short_window=4))
    clip = random_clip(model, 701, 2, 2, batch_size=12, seed=1)
    near, far = (half_precision_error(model, clip, frame, prepare=decaying) for frame in (100, 700))
    assert far < 1.3 * near


# Saving


def test_a_transformer_saved_alone_does_not_keep_it(tmp_path):
    model = tiny_transformer()
    clip = random_clip(model, 5)
    expected = predict(model, clip)
    apply_flex_rope(model, FlexRoPEConfig(0.3, "constant"))
    model.save_pretrained(tmp_path)
    assert torch.equal(predict(type(model).from_pretrained(tmp_path), clip), expected)


# Backends


@pytest.mark.full
@base_and_long
def test_flex_attention_equals_native_attention(long_patch_size):
    model = tiny_transformer(num_layers=1, long_patch_size=long_patch_size)
    clip = random_clip(model, 5)
    apply_flex_rope(model, FlexRoPEConfig(0.3, "beyond_training", trained_frames=2))
    expected, cached = predict(model, clip), predict_cached(model, clip)
    with using_backend(model, "flex"):
        torch.testing.assert_close(predict(model, clip), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(predict_cached(model, clip), cached, atol=1e-5, rtol=1e-5)


# Compilation


@pytest.fixture
def compile_counter():
    torch._dynamo.reset()
    yield CompileCounterWithBackend("eager")
    torch._dynamo.reset()


@pytest.mark.full
def test_neither_a_new_frame_nor_a_new_slope_compiles_again():
    def decaying(model):
        apply_flex_rope(model, FlexRoPEConfig(0.3, "beyond_training", trained_frames=1))
        return model

    # The slope grows from frame 1 to frame 2 and then stays; it is there from the second compilation on.
    counts, error = compiled_rollout(7, prepare=decaying, num_layers=1)
    assert error < 1e-5
    assert counts[3:] == [counts[3]] * 4


@pytest.mark.full
def test_another_config_with_another_slope_does_not_compile_again(compile_counter):
    model = tiny_transformer(num_layers=1)
    clip = random_clip(model, 4, 2, 2)
    kv_cache = fill_cache(model, clip.frames(0, 3))
    model.compile_repeated_blocks(backend=compile_counter)
    velocities = []
    for slope in (0.1, 0.2, 0.7):
        apply_flex_rope(model, FlexRoPEConfig(slope, "constant"))
        velocities.append(predict(model, clip.frames(3, 4), kv_cache=kv_cache))
    assert compile_counter.frame_count == 1
    assert not torch.allclose(velocities[0], velocities[2], atol=1e-3)


@pytest.mark.full
@pytest.mark.parametrize("long_patch_size, most", [(None, 3), (2, 5)])
def test_a_block_is_compiled_for_all_layers_at_once(long_patch_size, most):
    def decaying(model):
        apply_flex_rope(model, FlexRoPEConfig(0.3, "constant"))
        return model

    counts, _ = compiled_rollout(6, prepare=decaying, num_layers=4, long_patch_size=long_patch_size)
    assert counts[-1] <= most


# Bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"slope": -0.1}, "`slope` is -0.1; attention decays by a finite slope of 0 or more"),
        ({"slope": float("nan")}, "`slope` is nan; attention decays by a finite slope of 0 or more"),
        ({"slope": float("inf")}, "`slope` is inf; attention decays by a finite slope of 0 or more"),
        (
            {"schedule": "linear"},
            "`schedule` is 'linear'; choose one of 'constant', 'beyond_training' or pass a function",
        ),
        ({"schedule": None}, "`schedule` is None; choose one of"),
        ({"trained_frames": 0}, "`trained_frames` is 0; it counts frames, at least 1"),
    ],
)
def test_an_impossible_config_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FlexRoPEConfig(**arguments)


def test_beyond_training_without_a_trained_length_is_refused():
    with pytest.raises(ValueError, match="neither the config nor the model has `trained_frames`; pass"):
        apply_flex_rope(tiny_transformer())


def test_the_trained_length_comes_from_the_config_else_from_the_model():
    assert apply_flex_rope(tiny_transformer(trained_frames=9)).trained_frames == 9
    assert apply_flex_rope(tiny_transformer(trained_frames=9), FlexRoPEConfig(trained_frames=5)).trained_frames == 5
    assert apply_flex_rope(tiny_transformer(trained_frames=9), FlexRoPEConfig(0.2, "constant")).trained_frames is None


def test_the_users_config_is_unchanged():
    config = FlexRoPEConfig(0.2)
    before = copy.copy(config)
    apply_flex_rope(tiny_transformer(trained_frames=9), config)
    assert config == before


def test_a_model_whose_frames_see_the_future_is_refused():
    with pytest.raises(ValueError, match="`frame_causal=False`: it has no past"):
        apply_flex_rope(tiny_transformer(frame_causal=False), FlexRoPEConfig(0.2, "constant"))
