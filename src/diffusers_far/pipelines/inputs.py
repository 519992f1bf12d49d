"""What a user passes to the pipeline, checked and brought into one form before any work is done.

B contexts, N videos: each context is continued `num_videos_per_context` times. F frames, C latent channels, H/W latent
height/width, A action channels; h/w pixels.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import SchedulerMixin

from ..checks import (
    as_tensor,
    check_choice,
    check_count,
    check_integers,
    check_shape,
    check_values_finite,
    is_finite_number,
)
from ..models.codec import spatial_compression
from ..models.frame_transformer import FrameTransformer
from ..models.kv_cache import CacheOptions
from ..pictures import upright_rgb
from .settings import GenerationRequest, GenerationSettings


GUIDANCE_MODES = ("condition", "feature")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CALLBACK_TENSORS = ["latents"]
LATENT_DIMENSIONS = "batch, frames, channels, height, width"
WHOLE_PIXELS = "pass a whole number of pixels, or leave it out"
NUM_TIMESTEPS = 1000  # of noise that the model tells apart; the timestep of pure noise


@dataclass(frozen=True)
class PipelineInputs:
    """A request that is checked, and what it leads to.

    Args:
        request ([`GenerationRequest`]): As it was given.
        settings ([`GenerationSettings`]): How its frames are made.
        video (`torch.Tensor` of shape `(B, F_context, 3, h, w)`, *optional*): The context in pixels, float32 in [0, 1].
        num_context_frames (`int`): Of the context, in whichever form it was given.
        actions (`torch.Tensor` of shape `(N, F)` or `(N, F, A)`, *optional*): Taken at the frames; the last may be missing.
        class_labels (`torch.Tensor` of shape `(N,)`, *optional*).
        latent_shape (`tuple`): `(N, C, H, W)` of each frame.
    """

    request: GenerationRequest
    settings: GenerationSettings
    video: torch.Tensor | None
    num_context_frames: int
    actions: torch.Tensor | None
    class_labels: torch.Tensor | None
    latent_shape: tuple[int, int, int, int]

    @property
    def num_frames(self) -> int:
        """Of context and new frames."""
        return self.num_context_frames + self.request.num_frames


def check_request(
    transformer: FrameTransformer,
    vae: torch.nn.Module,
    own_size: tuple[int | None, int | None],
    request: GenerationRequest,
    settings: GenerationSettings,
    *,
    is_session: bool = False,
) -> PipelineInputs:
    """Check all arguments of a call, or of the start of a session, before any work is done.

    Args:
        own_size (`tuple`): The pipeline's own height and width in pixels, if any.
        request ([`GenerationRequest`]), settings ([`GenerationSettings`]): The settings are what the request leads to.
        is_session (`bool`): The action at the last frame of the context is yet to be taken.

    Raises:
        ValueError: Names the argument, its value, the rule and the cure.
    """
    config = transformer.config
    check_settings(transformer, settings)
    check_choice("output_type", request.output_type, OUTPUT_TYPES)
    unknown = [name for name in request.callback_on_step_end_tensor_inputs if name not in CALLBACK_TENSORS]
    if unknown:
        raise ValueError(f"`callback_on_step_end_tensor_inputs` has {unknown}; there are {CALLBACK_TENSORS}.")
    check_count("num_frames", request.num_frames)
    check_count("num_videos_per_context", request.num_videos_per_context)
    if request.video is not None and request.video_latents is not None:
        raise ValueError("`video` and `video_latents` were both given; pass the context in one of the two forms.")

    # 1. Context, noise and size
    video = None if request.video is None else video_to_tensor(request.video)
    for name, num_frames in (("video_latents", None), ("latents", request.num_frames)):
        if getattr(request, name) is not None:
            check_latents(name, getattr(request, name), (None, num_frames, config.in_channels, None, None))
    patch_size = config.long_patch_size or config.patch_size
    height, width = latent_size(request, video, own_size, spatial_compression(vae), patch_size)

    # 2. Conditions, for each sample or for all of them
    context = request.video_latents if video is None else video
    num_context_frames = 0 if context is None else context.shape[1]
    if transformer.is_separable:
        check_separable(config, num_context_frames, is_session=is_session)
    num_actions = num_context_frames + request.num_frames
    lengths = range(num_actions - config.action_shift, num_actions + 1)
    if is_session:
        lengths = [max(num_context_frames - 1, 0)]
    actions = check_actions(request.actions, config, lengths)
    class_labels = request.class_labels
    if class_labels is not None or config.num_classes is not None:
        class_labels = check_class_labels(class_labels, config.num_classes)

    # 3. Batch
    num_repeats = request.num_videos_per_context
    if context is None:
        batch_size = batch_without_video(request.latents, (actions, class_labels), num_repeats)
    else:
        batch_size = len(context)
    latent_shape = (batch_size * num_repeats, config.in_channels, height, width)
    if request.latents is not None:
        num_videos, *frame_shape = latent_shape
        check_shape("latents", request.latents, (num_videos, request.num_frames, *frame_shape), LATENT_DIMENSIONS)
    if request.generator is not None:
        check_generator(request.generator, latent_shape[0])
    return PipelineInputs(
        request=request,
        settings=settings,
        video=video,
        num_context_frames=num_context_frames,
        actions=rows_of_videos("actions", actions, batch_size, num_repeats),
        class_labels=rows_of_videos("class_labels", class_labels, batch_size, num_repeats),
        latent_shape=latent_shape,
    )


def check_settings(transformer: FrameTransformer, settings: GenerationSettings) -> None:
    """Refuse ways of generating that this model does not know or that contradict each other."""
    config, options = transformer.config, settings.cache_options
    check_count("num_inference_steps", settings.num_inference_steps, most=NUM_TIMESTEPS)
    options.check(config.short_window, has_long_frames=config.long_patch_size is not None)
    if not settings.use_cache and options != CacheOptions():
        raise ValueError(
            f"`use_cache` is False but {options} was asked for; leave `short_cache`, `max_long_frames` and "
            "`num_sink_frames` at their defaults, or use the cache."
        )
    check_guidance(transformer, settings.guidance_scale, settings.guidance_mode)


def check_guidance(transformer: FrameTransformer, guidance_scale: Any, guidance_mode: Any = "condition") -> None:
    """Refuse guidance that is no finite number of at least 0, or that this model cannot follow."""
    check_choice("guidance_mode", guidance_mode, GUIDANCE_MODES)
    if guidance_mode == "feature" and not transformer.is_separable:
        raise ValueError(
            f"`guidance_mode` is 'feature', but a {type(transformer).__name__} has no feature to be guided by; leave it out."
        )
    if not is_finite_number(guidance_scale) or guidance_scale < 0:
        raise ValueError(f"`guidance_scale` is {guidance_scale!r}; it is at least 0, finite, and guides above 1.")
    has_condition = transformer.takes_actions or transformer.takes_labels or guidance_mode == "feature"
    if guidance_scale > 1 and not has_condition:
        raise ValueError(
            f"`guidance_scale` is {guidance_scale} but this model has no condition to be guided by; leave it at 1."
        )


def check_separable(config, num_context_frames: int, *, is_session: bool) -> None:
    """Refuse what a separable model cannot make frames of."""
    if num_context_frames == 0 and not config.learn_start:
        raise ValueError(
            "`video` was not given, but this model has `learn_start=False` and cannot start from nothing; pass at least one "
            "frame, as `video` or `video_latents`."
        )
    has_actions = config.num_actions is not None or config.action_dim is not None
    if is_session and has_actions and config.action_shift == 0:
        raise ValueError(
            "The transformer is separable with `action_shift=0`: its encoder reads the action of a frame before that frame is "
            "made, so no session can be told its actions one by one. Call the pipeline with all actions, or train with "
            "`action_shift=1`."
        )


def check_sigmas(scheduler: SchedulerMixin, sigmas: Any, num_inference_steps: int | None) -> None:
    """Refuse noise levels that do not fall from at most 1 to above 0, one for each step, or a scheduler without them."""
    if "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ValueError(
            f"`sigmas` was given but the scheduler, {type(scheduler).__name__}, takes none; give `num_inference_steps`."
        )
    levels = list(sigmas) if isinstance(sigmas, (list, tuple, np.ndarray)) else []
    are_levels = all(is_finite_number(level) and 0 < level <= 1 for level in levels)
    if not levels or not are_levels or any(later >= level for level, later in zip(levels, levels[1:])):
        raise ValueError(
            f"`sigmas` is {sigmas!r}; pass a list of noise levels that fall from at most 1 to above 0, one for each step."
        )
    if num_inference_steps not in (None, len(levels)):
        raise ValueError(
            f"`sigmas` has {len(levels)} noise levels but `num_inference_steps` is {num_inference_steps}; leave the latter "
            "out."
        )


def check_generator(generator: Any, num_videos: int) -> None:
    """Refuse what is neither a generator nor one per video."""
    generators = generator if isinstance(generator, (list, tuple)) else [generator]
    if not all(each is None or isinstance(each, torch.Generator) for each in generators):
        raise ValueError(f"`generator` is {generator!r}; pass a `torch.Generator`, or a list of one per video.")
    if isinstance(generator, (list, tuple)) and len(generator) != num_videos:
        raise ValueError(
            f"`generator` is a list of {len(generator)} but the call makes {num_videos} "
            "videos; pass one generator per video, or a single one."
        )


def latent_size(
    request: GenerationRequest,
    video: torch.Tensor | None,
    own_size: tuple[int | None, int | None],
    compression: int,
    patch_size: int,
) -> tuple[int, int]:
    """Latent height and width: from the video or latents, else as asked for, else the pipeline's own."""
    for name in ("height", "width"):  # one below 1 is refused in the end
        check_count(name, getattr(request, name), WHOLE_PIXELS, least=-math.inf, optional=True)
    given = {"video": video, "video_latents": request.video_latents, "latents": request.latents}
    source = next((name for name, tensor in given.items() if tensor is not None), None)
    if source is None:
        source, size = "height`x`width", size_without_video(request, own_size)
    else:
        pixels = 1 if source == "video" else compression
        size = tuple(side * pixels for side in given[source].shape[-2:])
        if (request.height or size[0], request.width or size[1]) != size:
            raise ValueError(
                f"`height` and `width` are {request.height} and {request.width} but `{source}` is of {size[0]}x{size[1]} "
                "pixels; leave them out, or resize."
            )
    unit = compression * patch_size
    fitting = [max(1, round(side / unit)) * unit for side in size]
    if any(side < 1 or side % unit for side in size):
        raise ValueError(
            f"`{source}` is {size[0]}x{size[1]} pixels; VAE and patches need multiples of {unit}: resize, for example to "
            f"{fitting[0]}x{fitting[1]}."
        )
    return size[0] // compression, size[1] // compression


