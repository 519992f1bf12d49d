import sys
from pathlib import Path

import pytest
import torch
from tiny_models import predict_cached, random_clip, tiny_transformer


sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.naive import NaiveFAR  # noqa: E402


@pytest.mark.parametrize("long_patch_size", [None, 2])
def test_the_naive_reference_is_equal_in_result(long_patch_size):
    model = tiny_transformer(num_actions=3, long_patch_size=long_patch_size)
    clip = random_clip(model, 7).clean_but_last()
    clip.timestep[:, -1] = 400
    naive = NaiveFAR(model)
    cache = naive.encode(clip.latents[:, :-1], clip.actions[:, :-1])
    step = naive.step(clip.latents[:, -1:], 400.0, clip.actions[:, -1:], cache)
    torch.testing.assert_close(step, predict_cached(model, clip), atol=1e-5, rtol=1e-5)
