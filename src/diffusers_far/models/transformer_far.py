"""The FAR transformer: a DiT whose attention is full inside a frame and causal between frames.

The file reads from the inside out: attention, condition embedding, modulated norm, block, and the model that runs them.

B batch, F frames, C latent channels, H/W latent height/width, T tokens of a frame, L tokens of a pass (long ones first),
N heads, D head dim.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial, wraps
from typing import Any

import torch
import torch.nn as nn
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks import HookRegistry
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput

from ..checks import check_count, check_finite, check_memory
from .adapters import AdapterMixin, scaled_adapters
from .context_parallel import ClipGroup, SharedPass
from .context_plan import ContextPlan
from .frames import FrameBatch, check_condition, pair_with_clean
from .functional import (
    CausalChunks,
    apply_rotary_embedding,
    frame_causal_block_mask,
    frame_causal_chunks,
    frame_causal_mask,
    frame_ids,
    patchify,
    position_ids,
    rotary_embedding,
    unpatchify,
)
from .int8 import Int8Mixin
from .internals import (
    attention_backend,
    bring_to_device,
    call_uncompiled,
    execution_device,
    group_offloading,
    is_compiled,
)
from .kv_cache import CacheOptions, CachePass, FARKVCache, LayerKVCache
from .loading import CompleteWeightsMixin


@dataclass(frozen=True)
class AttentionFrames:
    """When the queries and keys of a pass are; what a hook on the attention needs to know of time. Its tensors are computed
    where they are asked for.

    Args:
        plan (`ContextPlan`): The frames of the pass.
        device (`torch.device`, *optional*): Of the tensors.
        has_twins (`bool`): The short frames follow once more, as noisy twins of clean frames.
        kv_cache (`FARKVCache`, *optional*), cache_pass (`CachePass`, *optional*): The pass runs against this cache; without
            one its keys are its own.
    """

    plan: ContextPlan
    device: torch.device | None = None
    has_twins: bool = False
    kv_cache: FARKVCache | None = None
    cache_pass: CachePass | None = None

    @property
    def first_query_frame(self) -> int:
        return self.plan.first_frame

    @property
    def last_query_frame(self) -> int:
        return self.plan.end_frame - 1

    @cached_property
    def query_frames(self) -> torch.Tensor:
        """Absolute frame index of each query, `(L,)`; with a cache, where the queries attend frame by frame, of each frame
        of the pass, `(F,)`."""
        if self.kv_cache is None:
            return frame_ids(self.plan, self.device, self.has_twins)
        long_frames = torch.arange(self.plan.first_frame, self.plan.end_long_frame, device=self.device)
        short_frames = torch.arange(self.plan.first_short_frame, self.plan.end_frame, device=self.device)
        return torch.cat([long_frames, short_frames])

    @cached_property
    def key_frames(self) -> torch.Tensor:
        """Absolute frame index of each key, in the order of the keys, `(L_key,)`."""
        return self.query_frames if self.kv_cache is None else self.kv_cache.key_frames(self.cache_pass)

    @cached_property
    def is_twin(self) -> torch.Tensor | None:
        """Marks the noisy twins among the queries, bool, `(L,)`; `None` where there are none."""
        if not self.has_twins:
            return None
        return torch.arange(len(self.query_frames), device=self.device) >= self.plan.num_tokens


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
        if isinstance(attention_mask, SharedPass):
            reads_all = num_output_tokens is None
            hidden_states = attention_mask.attend(self._attend_to_pass, query, key, value, reads_all)
        elif kv_cache is None:
            hidden_states = self._attend_to_pass(query, key, value, attention_mask)
        else:
            hidden_states = self._attend_to_cache(query, attention_mask, kv_cache)
        hidden_states = hidden_states.flatten(2)  # (B, L_query, N * D)

        num_long_tokens = 0 if long_query_states is None else long_query_states.shape[1]
        long_output = None
        if long_query_states is not None and not attn.context_pre_only:
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
            attn_mask=mask_for_kernel(attention_mask, query),
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
        spans, first_key, outputs = kv_cache.cache_pass.queries, kv_cache.cache_pass.view_start, []
        num_unread = spans[-1].end - query.shape[1]  # of the first frames, nobody reads what they see
        for frame, span in enumerate(spans):
            if span.start < num_unread:
                continue
            bias = None
            if attention_bias is not None:  # a row for each frame of the pass, a column for each key in view
                columns = slice(span.view_start - first_key, span.view_end - first_key)
                bias = attention_bias[..., frame : frame + 1, columns]
            queries = query[:, span.start - num_unread : span.end - num_unread]
            outputs.append(self._attend(queries, *kv_cache.view(span), bias))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def mask_for_kernel(attention_mask: Any, query: torch.Tensor) -> Any:
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
                With a cache a bias of shape `(1, 1, F, L_view)`, one row for each frame of the pass. Of clips that processes
                share, their `SharedPass`.
            kv_cache (`LayerKVCache`, *optional*): Stores the pass's keys and values and adds the cached ones.
            num_output_tokens (`int`, *optional*): Only the last so many short tokens, of whole frames, have an output that
                anybody reads. With 0 the pass only stores.

        Returns:
            The outputs for the short and for the long tokens; `None` where nobody reads them.
        """
        return self.processor(
            self, hidden_states, long_hidden_states, rotary_emb, attention_mask, kv_cache, num_output_tokens
        )


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

    def modulation(self, temb: torch.Tensor) -> torch.Tensor:
        """Shift, scale and so on of each frame, `(B, F, dim)` -> `(B, F, num_chunks * dim)`."""
        return self.linear(nn.functional.silu(temb))

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor | None, modulation: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """The normed states, `(B, F, T, dim)`, and `num_chunks` times `(B, F, 1, dim)`: of the `modulation` where it is known
        already, else of the embedding. What is done with them is the caller's."""
        modulation = self.modulation(temb) if modulation is None else modulation
        return self.norm(hidden_states), *modulation[:, :, None].chunk(self.num_chunks, dim=-1)


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
        temb: torch.Tensor | None,
        rotary_emb: torch.Tensor,
        attention_mask: Any = None,
        kv_cache: LayerKVCache | None = None,
        num_output_frames: int | None = None,
        modulation: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """`hidden_states` (B, F_short, T_short, dim) after `long_hidden_states` (B, F_long, T_long, dim), with `temb`
        (B, F_long + F_short, dim). Where the `modulation` of the two norms is known, `temb` is not read.

        In the last block nobody reads every output. With `num_output_frames` it returns the last so many short frames
        alone; with 0, which needs a `kv_cache`, it only stores keys and values.
        """
        long_temb, long_attn_input = None, None
        attn_modulation, mlp_modulation = modulation or (None, None)

        # 1. Attention, over the tokens of all frames at once
        if long_hidden_states is not None:
            num_long_frames = long_hidden_states.shape[1]
            long_temb, temb = temb[:, :num_long_frames], temb[:, num_long_frames:]
            long_attn_input, long_gate = self._modulated_norm1(long_hidden_states, long_temb)
        attn_input, gate = self._modulated_norm1(hidden_states, temb, attn_modulation)
        num_output_tokens = None if num_output_frames is None else num_output_frames * hidden_states.shape[2]
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
            hidden_states, gate = hidden_states[:, -num_output_frames:], gate[:, -num_output_frames:]
            temb = None if temb is None else temb[:, -num_output_frames:]
        hidden_states = hidden_states + gate * attn_output.view_as(hidden_states)
        hidden_states = self._feed_forward(hidden_states, temb, mlp_modulation)
        if long_attn_output is None:
            return hidden_states, None
        long_attn_output = long_gate * long_attn_output.view_as(long_hidden_states)
        return hidden_states, self._feed_forward(long_hidden_states + long_attn_output, long_temb)

    def _modulated_norm1(self, hidden_states, temb, modulation=None) -> tuple[torch.Tensor, torch.Tensor]:
        normed_states, shift, scale, gate = self.norm1(hidden_states, temb, modulation)
        return (normed_states * (1 + scale) + shift).flatten(1, 2), gate

    def _feed_forward(self, hidden_states, temb, modulation=None) -> torch.Tensor:
        normed_states, shift, scale, gate = self.norm2(hidden_states, temb, modulation)
        return hidden_states + gate * self.mlp(normed_states * (1 + scale) + shift)


