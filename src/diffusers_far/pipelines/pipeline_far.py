"""FARPipeline: continue or generate a video, frame after frame.

B batch, F frames, C latent channels, H/W latent height/width, A action channels; h/w pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, DiffusionPipeline, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging

from ..hooks import FlexRoPEConfig, apply_flex_rope, remove_flex_rope
from ..loaders.lora import FARLoraLoaderMixin
from ..models.codec import decode_video, encode_video, latent_statistics
from ..models.kv_cache import CacheOptions
from ..models.transformer_far import FARTransformer3DModel
from .generation import Callbacks, Generation, GenerationInterrupted
from .hub import FARHubMixin, applied_flex_rope, check_components_complete
from .inputs import CALLBACK_TENSORS, PipelineInputs, check_call, repeat_samples
from .latency import LatencyBudget
from .pipeline_output import FARPipelineOutput, Frame, join_frames
from .precision import warn_of_slow_dtype
from .rollout import Rollout, RolloutConfig, check_scheduler
from .session import FARSession
from .session_history import NoiseSource, SessionHistory, check_max_history, new_generator, smallest_history


logger = logging.get_logger(__name__)

DEFAULT_INFERENCE_STEPS = 50

ENCODED_FRAMES = 32  # frames that the VAE encodes at once; one at a time with `vae.enable_slicing()`

EXAMPLE_DOC_STRING = """
    Examples:
        >>> import torch
        >>> from diffusers_far import FARPipeline

        >>> pipe = FARPipeline.from_pretrained("checkpoints/far-maze")
        >>> frames = pipe(video=video, actions=actions, num_frames=16).frames[0]
