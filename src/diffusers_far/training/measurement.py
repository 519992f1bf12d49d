"""One measurement of a pipeline in training: held-out losses, the quality of its rollouts, and the rollouts to look at.

B batch, F predicted frames, h/w pixels.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ..data.encoded import EncodedDataset
from ..data.frames import evenly_spaced
from ..data.latents import LatentDataset
from ..models.codec import decode_video
from .validation import held_out_losses, psnr_metrics, rollout, validation_clips


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


def measure(args: argparse.Namespace, pipeline, latents: LatentDataset | EncodedDataset) -> Measurement:
    """Held-out loss per noise level, and PSNR of each predicted frame, beside what nobody had to learn.

    Args:
        args (`argparse.Namespace`): With `add_validation_arguments`, `num_frames`, `frame_interval` and
            `train_batch_size`. Without `num_validation_inference_steps` the pipeline takes its own.
        pipeline ([`FARPipeline`] or [`VideoDiTPipeline`]): Its transformer in `eval` mode.
        latents (`LatentDataset` or `EncodedDataset`): Held out; the same clips of it are measured every time.
    """
    transformer = pipeline.transformer
    clips = validation_clips(latents, args.num_validation_clips, args.num_frames, args.frame_interval)
    losses = held_out_losses(transformer, clips.to(transformer.device), batch_size=args.train_batch_size)
    metrics = {f"loss_at_{level}": loss for level, loss in losses.items()}
    metrics["loss"] = np.mean([*losses.values()]).item()
    num_context_frames = args.num_frames - args.num_validation_frames
    if not args.num_validation_videos or num_context_frames <= 0:
        return Measurement(metrics)
    clips = validation_clips(latents, args.num_validation_videos, args.num_frames, args.frame_interval)
    predicted, truth = rollout(
        pipeline,
        clips.to(transformer.device),
        num_context_frames=num_context_frames,
        num_inference_steps=args.num_validation_inference_steps,
    )
    last_context_frame = decode_video(pipeline.vae, clips.latents[:, num_context_frames - 1].to(transformer.device))
    metrics |= psnr_metrics("psnr", predicted, truth)
    metrics |= psnr_metrics("repeated_psnr", last_context_frame[:, None].float().cpu(), truth)
    if isinstance(latents, EncodedDataset):
        videos = validation_clips(latents.videos, args.num_validation_videos, args.num_frames, args.frame_interval)
        metrics |= psnr_metrics("vae_psnr", truth, videos.frames[:, num_context_frames:] / 255)
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
    """A table for the log: the loss by noise level, and PSNR by predicted frame, of the model and of what nobody had to
    learn. Of many frames it has some, spread over all; the means are over all.

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
