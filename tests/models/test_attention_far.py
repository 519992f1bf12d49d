from unittest.mock import patch

import pytest
import torch
from tiny_models import fill_cache, predict, random_clip, randomize, spy_attention, tiny_transformer, using_backend

from diffusers_far.models import frame_network
from diffusers_far.models.frame_network import FARAttention, FARAttnProcessor, mask_for_kernel
from diffusers_far.models.functional import frame_causal_mask, rotary_embedding


DIM, HEADS, DIM_HEAD, AXES_DIMS = 12, 2, 8, (4, 2, 2)
NUM_LONG, NUM_SHORT = 3, 5


def attention(**kwargs) -> FARAttention:
    return randomize(FARAttention(DIM, HEADS, DIM_HEAD, **kwargs)).eval()


def rotary(num_tokens: int) -> torch.Tensor:
    positions = torch.randint(0, 50, (num_tokens, 3), generator=torch.Generator().manual_seed(0))
    return rotary_embedding(positions, AXES_DIMS)


def tokens(num_tokens: int) -> torch.Tensor:
    return torch.randn(2, num_tokens, DIM, generator=torch.Generator().manual_seed(num_tokens))


def heads_by_hand(linear, norm, states, rotary_emb=None) -> torch.Tensor:
    """Project, normalise and rotate, as formulas: (B, L, dim) -> (B, N, L, D)."""
    states = (states @ linear.weight.T + linear.bias).view(2, -1, HEADS, DIM_HEAD)
    if norm is not None:
        states = states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
        even, odd, cos, sin = states[..., ::2], states[..., 1::2], rotary_emb.real[:, None], rotary_emb.imag[:, None]
        states = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    return states.transpose(1, 2)


def attend_by_hand(query, key, value, mask=None) -> torch.Tensor:
    scores = query @ key.mT / DIM_HEAD**0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


@torch.no_grad()
@pytest.mark.parametrize("is_masked", [False, True])
def test_attention_is_its_formula(is_masked):
    attn, states, rotary_emb = attention(), tokens(NUM_SHORT), rotary(NUM_SHORT)
    frames = torch.arange(NUM_SHORT) // 2
    mask = frame_causal_mask(frames, frames) if is_masked else None
    hidden_states = attend_by_hand(
        heads_by_hand(attn.to_q, attn.norm_q, states, rotary_emb),
        heads_by_hand(attn.to_k, attn.norm_k, states, rotary_emb),
        heads_by_hand(attn.to_v, None, states),
        mask,
    )
    expected = hidden_states @ attn.to_out[0].weight.T + attn.to_out[0].bias
    output, long_output = attn(states, rotary_emb=rotary_emb, attention_mask=mask)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert long_output is None


@torch.no_grad()
def test_long_tokens_have_projections_and_norms_of_their_own_in_one_attention():
    attn, rotary_emb = attention(added_kv_proj_dim=DIM), rotary(NUM_LONG + NUM_SHORT)
    states, long_states = tokens(NUM_SHORT), tokens(NUM_LONG)
    long_rotary, short_rotary = rotary_emb.split((NUM_LONG, NUM_SHORT))
    query = [
        heads_by_hand(attn.add_q_proj, attn.norm_added_q, long_states, long_rotary),
        heads_by_hand(attn.to_q, attn.norm_q, states, short_rotary),
    ]
    key = [
        heads_by_hand(attn.add_k_proj, attn.norm_added_k, long_states, long_rotary),
        heads_by_hand(attn.to_k, attn.norm_k, states, short_rotary),
    ]
    value = [heads_by_hand(attn.add_v_proj, None, long_states), heads_by_hand(attn.to_v, None, states)]
    hidden_states = attend_by_hand(*(torch.cat(parts, dim=2) for parts in (query, key, value)))
    long_expected = hidden_states[:, :NUM_LONG] @ attn.to_add_out.weight.T + attn.to_add_out.bias
    expected = hidden_states[:, NUM_LONG:] @ attn.to_out[0].weight.T + attn.to_out[0].bias
    output, long_output = attn(states, long_states, rotary_emb=rotary_emb)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(long_output, long_expected, atol=1e-5, rtol=1e-5)


def test_where_nobody_reads_the_long_tokens_they_have_no_output():
    attn = attention(added_kv_proj_dim=DIM, context_pre_only=True)
    assert not hasattr(attn, "to_add_out")
    _, long_output = attn(tokens(NUM_SHORT), tokens(NUM_LONG), rotary_emb=rotary(NUM_LONG + NUM_SHORT))
    assert long_output is None


def test_without_long_tokens_there_are_no_projections_for_them():
    assert not any("add" in name for name, _ in attention().named_parameters())


@torch.no_grad()
def test_half_precision_is_kept_through_the_rotation():
    output, _ = attention().bfloat16()(tokens(NUM_SHORT).bfloat16(), rotary_emb=rotary(NUM_SHORT))
    assert output.dtype == torch.bfloat16


