"""The FAR transformer: a DiT whose attention is full inside a frame and causal between frames; one network, one `forward` for
training and inference.

B batch, F frames, C latent channels, H/W latent height/width.
"""

from contextlib import nullcontext
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  diffusers looks for it where a component is defined

from .adapters import scaled_adapters
from .frame_network import FrameModulation, FrameNetwork
from .frame_transformer import FARTransformerOutput, FrameTransformer, check_config, initialize_weights
from .frames import FrameBatch, pair_with_clean
from .kv_cache import FARKVCache


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
            frames, timestep = pair_with_clean(frames, timestep, clean_latents, plan)
        temb = self.embed(frames, timestep, class_labels, plan.num_long_frames)
        return self.run(*self.patches(frames.latents, plan), plan, temb)
