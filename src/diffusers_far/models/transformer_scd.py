"""The separable transformer: an encoder that sees each finished frame once, and a small decoder that denoises.

What the early layers of a FAR compute hardly changes from one denoising step to the next, and the late layers hardly look at
other frames. So the network is split. The encoder is causal over the finished frames, with a cache; what it says at frame t
is the feature of frame t + 1. The decoder sees that feature and the noisy frame, side by side, and nothing else: a step costs
the same however long the video is.

B batch, F frames, C latent channels, H/W latent height/width, T tokens of a frame.
"""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  diffusers looks for it where a component is defined

from .adapters import scaled_adapters
from .context_plan import ContextPlan
from .frame_network import AttentionFrames, FARAttentionBias, FrameModulation, FrameNetwork
from .frame_transformer import FARTransformerOutput, FrameTransformer, check_config, initialize_weights
from .frames import CLEAN_TIMESTEP, FrameBatch, check_condition, repeat_batch
from .kv_cache import ContextFeature, FARKVCache


LEAST_NULL_NOISE = 0.05  # on the feature of the null half, for a model that was trained with less


class SCDEncoder(FrameNetwork):
    """Blocks over the finished frames; their normed states are the features of the frames after them."""

    drops_conditions = False

    def __init__(self, config, num_layers: int):
        super().__init__()
        self.config = config
        self.build(num_layers, has_long_frames=config.long_patch_size is not None)

    def output(self, states, scale, shift, plan: ContextPlan) -> ContextFeature:
        """The feature, in training with noise: the decoder meets features of frames that it made itself."""
        if self.training and self.config.feature_noise:
            states = states + self.config.feature_noise * torch.randn_like(states)
        return ContextFeature(states * (1 + scale) + shift, 1 + scale)


class SCDDecoder(FrameNetwork):
    """Blocks over one frame's feature and noisy patches, which all see each other."""

    drops_conditions = False

    def __init__(self, config, num_layers: int, out_channels: int):
        super().__init__()
        self.config = config
        self.build(num_layers, has_long_frames=False, out_channels=out_channels)

    def _attention_mask(self, frames: AttentionFrames) -> None:
        return None


