"""VideoDiTPipeline: continue or generate a whole clip at once, with a transformer whose frames all see each other.

B batch, F frames, C latent channels, H/W latent height/width; h/w pixels.
"""

import os
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, SchedulerMixin
from diffusers.utils import logging

from ..models.frames import FrameBatch, shift_actions
from ..models.transformer_far import CLEAN_TIMESTEP, FARTransformer3DModel
from ..pipelines.inputs import PipelineInputs, frame_noise
from ..pipelines.pipeline_far import FARPipeline
from ..pipelines.pipeline_output import FARPipelineOutput, join_frames
from ..pipelines.rollout import Rollout
from ..pipelines.settings import GenerationRequest


logger = logging.get_logger(__name__)

CONTEXT_MODES = ("noised", "clean")


class ClipRollout(Rollout):
    """All new frames at once, denoised together beside a context that is the same at every step.

    Args:
        context_mode (`str`): How the model is shown the context. `"noised"`: brought to the noise level of the new frames
            at every step, with noise that stays the same; what a model was trained on whose clips have one noise level
            throughout. `"clean"`: as it is, at timestep -1; what `--clean_prefix_ratio` trains. Either way the context
            is taken anew from the given frames at every step, so that nothing changes it.
        context_noise (`torch.Tensor` of shape `(B, F_context, C, H, W)`, *optional*): For `"noised"`.
        arguments: As of a [`Rollout`].
    """

    def __init__(self, *arguments, context_mode: str, context_noise: torch.Tensor | None = None, **options):
        super().__init__(*arguments, **options)
        self.context_mode = context_mode
        self.context_noise = context_noise

    def _velocity(self, noisy: FrameBatch, timestep: torch.Tensor, modulation: None = None) -> torch.Tensor:
        """Velocity of the noisy frames at a step, `(B, F, C, H, W)`."""
        if self.frames is None:
            return self._predict(noisy, timestep, class_labels=self._model_labels())
        context = self._context_at(timestep)
        batch_size, num_context = context.latents.shape[:2]
        timesteps = torch.full((batch_size, num_context + noisy.num_frames), float(timestep), device=self.device)
        if self.context_mode == "clean":
            timesteps[:, :num_context] = CLEAN_TIMESTEP
        return self._predict(context.append(noisy), timesteps, class_labels=self._model_labels())[:, num_context:]

    def _context_at(self, timestep: torch.Tensor) -> FrameBatch:
        """The context as the model is shown it where the new frames are at `timestep`."""
        if self.context_mode == "clean":
            return self.frames
        # As in training, t is the share of the noise: x_t = (1 - t) x_0 + t x_1.
        time = float(timestep) / self.scheduler.config.num_train_timesteps
        noise = torch.cat([self.context_noise] * 2) if self.is_guided else self.context_noise
        latents = (1 - time) * self.frames.latents.float() + time * noise
        return FrameBatch(latents.to(self.frames.latents.dtype), self.frames.actions, self.frames.action_mask)


