"""The arithmetic limit: the matrix products and attention calls of a case, same shapes, and nothing between them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from diffusers_far import FARTransformer3DModel


def bare_step(transformer: FARTransformer3DModel, num_keys: int, num_tokens: int) -> Callable[[], None]:
    """What one denoising step of one frame cannot do without.

    Args:
        transformer (`FARTransformer3DModel`): Its weights are multiplied with.
        num_keys (`int`): Tokens that the frame sees, its own included.
        num_tokens (`int`): Tokens of the frame.
    """
    config, dim = transformer.config, transformer.inner_dim
    frame, tokens, hidden = torch.randn(1, dim), torch.randn(num_tokens, dim), torch.randn(num_tokens, 4 * dim)
    shape = (1, config.num_attention_heads, -1, config.attention_head_dim)
    query = torch.randn(num_tokens, dim).view(shape)
    key, value = torch.randn(num_keys, dim).view(shape), torch.randn(num_keys, dim).view(shape)
    patches = torch.randn(num_tokens, transformer.x_embedder.in_features)

    @torch.no_grad()
    def run():
        transformer.x_embedder(patches)
        for block in transformer.transformer_blocks:
            block.norm1.linear(frame)
            block.norm2.linear(frame)
            for product in (block.attn.to_q, block.attn.to_k, block.attn.to_v, block.attn.to_out[0]):
                product(tokens)
            F.scaled_dot_product_attention(query, key, value)
            block.mlp.net[0].proj(tokens)
            block.mlp.net[2](hidden)
        transformer.norm_out.linear(frame)
        transformer.proj_out(tokens)

    return run
