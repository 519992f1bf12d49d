"""What a user passes to the pipeline, checked and brought into one form before any work is done.

B batch, F frames, C latent channels, H/W latent height/width, A action channels; h/w pixels.
"""

import math
import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.utils.torch_utils import randn_tensor

from ..checks import check_count, is_whole_number
from ..models.codec import spatial_compression
from ..models.kv_cache import CacheOptions
from ..models.transformer_far import FARTransformer3DModel
from ..pictures import upright_rgb
from .settings import GenerationRequest, GenerationSettings


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CALLBACK_TENSORS = ["latents"]
NUM_TIMESTEPS = 1000  # of noise that the model tells apart; the timestep of pure noise


@dataclass(frozen=True)
class PipelineInputs:
    """What a call works with, checked. `video` and `video_latents` are of B samples; B counts contexts, each of which is
    continued `num_videos_per_context` times."""

    video: torch.Tensor | None
    video_latents: torch.Tensor | None
    actions: torch.Tensor | None
    class_labels: torch.Tensor | None
    latents: torch.Tensor | None
    batch_size: int
    num_context_frames: int
    num_frames: int
    num_videos_per_context: int
    latent_height: int
    latent_width: int


def check_request(
    transformer: FARTransformer3DModel,
    vae: torch.nn.Module,
    own_size: tuple[int | None, int | None],
    request: GenerationRequest,
    *,
    is_session: bool = False,
    is_whole_clip: bool = False,
) -> PipelineInputs:
    """Check all arguments of a call, or of the start of a session, before any work is done.

    Args:
        own_size (`tuple`): The pipeline's own height and width, if any.
        request ([`GenerationRequest`]): Filled in with the pipeline's defaults.
        is_session (`bool`): The action at the last frame of the context is yet to be taken.
        is_whole_clip (`bool`): The pipeline makes all frames at once, not one after the other.

    Raises:
        ValueError: Names the argument, its value, the rule and the cure.
    """
    config, latents = transformer.config, request.latents
    check_settings(transformer, request.settings, is_whole_clip=is_whole_clip)
    check_output_type(request.output_type)
    unknown = [name for name in request.callback_on_step_end_tensor_inputs if name not in CALLBACK_TENSORS]
    if unknown:
        raise ValueError(f"`callback_on_step_end_tensor_inputs` has {unknown}; there are {CALLBACK_TENSORS}.")
    check_count("num_frames", request.num_frames)
    check_count("num_videos_per_context", request.num_videos_per_context)
    if request.video is not None and request.video_latents is not None:
        raise ValueError("`video` and `video_latents` were both given; pass the context in one of the two forms.")

    # 1. Context, noise and size
    video, latent_channels = None, (config.in_channels, None, None)
    if request.video is not None:
        video = video_to_tensor(request.video)
    if request.video_latents is not None:
        check_latents("video_latents", request.video_latents, (None, None, *latent_channels))
    if latents is not None:
        check_latents("latents", latents, (None, request.num_frames, *latent_channels))
    latent_height, latent_width = latent_size(
        config,
        spatial_compression(vae),
        own_size,
        video,
        request.video_latents,
        latents,
        request.height,
        request.width,
    )
    context = video if video is not None else request.video_latents

    # 2. Batch
    batch_size = infer_batch_size(
        context,
        latents,
        request.actions,
        request.class_labels,
        request.num_videos_per_context,
        3 if config.action_dim else 2,
    )
    if batch_size < 1:
        raise ValueError(f"`actions` or `class_labels` are of {batch_size} samples; pass at least one.")
    num_videos = batch_size * request.num_videos_per_context
    if latents is not None:
        frame_shape = (config.in_channels, latent_height, latent_width)
        check_latents("latents", latents, (num_videos, request.num_frames, *frame_shape))
    check_generator(request.generator, num_videos)

    # 3. Conditions
    num_context_frames = 0 if context is None else context.shape[1]
    num_all_frames = num_context_frames + request.num_frames
    lengths = (num_all_frames, num_all_frames - config.action_shift) if config.action_shift else (num_all_frames,)
    if is_session:
        lengths = (max(num_context_frames - 1, 0),)
    return PipelineInputs(
        video=video,
        video_latents=request.video_latents,
        actions=check_actions(request.actions, config, batch_size, lengths),
        class_labels=check_class_labels(request.class_labels, config.num_classes, batch_size),
        latents=latents,
        batch_size=batch_size,
        num_context_frames=num_context_frames,
        num_frames=request.num_frames,
        num_videos_per_context=request.num_videos_per_context,
        latent_height=latent_height,
        latent_width=latent_width,
    )


