"""FARPipeline: continue or generate a video, frame after frame.

B batch, F frames, C latent channels, H/W latent height/width, A action channels; h/w pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, DiffusionPipeline, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging

from ..hooks import FlexRoPEConfig, apply_flex_rope, remove_flex_rope
from ..loaders.lora import FARLoraLoaderMixin
from ..models.codec import decode_video, encode_video, latent_statistics
from ..models.frames import FrameBatch, shift_actions
from ..models.transformer_far import FARTransformer3DModel
from .hub import FARHubMixin, applied_flex_rope, check_components_complete
from .inputs import CALLBACK_TENSORS, PipelineInputs, check_request, check_sigmas, frame_noise, repeat_samples
from .latency import LatencyBudget
from .pipeline_output import FARPipelineOutput, Frame, join_frames
from .precision import warn_of_slow_dtype
from .rollout import Rollout, check_scheduler
from .session import FARSession
from .session_history import NoiseSource, SessionHistory, check_max_history, new_generator
from .settings import DEFAULT_INFERENCE_STEPS, GenerationInterrupted, GenerationRequest


logger = logging.get_logger(__name__)

ENCODED_FRAMES = 32  # frames that the VAE encodes at once; one at a time with `vae.enable_slicing()`

EXAMPLE_DOC_STRING = """
    Examples:
        >>> import torch
        >>> from diffusers_far import FARPipeline

        >>> pipe = FARPipeline.from_pretrained("checkpoints/far-maze")
        >>> frames = pipe(video=video, actions=actions, num_frames=16).frames[0]
