"""Compiled blocks are the plain ones, and are not compiled for each frame of a video."""

import pytest
import torch
from tiny_models import base_and_long, compiled_rollout, fill_cache, predict, random_clip, tiny_transformer
from torch._dynamo.testing import CompileCounterWithBackend


@pytest.mark.full
@base_and_long
def test_compiled_blocks_are_the_plain_ones_and_not_compiled_for_each_frame(long_patch_size):
    counts, error = compiled_rollout(8, long_patch_size=long_patch_size, short_window=2, num_layers=1)
    assert error < 1e-5
    assert counts[4:] == [counts[4]] * 4


@pytest.mark.full
@base_and_long
def test_a_rollout_compiles_at_most_3_times(long_patch_size):
    counts, _ = compiled_rollout(7, long_patch_size=long_patch_size, short_window=3, num_layers=4)
    assert counts[-1] <= (1 if long_patch_size is None else 3)


@pytest.mark.full
@base_and_long
def test_a_long_context_is_written_without_compiling_for_its_length(long_patch_size):
    model = tiny_transformer(long_patch_size=long_patch_size, short_window=2, num_layers=2)
    clip = random_clip(model, 9)
    kv_cache = fill_cache(model, clip.frames(0, 8), chunks=[8])
    expected = predict(model, clip.frames(8, 9), kv_cache=kv_cache)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(dynamic=True, backend=counter)
    kv_cache = fill_cache(model, clip.frames(0, 8), chunks=[8])
    assert counter.frame_count == 0
    velocity = predict(model, clip.frames(8, 9), kv_cache=kv_cache)
    assert counter.frame_count == 1
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=0)
    torch._dynamo.reset()