def check_settings(
    transformer: FARTransformer3DModel, settings: GenerationSettings, *, is_whole_clip: bool = False
) -> None:
    """Refuse ways of generating that this model does not know or that contradict each other."""
    config, options = transformer.config, settings.cache_options
    if config.frame_causal and is_whole_clip:
        raise ValueError(
            "The transformer has `frame_causal=True` and makes frame after frame, but this pipeline makes whole clips; "
            "load it as a `FARPipeline`."
        )
    if not config.frame_causal and not is_whole_clip:
        raise ValueError(
            "The transformer has `frame_causal=False` and makes whole clips; this pipeline makes frame after frame."
        )
    check_count("num_inference_steps", settings.num_inference_steps, most=NUM_TIMESTEPS)
    options.check(config.short_window, has_long_frames=config.long_patch_size is not None)
    if not settings.use_cache and options != CacheOptions():
        raise ValueError(
            f"`use_cache` is False but {options} was asked for; leave `short_cache`, `max_long_frames` and "
            "`num_sink_frames` at their defaults, or use the cache."
        )
    check_guidance(transformer, settings.guidance_scale)


def check_sigmas(sigmas: Any, num_inference_steps: int | None) -> None:
    """Refuse noise levels that do not fall from at most 1 to above 0, one for each step."""
    if sigmas is None:
        return
    levels = list(sigmas) if isinstance(sigmas, (list, tuple, np.ndarray)) else []
    are_numbers = all(isinstance(level, numbers.Real) and 0 < level <= 1 for level in levels)
    if not levels or not are_numbers or any(later >= level for level, later in zip(levels, levels[1:])):
        raise ValueError(
            f"`sigmas` is {sigmas!r}; pass a list of noise levels that fall from at most 1 to above 0, one for each step."
        )
    if num_inference_steps not in (None, len(levels)):
        raise ValueError(
            f"`sigmas` has {len(levels)} noise levels but `num_inference_steps` is {num_inference_steps}; leave the latter "
            "out."
        )


