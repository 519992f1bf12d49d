"""The FAR transformer: a DiT whose attention is full inside a frame and causal between frames.

B batch, F frames, C latent channels, H/W latent height/width, T tokens of a frame, L tokens of a pass, N heads,
D head dim.
"""

from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
import torch.nn as nn
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput

from .adapters import AdapterMixin, lora_scale, scaled_adapters
from .attention_far import AttentionFrames, FARAttentionBias, attention_frames_of
from .blocks_far import FARActionEmbedding, FARAdaLayerNorm, FARTransformerBlock
from .cache_options import CacheOptions
from .causal_chunks import CausalChunks, frame_causal_chunks
from .conditions import check_condition
from .config_checks import check_config
from .context_plan import ContextPlan
from .denoising_steps import DenoisingSteps
from .frame_batch import FrameBatch
from .functional import (
    frame_causal_block_mask,
    frame_causal_mask,
    patchify,
    position_ids,
    rotary_embedding,
    unpatchify,
)
from .int8 import Int8Mixin
from .internals import attention_backend, call_uncompiled, execution_device, group_offloading, is_compiled
from .kv_cache import CachePass, FARKVCache
from .loading import CompleteWeightsMixin
from .twins import pair_with_clean


CLEAN_TIMESTEP = -1.0  # outside the schedule: a finished frame
LONG_TIMESTEP = -2.0  # a long frame, which is always clean


@dataclass
class FARTransformerOutput(BaseOutput):
    """Output of [`FARTransformer3DModel`].

    Args:
        sample (`torch.Tensor` of shape `(B, F_short, C, H, W)`): Predicted velocity of the short frames; `None` where
            the call only wrote to a cache.
    """

    sample: torch.Tensor | None


