"""What FAR and separable models have in common, beside the networks inside: how they are built and checked, what diffusers,
caches and pipelines ask of a model, and the way of a call up to a network.

B batch, F frames, C latent channels, H/W latent height/width.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.nn as nn
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput

from ..checks import check_count, check_finite, check_memory
from .adapters import AdapterMixin, scaled_adapters
from .context_parallel import ClipGroup
from .context_plan import ContextPlan
from .frame_network import FARAdaLayerNorm, FrameModulation
from .frames import CLEAN_TIMESTEP, FrameBatch, check_condition
from .int8 import Int8Mixin
from .internals import bring_to_device, execution_device, group_offloading
from .kv_cache import CacheOptions, FARKVCache
from .loading import CompleteWeightsMixin


# Rows of a modulation that are computed at once. With more, a step has enough rows of its own to make the reading of weights
# worth it, and what is kept would be large: 12 layers of width 768 keep 56 MB of 256 rows in float32.
MAX_MODULATION_ROWS = 256


@dataclass
class FARTransformerOutput(BaseOutput):
    """Output of [`FARTransformer3DModel`].

    Args:
        sample (`torch.Tensor` of shape `(B, F_short, C, H, W)`): Predicted velocity of the short frames; `None` where
            the call only wrote to a cache.
    """

    sample: torch.Tensor | None


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
        if self.is_int8:
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
