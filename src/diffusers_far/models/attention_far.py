"""Attention of the FAR transformer: one attention over long and short tokens, each kind with projections of its own.

B batch, F frames, L tokens of a pass (long ones first), N heads, D head dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from diffusers.hooks import HookRegistry
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn

from .causal_chunks import CausalChunks
from .context_plan import ContextPlan
from .functional import apply_rotary_embedding, frame_ids
from .kv_cache import LayerKVCache


@dataclass(frozen=True)
class AttentionFrames:
    """When the queries and keys of a pass are; what a hook on the attention needs to know of time.

    Args:
        query_frames (`torch.Tensor` of shape `(L,)`): Absolute frame index of each query; with a cache, where the
            queries attend frame by frame, of each frame of the pass: `(F,)`.
        key_frames (`torch.Tensor` of shape `(L_key,)`): Same clock, in the order of the keys.
        first_query_frame (`int`), last_query_frame (`int`): Known on the host, so that no decision waits for a device.
        is_twin (`torch.Tensor` of shape `(L,)`, bool, *optional*): Marks the noisy twins of clean frames, where a pass
            has such.
    """

    query_frames: torch.Tensor
    key_frames: torch.Tensor
    first_query_frame: int
    last_query_frame: int
    is_twin: torch.Tensor | None = None


def attention_frames_of(
    plan: ContextPlan,
    key_frames: torch.Tensor | None,
    device: torch.device | None = None,
    *,
    has_twins: bool = False,
) -> AttentionFrames:
    """When the queries and keys of a pass are; without a cache the keys are those of the pass itself."""
    is_twin = None
    if has_twins:
        query_frames = frame_ids(plan, device)
        is_twin = torch.arange(plan.num_tokens + plan.num_short_tokens, device=device) >= plan.num_tokens
        query_frames = key_frames = torch.cat([query_frames, query_frames[plan.num_long_tokens :]])
    elif key_frames is None:
        query_frames = key_frames = frame_ids(plan, device)
    else:
        long_frames = torch.arange(plan.first_frame, plan.end_long_frame, device=device)
        query_frames = torch.cat([long_frames, torch.arange(plan.first_short_frame, plan.end_frame, device=device)])
    return AttentionFrames(query_frames, key_frames, plan.first_frame, plan.end_frame - 1, is_twin)


class FARAttentionBias(nn.Module):
    """The attention mask of a pass as it is: a place where hooks, such as FlexRoPE's, change it, once for all layers.

    It has no weights and is not compiled with the blocks, so a hook on it neither binds nor recompiles anything.
    """

    def forward(self, attention_mask, frames: AttentionFrames):
        """Return `attention_mask`: `None` (against a cache, or where all see all), [`CausalChunks`], a dense mask or a
        `BlockMask`."""
        return attention_mask

    # A hook hides `forward` behind a function that cannot be pickled, and that a copy would share with its original.
    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "forward"}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        registry = HookRegistry.check_if_exists_or_initialize(self)
        hooks = dict(registry.hooks)
        registry.__init__(self)
        for name, hook in hooks.items():
            registry.register_hook(hook, name)


class FARAttnProcessor:
    """Default processor of [`FARAttention`]; runs on any backend of `dispatch_attention_fn`."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "FARAttention",
        hidden_states: torch.Tensor,
        long_hidden_states: torch.Tensor | None = None,
        rotary_emb: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        kv_cache: LayerKVCache | None = None,
        num_output_tokens: int | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        query_states, long_query_states = hidden_states, long_hidden_states
        if num_output_tokens is not None:
            query_states = hidden_states[:, hidden_states.shape[1] - num_output_tokens :]
            long_query_states = None
        key, value = self._project_keys(attn, hidden_states, long_hidden_states)  # (B, L, N, D)
        # Rotated before caching: positions never change, so old keys are rotated once.
        key = apply_rotary_embedding(key, rotary_emb).to(value.dtype)
        if kv_cache is not None:
            kv_cache.write(key, value)
        if num_output_tokens == 0:
            return None, None

        query = self._project_queries(attn, query_states, long_query_states)  # (B, L_query, N, D)
        num_unread = key.shape[1] - query.shape[1]
        query = apply_rotary_embedding(query, rotary_emb[num_unread:]).to(value.dtype)
        if kv_cache is None:
            hidden_states = self._attend_to_pass(query, key, value, attention_mask)
        else:
            hidden_states = self._attend_to_cache(query, attention_mask, kv_cache)
        hidden_states = hidden_states.flatten(2)  # (B, L_query, N * D)

        num_long_tokens = 0 if long_query_states is None else long_query_states.shape[1]
        long_output = None
        if num_long_tokens and not attn.context_pre_only:
            long_output = attn.to_add_out(hidden_states[:, :num_long_tokens])
        output = attn.to_out[0](hidden_states[:, num_long_tokens:])
        return attn.to_out[1](output), long_output

    def _project_queries(self, attn: "FARAttention", hidden_states, long_hidden_states) -> torch.Tensor:
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)))
        if long_hidden_states is None:
            return query
        long_query = attn.norm_added_q(attn.add_q_proj(long_hidden_states).unflatten(-1, (attn.heads, -1)))
        return torch.cat([long_query, query], dim=1)

    def _project_keys(
        self, attn: "FARAttention", hidden_states, long_hidden_states
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key = attn.norm_k(attn.to_k(hidden_states).unflatten(-1, (attn.heads, -1)))
        value = attn.to_v(hidden_states).unflatten(-1, (attn.heads, -1))
        if long_hidden_states is None:
            return key, value
        long_key = attn.norm_added_k(attn.add_k_proj(long_hidden_states).unflatten(-1, (attn.heads, -1)))
        long_value = attn.add_v_proj(long_hidden_states).unflatten(-1, (attn.heads, -1))
        return torch.cat([long_key, key], dim=1), torch.cat([long_value, value], dim=1)

    def _attend(self, query, key, value, attention_mask):
        return dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=fitting_bias(attention_mask, query),
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )

    def _attend_to_pass(self, query, key, value, attention_mask):
        if isinstance(attention_mask, CausalChunks):
            return attention_mask.attend(self._attend, query, key, value)
        if isinstance(attention_mask, torch.Tensor) and attention_mask.shape[-2] > query.shape[1]:
            attention_mask = attention_mask[..., attention_mask.shape[-2] - query.shape[1] :, :]
        return self._attend(query, key, value, attention_mask)

    def _attend_to_cache(self, query, attention_bias, kv_cache: LayerKVCache):
        """Frame by frame: each sees one contiguous view of the stores, so causality needs no mask."""
        first_key = kv_cache.cache_pass.view_start
        outputs = []
        for frame, span in enumerate(kv_cache.cache_pass.queries):
            bias = None
            if attention_bias is not None:  # a row for each frame of the pass, a column for each key in view
                columns = slice(span.view_start - first_key, span.view_end - first_key)
                bias = attention_bias[..., frame : frame + 1, columns]
            outputs.append(self._attend(query[:, span.start : span.end], *kv_cache.view(span), bias))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def fitting_bias(attention_mask: Any, query: torch.Tensor) -> Any:
    """An additive mask as the kernels of an accelerator take it: in the dtype of the queries, and in memory of its own. Other
    masks, and the CPU's, are returned as they are.

    Some kernels refuse another dtype, and some misread it; they load blocks that are aligned, but a part of a mask may start
    anywhere.
    """
    is_bias = isinstance(attention_mask, torch.Tensor) and attention_mask.dtype != torch.bool
    if not is_bias or query.device.type == "cpu":
        return attention_mask
    return attention_mask.to(query.dtype, copy=True)


