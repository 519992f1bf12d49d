"""FARPipeline: continue or generate a video, frame after frame.

B batch, F frames, C latent channels, H/W latent height/width, A action channels; h/w pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging

from ..hooks import FlexRoPEConfig, apply_flex_rope, remove_flex_rope
from ..loaders.lora import FARLoraLoaderMixin
from ..models.codec import decode_video, encode_video, spatial_compression
from ..models.conditions import shift_actions
from ..models.kv_cache import FrameBatch
from ..models.transformer_far import FARTransformer3DModel
from .hub import FARHubMixin, applied_flex_rope, check_components_complete
from .inputs import (
    PipelineInputs,
    check_actions,
    check_class_labels,
    check_count,
    check_latents,
    frame_noise,
    infer_batch_size,
    repeat_samples,
    video_to_tensor,
)
from .pipeline_output import FARPipelineOutput, join_frames
from .rollout import Rollout, RolloutConfig


logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
ENCODED_FRAMES = 32  # frames that the VAE encodes at once; one at a time with `vae.enable_slicing()`

EXAMPLE_DOC_STRING = """
    Examples:
        >>> import torch
        >>> from diffusers_far import FARPipeline

        >>> pipe = FARPipeline.from_pretrained("checkpoints/far-maze")
        >>> frames = pipe(video=video, actions=actions, num_frames=16).frames[0]