def size_without_video(request: GenerationRequest, own_size: tuple[int | None, int | None]) -> tuple[int, int]:
    """Height and width in pixels as asked for, else the pipeline's own."""
    for name, pixels in zip(("height", "width"), own_size):
        check_count(name, pixels, WHOLE_PIXELS, least=-math.inf, optional=True)
    size = (request.height or own_size[0], request.width or own_size[1])
    if None in size:
        raise ValueError(
            f"`height` and `width` are {request.height} and {request.width}, without a video, and this pipeline has no "
            "size of its own; pass both, in pixels."
        )
    return size


def video_to_tensor(video: Any) -> torch.Tensor:
    """Any form of video as one tensor.

    Args:
        video: A list of PIL images, or a list of such lists; an array, channels last, `(F, h, w, 3)` or
            `(B, F, h, w, 3)`, uint8 or float in [0, 1]; a tensor `(F, 3, h, w)` or `(B, F, 3, h, w)`, likewise.

    Returns:
        `torch.Tensor` of shape `(B, F, 3, h, w)`, float32, in [0, 1].

    Raises:
        ValueError: Another form, other channels, no frame, values outside [0, 1] or not finite.
    """
    if isinstance(video, (list, tuple)):
        video = stack_frames(video)
    if isinstance(video, np.ndarray):
        video = channels_first(video)
    if not isinstance(video, torch.Tensor):
        raise ValueError(f"`video` is a {type(video).__name__}; pass a list of PIL images, an array or a tensor.")
    if video.ndim not in (4, 5) or video.shape[-3] != 3:
        raise ValueError(
            f"`video` is a tensor of shape {tuple(video.shape)}; pass (batch, frames, 3, height, width) in [0, 1]."
        )
    video = video if video.ndim == 5 else video[None]
    if 0 in video.shape:
        raise ValueError(f"`video` has shape {tuple(video.shape)}: no frames; leave it out to start from nothing.")
    if video.dtype == torch.uint8:
        return video.float() / 255
    if not video.is_floating_point():
        raise ValueError(f"`video` has dtype {video.dtype}; pass uint8, or floats in [0, 1].")
    video = video.float()
    check_values_finite("video", video, "pass finite values in [0, 1]")
    low, high = video.min().item(), video.max().item()
    if low < 0 or high > 1:
        raise ValueError(
            f"`video` has values from {low:.4g} to {high:.4g}; pass floats in [0, 1] (uint8 is divided by 255)."
        )
    return video