CLEAN_TIMESTEP = -1.0  # outside the schedule: a finished frame
LONG_TIMESTEP = -2.0  # a long frame, which is always clean
END_SHARE = 0.25  # of a flow map's time embedding: that of where the step ends

# Rows of a modulation that are computed at once. With more, a step has enough rows of its own to make the reading of weights
# worth it, and what is kept would be large: 12 layers of width 768 keep 56 MB of 256 rows in float32.
MAX_MODULATION_ROWS = 256


@dataclass(frozen=True)
class FrameModulation:
    """What time and conditions do to the one noisy frame at one denoising step; of
    [`FARTransformer3DModel.frame_modulations`].

    Args:
        blocks (`tuple`): For each block the modulations of its two norms, `(B, 1, 3 * dim)`.
        output (`torch.Tensor` of shape `(B, 1, 2 * dim)`): Of the norm before the output.
    """

    blocks: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    output: torch.Tensor

    def doubled(self) -> "FrameModulation":
        """For a batch that follows itself once more."""
        blocks = tuple(tuple(torch.cat([each, each]) for each in block) for block in self.blocks)
        return FrameModulation(blocks, torch.cat([self.output, self.output]))


@dataclass
class FARTransformerOutput(BaseOutput):
    """Output of [`FARTransformer3DModel`].

    Args:
        sample (`torch.Tensor` of shape `(B, F_short, C, H, W)`): Predicted velocity of the short frames; `None` where
            the call only wrote to a cache.
    """

    sample: torch.Tensor | None


