"""What a user asks of the pipeline, and how frames are made: one object for each, named once on the way down."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from ..models.adapters import lora_scale
from ..models.kv_cache import CacheOptions


DEFAULT_INFERENCE_STEPS = 50


@dataclass(frozen=True)
class GenerationSettings:
    """How frames are made.

    Args:
        num_inference_steps (`int`): Denoising steps of a frame.
        guidance_scale (`float`): Above 1 the model also runs with the null condition, in the same batch.
        use_cache (`bool`): `False` computes the whole context anew at every step.
        cache_options (`CacheOptions`): How the cache saves time and memory.
        attention_kwargs (`dict`, *optional*): Passed to the transformer: `scale` scales LoRA layers.
        sigmas (`tuple` of `float`, *optional*): Noise levels of the steps, for a scheduler that takes them.
        guidance_mode (`str`): `"condition"`, or for separable models `"feature"`: what guidance leads away from.

    Raises:
        ValueError: `attention_kwargs` has another key, or no finite number.
    """

    num_inference_steps: int = DEFAULT_INFERENCE_STEPS
    guidance_scale: float = 1.0
    use_cache: bool = True
    cache_options: CacheOptions = CacheOptions()
    attention_kwargs: dict | None = None
    sigmas: tuple[float, ...] | None = None
    guidance_mode: str = "condition"

    @property
    def needs_null_half(self) -> bool:
        """Whether the context is encoded once more, under null conditions."""
        return self.guidance_scale > 1 and self.guidance_mode == "condition"

    def __post_init__(self):
        if self.attention_kwargs is not None:
            lora_scale(self.attention_kwargs)


@dataclass(frozen=True)
class GenerationRequest:
    """The arguments of a call of a pipeline as they were given, each under its own name; see [`FARPipeline.__call__`].
    `None` means the pipeline's own where it has one."""

    video: Any = None
    video_latents: torch.Tensor | None = None
    actions: Any = None
    class_labels: Any = None
    num_frames: int = 16
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    num_videos_per_context: int = 1
    generator: torch.Generator | list[torch.Generator] | None = None
    latents: torch.Tensor | None = None
    use_cache: bool = True
    short_cache: str | int | None = None
    max_long_frames: int | None = None
    num_sink_frames: int = 0
    output_type: str = "pil"
    attention_kwargs: dict[str, Any] | None = None
    callback_on_step_end: Callable | None = None
    callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",)
    callback_on_frame_end: Callable | None = None
    sigmas: list[float] | None = None
    guidance_mode: str = "condition"

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> "GenerationRequest":
        """The request among the arguments of a function, by their names, as `locals()` has them."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls) if field.name in arguments})

    def settings(self, pipe) -> GenerationSettings:
        """How the frames are to be made: as asked for, else as the pipeline is shipped."""
        num_steps, guidance, short_cache = self.num_inference_steps, self.guidance_scale, self.short_cache
        if num_steps is None:
            num_steps = pipe.default_inference_steps if self.sigmas is None else len(self.sigmas)
        if short_cache is None:
            short_cache = pipe.default_short_cache if self.use_cache else "exact"
        return GenerationSettings(
            num_steps,
            pipe.default_guidance_scale if guidance is None else guidance,
            self.use_cache,
            CacheOptions(short_cache, self.max_long_frames, self.num_sink_frames),
            self.attention_kwargs,
            None if self.sigmas is None else tuple(self.sigmas),
            self.guidance_mode,
        )