def channels_first(video: np.ndarray) -> torch.Tensor:
    """An array of frames, channels last, as a tensor of the same values."""
    if video.ndim not in (4, 5) or video.shape[-1] != 3:
        raise ValueError(
            f"`video` is an array of shape {video.shape}; pass (frames, height, width, 3) or "
            "(batch, frames, height, width, 3)."
        )
    if video.dtype.kind not in "fui":
        raise ValueError(f"`video` is an array of dtype {video.dtype}; pass uint8, or floats in [0, 1].")
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(video, -1, -3)))


def stack_frames(video: list) -> np.ndarray | torch.Tensor:
    """A list of frames, or of videos, as one array or tensor."""
    if len(video) == 0:
        raise ValueError("`video` is an empty list; leave it out to start from nothing.")
    if isinstance(video[0], PIL.Image.Image):
        others = {type(frame).__name__ for frame in video if not isinstance(frame, PIL.Image.Image)}
        if others:
            raise ValueError(f"`video` mixes PIL images and {', '.join(sorted(others))}; pass frames of one kind.")
        try:
            frames = [upright_rgb(frame) for frame in video]
        except Exception as error:  # an image that Pillow reads only now may be damaged in any way
            raise ValueError(f"`video` has an image that cannot be used ({error}); pass another.") from error
        sizes = {frame.shape[:2] for frame in frames}
        if len(sizes) > 1:
            raise ValueError(f"`video` has frames of sizes {sorted(sizes)} (height, width); resize them to one size.")
        return np.stack(frames)
    parts = [stack_frames(part) if isinstance(part, (list, tuple)) else part for part in video]
    shapes = {tuple(getattr(part, "shape", ())) for part in parts}
    if len(shapes) > 1:
        raise ValueError(f"`video` has parts of shapes {sorted(shapes)}; a batch needs equal sizes and frame counts.")
    if all(isinstance(part, np.ndarray) for part in parts):
        return np.stack(parts)
    if all(isinstance(part, torch.Tensor) for part in parts):
        return torch.stack(parts)
    raise ValueError(f"`video` is a list of {type(video[0]).__name__}; pass PIL images, arrays or tensors.")