# What a pass costs


class count_rotated_tokens:
    """Counts the tokens that pass through the rotary embedding, queries and keys together, over all layers."""

    def __enter__(self):
        self.num_tokens = 0
        rotate = frame_network.apply_rotary_embedding

        def count(hidden_states, rotary_emb):
            self.num_tokens += hidden_states.shape[1]
            return rotate(hidden_states, rotary_emb)

        self._patch = patch.object(frame_network, "apply_rotary_embedding", count)
        self._patch.start()
        return self

    def __exit__(self, *exception):
        self._patch.stop()


@pytest.mark.parametrize("num_context_frames", [2, 7])
def test_a_denoising_pass_rotates_the_tokens_of_its_own_frame_however_long_the_context(num_context_frames):
    model = tiny_transformer(long_patch_size=2)
    clip = random_clip(model, num_context_frames + 1)
    kv_cache = fill_cache(model, clip.frames(0, num_context_frames))
    with count_rotated_tokens() as counter:
        predict(model, clip.frames(num_context_frames, num_context_frames + 1), kv_cache=kv_cache)
    assert counter.num_tokens == 2 * 2 * 24  # queries and keys, in 2 layers


def test_writing_a_frame_rotates_what_is_encoded_anew_and_no_long_frame_twice():
    model = tiny_transformer(long_patch_size=2)
    clip = random_clip(model, 8)
    kv_cache = fill_cache(model, clip.frames(0, 7), max_frames=9)
    with count_rotated_tokens() as counter, torch.no_grad():
        model(clip.latents[:, 7:], -1, kv_cache=kv_cache, update_cache=True)
    # One frame turns long (6 tokens); the two others of the short window are encoded anew. The last layer has no queries.
    assert counter.num_tokens == (2 + 1) * (6 + 2 * 24)


def test_a_whole_clip_rotates_each_token_once():
    model = tiny_transformer(long_patch_size=2)
    with count_rotated_tokens() as counter:
        predict(model, random_clip(model, 7))
    # Queries and keys in 2 layers; but nobody reads what the last layer makes of the 4 long frames.
    assert counter.num_tokens == 2 * 2 * (4 * 6 + 3 * 24) - 4 * 6


@pytest.mark.parametrize("long_patch_size", [None, 2])
def test_against_a_cache_no_mask_is_built(long_patch_size):
    model = tiny_transformer(long_patch_size=long_patch_size)
    clip = random_clip(model, 8)
    with spy_attention() as calls:
        kv_cache = fill_cache(model, clip.frames(0, 7), chunks=[1, 4, 2])
        predict(model, clip.frames(7, 8), kv_cache=kv_cache)
    assert calls and all(mask is None for *_, mask in calls)


def test_the_cache_is_read_in_place():
    model = tiny_transformer(long_patch_size=2)
    clip = random_clip(model, 6)
    kv_cache = fill_cache(model, clip.frames(0, 5))
    stores = [store.untyped_storage().data_ptr() for store in (kv_cache._key_stores, kv_cache._value_stores)]
    with spy_attention() as calls:
        predict(model, clip.frames(5, 6), kv_cache=kv_cache)
    assert len(calls) == 2
    for _, key, value, _ in calls:
        assert [key.untyped_storage().data_ptr(), value.untyped_storage().data_ptr()] == stores
        assert key.shape[1] == 3 * 6 + 3 * 24  # everything that the frame may see and nothing else


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_accelerator_gets_a_bias_in_the_dtype_of_the_queries_and_in_memory_of_its_own(dtype):
    query, bias = torch.empty(1, 4, 2, 8, dtype=dtype, device="meta"), torch.zeros(1, 1, 3, 16, device="meta")
    part = mask_for_kernel(bias[..., 1:2, 3:7], query)
    assert (part.dtype, part.shape, part.storage_offset()) == (dtype, (1, 1, 1, 4), 0)
    is_seen = bias.bool()
    assert mask_for_kernel(is_seen, query) is is_seen and mask_for_kernel(None, query) is None


def test_the_cpu_gets_a_bias_as_it_is():
    bias = torch.zeros(1, 1, 3, 16)
    assert mask_for_kernel(bias, torch.empty(1, 4, 2, 8, dtype=torch.bfloat16)) is bias


# Processors, as in diffusers


def test_processors_are_listed_and_replaced_by_name():
    model = tiny_transformer()
    assert list(model.attn_processors) == [f"transformer_blocks.{layer}.attn.processor" for layer in range(2)]
    processor = FARAttnProcessor()
    model.set_attn_processor(processor)
    assert all(value is processor for value in model.attn_processors.values())


def test_the_attention_backend_is_set_for_every_layer():
    model = tiny_transformer()
    with using_backend(model, "flex"):
        assert {processor._attention_backend for processor in model.attn_processors.values()} == {"flex"}
    assert {processor._attention_backend for processor in model.attn_processors.values()} == {None}
