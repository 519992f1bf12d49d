import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import (
    fill_cache,
    models_with_clips,
    predict,
    predict_cached,
    property_test,
    random_clip,
    spy_attention,
    tiny_transformer,
)


@st.composite
def chunks_of(draw, num_frames: int) -> list[int]:
    """Cut a context into the parts that it is written in."""
    chunks = []
    while sum(chunks) < num_frames:
        chunks.append(draw(st.integers(1, num_frames - sum(chunks))))
    return chunks


@st.composite
def rollouts(draw, is_long: bool | None = None):
    """A model, a clip whose last frame is noisy, and the chunks in which the other frames are written."""
    model, clip = draw(models_with_clips(is_long))
    return model, clip.clean_but_last(), draw(chunks_of(clip.num_frames - 1))


def long_model(**overrides):
    return tiny_transformer(**{"long_patch_size": 2, "num_actions": 3, **overrides})


def stores_in_view(kv_cache) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of the keys and values of the clean frames, in the order of the stores."""
    boundary = kv_cache._largest_plan.num_long_tokens
    window = slice(boundary - kv_cache.plan.num_long_tokens, boundary + kv_cache.plan.num_short_tokens)
    return kv_cache._key_stores[:, :, window].clone(), kv_cache._value_stores[:, :, window].clone()


# Cached equals uncached


@property_test
@given(rollouts(is_long=True))
def test_cached_equals_uncached_on_both_sides_of_the_windows_edge(rollout):
    model, clip, chunks = rollout
    expected = predict(model, clip)[:, -1:]
    torch.testing.assert_close(predict_cached(model, clip, chunks), expected, atol=1e-5, rtol=1e-5)


@property_test
@given(rollouts(is_long=False))
def test_cached_equals_uncached_in_a_base_model(rollout):
    model, clip, chunks = rollout
    expected = predict(model, clip)[:, -1:]
    torch.testing.assert_close(predict_cached(model, clip, chunks), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("short_window", [1, 3])
def test_every_frame_of_a_rollout_is_the_uncached_one(short_window):
    model = long_model(short_window=short_window)
    clip = random_clip(model, 9).clean_but_last()
    kv_cache = model.init_kv_cache(2, 4, 6, max_frames=9)
    for frame in range(9):
        until_frame = replace(clip.frames(0, frame + 1), timestep=clip.timestep[:, -frame - 1 :])
        noisy = until_frame.frames(frame, frame + 1)
        expected = predict(model, until_frame)[:, -1:]
        torch.testing.assert_close(predict(model, noisy, kv_cache=kv_cache), expected, atol=1e-5, rtol=1e-5)
        if frame < 8:
            clean = replace(noisy, timestep=torch.full_like(noisy.timestep, -1))
            assert predict(model, clean, kv_cache=kv_cache, update_cache=True) is None


def test_masked_actions_survive_the_rebuild_of_the_short_window():
    model = long_model()
    clip = random_clip(model, 8).clean_but_last()
    action_mask = torch.rand(2, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    with torch.no_grad():
        expected = model(clip.latents, clip.timestep, actions=clip.actions, action_mask=action_mask).sample[:, -1:]
        kv_cache = model.init_kv_cache(2, 4, 6, max_frames=8)
        for start, end in ((0, 4), (4, 5), (5, 7)):
            written = {"actions": clip.actions[:, start:end], "action_mask": action_mask[:, start:end]}
            model(clip.latents[:, start:end], -1, kv_cache=kv_cache, update_cache=True, **written)
        noisy = {"actions": clip.actions[:, 7:], "action_mask": action_mask[:, 7:]}
        cached = model(clip.latents[:, 7:], clip.timestep[:, 7:], kv_cache=kv_cache, **noisy).sample
    torch.testing.assert_close(cached, expected, atol=1e-5, rtol=1e-5)
    assert (predict_cached(model, clip) - expected).abs().max() > 1e-2  # all actions given: another prediction


def test_a_long_context_is_written_in_parts_of_bounded_size(monkeypatch):
    monkeypatch.setattr("diffusers_far.models.kv_cache.WRITTEN_TOKENS", 2 * 24)
    model = long_model(long_patch_size=None)
    clip = random_clip(model, 8).clean_but_last()
    sizes = []
    model.x_embedder.register_forward_pre_hook(lambda embedder, args: sizes.append(args[0].shape[1]))
    cached = predict_cached(model, clip, [7])
    assert sizes == [2, 2, 2, 1, 1]  # the context, two frames at a time, then the noisy frame
    torch.testing.assert_close(cached, predict(model, clip)[:, -1:], atol=1e-5, rtol=1e-5)


# What writing and reading leave as it is


@property_test
@given(rollouts())
def test_denoising_leaves_the_cache_as_it_is(rollout):
    model, clip, chunks = rollout
    noisy = clip.frames(clip.num_frames - 1, clip.num_frames)
    kv_cache = fill_cache(model, clip.frames(0, clip.num_frames - 1), chunks)
    before = stores_in_view(kv_cache)
    first = predict(model, noisy, kv_cache=kv_cache)
    predict(model, replace(noisy, latents=-noisy.latents), kv_cache=kv_cache)
    assert torch.equal(predict(model, noisy, kv_cache=kv_cache), first)
    assert kv_cache.num_frames == clip.num_frames - 1
    for stores, stores_before in zip(stores_in_view(kv_cache), before):
        assert torch.equal(stores, stores_before)


def test_long_entries_are_written_once():
    model = long_model(short_window=2)
    clip = random_clip(model, 8)
    kv_cache = fill_cache(model, clip.frames(0, 4), max_frames=9)
    boundary = kv_cache._largest_plan.num_long_tokens
    long = slice(boundary - kv_cache.plan.num_long_tokens, boundary)
    keys, values = kv_cache._key_stores[:, :, long].clone(), kv_cache._value_stores[:, :, long].clone()
    assert keys.shape[2] == 3 * 6
    for frame in range(4, 8):
        written = clip.frames(frame, frame + 1)
        predict(model, replace(written, timestep=-1), kv_cache=kv_cache, update_cache=True)
    assert kv_cache.plan.num_long_frames == 7
    assert torch.equal(kv_cache._key_stores[:, :, long], keys)
    assert torch.equal(kv_cache._value_stores[:, :, long], values)


@pytest.mark.parametrize("long_patch_size, num_frames", [(None, 8), (2, 4)])
def test_while_no_frame_is_long_short_entries_are_written_once(long_patch_size, num_frames):
    model = long_model(short_window=5, long_patch_size=long_patch_size)
    clip = random_clip(model, num_frames)
    kv_cache = model.init_kv_cache(2, 4, 6, max_frames=num_frames + 1)
    for frame in range(num_frames):
        keys, values = stores_in_view(kv_cache)
        written = replace(clip.frames(frame, frame + 1), timestep=-1)
        with spy_attention() as calls:
            predict(model, written, kv_cache=kv_cache, update_cache=True)
        assert {query.shape[1] for query, *_ in calls} == {kv_cache.plan.tokens_per_short_frame}
        new_keys, new_values = stores_in_view(kv_cache)
        assert torch.equal(new_keys[:, :, : keys.shape[2]], keys)
        assert torch.equal(new_values[:, :, : values.shape[2]], values)


def test_the_cache_does_not_change_with_the_callers_tensors():
    model = long_model()
    clip = random_clip(model, 6).clean_but_last()
    expected = predict(model, clip)[:, -1:]
    kv_cache = model.init_kv_cache(2, 4, 6, max_frames=6)
    for frame in range(5):
        latents, actions = clip.latents[:, frame : frame + 1].clone(), clip.actions[:, frame : frame + 1].clone()
        with torch.no_grad():
            model(latents, -1, actions=actions, kv_cache=kv_cache, update_cache=True)
        latents.fill_(1000)
        actions.fill_(0)
    cached = predict(model, clip.frames(5, 6), kv_cache=kv_cache)
    torch.testing.assert_close(cached, expected, atol=1e-5, rtol=1e-5)


# Sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("long_patch_size", [None, 2])
def test_bytes_are_2_x_layers_x_width_x_tokens_x_element_size(dtype, long_patch_size):
    model = tiny_transformer(num_layers=3, long_patch_size=long_patch_size)
    kv_cache = model.init_kv_cache(5, 4, 6, max_frames=10, dtype=dtype)
    num_tokens = 10 * 24 if long_patch_size is None else 7 * 6 + 3 * 24
    assert kv_cache.num_bytes == 2 * 3 * 32 * num_tokens * dtype.itemsize * 5
    assert kv_cache.dtype == dtype and kv_cache.device == torch.device("cpu")


def test_a_cache_takes_the_models_dtype():
    assert tiny_transformer().bfloat16().init_kv_cache(1, 4, 4, max_frames=2).dtype == torch.bfloat16


def test_keys_in_view_are_long_frames_latest_first_then_short_ones_in_order():
    model = long_model(short_window=2)
    kv_cache = fill_cache(model, random_clip(model, 4))
    _, cache_pass = kv_cache.begin_noisy()
    assert kv_cache.key_frames(cache_pass).tolist() == [2] * 6 + [1] * 6 + [0] * 6 + [3] * 24 + [4] * 24


# Misuse


def expect_refusal(message: str, model, clip, kv_cache, **kwargs):
    """The call is refused before the cache or its content changes, and the cache can be used further."""
    before, num_frames = stores_in_view(kv_cache), kv_cache.num_frames
    with pytest.raises(ValueError, match=message), spy_attention() as calls:
        predict(model, clip, kv_cache=kv_cache, **kwargs)
    assert calls == []
    assert kv_cache.num_frames == num_frames
    for stores, stores_before in zip(stores_in_view(kv_cache), before):
        assert torch.equal(stores, stores_before)


@pytest.fixture
def model():
    return long_model()


@pytest.fixture
def clip(model):
    return random_clip(model, 6)


@pytest.mark.parametrize("update_cache", [False, True])
def test_another_batch_size_is_refused(model, clip, update_cache):
    kv_cache = fill_cache(model, clip.frames(0, 4), max_frames=6)
    other = random_clip(model, 1, batch_size=3)
    other = replace(other, timestep=-1) if update_cache else other
    expect_refusal(
        "`hidden_states` has a batch of 3 but `kv_cache` was made for 2; make one",
        model,
        other,
        kv_cache,
        update_cache=update_cache,
    )


def test_another_latent_size_is_refused(model, clip):
    kv_cache = fill_cache(model, clip.frames(0, 4), max_frames=6)
    other = random_clip(model, 1, height=6, width=4)
    expect_refusal("latents of 6x4 but `kv_cache` was made for 4x6; make one", model, other, kv_cache)


def test_another_dtype_is_refused(model, clip):
    kv_cache = fill_cache(model, clip.frames(0, 4), max_frames=6)
    model = model.bfloat16()
    other = replace(clip.frames(4, 5), latents=clip.latents[:, 4:5].bfloat16())
    expect_refusal("computes in torch.bfloat16 but `kv_cache` holds torch.float32; make one", model, other, kv_cache)


def test_autocast_to_another_dtype_is_refused(model, clip):
    kv_cache = fill_cache(model, clip.frames(0, 4), max_frames=6)
    with torch.autocast("cpu", torch.bfloat16):
        expect_refusal("computes in torch.bfloat16", model, clip.frames(4, 5), kv_cache)


def test_another_model_is_refused_even_an_equal_one(model, clip):
    kv_cache = fill_cache(model, clip.frames(0, 4), max_frames=6)
    expect_refusal(
        "`kv_cache` was made by another FAR.*Make a cache", copy.deepcopy(model), clip.frames(4, 5), kv_cache
    )


def test_frames_beyond_the_end_are_refused(model, clip):
    kv_cache = fill_cache(model, clip.frames(0, 4), max_frames=5)
    written = replace(clip.frames(4, 5), timestep=-1)
    message = "room for `max_frames` 5, the noisy frame included; 5 clean frames need 6. Make one"
    expect_refusal(message, model, written, kv_cache, update_cache=True)
    predict(model, clip.frames(4, 5), kv_cache=kv_cache)


def test_two_noisy_frames_are_refused(model, clip):
    kv_cache = fill_cache(model, clip.frames(0, 3), max_frames=6)
    message = "`hidden_states` has 2 frames but exactly one frame is denoised.*pass one noisy frame"
    expect_refusal(message, model, clip.frames(3, 5), kv_cache)


def test_writing_noisy_frames_is_refused(model, clip):
    kv_cache = fill_cache(model, clip.frames(0, 3), max_frames=6)
    message = "`timestep` is .* in a write to `kv_cache`; only clean frames are cached, and their timestep is -1"
    expect_refusal(message, model, clip.frames(3, 4), kv_cache, update_cache=True)


def test_writing_without_a_cache_is_refused(model, clip):
    with pytest.raises(ValueError, match="`update_cache` is True but `kv_cache` is None; pass the cache"):
        predict(model, replace(clip, timestep=-1), update_cache=True)


def test_missing_actions_are_refused(model, clip):
    kv_cache = fill_cache(model, clip.frames(0, 3), max_frames=6)
    expect_refusal("`actions` is None", model, replace(clip.frames(3, 4), actions=None), kv_cache)


@pytest.mark.parametrize("name", ["batch_size", "max_frames"])
def test_a_cache_for_nothing_is_refused(model, name):
    with pytest.raises(ValueError, match=f"`{name}` is 0; a cache needs at least 1"):
        model.init_kv_cache(**{"batch_size": 1, "height": 4, "width": 4, "max_frames": 1, name: 0})


def test_a_size_that_patches_do_not_divide_is_refused(model):
    with pytest.raises(ValueError, match="3x4 cannot be cut by `long_patch_size` 2"):
        model.init_kv_cache(1, 3, 4, max_frames=8)


def test_a_model_whose_frames_see_the_future_has_no_cache():
    with pytest.raises(ValueError, match="`frame_causal=False`.*nothing can be cached"):
        tiny_transformer(frame_causal=False).init_kv_cache(1, 4, 4, max_frames=2)
