"""Frame-causal attention in chunks: equal to one dense mask, at little more than half of its work."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from diffusers_far.models.context_plan import ContextPlan
from diffusers_far.models.functional import frame_causal_chunks, frame_causal_mask, frame_ids


def attend(query, key, value, mask):
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def mask_of(plan: ContextPlan, has_twins: bool) -> torch.Tensor:
    frames, is_twin = frame_ids(plan), None
    if has_twins:
        frames = torch.cat([frames, frames[plan.num_long_tokens :]])
        is_twin = torch.arange(len(frames)) >= plan.num_tokens
    return frame_causal_mask(frames, frames, is_twin)


plans = st.builds(
    lambda num_frames, short_window, long_patch_size: ContextPlan.for_frames(
        num_frames, short_window=short_window, height=4, width=4, patch_size=1, long_patch_size=long_patch_size
    ),
    st.integers(2, 30),
    st.integers(1, 6),
    st.sampled_from([None, 2, 4]),
)


@given(plans, st.booleans(), st.booleans())
def test_chunks_give_the_attention_of_the_dense_mask_and_its_gradients(plan, has_twins, only_last_frames):
    mask = mask_of(plan, has_twins)
    num_tokens = len(mask)
    num_queries = plan.num_short_tokens if only_last_frames else num_tokens
    torch.manual_seed(0)
    states = [torch.randn(1, num_tokens, 2, 4, requires_grad=True) for _ in range(3)]
    results = []
    for chunked in (False, True):
        query, key, value = states
        query = query[:, num_tokens - num_queries :]
        if chunked:
            output = frame_causal_chunks(plan, mask, has_twins=has_twins).attend(attend, query, key, value)
        else:
            output = attend(query, key, value, mask[num_tokens - num_queries :])
        results.append((output, *torch.autograd.grad(output.square().sum(), states)))
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("num_frames", "long_patch_size"), [(16, None), (300, 4)])
def test_little_more_than_the_seen_half_is_computed(num_frames, long_patch_size):
    plan = ContextPlan.for_frames(
        num_frames, short_window=16, height=8, width=8, patch_size=1, long_patch_size=long_patch_size
    )
    mask = mask_of(plan, has_twins=False)
    areas = []

    def count(query, key, value, mask):
        areas.append(query.shape[1] * key.shape[1])
        return query

    states = torch.empty(1, plan.num_tokens, 1, 1)
    frame_causal_chunks(plan, mask).attend(count, states, states, states)
    assert len(areas) <= 9
    assert mask.sum() <= sum(areas) <= 0.58 * plan.num_tokens**2