def check_actions(actions: Any, config, lengths: Sequence[int]) -> torch.Tensor | None:
    """Actions as one tensor, `(B, F)` int64 or `(B, F, A)` float32; of one row where that is for every sample.

    Args:
        actions: Tensor, array or nested list.
        config: Of the transformer: `num_actions`, `action_dim`.
        lengths: Numbers of actions that fit; where 0 is among them, `actions` may be `None`.

    Raises:
        ValueError: Missing, superfluous, of the wrong length, type, range or number of channels, or not finite.
    """
    channels = () if config.action_dim is None else (config.action_dim,)
    if config.num_actions is None and not channels:
        if actions is not None:
            raise ValueError("`actions` was given but this model takes no actions; leave it out.")
        return None
    if actions is None and 0 not in lengths:
        kind = "floats" if channels else f"integers from 0 to {config.num_actions - 1}"
        raise ValueError(
            f"`actions` is None but this model is conditioned on actions; pass {kind} for {max(lengths)} frames."
        )
    if actions is None:
        return torch.zeros(1, 0, *channels, dtype=torch.float32 if channels else torch.int64)
    actions = as_tensor("actions", actions, "pass rows of equal length")
    actions = actions[None] if actions.ndim == 1 + len(channels) else actions
    if actions.ndim != 2 + len(channels) or not len(actions):
        form = ", ".join(("batch", "frames", *map(str, channels)))
        raise ValueError(f"`actions` has shape {tuple(actions.shape)}; this model takes ({form}).")
    if actions.shape[1] not in lengths:
        left_out = " (the last may be left out)" if len(lengths) > 1 else ""
        raise ValueError(
            f"`actions` has {actions.shape[1]} frames but context and new frames need {max(lengths)}; "
            f"pass one action per frame{left_out}."
        )
    return check_action_values(actions, config)


def check_action_values(actions: torch.Tensor, config) -> torch.Tensor:
    """Type and range of actions of any length."""
    if config.num_actions is not None:
        most = config.num_actions - 1
        check_integers("actions", actions, most, f"this model's actions are 0 to {most}")
        return actions.long()
    if actions.shape[-1] != config.action_dim:
        raise ValueError(f"`actions` has {actions.shape[-1]} channels; this model takes {config.action_dim}.")
    if actions.is_complex() or actions.dtype == torch.bool or not torch.isfinite(actions).all():
        raise ValueError(f"`actions` ({actions.dtype}) must be finite numbers; NaN and infinity are not actions.")
    return actions.float()