class FrameNetwork(nn.Module):
    """What frames run through: patches, the embedding of time and conditions, blocks, and a last norm, with or without an
    output layer. FAR is one such network; a separable model has two.

    Its class knows the `config`, and makes the layers with `build`.
    """

    gradient_checkpointing = False
    clip_group: ClipGroup | None = None
    drops_conditions = True  # in training; else the model does, for several networks at once

    def build(self, num_layers: int, *, has_long_frames: bool, out_channels: int | None = None) -> None:
        """Make the layers; without `out_channels` there is no output layer."""
        config = self.config
        self.inner_dim = config.num_attention_heads * config.attention_head_dim

        # 1. Patches
        self.x_embedder = nn.Linear(config.in_channels * config.patch_size**2, self.inner_dim)
        if has_long_frames:
            self.context_embedder = nn.Linear(config.in_channels * config.long_patch_size**2, self.inner_dim)

        # 2. Time and conditions
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=1)
        self.timestep_embedder = TimestepEmbedding(256, self.inner_dim)
        if config.flow_map and out_channels is not None:  # it denoises
            self.r_timestep_embedder = TimestepEmbedding(256, self.inner_dim)
        if config.num_actions is not None or config.action_dim is not None:
            self.action_embedder = FARActionEmbedding(self.inner_dim, config.num_actions, config.action_dim)
        if config.num_classes is not None:
            self.label_embedder = nn.Embedding(config.num_classes + 1, self.inner_dim)

        # 3. Attention mask, where hooks change it
        self.attention_bias = FARAttentionBias()

        # 4. Blocks. After the last one nobody reads the long tokens, so there they have no output projection.
        self.transformer_blocks = nn.ModuleList(
            FARTransformerBlock(
                self.inner_dim,
                config.num_attention_heads,
                config.attention_head_dim,
                config.mlp_ratio,
                added_kv_proj_dim=self.inner_dim if has_long_frames else None,
                context_pre_only=layer == num_layers - 1,
            )
            for layer in range(num_layers)
        )
        if has_long_frames:  # nor does anybody read what they see there, so what only asks for it is not trained
            last_attention = self.transformer_blocks[-1].attn
            last_attention.add_q_proj.requires_grad_(False)
            last_attention.norm_added_q.requires_grad_(False)

        # 5. Output
        self.norm_out = FARAdaLayerNorm(self.inner_dim, num_chunks=2)
        if out_channels is not None:
            self.proj_out = nn.Linear(self.inner_dim, out_channels * config.patch_size**2)

    @property
    def takes_actions(self) -> bool:
        return hasattr(self, "action_embedder")

    @property
    def takes_labels(self) -> bool:
        return hasattr(self, "label_embedder")

    @property
    def has_compiled_blocks(self) -> bool:
        return torch.compiler.is_compiling() or is_compiled(self.transformer_blocks[0])

    def embed(
        self, frames: FrameBatch, timestep: torch.Tensor, class_labels: torch.Tensor | None, num_long_frames: int = 0
    ) -> torch.Tensor:
        """The sum of time, action and class embedding of each frame, `(B, F, dim)`. `timestep` is `(B, F)`, or, where a step of
        a flow map ends elsewhere, `(2, B, F)`: its start and its end."""
        is_long = torch.arange(frames.num_frames, device=timestep.device) < num_long_frames
        timestep = timestep.masked_fill(is_long, LONG_TIMESTEP)
        # Sinusoids in float32 whatever the dtype: bfloat16 rounds timesteps above 256.
        time_proj = self.time_proj(timestep.flatten()).to(frames.latents.dtype).unflatten(0, timestep.shape)
        start, end = time_proj if timestep.ndim == 3 else (time_proj, time_proj)
        temb = self.timestep_embedder(start)
        if hasattr(self, "r_timestep_embedder"):
            temb = temb.lerp(self.r_timestep_embedder(end), END_SHARE)

        if self.training and self.drops_conditions and self.config.condition_dropout:
            frames, class_labels = self.drop_conditions(frames, class_labels)
        if self.takes_actions:
            temb = temb + self.action_embedder(frames.actions, frames.action_mask)
        if self.takes_labels:
            temb = temb + self.label_embedder(class_labels)[:, None]
        return temb

    def drop_conditions(
        self, frames: FrameBatch, class_labels: torch.Tensor | None
    ) -> tuple[FrameBatch, torch.Tensor | None]:
        """Some actions, drawn frame by frame, and some labels, drawn clip by clip, become null."""
        shape, device, share = frames.latents.shape[:2], frames.latents.device, self.config.condition_dropout
        if self.takes_actions:
            kept = torch.rand(shape, device=device) >= share
            frames = replace(frames, action_mask=kept if frames.action_mask is None else kept & frames.action_mask)
        if self.takes_labels:
            dropped = torch.rand(shape[0], device=device) < share
            class_labels = class_labels.masked_fill(dropped, self.config.num_classes)
        return frames, class_labels

    def modulations(self, temb: torch.Tensor) -> list[FrameModulation]:
        """What the blocks and the last norm make of the embedding of each step, `(B, S, dim)`."""
        blocks = [(block.norm1.modulation(temb), block.norm2.modulation(temb)) for block in self.transformer_blocks]
        output = self.norm_out.modulation(temb)
        return [
            FrameModulation(tuple((first[:, step], second[:, step]) for first, second in blocks), output[:, step])
            for step in (slice(index, index + 1) for index in range(temb.shape[1]))
        ]

    def patches(self, latents: torch.Tensor, plan: ContextPlan) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embedded patches of the short and of the long frames, `(B, F, T, dim)` each; twins count as short ones."""
        num_long = plan.num_long_frames
        short_states = self.x_embedder(patchify(latents[:, num_long:], plan.patch_size))
        long_states = (
            self.context_embedder(patchify(latents[:, :num_long], plan.long_patch_size)) if num_long else None
        )
        return short_states, long_states

    def run(
        self,
        short_states: torch.Tensor,
        long_states: torch.Tensor | None,
        plan: ContextPlan,
        temb: torch.Tensor | None,
        kv_cache: FARKVCache | None = None,
        cache_pass: CachePass | None = None,
        modulation: FrameModulation | None = None,
        num_read_frames: int | None = None,
    ):
        """One pass over the patches of a plan's frames: the `output` of its short frames, or of the last `num_read_frames`
        alone, `None` for 0. Where noisy twins follow the short frames, it is theirs.

        `temb` is the embedding of each frame, `(B, F, dim)`; `modulation` replaces it.
        """
        device, has_twins = short_states.device, short_states.shape[1] > plan.num_short_frames

        # 1. Positions, and who sees whom
        positions = position_ids(plan, device, has_twins)
        rotary_emb = rotary_embedding(positions, self.config.axes_dims_rope, self.config.rope_theta)
        attention_frames = AttentionFrames(plan, device, has_twins, kv_cache, cache_pass)
        attention_mask = self.attention_bias(self._attention_mask(attention_frames), attention_frames)

        # 2. Blocks; of the last one only what is read
        num_layers, is_write = len(self.transformer_blocks), cache_pass is not None and not cache_pass.is_noisy
        if num_read_frames is None:
            num_read_frames = self._num_output_frames(plan, attention_mask, has_twins)
        shared, block_temb, num_outputs = None, temb, [None] * (num_layers - 1) + [num_read_frames]
        if self.clip_group is not None:
            shared = SharedPass(self.clip_group, plan, attention_mask, has_twins, device)
            short_states, long_states, block_temb, rotary_emb = shared.own(short_states, long_states, temb, rotary_emb)
            attention_mask = shared
            num_outputs[-1] = None if num_read_frames is None else shared.num_own_frames
        layers = [None] * num_layers if kv_cache is None else kv_cache.layers(cache_pass)
        modulations = [None] * num_layers if modulation is None else modulation.blocks
        for block, *own in zip(self.transformer_blocks, layers, num_outputs, modulations):
            run = self._way_to_run(block, plan, is_write)
            short_states, long_states = run(short_states, long_states, block_temb, rotary_emb, attention_mask, *own)
        if num_read_frames == 0:
            return None
        if shared is not None:
            short_states = shared.gathered(short_states)

        # 3. Output, of the twins where there are any
        short_states = short_states[:, -(num_read_frames or plan.num_short_frames) :]
        temb = None if temb is None else temb[:, -short_states.shape[1] :]
        # Called as a module, like the blocks: where the weights are in shards, each unit is gathered when it is called.
        outputs = self.norm_out(short_states, temb, None if modulation is None else modulation.output)
        return self.output(*outputs, plan)

    def output(self, states, scale, shift, plan: ContextPlan) -> torch.Tensor:
        """What comes of normed states, `(B, F, T, dim)`, and the modulation of the last norm: velocity."""
        patches = self.proj_out(states * (1 + scale) + shift)
        return unpatchify(patches, plan.patch_size, plan.height, plan.width)

    def _way_to_run(self, block: FARTransformerBlock, plan: ContextPlan, is_write: bool) -> Callable:
        """How a block is called: as it is, with gradient checkpointing, or as if it were not compiled."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return partial(self._gradient_checkpointing_func, block)
        # So little work as the last block's of a write is not worth compiling, nor are so many frames, whose attentions the
        # compiler would unroll for a pass that does not come again.
        is_long_context = plan.num_frames > 2 * self.config.short_window
        if is_write and (is_long_context or block is self.transformer_blocks[-1]):
            return partial(call_uncompiled, block)
        return block

    def _num_output_frames(self, plan: ContextPlan, attention_mask, has_twins: bool) -> int | None:
        """How many of the last block's short frames are read; `None` where all are, or cannot be told apart."""
        is_everything = not has_twins and plan.num_long_frames == 0
        is_block_mask = attention_mask is not None and not isinstance(attention_mask, (torch.Tensor, CausalChunks))
        return None if is_everything or is_block_mask else plan.num_short_frames

    def _attention_mask(self, frames: AttentionFrames):
        """Who sees whom. `None` where every query sees every key, as against a cache, of which each frame sees a view of its
        own; else a `BlockMask` for flex attention, [`CausalChunks`] for the native one, a dense mask for others and for
        compiled blocks, which chunks would compile again and again."""
        is_alone = frames.plan.num_frames == 1 and not frames.has_twins
        if frames.kv_cache is not None or is_alone or not self.config.frame_causal:
            return None
        backend = attention_backend(self.transformer_blocks[0].attn)
        if backend == AttentionBackendName.FLEX:
            return frame_causal_block_mask(frames.query_frames, frames.key_frames, frames.is_twin)
        mask = frame_causal_mask(frames.query_frames, frames.key_frames, frames.is_twin)
        if backend == AttentionBackendName.NATIVE and not self.has_compiled_blocks:
            return frame_causal_chunks(frames.plan, mask, has_twins=frames.has_twins)
        return mask[None, None]


