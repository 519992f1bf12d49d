"""The cost of a pass is that which torch counts, where torch computes nothing in vain."""

import pytest
import torch
from tiny_models import random_clip, tiny_transformer, using_backend
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.studies.flops import (
    attended_pairs,
    far_step_flops,
    forward_flops,
    meta_transformer,
    token_ar_step_flops,
)
from diffusers_far import TokenARConfig, TokenARForVideo


def counted(model: torch.nn.Module, *inputs, **options) -> int:
    """What torch counts, on a backend whose attention it sees."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs, **options)
    return counter.get_total_flops()


def model_of(**config):
    config = {
        "in_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 6, 6),
        **config,
    }
    return tiny_transformer(**config), meta_transformer(config)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_full_attention_costs_what_torch_counts(num_layers):
    model, meta = model_of(frame_causal=False, num_layers=num_layers)
    clip = random_clip(model, 5, 4, 6, batch_size=1)
    with using_backend(model, "_native_math"):
        expected = counted(model, clip.latents, clip.timestep)
    assert forward_flops(meta, meta.context_plan(5, 4, 6)) == expected


@pytest.mark.parametrize("has_twins", [False, True], ids=["clips", "twins"])
@pytest.mark.parametrize("long_patch_size", [None, 2])
def test_causal_attention_costs_what_torch_counts_but_for_the_masked_pairs(long_patch_size, has_twins):
    """Torch counts the masked pairs of a dense mask too: their number is known, so that the rest can be compared."""
    model, meta = model_of(num_layers=3, long_patch_size=long_patch_size, short_window=3)
    clip = random_clip(model, 5, 4, 4, batch_size=1)
    options = {"clean_hidden_states": clip.latents} if has_twins else {}
    with using_backend(model, "_native_math"):
        total = counted(model, clip.latents, clip.timestep, **options)
    plan = meta.context_plan(5, 4, 4)
    sizes = [4] * plan.num_long_frames + [16] * plan.num_short_frames
    twins = [16] * plan.num_short_frames if has_twins else []
    pairs = attended_pairs(sizes, twins)
    num_tokens, num_outputs = sum(sizes) + sum(twins), 16 * plan.num_short_frames
    masked = 2 * (num_tokens**2 - sum(pairs)) + num_outputs * num_tokens - sum(pairs[-plan.num_short_frames :])
    in_vain = 2 * 2 * meta.inner_dim * masked
    # The second modulation of frames whose output nobody reads is counted here, and so is nothing else.
    unread = (plan.num_frames + len(twins) - plan.num_short_frames) * 2 * 3 * meta.inner_dim**2
    assert forward_flops(meta, plan, has_twins=has_twins) == total - in_vain + unread


def test_pairs_of_frames_and_twins():
    assert attended_pairs([1, 4, 4]) == [1, 4 * 5, 4 * 9]
    assert attended_pairs([1, 4, 4], [4, 4]) == [1, 20, 36, 4 * (1 + 4), 4 * (5 + 4)]
    assert attended_pairs([2, 2], frame_causal=False) == [8, 8]


def test_a_step_is_the_mean_over_the_long_frames_that_are_drawn():
    _, meta = model_of(long_patch_size=2, short_window=2)
    arguments = {"latent_size": 4, "num_clips": 3}
    costs = [forward_flops(meta, meta.context_plan(length, 4, 4)) for length in (2, 3, 4)]
    assert far_step_flops(meta, num_frames=4, **arguments) == pytest.approx(3 * 3 * sum(costs) / 3)


def test_token_ar_costs_what_torch_counts():
    decoder = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = TokenARForVideo(TokenARConfig(num_codes=10, tokens_per_frame=6, decoder=decoder)).eval()
    model.decoder.set_attn_implementation("eager")
    total = counted(model, torch.zeros(2, 3, 6, dtype=torch.int64))
    num_tokens = 3 * 7
    # Of the causal square torch counts both halves.
    in_vain = 2 * 2 * 2 * 2 * 16 * (num_tokens**2 - num_tokens * (num_tokens + 1) // 2)
    step = token_ar_step_flops(decoder, num_codes=10, tokens_per_frame=6, num_frames=3, num_clips=2)
    assert step == 3 * (total - in_vain)