class FARAttention(nn.Module, AttentionModuleMixin):
    """Self-attention over a pass; `add_*` projections serve the long tokens, as in MM-DiT.

    Args:
        dim (`int`): Width of the tokens.
        heads (`int`), dim_head (`int`): Attention heads and their channels.
        added_kv_proj_dim (`int`, *optional*): Width of the long tokens; `None` builds no projections for them.
        context_pre_only (`bool`): The long tokens are attended to but not updated, so they have no output projection.
        eps (`float`): Of the RMS norms on queries and keys.
    """

    _default_processor_cls = FARAttnProcessor
    _available_processors = [FARAttnProcessor]
    _supports_qkv_fusion = False

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        added_kv_proj_dim: int | None = None,
        context_pre_only: bool = False,
        eps: float = 1e-6,
        processor=None,
    ):
        super().__init__()
        inner_dim = heads * dim_head
        self.heads = heads
        self.added_kv_proj_dim = added_kv_proj_dim
        self.context_pre_only = context_pre_only

        self.to_q = nn.Linear(dim, inner_dim)
        self.to_k = nn.Linear(dim, inner_dim)
        self.to_v = nn.Linear(dim, inner_dim)
        self.norm_q = nn.RMSNorm(dim_head, eps=eps)
        self.norm_k = nn.RMSNorm(dim_head, eps=eps)
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, dim), nn.Dropout(0.0)])

        if added_kv_proj_dim is not None:
            self.add_q_proj = nn.Linear(added_kv_proj_dim, inner_dim)
            self.add_k_proj = nn.Linear(added_kv_proj_dim, inner_dim)
            self.add_v_proj = nn.Linear(added_kv_proj_dim, inner_dim)
            self.norm_added_q = nn.RMSNorm(dim_head, eps=eps)
            self.norm_added_k = nn.RMSNorm(dim_head, eps=eps)
            if not context_pre_only:
                self.to_add_out = nn.Linear(inner_dim, dim)

        self.set_processor(processor or self._default_processor_cls())

    def forward(
        self,
        hidden_states: torch.Tensor,
        long_hidden_states: torch.Tensor | None = None,
        rotary_emb: torch.Tensor | None = None,
        attention_mask: Any = None,
        kv_cache: LayerKVCache | None = None,
        num_output_tokens: int | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Attend.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, L_short, dim)`).
            long_hidden_states (`torch.Tensor` of shape `(B, L_long, dim)`, *optional*).
            rotary_emb (`torch.Tensor` of shape `(L, D / 2)`): Rotations of the pass's tokens, long ones first.
            attention_mask (`torch.Tensor` broadcastable to `(B, N, L, L_key)`, `CausalChunks` or `BlockMask`, *optional*):
                With a cache a bias of shape `(1, 1, F, L_view)`, one row for each frame of the pass.
            kv_cache (`LayerKVCache`, *optional*): Stores the pass's keys and values and adds the cached ones.
            num_output_tokens (`int`, *optional*): Only the last so many short tokens have an output that anybody reads;
                against a cache 0 or all. With 0 the pass only stores.

        Returns:
            The outputs for the short and for the long tokens; `None` where nobody reads them.
        """
        return self.processor(
            self, hidden_states, long_hidden_states, rotary_emb, attention_mask, kv_cache, num_output_tokens
        )
