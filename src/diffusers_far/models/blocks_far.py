"""The parts of the FAR transformer: condition embedding, modulated norm, block.

B batch, F frames, T tokens of a frame, L tokens of a pass, D head dim.
"""

import torch
import torch.nn as nn
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import TimestepEmbedding

from .attention_far import FARAttention
from .denoising_steps import DenoisingSteps
from .kv_cache import LayerKVCache


class FARActionEmbedding(nn.Module):
    """Embeds the action that each frame is fed: a table for discrete actions, an MLP for continuous ones. Either knows
    a null action, which stands for "none given".

    Args:
        dim (`int`): Width of the embedding.
        num_actions (`int`, *optional*): Size of the discrete action space; its null action has this index.
        action_dim (`int`, *optional*): Channels of a continuous action; its null action is a learned embedding.
    """

    def __init__(self, dim: int, num_actions: int | None = None, action_dim: int | None = None):
        super().__init__()
        self.num_actions = num_actions
        if num_actions is not None:
            self.embedding_table = nn.Embedding(num_actions + 1, dim)
        else:
            self.proj = TimestepEmbedding(action_dim, dim)
            self.null_embedding = nn.Parameter(torch.zeros(dim))

    def forward(self, actions: torch.Tensor, action_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Embed `(B, F)` int64 or `(B, F, action_dim)` float actions; those masked `False` are null. -> (B, F, dim)"""
        if self.num_actions is not None:
            if action_mask is not None:
                actions = actions.masked_fill(~action_mask, self.num_actions)
            return self.embedding_table(actions)
        embedding = self.proj(actions.to(self.null_embedding.dtype))
        if action_mask is not None:
            embedding = torch.where(action_mask[..., None], embedding, self.null_embedding)
        return embedding


class FARAdaLayerNorm(nn.Module):
    """Layer norm whose shift, scale (and further chunks, such as a gate) come from an embedding, once per frame."""

    def __init__(self, dim: int, num_chunks: int):
        super().__init__()
        self.num_chunks = num_chunks
        self.linear = nn.Linear(dim, num_chunks * dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)

    def modulation(self, temb: torch.Tensor, steps: DenoisingSteps | None = None) -> tuple[torch.Tensor, ...]:
        """Chunks of the modulation of each frame, `(B, F, dim)` -> `num_chunks` times `(B, F, 1, dim)`; with `steps`
        from what those keep."""
        projected = self._project(temb) if steps is None else steps.product(self, self._project)
        return projected[:, :, None].chunk(self.num_chunks, dim=-1)

    def _project(self, temb: torch.Tensor) -> torch.Tensor:
        return self.linear(nn.functional.silu(temb))


class FARTransformerBlock(nn.Module):
    """Attention over all tokens of a pass, then an MLP that long and short tokens share."""

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        mlp_ratio: float,
        added_kv_proj_dim: int | None = None,
        context_pre_only: bool = False,
    ):
        super().__init__()
        self.norm1 = FARAdaLayerNorm(dim, num_chunks=3)
        self.attn = FARAttention(
            dim,
            heads=num_attention_heads,
            dim_head=attention_head_dim,
            added_kv_proj_dim=added_kv_proj_dim,
            context_pre_only=context_pre_only,
        )
        self.norm2 = FARAdaLayerNorm(dim, num_chunks=3)
        self.mlp = FeedForward(dim, inner_dim=int(dim * mlp_ratio), activation_fn="gelu-approximate")

    def forward(
        self,
        hidden_states: torch.Tensor,
        long_hidden_states: torch.Tensor | None,
        temb: torch.Tensor,
        long_temb: torch.Tensor | None,
        rotary_emb: torch.Tensor,
        attention_mask: torch.Tensor | None,
        kv_cache: LayerKVCache | None,
        num_output_frames: int | None = None,
        steps: DenoisingSteps | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """`hidden_states` (B, F_short, T_short, dim) with `temb` (B, F_short, dim), and likewise for the long frames.

        In the last block nobody reads every output. With `num_output_frames` it returns the last so many short frames
        alone; with 0, which needs a `kv_cache`, it only stores keys and values.

        `steps` are those of the one noisy frame, where `temb` is its embedding at one of them.
        """
        # 1. Attention, over the tokens of all frames at once
        attn_input, gate = self._modulated_norm1(hidden_states, temb, steps)
        long_attn_input, long_gate = None, None
        if long_hidden_states is not None:
            long_attn_input, long_gate = self._modulated_norm1(long_hidden_states, long_temb)
        num_output_tokens = None
        if num_output_frames is not None:
            num_output_tokens = num_output_frames * hidden_states.shape[2]
        attn_output, long_attn_output = self.attn(
            attn_input,
            long_attn_input,
            rotary_emb=rotary_emb,
            attention_mask=attention_mask,
            kv_cache=kv_cache,
            num_output_tokens=num_output_tokens,
        )
        if num_output_frames == 0:
            return None, None

        # 2. Gated residuals and MLP, for each kind of token
        if num_output_frames is not None:
            hidden_states, temb, gate = (each[:, -num_output_frames:] for each in (hidden_states, temb, gate))
        hidden_states = self._feed_forward(hidden_states + gate * attn_output.view_as(hidden_states), temb, steps)
        if long_attn_output is None:
            return hidden_states, None
        long_attn_output = long_gate * long_attn_output.view_as(long_hidden_states)
        return hidden_states, self._feed_forward(long_hidden_states + long_attn_output, long_temb)

    def _modulated_norm1(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, steps: DenoisingSteps | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shift, scale, gate = self.norm1.modulation(temb, steps)
        return (self.norm1.norm(hidden_states) * (1 + scale) + shift).flatten(1, 2), gate

    def _feed_forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, steps: DenoisingSteps | None = None
    ) -> torch.Tensor:
        shift, scale, gate = self.norm2.modulation(temb, steps)
        return hidden_states + gate * self.mlp(self.norm2.norm(hidden_states) * (1 + scale) + shift)