def check_output_type(output_type: Any) -> None:
    """Refuse a form of frames that there is not."""
    if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` is {output_type!r}; choose one of {', '.join(OUTPUT_TYPES)}.")


def check_guidance(transformer: FARTransformer3DModel, guidance_scale: Any) -> None:
    """Refuse guidance that is no finite number of at least 0, or that this model cannot follow."""
    is_number = isinstance(guidance_scale, numbers.Real) and not isinstance(guidance_scale, bool)
    if not is_number or not 0 <= guidance_scale < math.inf:
        raise ValueError(f"`guidance_scale` is {guidance_scale!r}; it is at least 0, finite, and guides above 1.")
    if guidance_scale > 1 and not (transformer.takes_actions or transformer.takes_labels):
        raise ValueError(
            f"`guidance_scale` is {guidance_scale} but this model has no condition to be guided by; leave it at 1."
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
    config, compression: int, own_size: tuple[int | None, int | None], video, video_latents, latents, height, width
) -> tuple[int, int]:
    """Latent height and width: from the video or latents, else as given, else the pipeline's own."""
    for name, value in (*zip(("height", "width"), own_size), ("height", height), ("width", width)):
        if value is not None and not is_whole_number(value):
            raise ValueError(f"`{name}` is {value!r}; pass a whole number of pixels, or leave it out.")
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
        size, source = (height or own_size[0], width or own_size[1]), "`height`x`width`"
        if None in size:
            raise ValueError(
                f"`height` and `width` are {height} and {width}, without a video, and this pipeline has no size of "
                "its own; pass both, in pixels."
            )
    unit = compression * (config.long_patch_size or config.patch_size)
    if size[0] < 1 or size[1] < 1 or size[0] % unit or size[1] % unit:
        raise ValueError(
            f"{source} is {size[0]}x{size[1]} pixels; VAE and patches need multiples of {unit}: resize, for example "
            f"to {max(1, round(size[0] / unit)) * unit}x{max(1, round(size[1] / unit)) * unit}."
        )
    return size[0] // compression, size[1] // compression


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
        if video.ndim not in (4, 5) or video.shape[-1] != 3:
            raise ValueError(
                f"`video` is an array of shape {video.shape}; pass (frames, height, width, 3) or "
                "(batch, frames, height, width, 3)."
            )
        if video.dtype.kind not in "fui":
            raise ValueError(f"`video` is an array of dtype {video.dtype}; pass uint8, or floats in [0, 1].")
        video = torch.from_numpy(np.ascontiguousarray(np.moveaxis(video, -1, -3)))
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
    if not torch.isfinite(video).all():
        raise ValueError("`video` contains NaN or infinite values; pass finite values in [0, 1].")
    low, high = video.min().item(), video.max().item()
    if low < 0 or high > 1:
        raise ValueError(
            f"`video` has values from {low:.4g} to {high:.4g}; pass floats in [0, 1] (uint8 is divided by 255)."
        )
    return video


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


def check_actions(actions: Any, config, batch_size: int, lengths: tuple[int, ...]) -> torch.Tensor | None:
    """Actions as one tensor, `(B, F)` int64 or `(B, F, A)` float32.

    Args:
        actions: Tensor, array or nested list; one row serves every sample of a batch.
        config: Of the transformer: `num_actions`, `action_dim`.
        batch_size (`int`): B.
        lengths (`tuple[int, ...]`): How many there may be; of 0, none need be given.

    Raises:
        ValueError: Missing, superfluous, of the wrong length, type, range or number of channels, or not finite.
    """
    takes_actions = config.num_actions is not None or config.action_dim is not None
    if actions is None:
        if takes_actions and 0 not in lengths:
            kind = f"integers from 0 to {config.num_actions - 1}" if config.num_actions else "floats"
            raise ValueError(
                f"`actions` is None but this model is conditioned on actions; pass {kind} for {lengths[0]} frames."
            )
        return None
    if not takes_actions:
        raise ValueError("`actions` was given but this model takes no actions; leave it out.")
    try:
        actions = torch.as_tensor(np.asarray(actions) if isinstance(actions, (list, tuple)) else actions)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"`actions` cannot be read as a tensor ({error}); pass rows of equal length.") from error

    num_dims = 1 if config.num_actions is not None else 2
    if actions.ndim == num_dims:
        actions = actions[None]
    if actions.ndim != num_dims + 1:
        form = "(batch, frames)" if num_dims == 1 else f"(batch, frames, {config.action_dim})"
        raise ValueError(f"`actions` has shape {tuple(actions.shape)}; this model takes {form}.")
    if actions.shape[0] not in (1, batch_size):
        raise ValueError(
            f"`actions` has {actions.shape[0]} rows but the batch is {batch_size}; pass one row per sample."
        )
    if actions.shape[1] not in lengths:
        left_out = " (the last may be left out)" if len(lengths) > 1 else ""
        raise ValueError(
            f"`actions` has {actions.shape[1]} frames but context and new frames need {lengths[0]}; "
            f"pass one action per frame{left_out}."
        )
    return check_action_values(actions, config).expand(batch_size, *actions.shape[1:])


def check_action_values(actions: torch.Tensor, config) -> torch.Tensor:
    """Type and range of actions of any length."""
    if config.num_actions is None:
        if actions.shape[-1] != config.action_dim:
            raise ValueError(f"`actions` has {actions.shape[-1]} channels; this model takes {config.action_dim}.")
        if actions.is_complex() or actions.dtype == torch.bool or not torch.isfinite(actions).all():
            raise ValueError(f"`actions` ({actions.dtype}) must be finite numbers; NaN and infinity are not actions.")
        return actions.float()
    if actions.is_floating_point() or actions.is_complex() or actions.dtype == torch.bool:
        raise ValueError(
            f"`actions` has dtype {actions.dtype} but this model has {config.num_actions} discrete actions; "
            f"pass integers from 0 to {config.num_actions - 1}."
        )
    if actions.numel() and (actions.min() < 0 or actions.max() >= config.num_actions):
        raise ValueError(
            f"`actions` has values from {actions.min().item()} to {actions.max().item()}; this model's actions are "
            f"0 to {config.num_actions - 1}."
        )
    return actions.long()


def check_class_labels(class_labels: Any, num_classes: int | None, batch_size: int) -> torch.Tensor | None:
    """Labels as a tensor of shape `(B,)`, int64; one label serves the whole batch."""
    if class_labels is None:
        if num_classes is not None:
            raise ValueError(
                f"`class_labels` is None but this model is conditioned on classes; pass integers from 0 to "
                f"{num_classes} ({num_classes} is the null class)."
            )
        return None
    if num_classes is None:
        raise ValueError("`class_labels` was given but this model takes no classes; leave it out.")
    try:
        class_labels = torch.as_tensor(class_labels)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"`class_labels` cannot be read as a tensor ({error}); pass integers.") from error
    class_labels = class_labels[None] if class_labels.ndim == 0 else class_labels
    if (
        class_labels.is_floating_point()
        or class_labels.dtype == torch.bool
        or class_labels.ndim != 1
        or not len(class_labels)
    ):
        raise ValueError(
            f"`class_labels` has dtype {class_labels.dtype} and shape {tuple(class_labels.shape)}; pass one integer per "
            "sample."
        )
    if class_labels.shape[0] not in (1, batch_size):
        raise ValueError(
            f"`class_labels` has {class_labels.shape[0]} labels but the batch is {batch_size}; pass one per sample."
        )
    if class_labels.min() < 0 or class_labels.max() > num_classes:
        raise ValueError(
            f"`class_labels` has values from {class_labels.min().item()} to {class_labels.max().item()}; this model's "
            f"classes are 0 to {num_classes - 1}, and {num_classes} is the null class."
        )
    return class_labels.long().expand(batch_size)


def check_latents(name: str, latents: Any, expected: tuple[int | None, ...]) -> None:
    """Refuse latents that are not a finite float tensor of the expected shape, where `None` fits any size."""
    wanted = "(" + ", ".join("any" if size is None else str(size) for size in expected) + ")"
    if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
        kind = latents.dtype if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise ValueError(f"`{name}` is {kind}; pass a float tensor of shape {wanted}.")
    fits = latents.ndim == len(expected) and all(size in (None, given) for size, given in zip(expected, latents.shape))
    if not fits:
        raise ValueError(
            f"`{name}` has shape {tuple(latents.shape)}; it must be {wanted}: batch, frames, channels, height, width."
        )
    if 0 in latents.shape:
        raise ValueError(f"`{name}` has shape {tuple(latents.shape)}: no frames; leave it out to start from nothing.")
    if not torch.isfinite(latents).all():
        raise ValueError(f"`{name}` contains NaN or infinite values; pass finite latents.")


def frame_noise(
    shape: tuple[int, ...], generator: torch.Generator | list[torch.Generator] | None, device: torch.device
) -> torch.Tensor:
    """Noise of one frame, `(B, 1, C, H, W)`, float32; each sample's from its own generator where a list is given."""
    return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)


def infer_batch_size(context, latents, actions, class_labels, num_videos_per_context: int, action_dims: int) -> int:
    """The number of contexts: from the context, else from noise, labels or actions, else 1."""
    if context is not None:
        return context.shape[0]
    if latents is not None:
        if latents.shape[0] % num_videos_per_context:
            raise ValueError(
                f"`latents` has a batch of {latents.shape[0]}; it must be a multiple of `num_videos_per_context` "
                f"{num_videos_per_context}."
            )
        return latents.shape[0] // num_videos_per_context
    if class_labels is not None and num_dims(class_labels) > 0:
        return len(class_labels)
    if actions is not None and num_dims(actions) == action_dims:
        return len(actions)
    return 1


def num_dims(value: Any) -> int:
    """Dimensions of a tensor, an array or a nested list."""
    if hasattr(value, "ndim"):
        return value.ndim
    if not isinstance(value, (list, tuple)):
        return 0
    return 1 + num_dims(value[0]) if len(value) else 1


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
    if action is not None and takes_actions and not has_frame:
        raise ValueError(f"`action` is {action!r} but there is no frame yet that it could be taken at; leave it out.")
    if action is None and takes_actions and not has_frame:
        return None
    if action is None:
        return check_actions(None, config, batch_size, (1,))
    try:
        action = torch.as_tensor(action)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"`action` {action!r} cannot be read as a tensor ({error}); pass numbers.") from error
    num_dims_of_one = 0 if config.num_actions is not None else 1
    if action.ndim == num_dims_of_one:
        action = action[None]
    return check_actions(action[:, None], config, batch_size, (1,))[:, 0].to(device)
