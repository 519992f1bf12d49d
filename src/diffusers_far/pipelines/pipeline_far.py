"""FARPipeline: continue or generate a video, frame after frame.

N videos, F frames, C latent channels, H/W latent height/width, A action channels; h/w pixels.
"""

import functools
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, DiffusionPipeline, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput, logging

from ..checks import check_count, is_finite_number
from ..hooks import FlexRoPEConfig, apply_flex_rope, remove_flex_rope
from ..loaders.lora import FARLoraLoaderMixin
from ..models.codec import decode_video, encode_video, latent_statistics
from ..models.frames import FrameBatch, shift_actions
from ..models.internals import group_offloading, offloading_hooks
from ..models.transformer_far import FARTransformer3DModel
from ..models.transformer_scd import SCDTransformer3DModel
from .estimate import CostEstimate, estimate_frame, weight_bytes
from .hub import FARHubMixin, applied_flex_rope, check_components_complete
from .inputs import CALLBACK_TENSORS, PipelineInputs, check_request, check_sigmas, repeat_samples, size_without_video
from .latency import LatencyBudget
from .precision import MAX_STEP_DISTANCE, DtypeComparison, candidate_dtypes, compare_steps
from .rollout import Rollout, check_scheduler, frame_noise
from .session import FARSession, Frame
from .session_history import NoiseSource, SessionHistory, check_max_history, new_generator
from .settings import DEFAULT_INFERENCE_STEPS, GenerationRequest


logger = logging.get_logger(__name__)

ENCODED_FRAMES = 32  # frames that the VAE encodes at once; one at a time with `vae.enable_slicing()`

# What a transformer makes, with `frame_causal` and without, and the pipeline for it.
MADE_BY = {True: ("frame after frame", "FARPipeline"), False: ("whole clips", "VideoDiTPipeline")}

EXAMPLE_DOC_STRING = """
    Examples:
        >>> import torch
        >>> from diffusers_far import FARPipeline

        >>> pipe = FARPipeline.from_pretrained("checkpoints/far-maze")
        >>> frames = pipe(video=video, actions=actions, num_frames=16).frames[0]
"""


@dataclass
class FARPipelineOutput(BaseOutput):
    """Output of [`FARPipeline`].

    Args:
        frames (`list[list[PIL.Image.Image]]`, `np.ndarray` or `torch.Tensor`): The new frames only: a list of videos;
            `(B, F, height, width, 3)` in [0, 1]; `(B, F, 3, height, width)` in [0, 1]; or latents `(B, F, C, H, W)`.
    """

    frames: list[list[PIL.Image.Image]] | np.ndarray | torch.Tensor


class GenerationInterrupted(Exception):
    """Raised inside a call whose user set `pipe._interrupt`; the frames that are finished are returned."""


@dataclass
class Generation:
    """A call in the making.

    Args:
        inputs ([`PipelineInputs`]): What was asked for.
        rollout ([`Rollout`]): The frames that it was given so far.
        actions, action_mask (`torch.Tensor`, *optional*): What each frame of context and new ones is fed.
        unwritten (`torch.Tensor` of shape `(N, F, C, H, W)`, *optional*): Clean frames that the rollout was not given yet.
    """

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

    def noise(self, first: int, num_frames: int) -> torch.Tensor:
        """Noise of new frames, `(N, num_frames, C, H, W)`, as it was given, or drawn; `first` counts from the first new
        one."""
        request, (num_videos, *frame_shape) = self.inputs.request, self.inputs.latent_shape
        if request.latents is not None:
            return request.latents[:, first : first + num_frames].to(self.rollout.device)
        return frame_noise((num_videos, num_frames, *frame_shape), request.generator, self.rollout.device)