class VideoDiTPipeline(FARPipeline):
    r"""
    A video diffusion transformer, the baseline of FAR: the same network with `frame_causal=False`, trained with
    `train_far.py --objective video_dit`. It makes all new frames at once and knows no cache, no stream and no session.

    It loads the folder of such a training, and takes a [`FARPipeline`]'s place where models are evaluated.

    Args:
        context_mode (`str`, defaults to `"noised"`): How context is given, see [`ClipRollout`]: `"noised"` to a model that
            was trained as `--objective video_dit` does by itself, `"clean"` to one trained with `--clean_prefix_ratio`.
        arguments: As of a [`FARPipeline`].
    """

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
        short_cache: str | None = None,
        context_mode: str = "noised",
    ):
        if context_mode not in CONTEXT_MODES:
            raise ValueError(f"`context_mode` is {context_mode!r}; choose one of {', '.join(CONTEXT_MODES)}.")
        super().__init__(
            transformer,
            vae,
            scheduler,
            fps,
            action_names,
            height,
            width,
            flex_rope,
            num_inference_steps,
            guidance_scale,
            short_cache,
        )
        self.register_to_config(context_mode=context_mode)

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
        short_cache: str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> FARPipelineOutput | tuple:
        r"""
        Generate `num_frames` new frames at once.

        Args:
            video, video_latents, actions, class_labels, num_frames, height, width, num_inference_steps, guidance_scale,
                num_videos_per_context, output_type, return_dict, attention_kwargs: As of a [`FARPipeline`]'s call. The
                steps are those of all frames together.
            generator (`torch.Generator` or a list, one per video, *optional*): Draws the noise of the new frames, then
                that of the context where it is noised. With a list each video is the same alone as in a batch.
            latents (`torch.Tensor` of shape `(B, num_frames, C, H, W)`, *optional*): Starting noise of the new frames.
            short_cache (`str`, *optional*): There is no cache: only `"exact"`, the default, is accepted.

        Returns:
            [`FARPipelineOutput`], the new frames only.

        Raises:
            ValueError: An argument has the wrong shape, type or values, or the transformer is frame-causal.
        """
        # 1. Check the inputs
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
            use_cache=False,
            short_cache=short_cache or self.default_short_cache,
            output_type=output_type,
            attention_kwargs=attention_kwargs,
            callback_on_step_end_tensor_inputs=(),
        )
        request, inputs = self.check_inputs(request, is_whole_clip=True)
        self._warn_of_long_clips(inputs.num_context_frames + inputs.num_frames)

        # 2. Show the context, and denoise all new frames beside it
        context, new = self._frame_batches(inputs, generator)
        rollout = ClipRollout(
            self.transformer,
            self.scheduler,
            latent_shape=(new.latents.shape[0], *new.latents.shape[2:]),
            max_frames=inputs.num_context_frames + inputs.num_frames,
            device=self._execution_device,
            class_labels=self._for_videos(inputs.class_labels, inputs),
            config=request.settings,
            context_mode=self.config.context_mode,
            context_noise=self._context_noise(context, generator),
        )
        if context is not None:
            rollout.write(context)
        with self.progress_bar(total=rollout.num_steps) as progress_bar:
            made = rollout.denoise(new, partial(count_step, progress_bar), generator)

        # 3. The new frames
        frames = join_frames([self.decode_frame(frame, output_type) for frame in made.unbind(1)], output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (frames,)
        return FARPipelineOutput(frames=frames)

    def _warn_of_long_clips(self, num_frames: int) -> None:
        trained_frames = self.transformer.config.trained_frames
        if trained_frames is not None and num_frames > trained_frames:
            logger.warning(
                f"The clip has {num_frames} frames, context included, but the transformer was trained on "
                f"{trained_frames}; shorten the context or make fewer frames."
            )

    def _frame_batches(
        self, inputs: PipelineInputs, generator: torch.Generator | list[torch.Generator] | None
    ) -> tuple[FrameBatch | None, FrameBatch]:
        """The context, if any, and the noise that the new frames start from, with the actions that they are fed."""
        device, num_context = self._execution_device, inputs.num_context_frames
        context = self._for_videos(self._encode_context(inputs, device), inputs)
        noise = None if inputs.latents is None else inputs.latents.to(device).float()
        if noise is None:
            shape = (self.transformer.config.in_channels, inputs.latent_height, inputs.latent_width)
            num_videos = inputs.batch_size * inputs.num_videos_per_context
            noise = frame_noise((num_videos, inputs.num_frames, *shape), generator, device)
        if inputs.actions is None:
            return None if context is None else FrameBatch(context), FrameBatch(noise)
        num_frames = num_context + inputs.num_frames
        actions, mask = shift_actions(
            self._for_videos(inputs.actions, inputs), self.transformer.config.action_shift, num_frames
        )
        new = FrameBatch(noise, actions[:, num_context:], mask[:, num_context:])
        if context is None:
            return None, new
        return FrameBatch(context, actions[:, :num_context], mask[:, :num_context]), new

    def _context_noise(
        self, context: FrameBatch | None, generator: torch.Generator | list[torch.Generator] | None
    ) -> torch.Tensor | None:
        if context is None or self.config.context_mode == "clean":
            return None
        return frame_noise(tuple(context.latents.shape), generator, self._execution_device)


def count_step(progress_bar, step_index: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Show a finished step; the latents stay as they are."""
    progress_bar.update()
    return latents


def load_pipeline(pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> FARPipeline:
    """The pipeline that a folder or repo needs: [`VideoDiTPipeline`] where all frames see each other, else
    [`FARPipeline`].

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`): Pipeline folder or Hub id.
        kwargs: Of the pipeline's `from_pretrained`.
    """
    config = FARTransformer3DModel.load_config(pretrained_model_name_or_path, subfolder="transformer")
    pipeline_class = FARPipeline if config.get("frame_causal", True) else VideoDiTPipeline
    return pipeline_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