"""


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
            *optional*): Of a call that does not say; 50, 1, which is no guidance, and `"exact"`, where these do not say
            either.
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

        Examples:

        Returns:
            [`FARPipelineOutput`], the new frames only.
        """
        generation = self._prepare(
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
        )
        finished = list(self._generate(generation))
        frames = join_frames([self.decode_frame(frame, output_type) for frame in finished], output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (frames,)
        return FARPipelineOutput(frames=frames)

    def stream(self, *, output_type: str = "pil", **arguments) -> Iterator[Frame]:
        """Like a call, with its arguments by name, but yields each frame of the batch as soon as it is decoded: a list of
        B images, `(B, h, w, 3)`, `(B, 3, h, w)` or latents `(B, C, H, W)`. Bit-equal to the call. Inputs are checked at
        once, not when the first frame is asked for."""
        generation = self._prepare(output_type=output_type, **arguments)

        def decoded_frames():
            try:
                for frame in self._generate(generation):
                    yield self.decode_frame(frame, output_type)
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
        generation = self._prepare(
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
            is_session=True,
        )
        return self._start(
            generation, generation.inputs.actions, max_history, latency=latency, output_type=output_type
        )

    def _prepare(
        self,
        *,
        use_cache: bool = True,
        short_cache: str | int | None = None,
        max_long_frames: int | None = None,
        num_sink_frames: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = CALLBACK_TENSORS,
        callback_on_frame_end: Callable | None = None,
        **arguments,
    ) -> Generation:
        """Check the arguments of a call, by name."""
        if num_inference_steps is None:
            num_inference_steps = self.default_inference_steps
        if guidance_scale is None:
            guidance_scale = self.default_guidance_scale
        if short_cache is None:
            short_cache = self.default_short_cache if use_cache else "exact"
        cache_options = CacheOptions(short_cache, max_long_frames, num_sink_frames)
        inputs = self.check_inputs(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator,
            use_cache=use_cache,
            cache_options=cache_options,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            **arguments,
        )
        config = RolloutConfig(num_inference_steps, guidance_scale, use_cache, cache_options, attention_kwargs)
        callbacks = Callbacks(callback_on_step_end, tuple(callback_on_step_end_tensor_inputs), callback_on_frame_end)
        return Generation(inputs, config, generator, callbacks)

    def check_inputs(
        self,
        video: Any = None,
        video_latents: torch.Tensor | None = None,
        actions: Any = None,
        class_labels: Any = None,
        num_frames: int = 16,
        height: int | None = None,
        width: int | None = None,
        num_videos_per_context: int = 1,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        **arguments,
    ) -> PipelineInputs:
        """Check all arguments of a call before any work is done; see [`~pipelines.inputs.check_call`]."""
        left_out = [name for name, component in self.components.items() if component is None]
        if left_out:
            raise ValueError(f"This pipeline was loaded without {', '.join(left_out)}; load it whole to make frames.")
        check_scheduler(self.scheduler)  # which users replace
        return check_call(
            self.transformer,
            self.vae,
            (self.config.height, self.config.width),
            video=video,
            video_latents=video_latents,
            actions=actions,
            class_labels=class_labels,
            num_frames=num_frames,
            height=height,
            width=width,
            num_videos_per_context=num_videos_per_context,
            latents=latents,
            output_type=output_type,
            **arguments,
        )

    @torch.no_grad()
    def _start(
        self,
        generation: Generation,
        known_actions: torch.Tensor | None,
        max_history: int | None,
        **arguments,
    ) -> FARSession:
        """A session that has seen the context but made no frame yet; `arguments` are its own."""
        if self.transformer.training:
            logger.warning("The transformer is in training mode and drops conditions; call `pipe.transformer.eval()`.")
        inputs, device = generation.inputs, self._execution_device
        warn_of_slow_dtype(self.transformer.dtype, device.type)
        repeats = inputs.num_videos_per_context

        def on_device(tensor):
            return None if tensor is None else repeat_samples(tensor.to(device), repeats)

        rollout = Rollout(
            self.transformer,
            self.scheduler,
            latent_shape=(
                inputs.batch_size * repeats,
                self.transformer.config.in_channels,
                inputs.latent_height,
                inputs.latent_width,
            ),
            max_frames=inputs.num_context_frames + inputs.num_frames,
            device=device,
            class_labels=on_device(inputs.class_labels),
            config=generation.config,
        )
        context = on_device(self._encode_context(inputs, device))
        history = SessionHistory.of_context(context, on_device(known_actions), max_history)
        return FARSession(self, rollout, history=history, noise=NoiseSource(generation.generator), **arguments)

    @torch.no_grad()
    def _generate(self, generation: Generation) -> Iterator[torch.Tensor]:
        """Latents of each new frame, `(B * num_videos_per_context, C, H, W)`, as soon as it is finished."""
        inputs, callbacks = generation.inputs, generation.callbacks
        num_context = inputs.num_context_frames
        known_actions = None if inputs.actions is None else inputs.actions[:, : max(num_context - 1, 0)]
        session = self._start(generation, known_actions, max_history=smallest_history(self.transformer))
        num_steps = session.rollout.num_steps
        self._interrupt = False
        self._guidance_scale = generation.config.guidance_scale
        self._num_timesteps = inputs.num_frames * num_steps

        def action_at(frame: int) -> torch.Tensor | None:
            if inputs.actions is None or not 0 <= frame < inputs.actions.shape[1]:
                return None
            return repeat_samples(inputs.actions[:, frame], inputs.num_videos_per_context).to(session.rollout.device)

        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for frame_index in range(inputs.num_frames):

                def on_step_end(step_index, timestep, latents):
                    step = frame_index * num_steps + step_index
                    latents = self._call_back(
                        session, callbacks.on_step_end, callbacks.tensor_inputs, latents, step, timestep
                    )
                    progress_bar.update()
                    if self.interrupt:
                        raise GenerationInterrupted
                    return latents

                def on_frame_end(latents):
                    return self._call_back(session, callbacks.on_frame_end, ("latents",), latents, frame_index)

                noise = None
                if inputs.latents is not None:
                    noise = inputs.latents[:, frame_index : frame_index + 1].to(session.rollout.device)
                frame = num_context + frame_index
                try:
                    yield session.advance(
                        action_at(frame - 1),
                        own_action=action_at(frame),
                        noise=noise,
                        on_step_end=on_step_end,
                        on_frame_end=on_frame_end,
                    )
                except GenerationInterrupted:
                    return

    def _call_back(
        self, session: FARSession, callback, tensor_inputs: tuple[str, ...], latents: torch.Tensor, *position
    ) -> torch.Tensor:
        """Let the user see, and replace, the latents and the guidance of what comes next."""
        if callback is None:
            return latents
        self._guidance_scale = session.config.guidance_scale  # streams of one pipeline may take turns
        outputs = callback(self, *position, dict.fromkeys(tensor_inputs, latents))
        if self._guidance_scale != session.config.guidance_scale:
            session.rollout.set_guidance(self._guidance_scale)
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
