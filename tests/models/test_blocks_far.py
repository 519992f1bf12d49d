import pytest
import torch
from tiny_models import randomize

from diffusers_far.models.frame_network import FARActionEmbedding, FARAdaLayerNorm, FARTransformerBlock
from diffusers_far.models.functional import rotary_embedding


DIM = 16


def embeddings(num_frames: int) -> torch.Tensor:
    return torch.randn(2, num_frames, DIM, generator=torch.Generator().manual_seed(num_frames))


def normalized(states: torch.Tensor) -> torch.Tensor:
    mean, variance = states.mean(-1, keepdim=True), states.var(-1, keepdim=True, unbiased=False)
    return (states - mean) / (variance + 1e-6).sqrt()


def test_modulation_is_per_frame_and_broadcasts_over_its_tokens():
    norm = randomize(FARAdaLayerNorm(DIM, num_chunks=3))
    temb = embeddings(5)
    expected = (torch.nn.functional.silu(temb) @ norm.linear.weight.T + norm.linear.bias).split(DIM, dim=-1)
    states = torch.randn(2, 5, 4, DIM)
    normed, *chunks = norm(states, temb)
    torch.testing.assert_close(normed, normalized(states), atol=1e-5, rtol=1e-5)
    assert [chunk.shape for chunk in chunks] == [(2, 5, 1, DIM)] * 3
    for chunk, wanted in zip(chunks, expected):
        torch.testing.assert_close(chunk[:, :, 0], wanted)


@torch.no_grad()
@pytest.mark.parametrize("num_long_frames", [0, 2])
def test_a_block_is_its_formula(num_long_frames):
    block = randomize(FARTransformerBlock(DIM, 2, 8, 2.0, added_kv_proj_dim=DIM)).eval()
    states, temb = torch.randn(2, 3, 4, DIM), embeddings(3)
    long_states, long_temb = None, None
    if num_long_frames:
        long_states, long_temb = torch.randn(2, num_long_frames, 1, DIM), embeddings(num_long_frames)
    num_tokens = 12 + num_long_frames
    rotary_emb = rotary_embedding(torch.randint(0, 9, (num_tokens, 3)), (4, 2, 2))

    def modulated(norm, states, temb):
        _, shift, scale, gate = norm(states, temb)
        return normalized(states) * (1 + scale) + shift, gate

    attn_input, gate = modulated(block.norm1, states, temb)
    long_attn_input = long_gate = None
    if num_long_frames:
        long_attn_input, long_gate = modulated(block.norm1, long_states, long_temb)
        long_attn_input = long_attn_input.flatten(1, 2)
    attn_outputs = block.attn(attn_input.flatten(1, 2), long_attn_input, rotary_emb=rotary_emb)
    all_temb = temb if long_temb is None else torch.cat([long_temb, temb], dim=1)
    outputs = block(states, long_states, all_temb, rotary_emb)

    kinds = [(states, temb, gate, attn_outputs[0], outputs[0])]
    if num_long_frames:
        kinds.append((long_states, long_temb, long_gate, attn_outputs[1], outputs[1]))
    else:
        assert outputs[1] is None
    for states, temb, gate, attn_output, output in kinds:
        states = states + gate * attn_output.view_as(states)
        mlp_input, gate = modulated(block.norm2, states, temb)
        torch.testing.assert_close(output, states + gate * block.mlp(mlp_input), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_discrete_actions_have_a_row_each_and_one_more_for_the_null_action():
    embedding = randomize(FARActionEmbedding(DIM, num_actions=3))
    actions, action_mask = torch.tensor([[0, 2, 1]]), torch.tensor([[True, True, False]])
    assert torch.equal(embedding(actions)[0], embedding.embedding_table.weight[[0, 2, 1]])
    assert torch.equal(embedding(actions, action_mask)[0], embedding.embedding_table.weight[[0, 2, 3]])


@torch.no_grad()
def test_continuous_actions_pass_an_mlp_and_the_null_action_is_learned():
    embedding = randomize(FARActionEmbedding(DIM, action_dim=2))
    actions, action_mask = torch.randn(1, 3, 2), torch.tensor([[True, False, True]])
    embedded = embedding(actions, action_mask)
    torch.testing.assert_close(embedded[:, [0, 2]], embedding(actions[:, [0, 2]]))
    assert torch.equal(embedded[0, 1], embedding.null_embedding)
    assert embedding.bfloat16()(actions, action_mask).dtype == torch.bfloat16