class FrameTransformer(
    CompleteWeightsMixin, Int8Mixin, ModelMixin, ConfigMixin, AdapterMixin, CacheMixin, AttentionMixin
):
    """What FAR and separable models share beside their networks: what diffusers, caches and pipelines ask of a model, and
    the way of a call.

    Attributes:
        context_network ([`FrameNetwork`]): What finished frames run through; a cache holds its keys and values.
        denoising_network ([`FrameNetwork`]): What the noisy frame runs through.
        is_separable (`bool`): Whether these are two.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["FARTransformerBlock"]
    _repeated_blocks = ["FARTransformerBlock"]
    _skip_layerwise_casting_patterns = ["x_embedder", "context_embedder", "timestep_embedder", "norm"]
    _skip_keys = ["kv_cache"]
    _supports_group_offloading = True
    clip_group: ClipGroup | None = None
    is_separable = False

    def enable_cache(self, config) -> None:
        """Refuse diffusers' caches, all of which skip parts of a pass by what an earlier pass computed.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"`config` is a {type(config).__name__}, a cache that skips blocks or attention by what they gave in the step "
            "before. FAR's blocks also write keys and values of finished frames, and take and return short and long "
            "tokens, which no such cache knows. Leave it out; `short_cache`, fewer `num_inference_steps` and "
            "`quantize_int8` make frames fast."
        )

    @wraps(ModelMixin.enable_layerwise_casting, assigned=())
    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        *args,
        **kwargs,
    ) -> None:
        """As `ModelMixin.enable_layerwise_casting`; the layers that are not cast take the `compute_dtype` too, so that no
        two dtypes meet."""
        if compute_dtype is not None and compute_dtype != self.dtype:
            self.to(compute_dtype)
        super().enable_layerwise_casting(storage_dtype, compute_dtype, *args, **kwargs)

    def _apply(self, fn, recurse: bool = True):
        """What `to`, `half`, `cuda` and the like do, where it can be done."""
        moved = fn(torch.empty(0, dtype=self.dtype))
        self.check_int8_move(moved)
        keeps_copies = any(
            group.offload_to_disk_path is not None or group.stream is not None for group in group_offloading(self)
        )
        if keeps_copies and moved.dtype != self.dtype:
            raise ValueError(
                f"The model is group-offloaded, with copies of its weights in {self.dtype}, and cannot become "
                f"{moved.dtype}: give it its dtype before `enable_group_offload`."
            )
        return super()._apply(fn, recurse)

    @contextmanager
    def sharing_clips(self, clip_group: ClipGroup) -> Iterator[None]:
        """Inside, the processes of a group share the work on whole clips, without a cache. All of them call the model, with the
        same clips, and get the same outputs; of their gradients [`ClipGroup`] says what they are."""
        self.clip_group = self.context_network.clip_group = clip_group
        try:
            yield
        finally:
            self.clip_group = self.context_network.clip_group = None

    def context_plan(self, num_frames: int, height: int, width: int, rebuild_interval: int = 1) -> ContextPlan:
        """Which of `num_frames` frames are long or short, at latents of `height` x `width`; with a `rebuild_interval`
        of k, k frames turn long at once."""
        return ContextPlan.for_frames(
            num_frames,
            short_window=self.config.short_window,
            height=height,
            width=width,
            patch_size=self.config.patch_size,
            long_patch_size=self.config.long_patch_size,
            rebuild_interval=rebuild_interval,
        )

    def init_kv_cache(
        self,
        batch_size: int,
        height: int,
        width: int,
        max_frames: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        short_cache: str | int = "exact",
        max_long_frames: int | None = None,
        num_sink_frames: int = 0,
    ) -> FARKVCache:
        """An empty cache for a rollout of this model.

        Args:
            batch_size (`int`): B, the null half of guidance included.
            height (`int`), width (`int`): Latent size.
            max_frames (`int`): Frames that fit, the noisy one included.
            dtype (`torch.dtype`, *optional*), device (`torch.device`, *optional*): The model's by default.
            short_cache (`str` or `int`), max_long_frames (`int`, *optional*), num_sink_frames (`int`): See
                [`CacheOptions`]. With `max_long_frames` there is no end to the video, whatever `max_frames`.

        Raises:
            ValueError: The model is not frame-causal, or a size is impossible.
        """
        if not self.config.frame_causal:
            raise ValueError(
                "This model has `frame_causal=False`: early frames depend on later ones, so nothing can be cached. "
                "Run it on whole clips, without `kv_cache`."
            )
        options = CacheOptions(short_cache, max_long_frames, num_sink_frames)
        device = torch.device(device or execution_device(self))
        return FARKVCache(self, batch_size, height, width, max_frames, dtype or self.dtype, device, options)

    @torch.no_grad()
    def frame_modulations(
        self,
        frame: FrameBatch,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        r_timesteps: torch.Tensor | None = None,
    ) -> list[FrameModulation] | None:
        """What time and conditions do to one noisy frame, for all of its denoising steps at once.

        A modulation multiplies its weights with one row a step, which takes as long as reading the weights: here they are
        read once a frame.

        Args:
            frame (`FrameBatch`): The noisy frame; only its conditions count.
            timesteps (`torch.Tensor` of shape `(S,)`): Of the steps, 0 to 1000.
            class_labels (`torch.Tensor` of shape `(B,)`, *optional*), attention_kwargs (`dict`, *optional*): As of a call.
            r_timesteps (`torch.Tensor` of shape `(S,)`, *optional*): Of a flow map: where the steps end.

        Returns:
            S of them, for `forward`; `None` where each block has to compute its own, because it is compiled or offloaded
            in groups, or where that is as fast, for a large batch.
        """
        batch_size, num_steps, network = len(frame.latents), len(timesteps), self.denoising_network
        if num_steps * batch_size > MAX_MODULATION_ROWS or network.has_compiled_blocks or group_offloading(self):
            return None
        bring_to_device(self)
        frame.check_conditions(self, class_labels)
        with nullcontext() if attention_kwargs is None else scaled_adapters(self, attention_kwargs):
            timestep = timesteps.float().expand(batch_size, num_steps)
            if r_timesteps is not None:
                timestep = torch.stack([timestep, r_timesteps.float().expand_as(timestep)])
            return network.modulations(network.embed(frame.repeated(num_steps), timestep, class_labels))

    def _write(
        self, frames: FrameBatch, timestep: torch.Tensor, class_labels: torch.Tensor | None, kv_cache: FARKVCache
    ) -> None:
        """Add clean frames to the cache."""
        if bool((timestep != CLEAN_TIMESTEP).any()):
            raise ValueError(
                f"`timestep` is {timestep.unique().tolist()} in a write to `kv_cache`; only clean frames are cached, "
                "and their timestep is -1."
            )
        network = self.context_network
        num_read = 1 if self.is_separable else 0  # the last frame's output is the feature of the frame to come
        for piece in kv_cache.pieces(frames):
            encoded, plan, cache_pass = kv_cache.begin_write(piece)
            timestep = torch.full(encoded.latents.shape[:2], CLEAN_TIMESTEP, device=encoded.latents.device)
            temb = network.embed(encoded, timestep, class_labels, plan.num_long_frames)
            patches = network.patches(encoded.latents, plan)
            kv_cache.keep_feature(network.run(*patches, plan, temb, kv_cache, cache_pass, num_read_frames=num_read))

    def _timestep_per_frame(self, timestep: Any, frames: FrameBatch, name: str = "timestep") -> torch.Tensor:
        """The timestep that the argument `name` gave as `(B, F)`, float32."""
        batch_size, num_frames = frames.latents.shape[:2]
        if timestep is None:
            raise ValueError(f"`{name}` is None; pass a number, or one for each clip or frame.")
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=frames.latents.device)
        if timestep.ndim == 1 and timestep.shape[0] in (1, batch_size):
            timestep = timestep[:, None]
        if timestep.ndim == 1 or timestep.ndim > 2:
            raise ValueError(
                f"`{name}` has shape {tuple(timestep.shape)} but the batch is {batch_size} clips of {num_frames} "
                f"frames; pass one number, ({batch_size},) or ({batch_size}, {num_frames})."
            )
        return timestep.expand(batch_size, num_frames)

    def _check_call(
        self,
        frames: FrameBatch,
        timestep: torch.Tensor | float | None,
        class_labels: torch.Tensor | None,
        kv_cache: FARKVCache | None,
        update_cache: bool,
        clean_latents: torch.Tensor | None,
        modulation: FrameModulation | None,
        r_timestep: torch.Tensor | float | None,
    ) -> torch.Tensor | None:
        """Refuse what this model cannot be fed; by shapes, so nothing waits. Returns `timestep` as `(B, F)`, or `(2, B, F)` with
        where the steps end."""
        channels = frames.latents.shape[2]
        if channels != self.config.in_channels:
            raise ValueError(
                f"`hidden_states` has {channels} channels but this model has `in_channels` {self.config.in_channels}; "
                "pass latents as (batch, frames, channels, height, width)."
            )
        if kv_cache is not None:
            kv_cache.check(self, frames, noisy=not update_cache)
        elif update_cache:
            raise ValueError("`update_cache` is True but `kv_cache` is None; pass the cache to write to.")
        if clean_latents is not None:
            self._check_clean(clean_latents, frames, kv_cache)
        if modulation is not None:
            is_noisy = kv_cache is not None and not update_cache
            self._check_modulation(modulation, frames, timestep, r_timestep, class_labels, is_noisy=is_noisy)
            return None
        timestep = self._timestep_per_frame(timestep, frames)
        frames.check_conditions(self, class_labels)
        return timestep if r_timestep is None else self._with_end(timestep, r_timestep, frames)

    def _with_end(self, timestep: torch.Tensor, r_timestep: torch.Tensor | float, frames: FrameBatch) -> torch.Tensor:
        """Where the step of each frame begins and where it ends, `(2, B, F)`; a clean frame stays where it is."""
        if not self.config.flow_map:
            raise ValueError(
                "`r_timestep` was given, but this model has `flow_map=False` and knows no other end; leave it out."
            )
        end = self._timestep_per_frame(r_timestep, frames, "r_timestep")
        return torch.stack([timestep, torch.where(timestep < 0, timestep, end)])

    def _check_clean(self, clean_latents: torch.Tensor, frames: FrameBatch, kv_cache: FARKVCache | None) -> None:
        if kv_cache is not None or not self.config.frame_causal:
            reason = "`kv_cache` holds the clean frames" if kv_cache is not None else "no frame is causal"
            raise ValueError(f"`clean_hidden_states` was given but {reason}; leave it out.")
        check_condition("clean_hidden_states", clean_latents, True, tuple(frames.latents.shape))

    def _check_modulation(
        self, modulation: FrameModulation, frames: FrameBatch, timestep, r_timestep, class_labels, *, is_noisy: bool
    ) -> None:
        if not is_noisy:
            raise ValueError("`modulation` was given, but it is for one noisy frame and its `kv_cache`; leave it out.")
        given = {"timestep": timestep, "r_timestep": r_timestep, "class_labels": class_labels}
        given |= {"actions": frames.actions, "action_mask": frames.action_mask}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"`{name}` was given beside `modulation`, which knows it; leave one of the two out.")
        found = (len(modulation.blocks), *modulation.output.shape)
        expected = (len(self.denoising_network.transformer_blocks), len(frames.latents), 1, 2 * self.inner_dim)
        if found != expected:
            raise ValueError(
                f"`modulation` has (layers, batch, frames, channels) {found}, but this call needs {expected}; make it with "
                "`frame_modulations` of this model, for this batch."
            )