class SCDTransformer3DModel(FrameTransformer):
    r"""
    Separable causal diffusion: as [`FARTransformer3DModel`], but an encoder runs once a finished frame, and only a small
    decoder at every denoising step.

    Args:
        num_encoder_layers (`int`, defaults to 8), num_decoder_layers (`int`, defaults to 4): Transformer blocks.
        feature_noise (`float`, defaults to 0.05): Strength of the noise on the normed feature in training.
        learn_start (`bool`, defaults to `True`): Frame 0, which no frame precedes, reads a learned feature. `False`: it
            cannot be made.
        short_window (`int`, defaults to 16): As of FAR; with long frames at least 2, for the feature of a frame comes from a
            short one.
        frame_causal (`bool`, defaults to `True`): Always `True`.
        in_channels, out_channels, num_attention_heads, attention_head_dim, mlp_ratio, patch_size, long_patch_size,
            axes_dims_rope, rope_theta, num_actions, action_dim, action_shift, num_classes, condition_dropout,
            trained_frames, flow_map: As of [`FARTransformer3DModel`]; long frames are the encoder's, steps the decoder's.

    Source: separable causal diffusion, arXiv:2602.10095.
    """

    is_separable = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 32,
        out_channels: int | None = None,
        num_encoder_layers: int = 8,
        num_decoder_layers: int = 4,
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
        feature_noise: float = 0.05,
        learn_start: bool = True,
        flow_map: bool = False,
    ):
        super().__init__()
        check_config(self.config)
        check_separable_config(self.config)
        self.inner_dim = num_attention_heads * attention_head_dim
        self.out_channels = out_channels or in_channels
        self.encoder = SCDEncoder(self.config, num_encoder_layers)
        self.decoder = SCDDecoder(self.config, num_decoder_layers, self.out_channels)
        if learn_start:
            self.start_feature = nn.Parameter(torch.randn(self.inner_dim))  # features have about unit variance
        initialize_weights(self)

    @property
    def context_network(self) -> FrameNetwork:
        return self.encoder

    @property
    def denoising_network(self) -> FrameNetwork:
        return self.decoder

    @property
    def takes_actions(self) -> bool:
        return self.decoder.takes_actions

    @property
    def takes_labels(self) -> bool:
        return self.decoder.takes_labels

    @property
    def attention_bias(self) -> FARAttentionBias:
        """Where hooks change the attention between frames, which is the encoder's."""
        return self.encoder.attention_bias

    def feature_shape(self, batch_size: int, height: int, width: int) -> tuple[int, int, int, int]:
        """`(B, 1, T, dim)` of the feature of one frame, at latents of `height` x `width`."""
        return batch_size, 1, self.context_plan(1, height, width).tokens_per_short_frame, self.inner_dim

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
        next_action: torch.Tensor | None = None,
        next_action_mask: torch.Tensor | None = None,
        null_feature_noise: torch.Tensor | None = None,
        r_timestep: torch.Tensor | float | int | None = None,
    ) -> FARTransformerOutput | tuple[torch.Tensor | None]:
        """As [`FARTransformer3DModel`], but a whole clip needs its clean frames, which the encoder reads, and a write needs
        the action of the frame to come.

        Args:
            hidden_states, timestep, actions, action_mask, class_labels, kv_cache, update_cache, attention_kwargs,
                return_dict, modulation, r_timestep: As of [`FARTransformer3DModel`]; `actions` are what each frame is
                fed, of which the encoder reads, at each frame, that of the next one. Without a cache there may be several
                draws of the noisy frames, `(N, B, F, C, H, W)`, with timesteps of shape `(N, B, F)`: their clips are encoded
                once.
            clean_hidden_states (`torch.Tensor` of shape `(B, F, C, H, W)`): Without a cache: what the noisy frames were
                made of. That of the last frame is not looked at.
            next_action (`torch.Tensor` of shape `(B,)` or `(B, action_dim)`, *optional*): In a write, of a model that takes
                actions: what the frame after the last is fed.
            next_action_mask (`torch.Tensor` of shape `(B,)`, bool, *optional*): `False`: the null action.
            null_feature_noise (`torch.Tensor` of shape `(B, 1, T, dim)`, *optional*): Standard normal, for guidance by the
                feature: each frame is denoised once more, from its feature with this noise on it.

        Returns:
            [`FARTransformerOutput`] with the velocity of the short frames; zeros for one without a feature, which is the
            first short one of a model with long frames, or frame 0 without `learn_start`. With `null_feature_noise` the
            batch is `2 * B`, noisy features first. Of several draws there are as many, `(N, B, F_short, C, H, W)`.
        """
        scaled = nullcontext() if attention_kwargs is None else scaled_adapters(self, attention_kwargs)
        is_drawn = hidden_states.ndim == 6
        if is_drawn:
            self._check_draws(hidden_states, timestep, r_timestep, kv_cache, null_feature_noise)
        draws = hidden_states if is_drawn else hidden_states[None]
        frames = FrameBatch(draws[0], actions, action_mask)
        starts = timestep if is_drawn else [timestep]
        ends = r_timestep if is_drawn and r_timestep is not None else [r_timestep] * len(starts)
        timesteps = [
            self._check_call(frames, start, class_labels, kv_cache, update_cache, clean_hidden_states, modulation, end)
            for start, end in zip(starts, ends)
        ]
        timestep = timesteps[0]
        self._check_separable_call(
            frames, kv_cache, update_cache, clean_hidden_states, next_action, next_action_mask, null_feature_noise
        )
        with scaled, torch.set_grad_enabled(torch.is_grad_enabled() and kv_cache is None):
            if kv_cache is None:
                sample = self._predict_clip(
                    frames,
                    draws,
                    torch.stack(timesteps, dim=-3),
                    class_labels,
                    clean_hidden_states,
                    null_feature_noise,
                )
                sample = sample.unflatten(0, (len(draws), -1)) if is_drawn else sample
            elif update_cache:
                if next_action is not None:
                    mask = None if next_action_mask is None else next_action_mask[:, None]
                    frames = frames.looking_ahead(FrameBatch(hidden_states[:, -1:], next_action[:, None], mask))
                sample = self._write(*self._dropped(frames, timestep, class_labels), kv_cache)
            else:
                frames, timestep, class_labels = self._dropped(frames, timestep, class_labels)
                temb = None if modulation is not None else self.decoder.embed(frames, timestep, class_labels)
                feature = kv_cache.feature or self._start(hidden_states)
                sample = self._decode(feature, hidden_states, temb, modulation, null_feature_noise)
        return FARTransformerOutput(sample=sample) if return_dict else (sample,)

    def _predict_clip(
        self,
        frames: FrameBatch,
        draws: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None,
        clean_latents: torch.Tensor,
        null_noise: torch.Tensor | None,
    ) -> torch.Tensor:
        """Velocity of the short frames of whole clips, of whose noisy frames there are several `draws`, `(N, B, F, C, H, W)`
        at `timestep` `([2,] N, B, F)`, as `(N * B, F_short, C, H, W)`."""
        plan = self.context_plan(frames.num_frames, *frames.latents.shape[-2:])
        frames, timestep, class_labels = self._dropped(frames, timestep, class_labels)
        features, num_context = [], frames.num_frames - 1
        if self.config.learn_start and plan.num_long_frames == 0:
            features.append(self._start(frames.latents))
        if num_context:
            context = replace(frames, latents=clean_latents).between(0, num_context).looking_ahead(frames.last(1))
            clean_timestep = timestep.new_full((len(clean_latents), num_context), CLEAN_TIMESTEP)
            temb = self.encoder.embed(context, clean_timestep, class_labels, plan.num_long_frames)
            context_plan = plan.segment(0, num_context)
            features.append(self.encoder.run(*self.encoder.patches(context.latents, context_plan), context_plan, temb))

        feature = ContextFeature.joined(features).repeated(len(draws))
        num_decoded = feature.states.shape[1]
        decoded = frames.last(num_decoded).drawn(draws[:, :, -num_decoded:])
        timestep = timestep.flatten(-3, -2)[..., -num_decoded:]
        temb = self.decoder.embed(decoded, timestep, repeat_batch(class_labels, len(draws)))
        velocity = self._decode(feature, decoded.latents, temb, None, null_noise)
        missing = velocity.new_zeros(velocity[:, :1].shape)
        return velocity if num_decoded == plan.num_short_frames else torch.cat([missing, velocity], dim=1)

    def _decode(
        self,
        feature: ContextFeature,
        latents: torch.Tensor,
        temb: torch.Tensor | None,
        modulation: FrameModulation | None,
        null_noise: torch.Tensor | None,
    ) -> torch.Tensor:
        """Velocity of noisy frames, `(B, F, C, H, W)`, each from its feature; those with a noisy feature first."""
        context, (num_frames, *_, height, width) = feature.states, latents.shape[1:]
        if null_noise is not None:
            strength = max(self.config.feature_noise, LEAST_NULL_NOISE)
            context = torch.cat([context + strength * null_noise * feature.gain, context])
            latents = torch.cat([latents, latents])
            temb = None if temb is None else torch.cat([temb, temb])
            modulation = None if modulation is None else modulation.doubled()
        plan = self.context_plan(1, height, width)
        noisy, _ = self.decoder.patches(latents, plan)
        pairs = torch.stack([context, noisy], dim=2).flatten(0, 1)  # (B * F, 2, T, dim)
        temb = None if temb is None else temb.flatten(0, 1)[:, None]
        if self.clip_group is None:
            velocity = self.decoder.run(pairs, None, plan, temb, modulation=modulation)
        else:  # they do not see each other, so processes that share clips share them as they are
            velocity = self.decoder.run(self.clip_group.own(pairs), None, plan, self.clip_group.own(temb))
            velocity = self.clip_group.gathered(velocity, len(pairs))
        return velocity.unflatten(0, (-1, num_frames))[:, :, 0]

    def _start(self, latents: torch.Tensor) -> ContextFeature:
        """The feature of frame 0, `(B, 1, T, dim)`."""
        shape = self.feature_shape(len(latents), *latents.shape[-2:])
        states = self.start_feature.expand(shape)
        return ContextFeature(states, torch.ones_like(states[:, :, :1]))

    def _dropped(self, frames: FrameBatch, timestep: torch.Tensor | None, class_labels: torch.Tensor | None) -> tuple:
        """The same, in training without what is dropped: one draw for both parts."""
        if self.training and self.config.condition_dropout and timestep is not None:
            frames, class_labels = self.decoder.drop_conditions(frames, class_labels)
        return frames, timestep, class_labels

    def _check_draws(self, draws: torch.Tensor, timestep, r_timestep, kv_cache, null_noise) -> None:
        """Refuse several draws where they make no sense."""
        shape = tuple(draws.shape[:3])
        if kv_cache is not None or null_noise is not None:
            reason = "`kv_cache`" if kv_cache is not None else "`null_feature_noise`"
            raise ValueError(
                f"`hidden_states` has shape {tuple(draws.shape)}, several draws of whole clips, but {reason} was given; pass "
                "(batch, frames, channels, height, width)."
            )
        for name, value in {"timestep": timestep, "r_timestep": r_timestep}.items():
            given = tuple(getattr(value, "shape", ()))
            if given != shape and (name == "timestep" or value is not None):
                raise ValueError(
                    f"`{name}` has shape {given}; with {shape[0]} draws of {shape[1]} clips of {shape[2]} frames it must be "
                    f"{shape}."
                )

    def _check_separable_call(
        self, frames, kv_cache, update_cache, clean_latents, next_action, next_action_mask, null_noise
    ) -> None:
        """Refuse what only this kind of model can be fed wrongly."""
        batch_size, num_frames, _, height, width = frames.latents.shape
        if kv_cache is None and clean_latents is None:
            raise ValueError(
                "`clean_hidden_states` is None, but the encoder of this model reads the finished frames: pass them, or the "
                "`kv_cache` that they were written to."
            )
        action_shape = (batch_size,) if self.config.action_dim is None else (batch_size, self.config.action_dim)
        check_condition("next_action", next_action, update_cache and self.takes_actions, action_shape)
        if next_action_mask is not None:
            check_condition("next_action_mask", next_action_mask, next_action is not None, (batch_size,))
        if null_noise is not None:
            check_condition(
                "null_feature_noise", null_noise, not update_cache, self.feature_shape(batch_size, height, width)
            )
        is_first = num_frames == 1 if kv_cache is None else kv_cache.num_frames == 0
        if is_first and not update_cache and not self.config.learn_start:
            raise ValueError(
                "`hidden_states` is frame 0, but this model has `learn_start=False`: it makes frames after a clean one only. "
                "Write one to `kv_cache` before."
            )
        if kv_cache is not None and not update_cache:
            assert kv_cache.feature is not None or kv_cache.num_frames == 0, "a write must follow a rewind"


def check_separable_config(config) -> None:
    """Refuse what a separable model cannot be, the values named."""
    if not config.frame_causal:
        raise ValueError("`frame_causal` is False, but the encoder of a separable model is causal; leave it out.")
    if config.long_patch_size is not None and config.short_window < 2:
        raise ValueError(
            f"`short_window` is {config.short_window}, but a feature comes from a finished short frame: with "
            "`long_patch_size` a separable model needs at least 2."
        )
    if not isinstance(config.learn_start, bool):
        raise ValueError(f"`learn_start` is {config.learn_start!r}; it is `True` or `False`.")
    if isinstance(config.feature_noise, bool) or not isinstance(config.feature_noise, (int, float)):
        raise ValueError(f"`feature_noise` is {config.feature_noise!r}; it is a number of at least 0.")
    if not 0 <= config.feature_noise < float("inf"):
        raise ValueError(f"`feature_noise` is {config.feature_noise}; it is a strength of at least 0, finite.")