"""


@dataclass
class Generation:
    """A call in the making.

    Args:
        request ([`GenerationRequest`]), inputs ([`PipelineInputs`]): What was asked for, checked.
        rollout ([`Rollout`]): The context so far.
        actions, action_mask (`torch.Tensor`, *optional*): What each frame is fed, those to come included.
        unwritten (`torch.Tensor` of shape `(B, F, C, H, W)`, *optional*): Clean frames that the rollout has not been given.
    """

    request: GenerationRequest
    inputs: PipelineInputs
    rollout: Rollout
    actions: torch.Tensor | None
    action_mask: torch.Tensor | None
    unwritten: torch.Tensor | None

    def as_fed(self, latents: torch.Tensor, first_frame: int) -> FrameBatch:
        """Frames from `first_frame` on, with their actions."""
        if self.actions is None:
            return FrameBatch(latents)
        frames = slice(first_frame, first_frame + latents.shape[1])
        return FrameBatch(latents, self.actions[:, frames], self.action_mask[:, frames])


class FARPipeline(FARHubMixin, DiffusionPipeline, FARLoraLoaderMixin):
    r"""
    Frame-autoregressive video generation: continues a video, under actions, a class or nothing, or starts from nothing.

    Args:
        transformer ([`FARTransformer3DModel`]): The denoiser.
        vae (`AutoencoderDC`, `AutoencoderKL` or `AutoencoderTiny`): Encodes and decodes single frames.
        scheduler: A flow-matching scheduler, such as `FlowMatchEulerDiscreteScheduler`; others are refused.
        fps (`float`, *optional*): Frames per second of the videos that the model knows.
        action_names (`list[str]`, *optional*): Names of the discrete actions, by index; a saved pipeline has them as a
            `dict`.
        height (`int`, *optional*), width (`int`, *optional*): The model's own size in pixels.
        flex_rope (`dict`, *optional*): Fields of a [`FlexRoPEConfig`] to apply; written by `enable_flex_rope`.
        num_inference_steps (`int`, *optional*), guidance_scale (`float`, *optional*), short_cache (`str` or `int`,
            *optional*): What a call takes that does not give them. Where the pipeline has none either: 50 steps, a guidance of
            1 (none), and `"exact"`.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = CALLBACK_TENSORS

    def __init__(
        self,
        transformer: FARTransformer3DModel,
        vae: AutoencoderDC | AutoencoderKL | AutoencoderTiny,
        scheduler: SchedulerMixin,
        fps: int | float | None = None,
        action_names: list[str] | dict[str, str] | None = None,
        height: int | None = None,
        width: int | None = None,
        flex_rope: dict | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        short_cache: str | int | None = None,
    ):
        super().__init__()
        check_components_complete(transformer=transformer, vae=vae)
        if scheduler is not None:  # diffusers' way to load a part: `from_pretrained(..., transformer=None)`
            check_scheduler(scheduler)
        if vae is not None and transformer is not None:
            latent_statistics(vae, torch.empty(transformer.config.in_channels, 1, 1))
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        if isinstance(action_names, dict):
            action_names = list(action_names.values())
        self.register_to_config(fps=fps, action_names=action_names, height=height, width=width)
        self.register_to_config(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        self.register_to_config(short_cache=short_cache)
        self.register_to_config(flex_rope=applied_flex_rope(transformer))
        if flex_rope is not None:
            try:
                flex_rope = FlexRoPEConfig(**flex_rope)
            except TypeError as error:
                raise ValueError(f"`flex_rope` is {flex_rope!r}; it has the fields of a FlexRoPEConfig.") from error
            self.enable_flex_rope(flex_rope)

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of all frames of the last call."""
        return self._num_timesteps

    @property
    def default_inference_steps(self) -> int:
        """Denoising steps of a frame where a call does not say."""
        return self.config.num_inference_steps or DEFAULT_INFERENCE_STEPS

    @property
    def default_guidance_scale(self) -> float:
        """Guidance where a call does not say; 1 is none."""
        return 1.0 if self.config.guidance_scale is None else self.config.guidance_scale

    @property
    def default_short_cache(self) -> str | int:
        """How the short window is cached where a call does not say, see [`CacheOptions`]."""
        return self.config.short_cache or "exact"

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
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_context: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        use_cache: bool = True,
        short_cache: str | int | None = None,
        max_long_frames: int | None = None,
        num_sink_frames: int = 0,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        callback_on_frame_end: Callable | None = None,
        sigmas: list[float] | None = None,
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
            num_inference_steps (`int`, *optional*): Denoising steps of each frame; by default the pipeline's own, else 50.
            guidance_scale (`float`, *optional*): The pipeline's own by default, else 1. Above 1: away from the null
                condition, `null + scale * (condition - null)`; the null half has null actions for the context too.
            num_videos_per_context (`int`, defaults to 1): Continuations of each context; they follow each other in the
                batch of the output.
            generator (`torch.Generator` or a list, one per video, *optional*): With a list each video is the same alone
                as in a batch.
            latents (`torch.Tensor` of shape `(B, num_frames, C, H, W)`, *optional*): Starting noise; else drawn frame
                after frame.
            use_cache (`bool`, defaults to `True`): `False` computes the whole context anew at every step.
            short_cache (`str` or `int`, *optional*), max_long_frames (`int`, *optional*), num_sink_frames (`int`): How
                the cache saves time and memory, see [`CacheOptions`]; the first is the pipeline's own by default, else
                `"exact"`.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"` (channels last), `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`): `False` returns a tuple.
            attention_kwargs (`dict`, *optional*): `scale` scales LoRA layers.
            callback_on_step_end (callable, *optional*): `(pipe, step, timestep, tensors) -> tensors`; `step` counts
                through all frames. What it sets `pipe._guidance_scale` to holds from the next step on; above 1 only where
                the call began so.
            callback_on_step_end_tensor_inputs (`list[str]`): Tensors that it is given: `"latents"`, the noisy frame.
            callback_on_frame_end (callable, *optional*): `(pipe, frame_index, tensors) -> tensors`, with the finished
                frame as `"latents"`; frames are counted from the first new one.
            sigmas (`list[float]`, *optional*): Noise levels of a frame's steps, falling from at most 1 to above 0, instead of
                `num_inference_steps`; for a scheduler that takes them, which applies its `shift` to them.

        Examples:

        Returns:
            [`FARPipelineOutput`], the new frames only.
        """
        request = GenerationRequest(
            video=video,
            video_latents=video_latents,
            actions=actions,
            class_labels=class_labels,
            num_frames=num_frames,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_videos_per_context=num_videos_per_context,
            generator=generator,
            latents=latents,
            use_cache=use_cache,
            short_cache=short_cache,
            max_long_frames=max_long_frames,
            num_sink_frames=num_sink_frames,
            output_type=output_type,
            attention_kwargs=attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            callback_on_frame_end=callback_on_frame_end,
            sigmas=sigmas,
        )
        request, inputs = self.check_inputs(request)
        generation, frames = self._begin(request, inputs), []
        with self.progress_bar(total=self.num_timesteps) as progress_bar:
            for frame_index in range(num_frames):
                try:
                    frames.append(self._make_frame(generation, frame_index, progress_bar))
                except GenerationInterrupted:
                    break
        # Decoded in the end: where models are offloaded, transformer and VAE then change places once.
        frames = join_frames([self.decode_frame(latents, output_type) for latents in frames], output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (frames,)
        return FARPipelineOutput(frames=frames)

    def stream(self, *, output_type: str = "pil", **arguments) -> Iterator[Frame]:
        """Like a call, with its arguments by name, but yields each frame of the batch as soon as it is decoded: a list of
        B images, `(B, h, w, 3)`, `(B, 3, h, w)` or latents `(B, C, H, W)`. Bit-equal to the call. Inputs are checked at
        once, not when the first frame is asked for."""
        request, inputs = self.check_inputs(GenerationRequest(output_type=output_type, **arguments))

        @torch.no_grad()
        def decoded_frames():
            try:
                generation = self._begin(request, inputs)
                with self.progress_bar(total=self.num_timesteps) as progress_bar:
                    for frame_index in range(inputs.num_frames):
                        yield self.decode_frame(self._make_frame(generation, frame_index, progress_bar), output_type)
            except GenerationInterrupted:
                return
            finally:
                self.maybe_free_model_hooks()

        return decoded_frames()

    def start_session(
        self,
        video: Any = None,
        video_latents: torch.Tensor | None = None,
        actions: Any = None,
        class_labels: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        short_cache: str | int | None = None,
        max_long_frames: int | None = None,
        num_sink_frames: int = 0,
        max_history: int | None = None,
        max_seconds_per_frame: float | None = None,
        min_inference_steps: int = 4,
        output_type: str = "pil",
        attention_kwargs: dict[str, Any] | None = None,
    ) -> FARSession:
        """Start a rollout that is made frame by frame, see [`FARSession`].

        Args:
            video, video_latents, class_labels, height, width: As in a call.
            actions (*optional*): Taken at the frames of the context but the last: `(B, F_context - 1)`.
            num_inference_steps, guidance_scale, short_cache, max_long_frames, num_sink_frames, attention_kwargs: As in a
                call; the first two can be changed between steps.
            generator (`torch.Generator` or a list, one per sample, *optional*): A new one with a random seed by default.
            max_history (`int`, *optional*): Frames kept for `frames` and `rewind`; all by default. At least the short
                window of a long model.
            max_seconds_per_frame (`float`, *optional*), min_inference_steps (`int`, defaults to 4): Lower the number of
                steps, but not below the minimum, so that frames come in time, see [`LatencyBudget`]; what is made then
                depends on the machine.
            output_type (`str`, defaults to `"pil"`): Of the frames that a step returns.
        """
        check_max_history(max_history, self.transformer)
        device = self._execution_device
        latency = LatencyBudget(max_seconds_per_frame, min_inference_steps, device=device)
        request = GenerationRequest(
            video=video,
            video_latents=video_latents,
            actions=actions,
            class_labels=class_labels,
            num_frames=1,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=new_generator(device) if generator is None else generator,
            short_cache=short_cache,
            max_long_frames=max_long_frames,
            num_sink_frames=num_sink_frames,
            output_type=output_type,
            attention_kwargs=attention_kwargs,
        )
        request, inputs = self.check_inputs(request, is_session=True)
        rollout, context = self._start_rollout(request, inputs)
        history = SessionHistory.of_context(context, self._for_videos(inputs.actions, inputs), max_history)
        noise = NoiseSource(request.generator)
        return FARSession(self, rollout, history=history, noise=noise, latency=latency, output_type=output_type)

    def check_inputs(self, request: GenerationRequest, **kind: bool) -> tuple[GenerationRequest, PipelineInputs]:
        """Fill a request in with the pipeline's defaults, and check it before any work is done.

        Args:
            request ([`GenerationRequest`]): As the user gave it.
            kind: See [`~pipelines.inputs.check_request`].
        """
        left_out = [name for name, component in self.components.items() if component is None]
        if left_out:
            raise ValueError(f"This pipeline was loaded without {', '.join(left_out)}; load it whole to make frames.")
        check_scheduler(self.scheduler, takes_sigmas=request.sigmas is not None)  # users replace it
        check_sigmas(request.sigmas, request.num_inference_steps)
        request = request.with_defaults(self)
        own_size = (self.config.height, self.config.width)
        return request, check_request(self.transformer, self.vae, own_size, request, **kind)

    def _for_videos(self, tensor: torch.Tensor | None, inputs: PipelineInputs) -> torch.Tensor | None:
        """A tensor of B contexts for all of their videos, where the transformer runs."""
        if tensor is None:
            return None
        return repeat_samples(tensor.to(self._execution_device), inputs.num_videos_per_context)

    @torch.no_grad()
    def _start_rollout(
        self, request: GenerationRequest, inputs: PipelineInputs
    ) -> tuple[Rollout, torch.Tensor | None]:
        """A rollout that was written no frame yet, and the latents of the context, `(B * num_videos_per_context, F, C, H,
        W)`."""
        if self.transformer.training:
            logger.warning("The transformer is in training mode and drops conditions; call `pipe.transformer.eval()`.")
        device = self._execution_device
        warn_of_slow_dtype(self.transformer.dtype, device.type)
        num_videos = inputs.batch_size * inputs.num_videos_per_context
        rollout = Rollout(
            self.transformer,
            self.scheduler,
            latent_shape=(num_videos, self.transformer.config.in_channels, inputs.latent_height, inputs.latent_width),
            max_frames=inputs.num_context_frames + inputs.num_frames,
            device=device,
            class_labels=self._for_videos(inputs.class_labels, inputs),
            config=request.settings,
        )
        return rollout, self._for_videos(self._encode_context(inputs, device), inputs)

    def _begin(self, request: GenerationRequest, inputs: PipelineInputs) -> Generation:
        """Encode the context; no frame is made yet."""
        rollout, context = self._start_rollout(request, inputs)
        self._interrupt = False
        self._guidance_scale = rollout.config.guidance_scale
        self._num_timesteps = inputs.num_frames * rollout.num_steps
        num_frames = inputs.num_context_frames + inputs.num_frames
        actions, action_mask = self._fed_actions(inputs, num_frames, rollout.device)
        return Generation(request, inputs, rollout, actions, action_mask, unwritten=context)

    def _fed_actions(
        self, inputs: PipelineInputs, num_frames: int, device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What each frame of context and new ones is fed, with the mask of the null actions."""
        config, actions = self.transformer.config, self._for_videos(inputs.actions, inputs)
        if not self.transformer.takes_actions:
            return None, None
        if actions is None:  # a first frame from nothing, to which no action led
            num_videos = inputs.batch_size * inputs.num_videos_per_context
            form = FrameBatch.form(self.transformer, num_videos, num_frames, inputs.latent_height, inputs.latent_width)
            return tuple(
                torch.zeros(form[name][0], dtype=form[name][1], device=device) for name in ("actions", "action_mask")
            )
        return shift_actions(actions, config.action_shift, num_frames)

    def _make_frame(self, generation: Generation, frame_index: int, progress_bar) -> torch.Tensor:
        """Latents of the next frame, `(B * num_videos_per_context, C, H, W)`.

        The clean frames that came last, the whole context or the frame before, become context; then the new one is made
        from noise.
        """
        request, rollout = generation.request, generation.rollout
        frame = generation.inputs.num_context_frames + frame_index
        if generation.unwritten is not None:
            rollout.write(generation.as_fed(generation.unwritten, rollout.num_frames))

        noise = generation.inputs.latents
        if noise is None:
            batch_size, *frame_shape = rollout.latent_shape
            noise = frame_noise((batch_size, 1, *frame_shape), request.generator, rollout.device)
        else:
            noise = noise[:, frame_index : frame_index + 1].to(rollout.device)

        def on_step_end(step_index, timestep, latents):
            step, names = frame_index * rollout.num_steps + step_index, request.callback_on_step_end_tensor_inputs
            latents = self._call_back(rollout, request.callback_on_step_end, names, latents, step, timestep)
            progress_bar.update()
            if self.interrupt:
                raise GenerationInterrupted
            return latents

        latents = rollout.denoise(generation.as_fed(noise, frame), on_step_end, request.generator)
        latents = self._call_back(rollout, request.callback_on_frame_end, ("latents",), latents, frame_index)
        generation.unwritten = latents.clone()  # a callback may use its memory again
        return generation.unwritten[:, 0]

    def _call_back(
        self, rollout: Rollout, callback, tensor_inputs: tuple[str, ...], latents: torch.Tensor, *position
    ) -> torch.Tensor:
        """Let the user see, and replace, the latents and the guidance of what comes next."""
        if callback is None:
            return latents
        self._guidance_scale = rollout.config.guidance_scale  # streams of one pipeline may take turns
        outputs = callback(self, *position, dict.fromkeys(tensor_inputs, latents))
        if self._guidance_scale != rollout.config.guidance_scale:
            rollout.set_guidance(self._guidance_scale)
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
    def decode_frame(self, latents: torch.Tensor, output_type: str) -> Frame:
        """One frame of every sample, `(B, C, H, W)`, as the user wants it."""
        if output_type == "latent":
            return latents.clone()  # what the user does with it is not done to the context
        batch_size = 1 if getattr(self.vae, "use_slicing", False) else len(latents)
        images = decode_video(self.vae, latents, batch_size, self._execution_device).float()
        if output_type == "pt":
            return images
        images = VaeImageProcessor.pt_to_numpy(images)
        return images if output_type == "np" else VaeImageProcessor.numpy_to_pil(images)