class FARTransformer3DModel(FrameTransformer, FrameNetwork):
    r"""
    Frame-autoregressive diffusion transformer (FAR), base and long in one class.

    Args:
        in_channels (`int`, defaults to 32), out_channels (`int`, *optional*): Latent channels; out defaults to in.
        num_layers (`int`, defaults to 12): Transformer blocks.
        num_attention_heads (`int`, defaults to 12), attention_head_dim (`int`, defaults to 64): The width is their
            product.
        mlp_ratio (`float`, defaults to 4.0): Width of the MLP's hidden layer, in widths.
        patch_size (`int`, defaults to 1): Side of a short frame's patches, in latents.
        long_patch_size (`int`, *optional*): Side of the patches of long frames, those that left the short window. With
            `None` no frame is ever long and all frames are attended to in full.
        short_window (`int`, defaults to 16): Frames at the end of the context that are short, the noisy one included.
        axes_dims_rope (`tuple[int, int, int]`, defaults to `(16, 24, 24)`): Head channels that carry time, height and
            width.
        rope_theta (`float`, defaults to 10000.0): Base of the rotary frequencies.
        num_actions (`int`, *optional*): Discrete actions; index `num_actions` is the null action.
        action_dim (`int`, *optional*): Channels of continuous actions.
        action_shift (`int`, defaults to 0): 0: frame t is fed the action taken at it, as the released weights were. 1:
            the action that led to it. The pipeline and the training shift; the model is fed what it is given.
        num_classes (`int`, *optional*): Classes; index `num_classes` is the null class.
        condition_dropout (`float`, defaults to 0.1): Share of actions (per frame) and labels (per clip) that become
            null in training.
        frame_causal (`bool`, defaults to `True`): `False` lets every frame see every other one (video diffusion).
        trained_frames (`int`, *optional*): The longest clip seen in training; written by the training scripts.
        flow_map (`bool`, defaults to `False`): The model is told where a step ends too, and returns the mean velocity of the
            way there, so that few steps, or one, are enough.

    Source: FAR, arXiv:2503.19325; flow maps, AnyFlow, arXiv:2605.13724.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 32,
        out_channels: int | None = None,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        patch_size: int = 1,
        long_patch_size: int | None = None,
        short_window: int = 16,
        axes_dims_rope: tuple[int, int, int] = (16, 24, 24),
        rope_theta: float = 10000.0,
        num_actions: int | None = None,
        action_dim: int | None = None,
        action_shift: int = 0,
        num_classes: int | None = None,
        condition_dropout: float = 0.1,
        frame_causal: bool = True,
        trained_frames: int | None = None,
        flow_map: bool = False,
    ):
        super().__init__()
        check_config(self.config)
        self.out_channels = out_channels or in_channels
        self.build(num_layers, has_long_frames=long_patch_size is not None, out_channels=self.out_channels)
        initialize_weights(self)

    @property
    def context_network(self) -> FrameNetwork:
        return self

    @property
    def denoising_network(self) -> FrameNetwork:
        return self

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | int | None = None,
        actions: torch.Tensor | None = None,
        action_mask: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        kv_cache: FARKVCache | None = None,
        update_cache: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        clean_hidden_states: torch.Tensor | None = None,
        modulation: FrameModulation | None = None,
        r_timestep: torch.Tensor | float | int | None = None,
    ) -> FARTransformerOutput | tuple[torch.Tensor | None]:
        """Predict velocities, of a whole clip or of one frame against a cache; or write clean frames to the cache.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, F, C, H, W)`): Latents.
            timestep (`torch.Tensor` of shape `(B, F)` or `(B,)`, or a number): 0 to 1000; -1 marks a clean frame.
            actions (`torch.Tensor`, *optional*): `(B, F)` int64 or `(B, F, action_dim)` float: what each frame is fed.
            action_mask (`torch.Tensor` of shape `(B, F)`, bool, *optional*): `False`: the null action.
            class_labels (`torch.Tensor` of shape `(B,)`, int64, *optional*).
            kv_cache (`FARKVCache`, *optional*): Context. A call with it carries no gradient.
            update_cache (`bool`): `True` adds these clean frames to the cache, each exactly once, one or many at a
                time. `False` denoises exactly one frame and leaves the cache as it is.
            attention_kwargs (`dict`, *optional*): `scale`, a finite number, scales LoRA layers; no other key.
            return_dict (`bool`): `False` returns a tuple.
            clean_hidden_states (`torch.Tensor` of shape `(B, F, C, H, W)`, *optional*): For training without a cache:
                what the noisy frames were made of. Each short frame then attends to the clean frames before it instead
                of the noisy ones, as at inference, and so a clip trains every length of clean context at once.
            modulation (`FrameModulation`, *optional*): For a noisy frame and its `kv_cache`: this step's, from
                [`frame_modulations`]. It knows time and conditions, which are left out then.
            r_timestep (`torch.Tensor` of shape `(B, F)` or `(B,)`, or a number, *optional*): Of a flow map: where the step
                ends, at most `timestep`; `None`, and always for clean frames: at `timestep`, as a flow model. The output is the
                mean velocity of the way, `x_r = x_t - (t - r) u`.

        Returns:
            [`FARTransformerOutput`] with the velocity of the short frames, `(B, min(F, short_window), C, H, W)`, or of
            all F frames for a model without long frames; with `None` for a write.
        """
        scaled = nullcontext() if attention_kwargs is None else scaled_adapters(self, attention_kwargs)
        frames = FrameBatch(hidden_states, actions, action_mask)
        timestep = self._check_call(
            frames, timestep, class_labels, kv_cache, update_cache, clean_hidden_states, modulation, r_timestep
        )
        with scaled, torch.set_grad_enabled(torch.is_grad_enabled() and kv_cache is None):
            if kv_cache is None:
                sample = self._predict_clip(frames, timestep, class_labels, clean_hidden_states)
            elif update_cache:
                sample = self._write(frames, timestep, class_labels, kv_cache)
            else:
                plan, cache_pass = kv_cache.begin_noisy()
                temb = self.embed(frames, timestep, class_labels) if modulation is None else None
                sample = self.run(*self.patches(frames.latents, plan), plan, temb, kv_cache, cache_pass, modulation)
        return FARTransformerOutput(sample=sample) if return_dict else (sample,)

    def _predict_clip(
        self,
        frames: FrameBatch,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None,
        clean_latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """Velocity of the short frames of a whole clip; of their noisy twins where the clean latents are given."""
        plan = self.context_plan(frames.num_frames, *frames.latents.shape[-2:])
        if clean_latents is not None:
            frames, timestep = pair_with_clean(frames, timestep, clean_latents, plan, CLEAN_TIMESTEP)
        temb = self.embed(frames, timestep, class_labels, plan.num_long_frames)
        return self.run(*self.patches(frames.latents, plan), plan, temb)


def initialize_weights(model: FrameTransformer) -> None:
    """DiT's initialisation: modulation, gates and output start at zero, so that every block starts as the identity."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for module in model.modules():
        if isinstance(module, FARAdaLayerNorm):
            nn.init.zeros_(module.linear.weight)
        elif hasattr(module, "r_timestep_embedder"):
            module.r_timestep_embedder.load_state_dict(module.timestep_embedder.state_dict())
    nn.init.zeros_(model.denoising_network.proj_out.weight)


# Layers of FAR, and of a separable model.
LAYER_COUNTS = ("num_layers", "num_encoder_layers", "num_decoder_layers")

# Fields that count, with the most that they may be; `None` is allowed where it is a default.
COUNTS = {
    "in_channels": 2**16,
    "out_channels": 2**16,
    **dict.fromkeys(LAYER_COUNTS, 2**10),
    "num_attention_heads": 2**10,
    "attention_head_dim": 2**12,
    "patch_size": 2**10,
    "long_patch_size": 2**10,
    "short_window": 2**20,
    "num_actions": 2**24,
    "action_dim": 2**16,
    "num_classes": 2**24,
    "trained_frames": 2**31,
}


OPTIONAL = ("out_channels", "long_patch_size", "num_actions", "action_dim", "num_classes", "trained_frames")


def check_config(config) -> None:
    """Refuse impossible sizes at construction, the values named."""
    if not isinstance(config.short_window, int) or config.short_window < 1:
        raise ValueError(f"`short_window` is {config.short_window}; the noisy frame alone needs 1.")
    for name in filter(config.__contains__, COUNTS):
        check_count(name, config[name], most=COUNTS[name], optional=name in OPTIONAL)
    check_finite("mlp_ratio", config.mlp_ratio)
    check_finite("rope_theta", config.rope_theta)
    axes = config.axes_dims_rope
    if not isinstance(axes, (list, tuple)) or [type(dim) for dim in axes] != [int] * 3 or min(axes) < 0:
        raise ValueError(f"`axes_dims_rope` is {axes!r}; give three whole numbers, for time, height and width.")
    if sum(config.axes_dims_rope) != config.attention_head_dim or any(dim % 2 for dim in config.axes_dims_rope):
        raise ValueError(
            f"`axes_dims_rope` is {tuple(config.axes_dims_rope)} and `attention_head_dim` {config.attention_head_dim}; "
            "the axes must be even and add up to the head dim."
        )
    if config.long_patch_size is not None and config.long_patch_size % config.patch_size:
        raise ValueError(
            f"`long_patch_size` is {config.long_patch_size} and `patch_size` {config.patch_size}; a long patch must "
            "cover whole short patches, so choose a multiple."
        )
    if config.action_shift not in (0, 1):
        raise ValueError(f"`action_shift` is {config.action_shift}; it is 0 or 1.")
    if config.num_actions is not None and config.action_dim is not None:
        raise ValueError(
            f"`num_actions` is {config.num_actions} and `action_dim` {config.action_dim}; actions are discrete or "
            "continuous, so give one of the two."
        )
    if not isinstance(config.condition_dropout, (int, float)) or not 0 <= config.condition_dropout < 1:
        raise ValueError(f"`condition_dropout` is {config.condition_dropout}; it is a share, at least 0 and below 1.")
    if not isinstance(config.frame_causal, bool):
        raise ValueError(f"`frame_causal` is {config.frame_causal!r}; it is `True` or `False`.")
    if not isinstance(config.flow_map, bool) or (config.flow_map and not config.frame_causal):
        raise ValueError(
            f"`flow_map` is {config.flow_map!r} and `frame_causal` {config.frame_causal}; it is `False`, or, of a model that "
            "makes frame after frame, `True`."
        )
    width = config.num_attention_heads * config.attention_head_dim
    if not 1 <= width * config.mlp_ratio < 2**40:
        raise ValueError(
            f"`mlp_ratio` is {config.mlp_ratio}; of a width of {width} it makes no possible hidden layer."
        )
    conditions = sum(config[name] or 0 for name in ("num_actions", "action_dim", "num_classes"))
    attention = 4 if config.long_patch_size is None else 8
    layers = [name for name in LAYER_COUNTS if name in config]
    num_layers = sum(config[name] for name in layers)
    num_weights = int((num_layers * (attention + 2 * config.mlp_ratio) * width + conditions) * width)
    check_memory(num_weights, (*layers, "num_attention_heads", "attention_head_dim", "mlp_ratio"), config)
