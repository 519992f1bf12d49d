import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import property_test

from diffusers_far.models.context_plan import ContextPlan
from diffusers_far.models.functional import (
    apply_rotary_embedding,
    frame_causal_block_mask,
    frame_causal_mask,
    frame_ids,
    patchify,
    position_ids,
    rotary_embedding,
    unpatchify,
)


AXES_DIMS = (16, 24, 24)


def time_positions(*frames: int) -> torch.Tensor:
    return torch.tensor([[frame, 0, 0] for frame in frames])


def random_heads(num_tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(1, num_tokens, 2, sum(AXES_DIMS), generator=torch.Generator().manual_seed(0)).to(dtype)


@property_test
@given(
    batch_size=st.integers(1, 2),
    num_frames=st.integers(0, 3),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    patch_size=st.integers(1, 4),
)
def test_unpatchify_inverts_patchify(batch_size, num_frames, rows, columns, patch_size):
    latents = torch.randn(batch_size, num_frames, 3, rows * patch_size, columns * patch_size)
    patches = patchify(latents, patch_size)
    assert patches.shape == (batch_size, num_frames, rows * columns, 3 * patch_size**2)
    assert torch.equal(unpatchify(patches, patch_size, *latents.shape[-2:]), latents)


def test_a_linear_layer_on_patches_is_the_strided_convolution():
    latents, kernel = torch.randn(2, 3, 4, 6, 8), torch.randn(5, 4, 2, 2)
    expected = torch.nn.functional.conv2d(latents.flatten(0, 1), kernel, stride=2)  # (B * F, 5, 3, 4)
    tokens = patchify(latents, 2) @ kernel.flatten(1).T
    torch.testing.assert_close(tokens.flatten(0, 1), expected.flatten(2).mT, atol=1e-5, rtol=1e-5)


@property_test
@given(
    first_frame=st.integers(0, 500),
    num_long_frames=st.integers(0, 3),
    num_short_frames=st.integers(0, 3),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    patch_size=st.integers(1, 2),
    patches_per_long_patch=st.integers(1, 3),
)
def test_a_token_stands_at_the_first_short_token_that_its_patch_covers(
    first_frame, num_long_frames, num_short_frames, rows, columns, patch_size, patches_per_long_patch
):
    spacing = patches_per_long_patch
    height, width = rows * patch_size * spacing, columns * patch_size * spacing
    plan = ContextPlan(
        num_long_frames, num_short_frames, height, width, patch_size, patch_size * spacing, first_frame=first_frame
    )
    expected = [
        (frame, row, column)
        for frame in range(first_frame, first_frame + num_long_frames)
        for row in range(0, rows * spacing, spacing)
        for column in range(0, columns * spacing, spacing)
    ] + [
        (frame, row, column)
        for frame in range(first_frame + num_long_frames, first_frame + num_long_frames + num_short_frames)
        for row in range(rows * spacing)
        for column in range(columns * spacing)
    ]
    ids = position_ids(plan)
    assert [tuple(position) for position in ids.tolist()] == expected
    assert ids.dtype == torch.int64
    assert torch.equal(frame_ids(plan), ids[:, 0])


def test_rotations_are_single_precision_under_a_half_precision_default():
    ids = time_positions(255, 256, 257, 700)
    expected = rotary_embedding(ids, AXES_DIMS)
    torch.set_default_dtype(torch.bfloat16)
    try:
        rotary_emb = rotary_embedding(ids, AXES_DIMS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert rotary_emb.dtype == torch.complex64
    assert torch.equal(rotary_emb, expected)


@pytest.mark.parametrize("frame", [1, 255, 257, 701, 4097])
def test_frame_positions_are_exact_far_beyond_256(frame):
    frequencies = 10000.0 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    rotary_emb = rotary_embedding(time_positions(frame), AXES_DIMS)[0, :8]
    expected = torch.polar(torch.ones(8, dtype=torch.float64), frame * frequencies)
    # The rounding of a float32 angle. A frame index in bfloat16 would be off by up to frame / 512.
    assert (rotary_emb - expected).abs().max() < frame * 2.0**-22


def test_each_axis_turns_its_own_share_of_the_channels():
    ids = torch.tensor([[5, 0, 0], [0, 5, 0], [0, 0, 5]])
    is_turned = rotary_embedding(ids, AXES_DIMS).imag != 0
    for axis, share in enumerate((slice(0, 8), slice(8, 20), slice(20, 32))):
        assert is_turned[axis, share].all()
        assert is_turned[axis].sum() == share.stop - share.start


def test_scores_depend_on_relative_positions_alone():
    query, key = random_heads(1), random_heads(1).flip(-1)

    def score(query_position, key_position):
        rotated = [
            apply_rotary_embedding(states, rotary_embedding(torch.tensor([position]), AXES_DIMS))
            for states, position in ((query, query_position), (key, key_position))
        ]
        return (rotated[0] * rotated[1]).sum(-1)

    near, far = score((3, 2, 7), (1, 5, 6)), score((703, 12, 27), (701, 15, 26))
    torch.testing.assert_close(far, near, atol=5e-3, rtol=0)
    assert (score((3, 2, 7), (2, 5, 6)) - near).abs().min() > 0.05


def test_rotation_turns_interleaved_pairs():
    states = random_heads(1)
    rotary_emb = rotary_embedding(time_positions(3), AXES_DIMS)
    rotated = apply_rotary_embedding(states, rotary_emb)
    even, odd, cos, sin = states[..., ::2], states[..., 1::2], rotary_emb.real, rotary_emb.imag
    torch.testing.assert_close(rotated[..., ::2], even * cos - odd * sin)
    torch.testing.assert_close(rotated[..., 1::2], even * sin + odd * cos)


def test_position_zero_is_the_identity_and_the_dtype_is_kept():
    for dtype in (torch.float32, torch.bfloat16):
        states = random_heads(1, dtype)
        rotated = apply_rotary_embedding(states, rotary_embedding(time_positions(0), AXES_DIMS))
        assert rotated.dtype == dtype
        assert torch.equal(rotated, states)


@property_test
@given(
    query_frames=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    key_frames=st.lists(st.integers(0, 9), min_size=1, max_size=12),
)
def test_a_token_sees_its_own_and_every_earlier_frame(query_frames, key_frames):
    mask = frame_causal_mask(torch.tensor(query_frames), torch.tensor(key_frames))
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[key <= query for key in key_frames] for query in query_frames]


def test_the_block_mask_allows_what_the_dense_mask_allows():
    from torch.nn.attention.flex_attention import create_mask

    plan = ContextPlan(3, 4, 4, 8, 1, 4)
    frames = frame_ids(plan)
    block_mask = frame_causal_block_mask(frames, frames)
    dense = create_mask(block_mask.mask_mod, 1, 1, len(frames), len(frames), device="cpu")[0, 0]
    assert torch.equal(dense, frame_causal_mask(frames, frames))
