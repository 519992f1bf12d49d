"""What a user passes to the pipeline, checked and brought into one form before any work is done.

B batch, F frames, C latent channels, H/W latent height/width, A action channels; h/w pixels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.utils.torch_utils import randn_tensor


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
        video = torch.from_numpy(np.ascontiguousarray(np.moveaxis(video, -1, -3)))
    if not isinstance(video, torch.Tensor):
        raise ValueError(f"`video` is a {type(video).__name__}; pass a list of PIL images, an array or a tensor.")
    if video.ndim not in (4, 5) or video.shape[-3] != 3:
        raise ValueError(
            f"`video` is a tensor of shape {tuple(video.shape)}; pass (batch, frames, 3, height, width) in [0, 1]."
        )
    video = video if video.ndim == 5 else video[None]
    if video.shape[0] == 0 or video.shape[1] == 0:
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
        sizes = {frame.size for frame in video if isinstance(frame, PIL.Image.Image)}
        if len(sizes) > 1:
            raise ValueError(f"`video` has frames of sizes {sorted(sizes)}; resize them to one size.")
        return np.stack([np.asarray(frame.convert("RGB")) for frame in video])
    parts = [stack_frames(part) if isinstance(part, (list, tuple)) else part for part in video]
    shapes = {tuple(getattr(part, "shape", ())) for part in parts}
    if len(shapes) > 1:
        raise ValueError(f"`video` has parts of shapes {sorted(shapes)}; a batch needs equal sizes and frame counts.")
    if all(isinstance(part, np.ndarray) for part in parts):
        return np.stack(parts)
    if all(isinstance(part, torch.Tensor) for part in parts):
        return torch.stack(parts)
    raise ValueError(f"`video` is a list of {type(video[0]).__name__}; pass PIL images, arrays or tensors.")


def check_actions(actions: Any, config, batch_size: int, num_frames: int) -> torch.Tensor | None:
    """Actions as one tensor, `(B, F)` int64 or `(B, F, A)` float32.

    Args:
        actions: Tensor, array or nested list; one row serves every sample of a batch.
        config: Of the transformer: `num_actions`, `action_dim`, `action_shift`.
        batch_size (`int`): B.
        num_frames (`int`): Context and new frames.

    Raises:
        ValueError: Missing, superfluous, of the wrong length, type, range or number of channels, or not finite.
    """
    takes_actions = config.num_actions is not None or config.action_dim is not None
    if actions is None:
        if takes_actions:
            kind = f"integers from 0 to {config.num_actions - 1}" if config.num_actions else "floats"
            raise ValueError(
                f"`actions` is None but this model is conditioned on actions; pass {kind} for {num_frames} frames."
            )
        return None
    if not takes_actions:
        raise ValueError("`actions` was given but this model takes no actions; leave it out.")
    try:
        actions = torch.as_tensor(np.asarray(actions) if isinstance(actions, (list, tuple)) else actions)
    except (ValueError, TypeError) as error:
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
    if actions.shape[1] not in (num_frames, num_frames - config.action_shift):
        left_out = " (the last may be left out)" if config.action_shift else ""
        raise ValueError(
            f"`actions` has {actions.shape[1]} frames but context and new frames need {num_frames}; "
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
    class_labels = torch.as_tensor(class_labels)
    class_labels = class_labels[None] if class_labels.ndim == 0 else class_labels
    if class_labels.is_floating_point() or class_labels.dtype == torch.bool or class_labels.ndim != 1:
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
    if not torch.isfinite(latents).all():
        raise ValueError(f"`{name}` contains NaN or infinite values; pass finite latents.")


def check_count(name: str, value: Any, rule: str = "pass a whole number of at least 1") -> None:
    """Refuse a count that is not a positive integer."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"`{name}` is {value!r}; {rule}.")


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
    return value.ndim if hasattr(value, "ndim") else 1 + num_dims(value[0]) if isinstance(value, (list, tuple)) else 0


def repeat_samples(tensor: torch.Tensor, repeats: int) -> torch.Tensor:
    """Each sample of the batch `repeats` times in a row."""
    return tensor if repeats == 1 else tensor.repeat_interleave(repeats, dim=0)
