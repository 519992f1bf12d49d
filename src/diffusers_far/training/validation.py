"""How a FAR training is measured on held-out trajectories, with the same random draws every time: losses by noise level, the
quality of rollouts, and videos to look at.

B batch, F frames, C latent channels, H/W latent height/width; h/w pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..data.clips import ClipBatch, evenly_spaced
from ..data.latents import LatentDataset
from ..data.rows import BadExampleError
from ..data.video_clips import EncodedDataset
from ..models.codec import decode_video
from ..models.loading import name_some
from .clips import ClipDataset, draw_clip, fed_conditions, step_generator, usable_trajectories
from .config import FARSettings
from .objective import add_noise, velocity_loss


NOISE_LEVELS = (100, 300, 500, 700, 900)  # timesteps at which the held-out loss is taken


def validation_clips(
    dataset: ClipDataset,
    num_clips: int,
    num_frames: int,
    interval: int = 1,
    vae: torch.nn.Module | None = None,
    *,
    keep_frames: bool = False,
) -> ClipBatch:
    """The same clips in every run: of trajectories spread over the dataset, at fixed random starts.

    Args:
        dataset (`ClipDataset`): Held out.
        num_clips, num_frames, interval (`int`): How many, how long, and how far apart their frames are.
        vae (`nn.Module`, *optional*): Encodes clips that are no latents, one after the other.
        keep_frames (`bool`): Keep the frames of what it encodes.

    Raises:
        BadExampleError: Latents or actions are not finite; names the trajectories.
    """
    usable, clips = usable_trajectories(dataset, num_frames, interval), []
    for number, place in enumerate(np.linspace(0, len(usable) - 1, num_clips).round().astype(int)):
        clip = draw_clip(dataset, int(usable[place]), num_frames, interval, step_generator(0, 0, number))
        if clip.latents is None:
            clip = clip.encode(vae)
        clips.append(clip if keep_frames else replace(clip, frames=None))
    clips = ClipBatch.stack(clips)
    faulty = clips.not_finite()
    if faulty:
        raise BadExampleError(
            f"The split that is held out has NaN or infinite values in {name_some(set(faulty))}; mend or remove them."
        )
    return clips


@torch.no_grad()
def held_out_losses(transformer, clips: ClipBatch, *, batch_size: int) -> dict[int, float]:
    """The loss at each of `NOISE_LEVELS`, of the last frame after a clean context as at inference.

    For a model that is not frame-causal all frames are noisy, at the same level.

    Args:
        transformer ([`FARTransformer3DModel`]): In `eval` mode, so that no condition is dropped.
        clips (`ClipBatch`): On the transformer's device.
        batch_size (`int`): Clips that go through the transformer at once.
    """
    num_clips, num_frames = clips.latents.shape[:2]
    num_noisy = 1 if transformer.config.frame_causal else num_frames
    noise = torch.stack(
        [torch.randn(clips.latents.shape[1:], generator=step_generator(0, 1, number)) for number in range(num_clips)]
    ).to(clips.latents)
    conditions = fed_conditions(clips, transformer.config)
    if transformer.is_separable:
        conditions["clean_hidden_states"] = clips.latents
    losses = {}
    for level in NOISE_LEVELS:
        timestep = torch.full((num_clips, num_frames), -1.0, device=noise.device)
        timestep[:, num_frames - num_noisy :] = level
        total = 0.0
        for first in range(0, num_clips, batch_size):
            part = slice(first, first + batch_size)
            velocity = transformer(
                add_noise(clips.latents[part], noise[part], timestep[part]),
                timestep[part],
                **{name: value[part] for name, value in conditions.items()},
            ).sample
            loss = velocity_loss(velocity, clips.latents[part], noise[part], timestep[part])
            total += loss.item() * len(timestep[part])
        losses[level] = total / num_clips
    return losses


@torch.no_grad()
def rollout(
    pipeline, clips: ClipBatch, *, num_context_frames: int, num_inference_steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predict the frames of `clips` after the context, at the true actions.

    Returns:
        Predicted and true frames, each `(B, F - num_context_frames, 3, h, w)` in [0, 1]. The true ones are decoded from
        their latents, so that what the VAE loses does not count.
    """
    num_frames = clips.latents.shape[1] - num_context_frames
    config = pipeline.transformer.config
    takes_actions = config.num_actions is not None or config.action_dim is not None
    generators = [step_generator(0, 2, number) for number in range(len(clips.latents))]
    predicted = pipeline(
        video_latents=clips.latents[:, :num_context_frames],
        actions=clips.actions if takes_actions else None,
        class_labels=clips.labels if config.num_classes is not None else None,
        num_frames=num_frames,
        num_inference_steps=num_inference_steps,
        generator=generators,
        output_type="pt",
    ).frames
    true_latents = clips.latents[:, num_context_frames:]
    truth = decode_video(pipeline.vae, true_latents.flatten(0, 1)).unflatten(0, true_latents.shape[:2])
    return predicted.float().cpu(), truth.float().cpu()