class FARTransformer3DModel(
    CompleteWeightsMixin, Int8Mixin, ModelMixin, ConfigMixin, AdapterMixin, CacheMixin, AttentionMixin
):
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

    Source: FAR, arXiv:2503.19325.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["FARTransformerBlock"]
    _repeated_blocks = ["FARTransformerBlock"]
    _skip_layerwise_casting_patterns = ["x_embedder", "context_embedder", "timestep_embedder", "norm"]
    _skip_keys = ["kv_cache"]
    _supports_group_offloading = True

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
    ):
        super().__init__()
        check_config(self.config)
        self.inner_dim = num_attention_heads * attention_head_dim
        self.out_channels = out_channels or in_channels

        # 1. Patches
        self.x_embedder = nn.Linear(in_channels * patch_size**2, self.inner_dim)
        if long_patch_size is not None:
            self.context_embedder = nn.Linear(in_channels * long_patch_size**2, self.inner_dim)

        # 2. Time and conditions
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=1)
        self.timestep_embedder = TimestepEmbedding(256, self.inner_dim)
        if num_actions is not None or action_dim is not None:
            self.action_embedder = FARActionEmbedding(self.inner_dim, num_actions, action_dim)
        if num_classes is not None:
            self.label_embedder = nn.Embedding(num_classes + 1, self.inner_dim)

        # 3. Attention mask, where hooks change it
        self.attention_bias = FARAttentionBias()

        # 4. Blocks. After the last one nobody reads the long tokens, so there they have no output projection.
        self.transformer_blocks = nn.ModuleList(
            FARTransformerBlock(
                self.inner_dim,
                num_attention_heads,
                attention_head_dim,
                mlp_ratio,
                added_kv_proj_dim=None if long_patch_size is None else self.inner_dim,
                context_pre_only=layer == num_layers - 1,
            )
            for layer in range(num_layers)
        )

        # 5. Output
        self.norm_out = FARAdaLayerNorm(self.inner_dim, num_chunks=2)
        self.proj_out = nn.Linear(self.inner_dim, self.out_channels * patch_size**2)

        self.gradient_checkpointing = False
        initialize_weights(self)

    @property
    def takes_actions(self) -> bool:
        return hasattr(self, "action_embedder")

    @property
    def takes_labels(self) -> bool:
        return hasattr(self, "label_embedder")

    @property
    def _has_compiled_blocks(self) -> bool:
        return torch.compiler.is_compiling() or is_compiled(self.transformer_blocks[0])

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
        options.check(self.config.short_window, has_long_frames=self.config.long_patch_size is not None)
        return FARKVCache(
            partial(self.context_plan, height=height, width=width, rebuild_interval=options.rebuild_interval),
            self,
            num_layers=self.config.num_layers,
            num_heads=self.config.num_attention_heads,
            head_dim=self.config.attention_head_dim,
            batch_size=batch_size,
            max_frames=max_frames,
            dtype=dtype or self.dtype,
            device=torch.device(device or execution_device(self)),
            options=options,
            rotation=self._time_rotation,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | int,
        actions: torch.Tensor | None = None,
        action_mask: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        kv_cache: FARKVCache | None = None,
        update_cache: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        clean_hidden_states: torch.Tensor | None = None,
        denoising_steps: DenoisingSteps | None = None,
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
            denoising_steps (`DenoisingSteps`, *optional*): For a noisy frame and its `kv_cache`: all of its steps, of
                which this one, at `timestep`, is taken. What depends on time and conditions alone is then computed at
                the first.

        Returns:
            [`FARTransformerOutput`] with the velocity of the short frames, `(B, min(F, short_window), C, H, W)`, or of
            all F frames for a model without long frames; with `None` for a write.
        """
        scale = lora_scale(attention_kwargs)
        frames = FrameBatch(hidden_states, actions, action_mask)
        timestep = self._timestep_per_frame(timestep, frames)
        self._check_inputs(frames, class_labels, timestep, kv_cache, update_cache)
        self._check_clean(clean_hidden_states, frames, kv_cache)
        with scaled_adapters(self, scale), torch.set_grad_enabled(torch.is_grad_enabled() and kv_cache is None):
            if kv_cache is None:
                plan = self.context_plan(frames.num_frames, *hidden_states.shape[-2:])
                if clean_hidden_states is not None:
                    frames, timestep = pair_with_clean(frames, timestep, clean_hidden_states, plan, CLEAN_TIMESTEP)
                sample = self._run_pass(frames, plan, timestep, class_labels)
            elif update_cache:
                sample = None
                for piece in kv_cache.pieces(frames):
                    encoded, plan, cache_pass = kv_cache.begin_write(piece)
                    clean = timestep[:, :1].expand(-1, plan.num_frames)
                    self._run_pass(encoded, plan, clean, class_labels, kv_cache, cache_pass)
            else:
                plan, cache_pass = kv_cache.begin_noisy()
                steps = None if self._has_compiled_blocks else denoising_steps
                if steps is not None and not steps.is_worth_it(len(hidden_states)):
                    steps = None
                sample = self._run_pass(frames, plan, timestep, class_labels, kv_cache, cache_pass, steps)

        if not return_dict:
            return (sample,)
        return FARTransformerOutput(sample=sample)

    def _run_pass(
        self,
        frames: FrameBatch,
        plan: ContextPlan,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None,
        kv_cache: FARKVCache | None = None,
        cache_pass: CachePass | None = None,
        steps: DenoisingSteps | None = None,
    ) -> torch.Tensor | None:
        """One pass of the network over the frames of a plan: the velocity of its short frames, `None` for a write.

        `frames` may go on with noisy twins of the short frames; then it is their velocity that is returned.
        """
        device = frames.latents.device
        has_twins = frames.num_frames > plan.num_frames

        # 1. Patches
        num_long = plan.num_long_frames
        short_states = self.x_embedder(patchify(frames.latents[:, num_long:], plan.patch_size))
        long_states = None
        if num_long:
            long_states = self.context_embedder(patchify(frames.latents[:, :num_long], plan.long_patch_size))

        # 2. Time and conditions, one embedding per frame
        embed = partial(self._embed_conditions, class_labels=class_labels, num_long_frames=num_long)
        temb = embed(frames, timestep) if steps is None else steps.embedding(embed, frames)
        long_temb, temb = temb[:, :num_long], temb[:, num_long:]

        # 3. Positions, and who sees whom: against a cache each frame sees a view of it, so nothing is masked
        config = self.config
        positions = position_ids(plan, device)
        if has_twins:
            positions = torch.cat([positions, positions[plan.num_long_tokens :]])
        rotary_emb = rotary_embedding(positions, config.axes_dims_rope, config.rope_theta)
        if kv_cache is None:
            layers = [None] * config.num_layers
            attention_frames = attention_frames_of(plan, None, device, has_twins=has_twins)
            attention_mask = self._attention_mask(plan, attention_frames)
        else:
            layers = kv_cache.layers(cache_pass)
            attention_frames = attention_frames_of(plan, kv_cache.key_frames(cache_pass), device)
            attention_mask = None
        attention_mask = self.attention_bias(attention_mask, attention_frames)

        # 4. Blocks; of the last one only what is read
        is_write = cache_pass is not None and not cache_pass.is_noisy
        is_long_context = is_write and plan.num_frames > 2 * config.short_window
        num_output_frames = self._num_output_frames(plan, attention_mask, is_write=is_write, has_twins=has_twins)
        last_block, shared = self.transformer_blocks[-1], (temb, long_temb, rotary_emb, attention_mask)
        for block, layer in zip(self.transformer_blocks, layers):
            num_outputs = num_output_frames if block is last_block else None
            inputs = (short_states, long_states, *shared, layer, num_outputs, steps)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                short_states, long_states = self._gradient_checkpointing_func(block, *inputs)
            elif (block is last_block and is_write) or is_long_context:
                # With its hooks, but not compiled: so little work is not worth it, nor are so many frames, whose attentions
                # the compiler would unroll for a pass that does not come again.
                short_states, long_states = call_uncompiled(block, *inputs)
            else:
                short_states, long_states = block(*inputs)
        if is_write:
            return None

        # 5. Velocity, of the twins where there are any
        scale, shift = self.norm_out.modulation(temb[:, -plan.num_short_frames :], steps)
        patches = self.proj_out(self.norm_out.norm(short_states[:, -plan.num_short_frames :]) * (1 + scale) + shift)
        return unpatchify(patches, plan.patch_size, plan.height, plan.width)

    def _num_output_frames(self, plan: ContextPlan, attention_mask, *, is_write: bool, has_twins: bool) -> int | None:
        """How many of the last block's short frames are read; `None` where all are, or cannot be told apart."""
        if is_write:
            return 0
        is_everything = not has_twins and plan.num_long_frames == 0
        is_block_mask = attention_mask is not None and not isinstance(attention_mask, (torch.Tensor, CausalChunks))
        return None if is_everything or is_block_mask else plan.num_short_frames

    def _time_rotation(self, num_frames: int) -> torch.Tensor:
        """The rotary embedding of a shift in time, `(1, D / 2)`."""
        shift = torch.tensor([[num_frames, 0, 0]], device=execution_device(self))
        return rotary_embedding(shift, self.config.axes_dims_rope, self.config.rope_theta)

    def _timestep_per_frame(self, timestep: torch.Tensor | float | int, frames: FrameBatch) -> torch.Tensor:
        """`timestep` as `(B, F)`, float32."""
        batch_size, num_frames = frames.latents.shape[:2]
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=frames.latents.device)
        if timestep.ndim == 1 and timestep.shape[0] in (1, batch_size):
            timestep = timestep[:, None]
        if timestep.ndim == 1 or timestep.ndim > 2:
            raise ValueError(
                f"`timestep` has shape {tuple(timestep.shape)} but the batch is {batch_size} clips of {num_frames} "
                f"frames; pass one number, ({batch_size},) or ({batch_size}, {num_frames})."
            )
        return timestep.expand(batch_size, num_frames)

    def _embed_conditions(
        self, frames: FrameBatch, timestep: torch.Tensor, class_labels: torch.Tensor | None, num_long_frames: int
    ) -> torch.Tensor:
        """The sum of time, action and class embedding of each frame, `(B, F, dim)`."""
        batch_size, num_frames = frames.latents.shape[:2]
        is_long = torch.arange(num_frames, device=timestep.device) < num_long_frames
        timestep = timestep.masked_fill(is_long, LONG_TIMESTEP)
        # Sinusoids in float32 whatever the dtype: bfloat16 rounds timesteps above 256.
        time_proj = self.time_proj(timestep.flatten()).to(frames.latents.dtype)
        temb = self.timestep_embedder(time_proj).unflatten(0, (batch_size, num_frames))

        dropout = self.config.condition_dropout if self.training else 0.0
        if self.takes_actions:
            action_mask = frames.action_mask
            if dropout:
                kept = torch.rand(batch_size, num_frames, device=temb.device) >= dropout
                action_mask = kept if action_mask is None else kept & action_mask
            temb = temb + self.action_embedder(frames.actions, action_mask)
        if self.takes_labels:
            if dropout:
                dropped = torch.rand(batch_size, device=temb.device) < dropout
                class_labels = class_labels.masked_fill(dropped, self.config.num_classes)
            temb = temb + self.label_embedder(class_labels)[:, None]
        return temb

    def _attention_mask(self, plan: ContextPlan, frames: AttentionFrames):
        """`None` where every query sees every key; else a `BlockMask` for flex attention, [`CausalChunks`] for the native
        one, a dense mask for others and for compiled blocks, which chunks would compile again and again."""
        if (plan.num_frames == 1 and frames.is_twin is None) or not self.config.frame_causal:
            return None
        backend = attention_backend(self.transformer_blocks[0].attn)
        if backend == AttentionBackendName.FLEX:
            return frame_causal_block_mask(frames.query_frames, frames.key_frames, frames.is_twin)
        mask = frame_causal_mask(frames.query_frames, frames.key_frames, frames.is_twin)
        if backend == AttentionBackendName.NATIVE and not self._has_compiled_blocks:
            return frame_causal_chunks(plan, mask, has_twins=frames.is_twin is not None)
        return mask[None, None]

    def _check_inputs(
        self,
        frames: FrameBatch,
        class_labels: torch.Tensor | None,
        timestep: torch.Tensor,
        kv_cache: FARKVCache | None,
        update_cache: bool,
    ) -> None:
        """Refuse what this model cannot be fed. Shapes only, but for the timesteps of a write, so nothing waits."""
        batch_size, num_frames, channels = frames.latents.shape[:3]
        if channels != self.config.in_channels:
            raise ValueError(
                f"`hidden_states` has {channels} channels but this model has `in_channels` {self.config.in_channels}; "
                "pass latents as (batch, frames, channels, height, width)."
            )
        action_shape = (batch_size, num_frames)
        if self.config.action_dim is not None:
            action_shape += (self.config.action_dim,)
        check_condition("actions", frames.actions, self.takes_actions, action_shape)
        check_condition("class_labels", class_labels, self.takes_labels, (batch_size,))
        if frames.action_mask is not None:
            check_condition("action_mask", frames.action_mask, self.takes_actions, (batch_size, num_frames))
        if kv_cache is not None:
            device_type = frames.latents.device.type
            autocast = torch.is_autocast_enabled(device_type)
            dtype = torch.get_autocast_dtype(device_type) if autocast else frames.latents.dtype
            kv_cache.check(self, frames, dtype, noisy=not update_cache)
        elif update_cache:
            raise ValueError("`update_cache` is True but `kv_cache` is None; pass the cache to write to.")
        if update_cache and bool((timestep != CLEAN_TIMESTEP).any()):
            raise ValueError(
                f"`timestep` is {timestep.unique().tolist()} in a write to `kv_cache`; only clean frames are cached, "
                "and their timestep is -1."
            )

    def _check_clean(
        self, clean_hidden_states: torch.Tensor | None, frames: FrameBatch, kv_cache: FARKVCache | None
    ) -> None:
        if clean_hidden_states is None:
            return
        if kv_cache is not None or not self.config.frame_causal:
            reason = "`kv_cache` holds the clean frames" if kv_cache is not None else "no frame is causal"
            raise ValueError(f"`clean_hidden_states` was given but {reason}; leave it out.")
        check_condition("clean_hidden_states", clean_hidden_states, True, tuple(frames.latents.shape))


def initialize_weights(model: FARTransformer3DModel) -> None:
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
    nn.init.zeros_(model.proj_out.weight)