"""


@dataclass(frozen=True)
class Callbacks:
    """What the user wants to be called with, after each step and after each frame."""

    on_step_end: Callable | None
    tensor_inputs: list[str]
    on_frame_end: Callable | None


class GenerationInterrupted(Exception):
    """Raised inside a call whose user set `pipe._interrupt`; the frames that are finished are returned."""


class FARPipeline(FARHubMixin, DiffusionPipeline, FARLoraLoaderMixin):
    r"""
    Frame-autoregressive video generation: continues a video, under actions, a class or nothing, or starts from nothing.

    Args:
        transformer ([`FARTransformer3DModel`]): The denoiser.
        vae (`AutoencoderDC`, `AutoencoderKL` or `AutoencoderTiny`): Encodes and decodes single frames.
        scheduler: A flow-matching scheduler, such as `FlowMatchEulerDiscreteScheduler`.
        fps (`float`, *optional*): Frames per second of the videos that the model knows.
        action_names (`list[str]`, *optional*): Names of the discrete actions, by index.
        height (`int`, *optional*), width (`int`, *optional*): The model's own size in pixels.
        flex_rope (`dict`, *optional*): Fields of a [`FlexRoPEConfig`] to apply; written by `enable_flex_rope`.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: FARTransformer3DModel,
        vae: torch.nn.Module,
        scheduler: SchedulerMixin,
        fps: float | None = None,
        action_names: list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        flex_rope: dict | None = None,
    ):
        super().__init__()
        check_components_complete(transformer=transformer, vae=vae)
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(fps=fps, action_names=action_names, height=height, width=width)
        self.register_to_config(flex_rope=applied_flex_rope(transformer))
        if flex_rope is not None:
            self.enable_flex_rope(FlexRoPEConfig(**flex_rope))

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of all frames of the last call."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def enable_flex_rope(self, config: FlexRoPEConfig | None = None) -> None:
        """Let attention decay with time at inference, see [`FlexRoPEConfig`]. Kept when the pipeline is saved, unless
        the schedule is a function."""
        config = apply_flex_rope(self.transformer, config)
        self.register_to_config(flex_rope=None if callable(config.schedule) else asdict(config))

    def disable_flex_rope(self) -> None:
        """Back to plain RoPE."""
        remove_flex_rope(self.transformer)
        self.register_to_config(flex_rope=None)

    @torch.no_grad()
    def __call__(
        self,
        video: Any = None,
        video_latents: torch.Tensor | None = None,
        actions: Any = None,
        class_labels: Any = None,
        num_frames: int = 16,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        num_videos_per_context: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        use_cache: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        callback_on_frame_end: Callable | None = None,
    ) -> FARPipelineOutput | tuple:
        r"""
        Generate `num_frames` new frames.

        Args:
            video (*optional*): Context: a list of PIL images, or of such lists; an array, channels last, uint8 or in
                [0, 1]; or a tensor `(B, F, 3, h, w)` in [0, 1].
            video_latents (`torch.Tensor` of shape `(B, F, C, H, W)`, *optional*): Context that is already encoded and
                scaled, instead of `video`.
            actions (*optional*): One per context and new frame, `(B, F_context + num_frames)` integers, or with a last
                axis of floats for continuous actions; `actions[:, t]` is the action taken at frame t and leads to
                frame t + 1. For a model with `action_shift=1` the last may be left out.
            class_labels (*optional*): One integer per sample.
            num_frames (`int`, defaults to 16): New frames.
            height (`int`, *optional*), width (`int`, *optional*): In pixels, where neither context nor `latents` give
                it; the pipeline's own by default.
            num_inference_steps (`int`, defaults to 50): Denoising steps of each frame.
            guidance_scale (`float`, defaults to 1.0): Above 1: away from the null condition, `null + scale * (condition
                - null)`; the null half has null actions for the context too.
            num_videos_per_context (`int`, defaults to 1): Continuations of each context; they follow each other in the
                batch of the output.
            generator (`torch.Generator` or a list, one per video, *optional*): With a list each video is the same alone
                as in a batch.
            latents (`torch.Tensor` of shape `(B, num_frames, C, H, W)`, *optional*): Starting noise; else drawn frame
                after frame.
            use_cache (`bool`, defaults to `True`): `False` computes the whole context anew at every step.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"` (channels last), `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`): `False` returns a tuple.
            attention_kwargs (`dict`, *optional*): `scale` scales LoRA layers.
            callback_on_step_end (callable, *optional*): `(pipe, step, timestep, tensors) -> tensors`; `step` counts
                through all frames.
            callback_on_step_end_tensor_inputs (`list[str]`): Tensors that it is given: `"latents"`, the noisy frame.
            callback_on_frame_end (callable, *optional*): `(pipe, frame_index, tensors) -> tensors`, with the finished
                frame as `"latents"`; frames are counted from the first new one.

        Examples:

        Returns:
            [`FARPipelineOutput`], the new frames only.
        """
        inputs = self.check_inputs(
            video,
            video_latents,
            actions,
            class_labels,
            num_frames,
            height,
            width,
            num_inference_steps,
            guidance_scale,
            num_videos_per_context,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        config = RolloutConfig(num_inference_steps, guidance_scale, use_cache, attention_kwargs)
        callbacks = Callbacks(callback_on_step_end, callback_on_step_end_tensor_inputs, callback_on_frame_end)
        finished = list(self._generate(inputs, config, generator, callbacks))
        frames = join_frames([self._decode(frame, output_type) for frame in finished], output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (frames,)
        return FARPipelineOutput(frames=frames)

    def stream(
        self,
        video: Any = None,
        video_latents: torch.Tensor | None = None,
        actions: Any = None,
        class_labels: Any = None,
        num_frames: int = 16,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        num_videos_per_context: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        use_cache: bool = True,
        output_type: str = "pil",
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        callback_on_frame_end: Callable | None = None,
    ) -> Iterator[list[PIL.Image.Image] | np.ndarray | torch.Tensor]:
        """Like a call, but yields each frame of the batch as soon as it is decoded: a list of B images, `(B, h, w, 3)`,
        `(B, 3, h, w)` or latents `(B, C, H, W)`. Bit-equal to the call. Inputs are checked at once."""
        inputs = self.check_inputs(
            video,
            video_latents,
            actions,
            class_labels,
            num_frames,
            height,
            width,
            num_inference_steps,
            guidance_scale,
            num_videos_per_context,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        config = RolloutConfig(num_inference_steps, guidance_scale, use_cache, attention_kwargs)
        callbacks = Callbacks(callback_on_step_end, callback_on_step_end_tensor_inputs, callback_on_frame_end)

        def decoded_frames():
            try:
                for frame in self._generate(inputs, config, generator, callbacks):
                    yield self._decode(frame, output_type)
            finally:
                self.maybe_free_model_hooks()

        return decoded_frames()

    @torch.no_grad()
    def _generate(
        self,
        inputs: PipelineInputs,
        config: RolloutConfig,
        generator: torch.Generator | list[torch.Generator] | None,
        callbacks: Callbacks,
    ) -> Iterator[torch.Tensor]:
        """Latents of each new frame, `(B * num_videos_per_context, C, H, W)`, as soon as it is finished."""
        device = self._execution_device
        repeats = inputs.num_videos_per_context
        actions, action_mask = None, None
        if inputs.actions is not None:
            num_frames = inputs.num_context_frames + inputs.num_frames
            actions = repeat_samples(inputs.actions.to(device), repeats)
            actions, action_mask = shift_actions(actions, self.transformer.config.action_shift, num_frames)
        context = self._encode_context(inputs, device)

        latent_shape = (
            inputs.batch_size * repeats,
            self.transformer.config.in_channels,
            inputs.latent_height,
            inputs.latent_width,
        )
        rollout = Rollout(
            self.transformer,
            self.scheduler,
            latent_shape=latent_shape,
            max_frames=inputs.num_context_frames + inputs.num_frames,
            device=device,
            class_labels=None
            if inputs.class_labels is None
            else repeat_samples(inputs.class_labels, repeats).to(device),
            config=config,
        )
        self._interrupt = False
        self._guidance_scale = config.guidance_scale
        self._num_timesteps = inputs.num_frames * rollout.num_steps

        def fed_frames(latents: torch.Tensor, first_frame: int) -> FrameBatch:
            window = slice(first_frame, first_frame + latents.shape[1])
            if actions is None:
                return FrameBatch(latents)
            return FrameBatch(latents, actions[:, window], action_mask[:, window])

        finished = repeat_samples(context, repeats) if context is not None else None
        num_finished = 0
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for frame_index in range(inputs.num_frames):
                if finished is not None:
                    rollout.write(fed_frames(finished, num_finished))
                    num_finished += finished.shape[1]
                if inputs.latents is not None:
                    noise = inputs.latents[:, frame_index : frame_index + 1].to(device)
                else:
                    noise = frame_noise((latent_shape[0], 1, *latent_shape[1:]), generator, device)

                def on_step_end(step_index, timestep, latents):
                    step = frame_index * rollout.num_steps + step_index
                    latents = self._call_back(callbacks.on_step_end, callbacks.tensor_inputs, latents, step, timestep)
                    progress_bar.update()
                    if self.interrupt:
                        raise GenerationInterrupted
                    return latents

                try:
                    finished = rollout.denoise(fed_frames(noise, num_finished), on_step_end)
                except GenerationInterrupted:
                    return
                finished = self._call_back(callbacks.on_frame_end, ["latents"], finished, frame_index)
                yield finished[:, 0]

    def _call_back(self, callback, tensor_inputs: list[str], latents: torch.Tensor, *position) -> torch.Tensor:
        """Let the user see, and replace, the latents."""
        if callback is None:
            return latents
        outputs = callback(self, *position, dict.fromkeys(tensor_inputs, latents))
        return (outputs or {}).get("latents", latents)

    def _encode_context(self, inputs: PipelineInputs, device: torch.device) -> torch.Tensor | None:
        """Latents of the context, `(B, F, C, H, W)`, float32."""
        if inputs.video_latents is not None:
            return inputs.video_latents.to(device).float()
        if inputs.video is None:
            return None
        batch_size = 1 if getattr(self.vae, "use_slicing", False) else ENCODED_FRAMES
        latents = encode_video(self.vae, inputs.video.flatten(0, 1), batch_size, device)
        return latents.unflatten(0, inputs.video.shape[:2]).float()

    @torch.no_grad()
    def _decode(self, latents: torch.Tensor, output_type: str) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """One frame of every sample, `(B, C, H, W)`, as the user wants it."""
        if output_type == "latent":
            return latents
        batch_size = 1 if getattr(self.vae, "use_slicing", False) else len(latents)
        images = decode_video(self.vae, latents, batch_size, self._execution_device).float()
        if output_type == "pt":
            return images
        images = VaeImageProcessor.pt_to_numpy(images)
        return images if output_type == "np" else VaeImageProcessor.numpy_to_pil(images)

    def check_inputs(
        self,
        video: Any,
        video_latents: torch.Tensor | None,
        actions: Any,
        class_labels: Any,
        num_frames: int,
        height: int | None,
        width: int | None,
        num_inference_steps: int,
        guidance_scale: float,
        num_videos_per_context: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> PipelineInputs:
        """Check all arguments before any work is done.

        Raises:
            ValueError: Names the argument, its value, the rule and the cure.
        """
        config = self.transformer.config
        if not config.frame_causal:
            raise ValueError(
                "The transformer has `frame_causal=False` and makes whole clips; this pipeline makes frame after frame."
            )
        check_count("num_frames", num_frames)
        check_count("num_inference_steps", num_inference_steps)
        check_count("num_videos_per_context", num_videos_per_context)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` is {output_type!r}; choose one of {', '.join(OUTPUT_TYPES)}.")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {unknown}; there are {self._callback_tensor_inputs}."
            )
        if not np.isfinite(guidance_scale) or guidance_scale < 0:
            raise ValueError(f"`guidance_scale` is {guidance_scale}; it is at least 0, and guides above 1.")
        if guidance_scale > 1 and not (self.transformer.takes_actions or self.transformer.takes_labels):
            raise ValueError(
                f"`guidance_scale` is {guidance_scale} but this model has no condition to be guided by; leave it at 1."
            )
        if video is not None and video_latents is not None:
            raise ValueError("`video` and `video_latents` were both given; pass the context in one of the two forms.")

        latent_channels = (config.in_channels, None, None)
        if video is not None:
            video = video_to_tensor(video)
        if video_latents is not None:
            check_latents("video_latents", video_latents, (None, None, *latent_channels))
        if latents is not None:
            check_latents("latents", latents, (None, num_frames, *latent_channels))
        latent_height, latent_width = self._latent_size(video, video_latents, latents, height, width)
        context = video if video is not None else video_latents

        batch_size = infer_batch_size(
            context, latents, actions, class_labels, num_videos_per_context, 3 if config.action_dim else 2
        )
        if latents is not None:
            num_videos = batch_size * num_videos_per_context
            check_latents(
                "latents", latents, (num_videos, num_frames, config.in_channels, latent_height, latent_width)
            )
        if isinstance(generator, (list, tuple)) and len(generator) != batch_size * num_videos_per_context:
            raise ValueError(
                f"`generator` is a list of {len(generator)} but the call makes {batch_size * num_videos_per_context} "
                "videos; pass one generator per video, or a single one."
            )
        num_context_frames = 0 if context is None else context.shape[1]
        return PipelineInputs(
            video=video,
            video_latents=video_latents,
            actions=check_actions(actions, config, batch_size, num_context_frames + num_frames),
            class_labels=check_class_labels(class_labels, config.num_classes, batch_size),
            latents=latents,
            batch_size=batch_size,
            num_context_frames=num_context_frames,
            num_frames=num_frames,
            num_videos_per_context=num_videos_per_context,
            latent_height=latent_height,
            latent_width=latent_width,
        )

    def _latent_size(self, video, video_latents, latents, height, width) -> tuple[int, int]:
        """Latent height and width: from the video or latents, else as given, else the pipeline's own."""
        compression = spatial_compression(self.vae)
        for name, tensor, pixels in (
            ("video", video, 1),
            ("video_latents", video_latents, compression),
            ("latents", latents, compression),
        ):
            if tensor is not None:
                size = (tensor.shape[-2] * pixels, tensor.shape[-1] * pixels)
                source = f"`{name}`"
                if (height or size[0], width or size[1]) != size:
                    raise ValueError(
                        f"`height` and `width` are {height} and {width} but {source} is of {size[0]}x{size[1]} pixels; "
                        "leave them out, or resize."
                    )
                break
        else:
            size, source = (height or self.config.height, width or self.config.width), "`height`x`width`"
            if None in size:
                raise ValueError(
                    f"`height` and `width` are {height} and {width}, without a video, and this pipeline has no size of "
                    "its own; pass both, in pixels."
                )
        config = self.transformer.config
        unit = compression * (config.long_patch_size or config.patch_size)
        if size[0] < 1 or size[1] < 1 or size[0] % unit or size[1] % unit:
            raise ValueError(
                f"{source} is {size[0]}x{size[1]} pixels; VAE and patches need multiples of {unit}: resize, for example "
                f"to {max(1, round(size[0] / unit)) * unit}x{max(1, round(size[1] / unit)) * unit}."
            )
        return size[0] // compression, size[1] // compression