def psnr_metrics(name: str, predicted: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """`psnr_per_horizon` as metrics: `{name}_of_frame_1` and so on, and their mean as `name`."""
    values = psnr_per_horizon(predicted, truth)
    metrics = {f"{name}_of_frame_{horizon}": value for horizon, value in enumerate(values, start=1)}
    return metrics | {name: np.mean(values).item()}


def psnr_per_horizon(predicted: torch.Tensor, truth: torch.Tensor) -> list[float]:
    """PSNR in dB of the first, second, ... predicted frame: each video's own, then the mean over videos.

    Args:
        predicted, truth (`torch.Tensor` of shape `(B, F, 3, h, w)`): In [0, 1].
    """
    squared_error = (predicted - truth).square().flatten(2).mean(dim=2)
    return (-10 * squared_error.clamp(min=1e-10).log10()).mean(dim=0).tolist()


# The rows of the table of held-out figures: what is measured on each predicted frame.
PSNR_ROWS = {
    "psnr": "PSNR, dB: model",
    "repeated_psnr": "  repeating the last frame",
    "vae_psnr": "  VAE, of the true frames",
}
MAX_COLUMNS = 8


@dataclass(frozen=True)
class Measurement:
    """What `measure` found.

    Args:
        metrics (`dict[str, float]`): `loss` and `loss_at_...` per noise level; where videos were continued, in dB: `psnr` and
            `psnr_of_frame_...` of the model, `repeated_psnr...` of the last context frame shown again, both against the
            VAE's reconstruction, and, where the data have pixels, `vae_psnr...` of that against the true frames.
        predicted, truth (`torch.Tensor` of shape `(B, F, 3, h, w)`, *optional*): In [0, 1]; `None` where none were.
    """

    metrics: dict[str, float]
    predicted: torch.Tensor | None = None
    truth: torch.Tensor | None = None


def measure(settings: FARSettings, pipeline, latents: LatentDataset | EncodedDataset) -> Measurement:
    """Held-out loss per noise level, and PSNR of each predicted frame, beside that of repeating the last frame.

    Args:
        settings ([`FARSettings`]): Of the script. Without `num_validation_inference_steps` the pipeline takes its own.
        pipeline ([`FARPipeline`] or [`VideoDiTPipeline`]): Its transformer in `eval` mode.
        latents (`LatentDataset` or `EncodedDataset`): Held out; the same clips of it are measured every time.
    """
    transformer = pipeline.transformer
    place = (settings.num_frames, settings.frame_interval, pipeline.vae)
    clips = validation_clips(latents, settings.num_validation_clips, *place)
    losses = held_out_losses(transformer, clips.to(transformer.device), batch_size=settings.train_batch_size)
    metrics = {f"loss_at_{level}": loss for level, loss in losses.items()}
    metrics["loss"] = np.mean([*losses.values()]).item()
    num_context_frames = settings.num_frames - settings.num_validation_frames
    if not settings.num_validation_videos or num_context_frames <= 0:
        return Measurement(metrics)
    clips = validation_clips(latents, settings.num_validation_videos, *place, keep_frames=True)
    predicted, truth = rollout(
        pipeline,
        replace(clips, frames=None).to(transformer.device),
        num_context_frames=num_context_frames,
        num_inference_steps=settings.num_validation_inference_steps,
    )
    last_context_frame = decode_video(pipeline.vae, clips.latents[:, num_context_frames - 1].to(transformer.device))
    metrics |= psnr_metrics("psnr", predicted, truth)
    metrics |= psnr_metrics("repeated_psnr", last_context_frame[:, None].float().cpu(), truth)
    if clips.frames is not None:
        metrics |= psnr_metrics("vae_psnr", truth, clips.frames[:, num_context_frames:] / 255)
    return Measurement(metrics, predicted, truth)


def side_by_side(truth: torch.Tensor, predicted: torch.Tensor, num_videos: int = 4, gap: int = 2) -> torch.Tensor:
    """Truth on the left and prediction on the right as one video, a row for each of the first `num_videos`.

    Args:
        truth, predicted (`torch.Tensor` of shape `(B, F, 3, h, w)`): In [0, 1].
        num_videos (`int`): Rows at most.
        gap (`int`): White pixels around each video.

    Returns:
        `torch.Tensor` of shape `(F, 3, rows * (h + 2 * gap), 2 * (w + 2 * gap))`.
    """
    pairs = torch.stack([truth[:num_videos], predicted[:num_videos]], dim=1)  # (rows, 2, F, 3, h, w)
    padded = torch.nn.functional.pad(pairs, (gap, gap, gap, gap), value=1.0)
    return padded.permute(2, 3, 0, 4, 1, 5).flatten(4).flatten(2, 3)


def describe_metrics(metrics: Mapping[str, float]) -> str:
    """A table for the log: the loss by noise level, and the PSNR by predicted frame, of the model and of what it is compared
    with. Of many frames it shows some, evenly spaced; the means are over all.

    Args:
        metrics (`dict`): Of a [`Measurement`].
    """
    levels = [name.removeprefix("loss_at_") for name in metrics if name.startswith("loss_at_")]
    rows = [["noise level", *levels, "mean"]] if levels else []
    rows += [["loss", *(f"{metrics[f'loss_at_{level}']:.4f}" for level in levels), f"{metrics['loss']:.4f}"]]
    num_frames = sum(name.startswith("psnr_of_frame_") for name in metrics)
    shown = [index + 1 for index in evenly_spaced(num_frames, MAX_COLUMNS)] if num_frames else []
    if shown:
        rows += [["predicted frame", *map(str, shown), "mean"]]
    for name, heading in PSNR_ROWS.items():
        if name in metrics:
            values = [*(metrics[f"{name}_of_frame_{frame}"] for frame in shown), metrics[name]]
            rows += [[heading, *(f"{value:.2f}" for value in values)]]
    return "\n".join(f"  {row[0]:<26}" + "".join(f"{value:>8}" for value in row[1:]) for row in rows)
