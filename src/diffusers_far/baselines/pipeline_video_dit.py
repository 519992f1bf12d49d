"""VideoDiTPipeline: continue or generate a whole clip at once, with a transformer whose frames all see each other.

B batch, F frames, C latent channels, H/W latent height/width; h/w pixels.
"""

import os
from functools import partial

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, SchedulerMixin
from diffusers.utils import logging

from ..checks import check_choice
from ..models.frames import CLEAN_TIMESTEP, FrameBatch
from ..models.transformer_far import FARTransformer3DModel
from ..pipelines.pipeline_far import FARPipeline, FARPipelineOutput, VideoPipeline
from ..pipelines.rollout import Rollout, frame_noise
from ..pipelines.settings import GenerationRequest


logger = logging.get_logger(__name__)

CONTEXT_MODES = ("noised", "clean")
FRAME_BY_FRAME = (  # arguments of a call that mean nothing to a whole clip
    "use_cache",
    "max_long_frames",
    "num_sink_frames",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
    "callback_on_frame_end",
)


class ClipRollout(Rollout):
    """All new frames at once, denoised together beside a context that is the same at every step.

    Args:
        context_mode (`str`): How the model is shown the context. `"noised"`: brought to the noise level of the new frames
            at every step, with noise that stays the same; what a model was trained on whose clips have one noise level
            throughout. `"clean"`: as it is, at timestep -1; what `--clean_prefix_ratio` trains. Either way the context
            is taken anew from the given frames at every step, so that nothing changes it.
        arguments: As of a [`Rollout`].

    Attributes:
        context_noise (`torch.Tensor` of shape `(B, F_context, C, H, W)`): For `"noised"`; to be set before the first step.
    """

    def __init__(self, *arguments, context_mode: str, **options):
        super().__init__(*arguments, **options)
        self.context_mode = context_mode
        self.context_noise: torch.Tensor | None = None

    def _velocity(
        self, noisy: FrameBatch, timestep: torch.Tensor, modulation: None, null_feature: dict
    ) -> torch.Tensor:
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


class VideoDiTPipeline(VideoPipeline):
    r"""
    A video diffusion transformer, the baseline of FAR: the same network with `frame_causal=False`, trained with
    `train_far.py --objective video_dit`. It makes all new frames at once and knows no cache, no stream and no session.

    It loads the folder of such a training, and takes a [`FARPipeline`]'s place where models are evaluated.

    Args:
        context_mode (`str`, defaults to `"noised"`): How context is given, see [`ClipRollout`]: `"noised"` to a model that
            was trained as `--objective video_dit` does by itself, `"clean"` to one trained with `--clean_prefix_ratio`.
        arguments: As of a [`FARPipeline`].
    """

    is_frame_causal = False

    # diffusers reads here what a pipeline is made of, so all is named.
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
        check_choice("context_mode", context_mode, CONTEXT_MODES)
        shipped = (fps, action_names, height, width, flex_rope, num_inference_steps, guidance_scale, short_cache)
        super().__init__(transformer, vae, scheduler, *shipped)
        self.register_to_config(context_mode=context_mode)

    @torch.no_grad()
    def __call__(self, *arguments, return_dict: bool = True, **named) -> FARPipelineOutput | tuple:
        r"""
        Generate `num_frames` new frames at once.

        Args:
            arguments: Those of a [`FARPipeline`]'s call, in its order or by name, but for what only frame after frame can
                have: `use_cache` and its options, and callbacks. Denoising steps are those of all frames together.
                `generator` draws the noise of the new frames, then that of the context where it is noised; with a list each
                video is the same alone as in a batch. Of `short_cache` only `"exact"`, the default, is accepted.
            return_dict (`bool`, defaults to `True`): `False` returns a tuple.

        Returns:
            [`FARPipelineOutput`], the new frames only.

        Raises:
            ValueError: An argument has the wrong shape, type or values, or the transformer is frame-causal.
        """
        # 1. Check the inputs
        unknown = [name for name in FRAME_BY_FRAME if name in named]
        if unknown:
            raise ValueError(f"`{unknown[0]}` was given but this pipeline makes all frames at once; leave it out.")
        inputs = self.check_inputs(GenerationRequest(*arguments, **named, use_cache=False))
        request, num_context = inputs.request, inputs.num_context_frames
        self._warn_of_long_clips(inputs.num_frames)

        # 2. Show the context, and denoise all new frames beside it
        generation = self._begin(inputs, ClipRollout, context_mode=self.config.context_mode)
        rollout, context = generation.rollout, generation.unwritten
        new = generation.as_fed(generation.noise(0, request.num_frames), num_context)
        if context is not None:
            if self.config.context_mode == "noised":
                rollout.context_noise = frame_noise(context.shape, request.generator, rollout.device)
            rollout.write(generation.as_fed(context, 0))
        with self.progress_bar(total=self.num_timesteps) as progress_bar:
            made = rollout.denoise(new, partial(count_step, progress_bar), request.generator)

        # 3. The new frames
        return self._output(made.unbind(1), request.output_type, return_dict)

    def _warn_of_long_clips(self, num_frames: int) -> None:
        trained_frames = self.transformer.config.trained_frames
        if trained_frames is not None and num_frames > trained_frames:
            logger.warning(
                f"The clip has {num_frames} frames, context included, but the transformer was trained on "
                f"{trained_frames}; shorten the context or make fewer frames."
            )


def count_step(progress_bar, step_index: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Show a finished step; the latents stay as they are."""
    progress_bar.update()
    return latents


def load_pipeline(pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> VideoPipeline:
    """The pipeline that a folder or repo needs: [`VideoDiTPipeline`] where all frames see each other, else
    [`FARPipeline`].

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`): Pipeline folder or Hub id.
        kwargs: Of the pipeline's `from_pretrained`.
    """
    config = FARTransformer3DModel.load_config(pretrained_model_name_or_path, subfolder="transformer")
    pipeline_class = FARPipeline if config.get("frame_causal", True) else VideoDiTPipeline
    return pipeline_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