def check_class_labels(class_labels: Any, num_classes: int | None) -> torch.Tensor | None:
    """Labels as a tensor of shape `(B,)`, int64; of one label where that is for every sample.

    Raises:
        ValueError: Missing, superfluous, or no labels of this model.
    """
    if num_classes is None and class_labels is not None:
        raise ValueError("`class_labels` was given but this model takes no classes; leave it out.")
    if num_classes is None:
        return None
    if class_labels is None:
        raise ValueError(
            f"`class_labels` is None but this model is conditioned on classes; pass integers from 0 to {num_classes} "
            f"({num_classes} is the null class)."
        )
    class_labels = as_tensor("class_labels", class_labels, "pass integers")
    class_labels = class_labels[None] if class_labels.ndim == 0 else class_labels
    if class_labels.ndim != 1 or not len(class_labels):
        raise ValueError(
            f"`class_labels` has dtype {class_labels.dtype} and shape {tuple(class_labels.shape)}; pass one integer per "
            "sample."
        )
    rule = f"this model's classes are 0 to {num_classes - 1}, and {num_classes} is the null class"
    check_integers("class_labels", class_labels, num_classes, rule)
    return class_labels.long()


def check_latents(name: str, latents: Any, expected: tuple[int | None, ...]) -> None:
    """Refuse latents that are not a finite float tensor of the expected shape, where `None` fits any size."""
    if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
        kind = latents.dtype if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise ValueError(f"`{name}` is {kind}; pass a float tensor ({LATENT_DIMENSIONS}).")
    check_shape(name, latents, expected, LATENT_DIMENSIONS)
    if 0 in latents.shape:
        raise ValueError(f"`{name}` has shape {tuple(latents.shape)}: no frames; leave it out to start from nothing.")
    check_values_finite(name, latents, "pass finite latents")


def batch_without_video(
    latents: torch.Tensor | None, conditions: tuple[torch.Tensor | None, ...], num_videos_per_context: int
) -> int:
    """The number of contexts that are continued, where these are empty: from the noise, else from actions and labels, else
    1."""
    if latents is None:
        return max(1 if condition is None else len(condition) for condition in conditions)
    if len(latents) % num_videos_per_context:
        raise ValueError(
            f"`latents` has a batch of {len(latents)}; it must be a multiple of `num_videos_per_context` "
            f"{num_videos_per_context}."
        )
    return len(latents) // num_videos_per_context


def rows_of_videos(
    name: str, rows: torch.Tensor | None, batch_size: int, num_videos_per_context: int = 1
) -> torch.Tensor | None:
    """A condition for each video, from one row for each context, or one for all: `(B, ...)` or `(1, ...)` to `(N, ...)`."""
    if rows is None:
        return None
    if len(rows) not in (1, batch_size):
        kind = "labels" if rows.ndim == 1 else "rows"
        raise ValueError(f"`{name}` has {len(rows)} {kind} but the batch is {batch_size}; pass one per sample.")
    return repeat_samples(rows.expand(batch_size, *rows.shape[1:]), num_videos_per_context)


def repeat_samples(tensor: torch.Tensor, repeats: int) -> torch.Tensor:
    """Each sample of the batch `repeats` times in a row."""
    return tensor if repeats == 1 else tensor.repeat_interleave(repeats, dim=0)


def check_step_action(
    action: Any, config, batch_size: int, *, has_frame: bool, device: torch.device
) -> torch.Tensor | None:
    """The action of a session's step as a tensor, `(B,)` int64 or `(B, A)` float32.

    Raises:
        ValueError: Missing, superfluous, of the wrong type, range or number.
    """
    takes_actions = config.num_actions is not None or config.action_dim is not None
    if takes_actions and not has_frame:
        if action is not None:
            raise ValueError(
                f"`action` is {action!r} but there is no frame yet that it could be taken at; leave it out."
            )
        return None
    if action is not None:
        action, num_dims_of_one = as_tensor("action", action, "pass numbers"), 0 if config.action_dim is None else 1
        action = (action if action.ndim > num_dims_of_one else action[None])[:, None]
    actions = rows_of_videos("actions", check_actions(action, config, [1]), batch_size)
    return None if actions is None else actions[:, 0].to(device)