class VideoPipeline(FARHubMixin, DiffusionPipeline, FARLoraLoaderMixin):
    r"""
    What the pipelines that continue a video share: their components, what they are shipped with, the check of what is
    asked for, and the way from pixels to latents and back. [`FARPipeline`] is one, [`VideoDiTPipeline`] another.

    Args:
        arguments: As of a [`FARPipeline`].

    Attributes:
        is_frame_causal (`bool`): Whether its transformer makes frame after frame, or whole clips.
    """

    model_cpu_offload_seq = "transformer->vae"
    is_frame_causal = True
    _checked_scheduler = None  # the last one that was accepted, and what can be changed of it

    def __init__(
        self,
        transformer: FARTransformer3DModel | SCDTransformer3DModel,
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
        if vae is not None and transformer is not None:
            latent_statistics(vae, torch.empty(transformer.config.in_channels, 1, 1))
        if flex_rope is not None:
            try:
                flex_rope = FlexRoPEConfig(**flex_rope)
            except TypeError as error:
                raise ValueError(f"`flex_rope` is {flex_rope!r}; it has the fields of a FlexRoPEConfig.") from error
            apply_flex_rope(transformer, flex_rope)
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        if scheduler is not None:  # diffusers' way to load a part: `from_pretrained(..., transformer=None)`
            self._check_scheduler()
        if isinstance(action_names, dict):
            action_names = list(action_names.values())
        self.register_to_config(
            fps=fps,
            action_names=action_names,
            height=height,
            width=width,
            flex_rope=applied_flex_rope(transformer),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            short_cache=short_cache,
        )

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the last call, of all its frames."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        """Guidance of the step that is being taken; a callback changes it through `_guidance_scale`."""
        return self._guidance_scale

    @property
    def default_inference_steps(self) -> int:
        """Denoising steps of a frame, for calls that do not give them."""
        return self.config.num_inference_steps or DEFAULT_INFERENCE_STEPS

    @property
    def default_guidance_scale(self) -> float:
        """Guidance, for calls that do not give it; 1 is no guidance."""
        return 1.0 if self.config.guidance_scale is None else self.config.guidance_scale

    @property
    def default_short_cache(self) -> str | int:
        """How the short window is cached, for calls that do not give it; see [`CacheOptions`]."""
        return self.config.short_cache or "exact"

    def _check_scheduler(self) -> None:
        """Refuse a scheduler that does not follow the transformer's flow. Users replace it: each new one is tried once."""
        shift = self.scheduler.shift if hasattr(type(self.scheduler), "shift") else None  # `set_shift` changes it
        scheduler = (self.scheduler, dict(getattr(self.scheduler, "config", {})), shift)
        if self._checked_scheduler != scheduler:
            check_scheduler(self.scheduler)
            self._checked_scheduler = scheduler

    def check_inputs(self, request: GenerationRequest, *, is_session: bool = False) -> PipelineInputs:
        """Check a request before any work is done, and fill in what the pipeline is shipped with.

        Args:
            request ([`GenerationRequest`]): As the user gave it.
            is_session (`bool`): See [`~pipelines.inputs.check_request`].

        Raises:
            ValueError: Names the argument or the component, its value, the rule and the cure.
        """
        left_out = [name for name, component in self.components.items() if component is None]
        if left_out:
            raise ValueError(f"This pipeline was loaded without {', '.join(left_out)}; load it whole to make frames.")
        is_frame_causal = self.transformer.config.frame_causal
        if is_frame_causal != self.is_frame_causal:
            makes, its_pipeline = MADE_BY[is_frame_causal]
            raise ValueError(
                f"The transformer has `frame_causal={is_frame_causal}` and makes {makes}; load it as a `{its_pipeline}`."
            )
        self._check_scheduler()
        if request.sigmas is not None:
            check_sigmas(self.scheduler, request.sigmas, request.num_inference_steps)
        own_size = (self.config.height, self.config.width)
        return check_request(
            self.transformer, self.vae, own_size, request, request.settings(self), is_session=is_session
        )

    def _start_rollout(self, inputs: PipelineInputs, rollout_class: type[Rollout] = Rollout, **options) -> Rollout:
        """A rollout that was given no frame yet; `options` are those of another class."""
        device, dtype = self._execution_device, self.transformer.dtype
        if self.transformer.training:
            logger.warning("The transformer is in training mode and drops conditions; call `pipe.transformer.eval()`.")
        if device.type == "cpu" and dtype in HALF_PRECISION_UNITS:
            warn_of_slow_dtype(dtype)
        return rollout_class(
            self.transformer,
            self.scheduler,
            latent_shape=inputs.latent_shape,
            max_frames=inputs.num_frames,
            device=device,
            class_labels=inputs.class_labels,
            config=inputs.settings,
            **options,
        )

    def _begin(self, inputs: PipelineInputs, rollout_class: type[Rollout] = Rollout, **options) -> Generation:
        """Encode the context; no frame is made yet."""
        rollout = self._start_rollout(inputs, rollout_class, **options)
        actions, action_mask = inputs.actions, None
        if actions is not None:
            action_shift = self.transformer.config.action_shift
            actions, action_mask = shift_actions(actions.to(rollout.device), action_shift, inputs.num_frames)
        self._interrupt = False
        self._guidance_scale = inputs.settings.guidance_scale
        self._num_timesteps = rollout.num_steps * (inputs.request.num_frames if self.is_frame_causal else 1)
        return Generation(inputs, rollout, actions, action_mask, unwritten=self._encode_context(inputs))

    @torch.no_grad()
    def _encode_context(self, inputs: PipelineInputs) -> torch.Tensor | None:
        """Latents of the context of each video, `(N, F, C, H, W)`, float32."""
        latents, video, device = inputs.request.video_latents, inputs.video, self._execution_device
        if video is not None:
            batch_size = 1 if getattr(self.vae, "use_slicing", False) else ENCODED_FRAMES
            latents = encode_video(self.vae, video.flatten(0, 1), batch_size, device).unflatten(0, video.shape[:2])
        if latents is None:
            return None
        return repeat_samples(latents.to(device).float(), inputs.request.num_videos_per_context)

    @torch.no_grad()
    def decode_frame(self, latents: torch.Tensor, output_type: str) -> Frame:
        """One frame of every video, latents `(N, C, H, W)` on the device that the models run on, as the user wants it.

        Args:
            output_type (`str`): `"pil"`, `"np"`, `"pt"` or `"latent"`.

        Returns:
            A list of N images, `(N, h, w, 3)` in [0, 1], `(N, 3, h, w)` in [0, 1], or a copy of the latents.
        """
        if output_type == "latent":
            return latents.clone()  # what the user does with it is not done to the context
        batch_size = 1 if getattr(self.vae, "use_slicing", False) else len(latents)
        images = decode_video(self.vae, latents, batch_size, latents.device).float()
        if output_type == "pt":
            return images
        images = VaeImageProcessor.pt_to_numpy(images)
        return images if output_type == "np" else VaeImageProcessor.numpy_to_pil(images)

    def _output(self, latents: list[torch.Tensor], output_type: str, return_dict: bool) -> FARPipelineOutput | tuple:
        """Finished frames, each `(N, C, H, W)`, decoded and joined to videos."""
        frames = [self.decode_frame(each, output_type) for each in latents]
        self.maybe_free_model_hooks()
        if frames and output_type == "pil":
            frames = [list(video) for video in zip(*frames)]
        elif frames:  # none where the call was interrupted before the first was finished
            frames = np.stack(frames, axis=1) if output_type == "np" else torch.stack(frames, dim=1)
        return FARPipelineOutput(frames=frames) if return_dict else (frames,)


class FARPipeline(VideoPipeline):
    r"""
    Frame-autoregressive video generation: continues a video, under actions, a class or nothing, or starts from nothing.

    Args:
        transformer ([`FARTransformer3DModel`] or [`SCDTransformer3DModel`]): The denoiser.
        vae (`AutoencoderDC`, `AutoencoderKL` or `AutoencoderTiny`): Encodes and decodes single frames.
        scheduler: A flow-matching scheduler, such as `FlowMatchEulerDiscreteScheduler`; others are refused.
        fps (`float`, *optional*): Frames per second of the videos that the model knows.
        action_names (`list[str]`, *optional*): Names of the discrete actions, by index; a saved pipeline has them as a
            `dict`.
        height (`int`, *optional*), width (`int`, *optional*): The model's own size in pixels.
        flex_rope (`dict`, *optional*): Fields of a [`FlexRoPEConfig`] to apply; written by `enable_flex_rope`.
        num_inference_steps (`int`, *optional*), guidance_scale (`float`, *optional*), short_cache (`str` or `int`,
            *optional*): Defaults of a call. A pipeline without them takes 50 steps, a guidance of 1 (no guidance) and `"exact"`.
    """

    _callback_tensor_inputs = CALLBACK_TENSORS

    @property
    def interrupt(self) -> bool:
        """Whether the call is to end with the frames that are finished; a callback sets `_interrupt`."""
        return self._interrupt

    def enable_flex_rope(self, config: FlexRoPEConfig | None = None) -> None:
        """Let attention decay with time at inference, see [`FlexRoPEConfig`]. Kept when the pipeline is saved, unless
        the schedule is a function."""
        apply_flex_rope(self.transformer, config)
        self.register_to_config(flex_rope=applied_flex_rope(self.transformer))

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
        guidance_mode: str = "condition",
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
            guidance_mode (`str`, defaults to `"condition"`): `"feature"`, for a separable model: guidance leads away from
                what the frame would be with noise on its feature, under the same conditions. The context is then encoded
                once, and a model without conditions is guided too.

        Examples:

        Returns:
            [`FARPipelineOutput`], the new frames only.
        """
        inputs = self.check_inputs(GenerationRequest.among(locals()))
        generation, frames = self._begin(inputs), []
        with self.progress_bar(total=self.num_timesteps) as progress_bar:
            for frame_index in range(num_frames):
                try:
                    frames.append(self._make_frame(generation, frame_index, progress_bar))
                except GenerationInterrupted:
                    break
        # Decoded in the end: where models are offloaded, transformer and VAE then change places once.
        return self._output(frames, output_type, return_dict)

    def stream(self, *, output_type: str = "pil", **arguments) -> Iterator[Frame]:
        """Like a call, with its arguments by name, but yields each frame of the batch as soon as it is decoded: a list of
        B images, `(B, h, w, 3)`, `(B, 3, h, w)` or latents `(B, C, H, W)`. Bit-equal to the call. Inputs are checked at
        once, not when the first frame is asked for."""
        inputs = self.check_inputs(GenerationRequest(output_type=output_type, **arguments))

        @torch.no_grad()
        def decoded_frames():
            try:
                generation = self._begin(inputs)
                with self.progress_bar(total=self.num_timesteps) as progress_bar:
                    for frame_index in range(inputs.request.num_frames):
                        latents = self._make_frame(generation, frame_index, progress_bar)
                        yield self.decode_frame(latents, output_type)
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
        guidance_mode: str = "condition",
    ) -> FARSession:
        """Start a rollout that is made frame by frame, see [`FARSession`].

        Args:
            video, video_latents, class_labels, height, width: As in a call.
            actions (*optional*): Taken at the frames of the context but the last: `(B, F_context - 1)`.
            num_inference_steps, guidance_scale, short_cache, max_long_frames, num_sink_frames, attention_kwargs,
                guidance_mode: As in a call; the first two can be changed between steps.
            generator (`torch.Generator` or a list, one per sample, *optional*): A new one with a random seed by default.
            max_history (`int`, *optional*): Frames kept for `frames` and `rewind`; all by default. At least the short
                window of a long model.
            max_seconds_per_frame (`float`, *optional*), min_inference_steps (`int`, defaults to 4): Lower the number of
                steps, but not below the minimum, so that frames come in time, see [`LatencyBudget`]; what is made then
                depends on the machine.
            output_type (`str`, defaults to `"pil"`): Of the frames that a step returns.
        """
        generator = new_generator(self._execution_device) if generator is None else generator
        request = GenerationRequest.among({**locals(), "num_frames": 1})
        check_max_history(max_history, self.transformer)
        latency = LatencyBudget(max_seconds_per_frame, min_inference_steps, device=self._execution_device)
        inputs = self.check_inputs(request, is_session=True)
        rollout = self._start_rollout(inputs)
        actions = None if inputs.actions is None else inputs.actions.to(rollout.device)
        return FARSession(
            self.decode_frame,
            rollout,
            history=SessionHistory.of_context(self._encode_context(inputs), actions, max_history),
            noise=NoiseSource(generator),
            latency=latency,
            output_type=output_type,
        )

    def estimate(
        self,
        num_frames: int = 16,
        num_context_frames: int = 0,
        batch_size: int = 1,
        *,
        measure: bool = True,
        **arguments,
    ) -> CostEstimate:
        """What a call would cost: bytes of weights and cache, which are counted, and seconds of its last new frame on this
        machine, which are measured: a few steps on blank frames, with as many before them.

        The context is not encoded, and what VAE and transformer need while they compute is not counted. The first frame of a
        video, before which there is nothing to write, is measured as the one after it.

        Args:
            num_frames (`int`, defaults to 16): New frames.
            num_context_frames (`int`, defaults to 0): Frames before them.
            batch_size (`int`, defaults to 1): Videos.
            measure (`bool`, defaults to `True`): `False` only counts. That takes hardly any time and memory: more than fits can
                be asked for.
            arguments: Of the call, but for contents: `height`, `width`, `num_inference_steps`, `guidance_scale`, `use_cache`,
                `short_cache`, `max_long_frames`, `num_sink_frames`, `output_type`, `attention_kwargs`, `sigmas`,
                `guidance_mode`.

        Raises:
            ValueError: As in a call.
        """
        check_count("num_frames", num_frames)
        inputs = self._blank_inputs(num_context_frames, batch_size, arguments)
        writes = [num_context_frames] if num_context_frames else []
        writes += [1] * (num_frames - 1)
        decode = functools.partial(self.decode_frame, output_type=inputs.request.output_type) if measure else None
        cost = estimate_frame(self._start_rollout(inputs), writes, decode, num_context_frames + num_frames)
        self.maybe_free_model_hooks()
        return replace(cost, weight_bytes=weight_bytes(self.transformer) + weight_bytes(self.vae))

    def to_fastest(
        self,
        num_context_frames: int | None = None,
        *,
        dtypes: Sequence[torch.dtype] | None = None,
        max_distance: float = MAX_STEP_DISTANCE,
        **arguments,
    ) -> DtypeComparison:
        """Move the transformer to the dtype in which this machine denoises fastest, as a short measurement finds: float32, or
        one that is at least 5 % faster and near it. The VAE is not measured and stays as it is.

        A few steps of one frame after a context of noise run in each dtype in turn; other dtypes than the transformer's take
        memory for a copy of it. On a CPU the result also says what a single thread would bring; `torch.set_num_threads` is the
        whole process's and is left to you.

        Args:
            num_context_frames (`int`, *optional*): In the cache; a full short window if left out.
            dtypes (sequence of `torch.dtype`, *optional*): To try beside float32; by default bfloat16, on CUDA float16 too.
            max_distance (`float`, defaults to 0.02): How far the velocity may be from float32's, in its norms; a dtype that is
                farther away is not taken, however fast.
            arguments: Of the calls to come, as in [`estimate`].

        Raises:
            ValueError: An argument is impossible, or no copy of the transformer can be measured: it is compiled, offloaded or
                int8.
        """
        inputs = self._blank_inputs(num_context_frames or 0, 1, arguments)
        model, device = self.transformer, self._execution_device
        is_fixed = model.is_int8 or model.denoising_network.has_compiled_blocks
        if is_fixed or offloading_hooks(model) or group_offloading(model):
            raise ValueError(
                "`to_fastest` measures copies of the transformer, and this one is compiled, offloaded or int8; call it before."
            )
        if num_context_frames is None:
            num_context_frames = model.config.short_window - 1
        dtypes = candidate_dtypes(device) if dtypes is None else dtypes
        for dtype in dtypes:
            if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
                raise ValueError(f"`dtypes` has {dtype!r}; give dtypes of floats, such as torch.bfloat16.")
        if not (is_finite_number(max_distance) and max_distance >= 0):
            raise ValueError(f"`max_distance` is {max_distance!r}; give a relative distance of at least 0.")
        comparison = compare_steps(self._start_rollout(inputs), num_context_frames, dtypes, max_distance)
        logger.info(f"Of a denoising step after {num_context_frames} frames: {comparison}")
        model.to(comparison.chosen)
        return comparison

    def _blank_inputs(self, num_context_frames: int, batch_size: int, arguments: dict[str, Any]) -> PipelineInputs:
        """What a call for one frame after so many would be told, but for contents."""
        check_count("num_context_frames", num_context_frames, least=0)
        check_count("batch_size", batch_size)
        without = dict.fromkeys(["video", "video_latents", "actions", "class_labels", "latents"])
        request = GenerationRequest(num_frames=1, num_videos_per_context=batch_size, **without, **arguments)
        if self.transformer is None:
            self.check_inputs(request)  # refuses it
        has_context = num_context_frames > 0
        if has_context:
            size = size_without_video(request, (self.config.height, self.config.width))
            request = replace(request, video=torch.zeros(1, 1, 3, *size))  # one frame stands for all
        conditions = FrameBatch.blank(self.transformer, 1, has_context + 1, 1, 1, device="cpu")
        label = 0 if self.transformer.takes_labels else None
        return self.check_inputs(replace(request, actions=conditions.actions, class_labels=label))

    def _make_frame(self, generation: Generation, frame_index: int, progress_bar) -> torch.Tensor:
        """Latents of the next frame, `(N, C, H, W)`.

        The clean frames that came last, the whole context or the frame before, become context; then the new one is made
        from noise.
        """
        request, rollout = generation.inputs.request, generation.rollout
        num_context = generation.inputs.num_context_frames
        new = generation.as_fed(generation.noise(frame_index, 1), num_context + frame_index)
        if generation.unwritten is not None:
            rollout.write(generation.as_fed(generation.unwritten, rollout.num_frames), new)

        def on_step_end(step_index, timestep, latents):
            if request.callback_on_step_end is not None:
                step, names = frame_index * rollout.num_steps + step_index, request.callback_on_step_end_tensor_inputs
                latents = self._call_back(rollout, request.callback_on_step_end, names, latents, step, timestep)
            progress_bar.update()
            if self.interrupt:
                raise GenerationInterrupted
            return latents

        latents = rollout.denoise(new, on_step_end, request.generator)
        if request.callback_on_frame_end is not None:
            latents = self._call_back(rollout, request.callback_on_frame_end, CALLBACK_TENSORS, latents, frame_index)
        generation.unwritten = latents.clone()  # a callback may use its memory again
        return generation.unwritten[:, 0]

    def _call_back(
        self, rollout: Rollout, callback: Callable, tensor_inputs: list[str], latents: torch.Tensor, *position
    ) -> torch.Tensor:
        """Let the user see, and replace, the latents and the guidance of what comes next."""
        self._guidance_scale = rollout.config.guidance_scale  # streams of one pipeline may take turns
        outputs = callback(self, *position, dict.fromkeys(tensor_inputs, latents))
        if self._guidance_scale != rollout.config.guidance_scale:
            rollout.set_guidance(self._guidance_scale)
        return (outputs or {}).get("latents", latents)


# What a CPU calls the units that multiply in a half precision.
HALF_PRECISION_UNITS = {torch.bfloat16: "avx512_bf16", torch.float16: "amx_fp16"}


def has_half_precision_units(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies in a half precision; one that is not x86 gets the benefit of the doubt."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.cpu.get_capabilities().get(HALF_PRECISION_UNITS[dtype], True)


@functools.cache
def warn_of_slow_dtype(dtype: torch.dtype) -> None:
    """Say once that half precision saves memory but no time on this CPU. `dtype` is the transformer's."""
    if not has_half_precision_units(dtype):
        logger.warning(
            f"The transformer is in {dtype}, for which this CPU has no units: it is several times as slow as float32, "
            "which `pipe.to(torch.float32)` brings back. For speed, see `pipe.transformer.quantize_int8`."
        )
