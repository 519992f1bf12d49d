"""One measurement of a pipeline in training: held-out losses, the quality of its rollouts, and the rollouts to look at.

B batch, F predicted frames, h/w pixels.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ..data.encoded import EncodedDataset
from ..data.latents import LatentDataset
from .validation import held_out_losses, psnr_per_horizon, rollout, validation_clips


@dataclass(frozen=True)
class Measurement:
    """What `measure` found.

    Args:
        metrics (`dict[str, float]`): `loss` and `loss_at_...` per noise level; `psnr` and `psnr_of_frame_...` in dB,
            where videos were continued.
        predicted, truth (`torch.Tensor` of shape `(B, F, 3, h, w)`, *optional*): In [0, 1]; `None` where none were.
    """

    metrics: dict[str, float]
    predicted: torch.Tensor | None = None
    truth: torch.Tensor | None = None


def measure(args: argparse.Namespace, pipeline, latents: LatentDataset | EncodedDataset) -> Measurement:
    """Held-out loss per noise level, and PSNR of each predicted frame against the VAE's reconstruction.

    Args:
        args (`argparse.Namespace`): With `add_validation_arguments`, `num_frames`, `frame_interval` and
            `train_batch_size`.
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
    psnr = psnr_per_horizon(predicted, truth)
    metrics |= {f"psnr_of_frame_{horizon}": value for horizon, value in enumerate(psnr, start=1)}
    metrics["psnr"] = np.mean(psnr).item()
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
    """One line for the log."""
    return ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
