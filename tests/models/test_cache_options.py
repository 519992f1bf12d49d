from functools import partial
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import fill_cache, predict, predict_cached, property_test, random_clip, tiny_transformer

from diffusers_far import FlexRoPEConfig, apply_flex_rope
from diffusers_far.models.kv_cache import CacheOptions


def long_model(**overrides):
    return tiny_transformer(**{"long_patch_size": 2, "num_actions": 3, "short_window": 4, **overrides})


def predict_with_breathing_window(model, clip, rebuild_interval):
    """The uncached prediction of the last frame when `rebuild_interval` frames turn long at once."""
    with patch.object(model, "context_plan", partial(model.context_plan, rebuild_interval=rebuild_interval)):
        return predict(model, clip)[:, -1:]


@property_test
@given(
    interval=st.integers(1, 3),
    num_frames=st.integers(1, 12),
    chunk=st.integers(1, 5),
    seed=st.integers(0, 100),
    slope=st.sampled_from([0.0, 0.3]),
)
def test_a_rebuild_interval_is_exact_for_a_window_that_breathes(interval, num_frames, chunk, seed, slope):
    model = long_model(seed=seed)
    apply_flex_rope(model, FlexRoPEConfig(slope, "constant"))
    clip = random_clip(model, num_frames, seed=seed).clean_but_last()
    chunks = [chunk] * ((num_frames - 1) // chunk) + [(num_frames - 1) % chunk]
    cached = predict_cached(model, clip, [size for size in chunks if size], short_cache=interval)
    expected = predict_with_breathing_window(model, clip, interval)
    torch.testing.assert_close(cached, expected, atol=1e-5, rtol=1e-5)


def test_between_rebuilds_a_write_encodes_only_the_new_frame():
    model = long_model()
    clip = random_clip(model, 12).clean_but_last()
    encoded = []
    with patch.object(model, "run", lambda short, long, plan, *rest, **options: encoded.append(plan.num_frames)):
        kv_cache = model.init_kv_cache(2, 4, 6, 12, short_cache=3)
        for frame in range(11):
            part = clip.frames(frame, frame + 1)
            model(part.latents, -1, actions=part.actions, kv_cache=kv_cache, update_cache=True)
    # Three frames are short; the fourth turns three long and leaves one: four frames are encoded, then one each.
    assert encoded == [1, 1, 1, 4, 1, 1, 4, 1, 1, 4, 1]


def test_a_rolling_cache_is_exact_until_a_frame_turns_long_and_near_it_after_that():
    model = long_model()
    clip = random_clip(model, 10).clean_but_last()
    for num_frames in range(1, 11):
        part = clip.frames(0, num_frames)
        exact = predict_cached(model, part.clean_but_last())
        rolling = predict_cached(model, part.clean_but_last(), short_cache="rolling")
        if num_frames <= 4:
            assert torch.equal(rolling, exact)
        else:
            assert not torch.equal(rolling, exact)
            assert (rolling - exact).norm() < 0.5 * exact.norm()


def test_a_rolling_write_encodes_the_frame_that_turns_long_and_the_new_one():
    model = long_model()
    clip = random_clip(model, 8)
    plans = []
    with patch.object(model, "run", lambda short, long, plan, *rest, **options: plans.append(plan)):
        kv_cache = model.init_kv_cache(2, 4, 6, 8, short_cache="rolling")
        for frame in range(6):
            part = clip.frames(frame, frame + 1)
            model(part.latents, -1, actions=part.actions, kv_cache=kv_cache, update_cache=True)
    assert [(plan.num_long_frames, plan.num_short_frames) for plan in plans] == [(0, 1)] * 3 + [(1, 1)] * 3
    assert [(plan.first_frame, plan.first_short_frame) for plan in plans[3:]] == [(0, 3), (1, 4), (2, 5)]
    short_keys = kv_cache.key_frames(kv_cache.begin_noisy()[1])[-4 * 24 :].unique_consecutive().tolist()
    assert short_keys == [3, 4, 5, 6]


@pytest.mark.parametrize("num_sink_frames", [0, 2])
@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_bounded_memory_is_attention_over_the_kept_frames_at_their_new_positions(num_sink_frames, slope):
    model = long_model(num_layers=1)  # one layer: what is stored of a frame depends on that frame alone
    apply_flex_rope(model, FlexRoPEConfig(slope, "constant"))
    clip = random_clip(model, 40)
    kv_cache = model.init_kv_cache(2, 4, 6, 1, max_long_frames=5, num_sink_frames=num_sink_frames)
    kept = []
    for frame in range(39):
        written, noisy = clip.frames(frame, frame + 1), clip.frames(frame + 1, frame + 2)
        num_before = kv_cache.num_frames
        with torch.no_grad():
            model(written.latents, -1, actions=written.actions, kv_cache=kv_cache, update_cache=True)
        num_forgotten = num_before + 1 - kv_cache.num_frames
        kept = kept[:num_sink_frames] + kept[num_sink_frames + num_forgotten :] + [frame]
        seen = torch.tensor([*kept, frame + 1])
        timestep = torch.full((2, len(seen)), -1.0)
        timestep[:, -1] = noisy.timestep[:, 0]
        with torch.no_grad():
            expected = model(clip.latents[:, seen], timestep, actions=clip.actions[:, seen]).sample[:, -1:]
        torch.testing.assert_close(predict_with(model, noisy, kv_cache), expected, atol=2e-5, rtol=1e-4)
    assert kept[:num_sink_frames] == list(range(num_sink_frames))
    assert kv_cache.plan.num_long_frames <= 5 and kv_cache.num_frames == len(kept) < 39


def predict_with(model, noisy, kv_cache):
    with torch.no_grad():
        return model(noisy.latents, noisy.timestep, actions=noisy.actions, kv_cache=kv_cache).sample


@pytest.mark.parametrize("short_cache", ["exact", 2])
def test_bounded_memory_does_not_depend_on_how_many_frames_are_written_at_once(short_cache):
    model = long_model()
    context = random_clip(model, 30).clean_but_last()
    options = {"max_frames": 1, "max_long_frames": 8, "short_cache": short_cache}
    one_by_one = predict_cached(model, context, **options)
    torch.testing.assert_close(predict_cached(model, context, [29], **options), one_by_one, atol=1e-5, rtol=1e-5)


def test_bounded_memory_takes_no_more_bytes_as_the_video_grows():
    model = long_model()
    kv_cache = fill_cache(model, random_clip(model, 30), max_frames=1, max_long_frames=4)
    assert kv_cache.num_bytes == 2 * 2 * 2 * 32 * (4 * 6 + 4 * 24) * 4


@property_test
@given(num_frames=st.integers(2, 12), num_dropped=st.integers(1, 11), long_patch_size=st.sampled_from([None, 2]))
def test_a_rewound_cache_goes_on_as_one_that_never_went_further(num_frames, num_dropped, long_patch_size):
    num_dropped = min(num_dropped, num_frames - 1)
    model = long_model(long_patch_size=long_patch_size)
    clip = random_clip(model, num_frames + 1).clean_but_last()
    left = num_frames - num_dropped
    kv_cache = fill_cache(model, clip.frames(0, num_frames))
    window = clip.frames(0, left)
    kv_cache.rewind(left, frames_of(window))
    again, noisy = clip.frames(left, left + 1), clip.frames(num_frames, num_frames + 1)
    with torch.no_grad():
        model(again.latents, -1, actions=again.actions, kv_cache=kv_cache, update_cache=True)
    expected = fill_cache(model, clip.frames(0, left + 1), max_frames=num_frames + 1)
    torch.testing.assert_close(
        predict_with(model, noisy, kv_cache), predict_with(model, noisy, expected), atol=1e-5, rtol=1e-5
    )


def frames_of(clip):
    from diffusers_far.models.frames import FrameBatch

    return FrameBatch(clip.latents, clip.actions)


@pytest.mark.parametrize("long_patch_size", [None, 2])
def test_a_cache_that_grew_is_as_good_as_a_large_one(long_patch_size):
    model = long_model(long_patch_size=long_patch_size)
    clip = random_clip(model, 10).clean_but_last()
    kv_cache = fill_cache(model, clip.frames(0, 3))
    for frame in range(3, 9):
        part = clip.frames(frame, frame + 1)
        kv_cache.make_room(1)
        with torch.no_grad():
            model(part.latents, -1, actions=part.actions, kv_cache=kv_cache, update_cache=True)
    torch.testing.assert_close(
        predict_with(model, clip.frames(9, 10), kv_cache), predict_cached(model, clip), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"short_cache": "none"}, "`short_cache` is 'none'"),
        ({"short_cache": 0}, "`short_cache` is 0"),
        ({"short_cache": 4}, "`short_cache` is 4; .* from 1 to 3"),
        ({"num_sink_frames": 2}, "`num_sink_frames` is 2 but `max_long_frames` is None"),
        ({"max_long_frames": 4, "num_sink_frames": 4}, "`num_sink_frames` is 4 and `max_long_frames` 4"),
        ({"max_long_frames": 4, "short_cache": 2}, "keep at least 6 beside the sinks"),
    ],
)
def test_impossible_options_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CacheOptions(**arguments).check(short_window=4, has_long_frames=True)


def test_a_model_without_long_frames_has_none_to_forget():
    with pytest.raises(ValueError, match="`max_long_frames` is 4 but this model has no long frames"):
        CacheOptions(max_long_frames=4).check(short_window=4, has_long_frames=False)
