"""FlexRoPE: test-time temporal decay on top of 3D RoPE, as a hook on the attention mask.

`logit(i, j) += slope_i * (frame_j - frame_i)`: zero inside a frame, ever more negative for remote frames. The slope
belongs to the query frame i, so that what is cached equals what is computed anew.

F query frames, L queries or keys.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager

from ..checks import check_count, is_finite_number
from ..models.frame_network import AttentionFrames, FARAttentionBias
from ..models.functional import frame_causal_mask


FLEX_ROPE_HOOK = "flex_rope"
SCHEDULES = ("constant", "beyond_training")

SlopeSchedule = Callable[[int, int | None, int | None], float]


@dataclass(frozen=True)
class FlexRoPEConfig:
    """How attention decays with the distance in time, at inference.

    Args:
        slope (`float`, defaults to 0.1): Logits lost per frame of distance, at least 0; 0 is plain RoPE.
        schedule (`str` or callable, defaults to `"beyond_training"`): `"constant"`: `slope` for every frame.
            `"beyond_training"`: `slope * clamp((i + 1 - trained_frames) / trained_frames, 0, 1)` for query frame i, from
            0, which leaves the trained length as it is. Or a function `(frame_index, step_index, num_inference_steps)
            -> slope`; the last two are `None` while context is written to the cache. A function that depends on the
            step gives up that cached equals uncached, and cannot be saved.
        trained_frames (`int`, *optional*): The model's own by default.

    Source: FAR, arXiv:2503.19325v1, "FlexRoPE".
    """

    slope: float = 0.1
    schedule: str | SlopeSchedule = "beyond_training"
    trained_frames: int | None = None

    def __post_init__(self):
        if not is_finite_number(self.slope) or self.slope < 0:
            raise ValueError(f"`slope` is {self.slope}; attention decays by a finite slope of 0 or more.")
        if not callable(self.schedule) and self.schedule not in SCHEDULES:
            raise ValueError(
                f"`schedule` is {self.schedule!r}; choose one of {', '.join(map(repr, SCHEDULES))} or pass a function "
                "(frame_index, step_index, num_inference_steps) -> slope."
            )
        check_count("trained_frames", self.trained_frames, "it counts frames, at least 1", optional=True)


class DenoisingStep(StateManager):
    """Where the denoising loop is, as `cache_context` says. FlexRoPE remembers nothing else between calls.

    Attributes:
        current (`CacheContext`, *optional*): `None` in a call outside of `cache_context`.
    """

    def __init__(self):
        super().__init__(BaseState)
        self.current = None

    def set_context(self, context) -> None:
        """Called by `cache_context` when it is entered."""
        self.current = context

    def reset(self) -> None:
        """Forget where the loop was."""
        self.current = None


class FlexRoPEHook(ModelHook):
    """Adds the decay to the attention mask of a pass.

    Args:
        config (`FlexRoPEConfig`): `trained_frames` is set where the schedule needs it.
    """

    _is_stateful = True

    def __init__(self, config: FlexRoPEConfig):
        super().__init__()
        self.step = DenoisingStep()
        self.set_config(config)

    def set_config(self, config: FlexRoPEConfig) -> None:
        """Take another config over. The slope is a tensor, changed in place: compiled code stays as it is."""
        self.config = config
        if not hasattr(self, "slope"):
            self.slope = torch.zeros((), dtype=torch.float32)
        self.slope.fill_(config.slope)
        self.first_decaying_frame = config.trained_frames if config.schedule == "beyond_training" else 0
        self.is_on = callable(config.schedule) or config.slope > 0

    def pre_forward(self, module: FARAttentionBias, attention_mask, frames: AttentionFrames):
        """The inputs of the module, with the decay in the mask."""
        if self.is_on and frames.last_query_frame >= self.first_decaying_frame:
            slopes = self.slopes(frames)
            if slopes is not None:
                attention_mask = temporal_decay(frames, slopes, frame_causal=attention_mask is not None)
        return (attention_mask, frames), {}

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        """Called by diffusers between two uses of a model."""
        self.step.reset()
        return module

    def __getstate__(self) -> FlexRoPEConfig:
        return self.config

    def __setstate__(self, config: FlexRoPEConfig) -> None:
        self.__init__(config)

    def slopes(self, frames: AttentionFrames) -> torch.Tensor | None:
        """Slope of each query of `frames`, float32; `None` where all are 0."""
        if callable(self.config.schedule):
            return self._scheduled_slopes(frames)
        if self.slope.device != frames.query_frames.device:
            self.slope = self.slope.to(frames.query_frames.device)
        if self.config.schedule == "constant":
            return self.slope.expand_as(frames.query_frames)
        trained_frames = self.config.trained_frames
        frames_beyond = (frames.query_frames + 1 - trained_frames).float()
        return self.slope * (frames_beyond / trained_frames).clamp(0, 1)

    def _scheduled_slopes(self, frames: AttentionFrames) -> torch.Tensor | None:
        context = self.step.current
        step_index = None if context is None else context.step_index
        num_inference_steps = None if context is None else context.num_inference_steps
        slopes = [
            float(self.config.schedule(frame, step_index, num_inference_steps))
            for frame in range(frames.first_query_frame, frames.last_query_frame + 1)
        ]
        if not any(slopes):
            return None
        slopes = torch.tensor(slopes, dtype=torch.float32, device=frames.query_frames.device)
        return slopes[frames.query_frames - frames.first_query_frame]


def temporal_decay(frames: AttentionFrames, slopes: torch.Tensor, *, frame_causal: bool) -> torch.Tensor:
    """The decay as an additive attention mask, in float32 whatever the model's dtype.

    Args:
        frames (`AttentionFrames`): Query and key frames.
        slopes (`torch.Tensor` of shape `(L_query,)`): Slope of each query.
        frame_causal (`bool`): Whether later frames are among the keys and must be hidden.

    Returns:
        `torch.Tensor` of shape `(1, 1, L_query, L_key)`; `(1, 1, 1, L_key)` for one query frame against a cache.
    """
    distance = frames.key_frames[None, :] - frames.query_frames[:, None]
    decay = slopes[:, None] * distance
    if frame_causal:
        is_seen = frame_causal_mask(frames.query_frames, frames.key_frames, frames.is_twin)
        decay = decay.masked_fill(~is_seen, float("-inf"))
    return decay[None, None]


def apply_flex_rope(transformer: torch.nn.Module, config: FlexRoPEConfig | None = None) -> FlexRoPEConfig:
    """Let the attention of a FAR transformer decay with time. Applied again, the new config replaces the old one.

    Args:
        transformer ([`FARTransformer3DModel`]).
        config (`FlexRoPEConfig`, *optional*): The defaults where none is given.

    Returns:
        The config in force, with `trained_frames` filled in.

    Raises:
        ValueError: `"beyond_training"` without `trained_frames` in the config or the model, or a model whose frames
            see the future.
    """
    config = resolve_config(transformer, config or FlexRoPEConfig())
    registry = HookRegistry.check_if_exists_or_initialize(transformer.attention_bias)
    hook = registry.get_hook(FLEX_ROPE_HOOK)
    if hook is None:
        registry.register_hook(FlexRoPEHook(config), FLEX_ROPE_HOOK)
    else:
        hook.set_config(config)
    HookRegistry.check_if_exists_or_initialize(transformer).invalidate_child_registries_cache()
    return config


def remove_flex_rope(transformer: torch.nn.Module) -> None:
    """Back to plain RoPE. Does nothing where FlexRoPE is not applied."""
    HookRegistry.check_if_exists_or_initialize(transformer.attention_bias).remove_hook(FLEX_ROPE_HOOK)
    HookRegistry.check_if_exists_or_initialize(transformer).invalidate_child_registries_cache()


def applied_config(transformer: torch.nn.Module) -> FlexRoPEConfig | None:
    """The config in force on a transformer; `None` where FlexRoPE is not applied."""
    hook = HookRegistry.check_if_exists_or_initialize(transformer.attention_bias).get_hook(FLEX_ROPE_HOOK)
    return None if hook is None else hook.config


def resolve_config(transformer: torch.nn.Module, config: FlexRoPEConfig) -> FlexRoPEConfig:
    """`config` with the model's `trained_frames` where its schedule needs them and it has none."""
    if not transformer.config.frame_causal:
        raise ValueError("FlexRoPE decays into the past, but this model has `frame_causal=False`: it has no past.")
    if config.schedule != "beyond_training" or config.trained_frames is not None:
        return config
    if transformer.config.trained_frames is None:
        raise ValueError(
            "`schedule` is 'beyond_training' but neither the config nor the model has `trained_frames`; pass "
            "`FlexRoPEConfig(trained_frames=...)`, the longest clip that the model was trained on."
        )
    return FlexRoPEConfig(config.slope, config.schedule, transformer.config.trained_frames)
