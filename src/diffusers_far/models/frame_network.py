"""The network that frames run through, from the inside out: attention, modulated norm, block, the embedding of conditions, and
what runs the blocks over frames.

B batch, F frames, C latent channels, H/W latent height/width, T tokens of a frame, L tokens of a pass (long ones first),
N heads, D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn as nn
from diffusers.hooks import HookRegistry
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.embeddings import TimestepEmbedding, Timesteps

from .context_parallel import ClipGroup, SharedPass
from .context_plan import ContextPlan
from .frames import FrameBatch
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
from .internals import attention_backend, call_uncompiled, is_compiled
from .joint_cache import JointPass
from .kv_cache import CachePass, FARKVCache, LayerKVCache


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
        # Of a pass that is read to its start the whole, as it is: a graph cannot hold an alias of complex numbers.
        query_emb = rotary_emb if query.shape[1] == key.shape[1] else rotary_emb[..., -query.shape[1] :, :]
        query = apply_rotary_embedding(query, query_emb).to(value.dtype)
        if isinstance(attention_mask, SharedPass):
            reads_all = num_output_tokens is None
            hidden_states = attention_mask.attend(self._attend_to_pass, query, key, value, reads_all)
        elif kv_cache is None:
            hidden_states = self._attend_to_pass(query, key, value, attention_mask)
        else:
            hidden_states = kv_cache.attend(self._attend, query, attention_mask)
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


LONG_TIMESTEP = -2.0  # a long frame, which is always clean
END_SHARE = 0.25  # of a flow map's time embedding: that of where the step ends


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
        positions, attention_mask = self._surroundings(AttentionFrames(plan, device, has_twins, kv_cache, cache_pass))
        rotary_emb = rotary_embedding(positions, self.config.axes_dims_rope, self.config.rope_theta)

        # 2. Blocks; of the last one only what is read
        num_layers = len(self.transformer_blocks)
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
            run = self._way_to_run(block, plan, cache_pass)
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

    def _surroundings(self, frames: AttentionFrames) -> tuple[torch.Tensor, Any]:
        """Where the tokens of a pass stand, and who sees whom; of a joint pass both for each sample, `(B, L, 3)`."""
        if isinstance(frames.cache_pass, JointPass):
            return self._joint_surroundings(frames)
        positions = position_ids(frames.plan, frames.device, frames.has_twins)
        return positions, self.attention_bias(self._attention_mask(frames), frames)

    def _joint_surroundings(self, frames: AttentionFrames) -> tuple[torch.Tensor, list]:
        caches, joint = frames.kv_cache.parts, frames.cache_pass
        each = [
            AttentionFrames(plan, frames.device, False, cache, cache_pass)
            for cache, plan, cache_pass in zip(caches, joint.plans, joint.passes)
        ]
        delays = torch.tensor([[delay, 0, 0] for delay in joint.delays], device=frames.device)
        positions = position_ids(frames.plan, frames.device) + delays.repeat(caches[0].batch_size, 1)[:, None]
        return positions, [self.attention_bias(None, own) for own in each]

    def _way_to_run(self, block: FARTransformerBlock, plan: ContextPlan, cache_pass: CachePass | None) -> Callable:
        """How a block is called: as it is, with gradient checkpointing, or as if it were not compiled."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return partial(self._gradient_checkpointing_func, block)
        # So little work as the last block's of a write is not worth compiling, nor are so many frames, whose attentions the
        # compiler would unroll for a pass that does not come again, or those of a joint pass, one for each sample.
        is_write = cache_pass is not None and not cache_pass.is_noisy
        is_much_or_little = plan.num_frames > 2 * self.config.short_window or block is self.transformer_blocks[-1]
        if (is_write and is_much_or_little) or isinstance(cache_pass, JointPass):
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
