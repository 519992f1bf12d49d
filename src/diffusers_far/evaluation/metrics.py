"""Numbers that compare predicted with true frames.

B batch, F frames; h/w pixels. Videos are (B, F, 3, h, w) in [0, 1].
"""

from dataclasses import dataclass

import numpy as np
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval, `mean - half_width` to `mean + half_width`, over `num_samples` independent samples."""

    mean: float
    half_width: float
    num_samples: int

    @classmethod
    def of(cls, values) -> "Estimate":
        """From one value per sample; NaN marks a sample without one. The interval is the normal approximation's."""
        values = np.asarray(values, dtype=np.float64)
        values = values[~np.isnan(values)]
        if len(values) == 0:
            return cls(float("nan"), float("nan"), 0)
        half_width = 1.96 * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        return cls(float(values.mean()), float(half_width), len(values))

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.half_width:.2f}"


def frame_psnr(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of every frame, in dB.

    Args:
        predicted, target (`torch.Tensor` of shape `(B, F, 3, h, w)`): In [0, 1].

    Returns:
        `torch.Tensor` of shape `(B, F)`. Equal frames have infinite PSNR; they are counted as 100 dB.
    """
    psnr = [
        peak_signal_noise_ratio(ours, truth, data_range=1.0)
        for ours, truth in zip(predicted.flatten(0, 1), target.flatten(0, 1))
    ]
    return torch.stack(psnr).clamp(max=100).unflatten(0, predicted.shape[:2])


def gradient_magnitude(video: torch.Tensor) -> torch.Tensor:
    """Mean magnitude of the image gradient of every frame, which blur lowers.

    Args:
        video (`torch.Tensor` of shape `(B, F, 3, h, w)`): In [0, 1].

    Returns:
        `torch.Tensor` of shape `(B, F)`: the mean over pixels and channels of the length of the gradient, by forward
        differences.
    """
    vertical = video[..., 1:, :-1] - video[..., :-1, :-1]
    horizontal = video[..., :-1, 1:] - video[..., :-1, :-1]
    return (vertical**2 + horizontal**2).sqrt().mean(dim=(-3, -2, -1))


def seen_before(
    pose: torch.Tensor, memory: slice, frames: slice, *, max_distance: float = 40.0, max_turn: float = 15.0
) -> torch.Tensor:
    """Whether the view of each frame was seen in a stretch of memory: near in place and heading.

    Args:
        pose (`torch.Tensor` of shape `(F, 3)`): Position (x, y), and heading in degrees.
        memory (`slice`): Frames that may be remembered.
        frames (`slice`): Frames that are asked about.
        max_distance (`float`): In units of the position.
        max_turn (`float`): In degrees.

    Returns:
        `torch.Tensor` of shape `(number of frames asked about,)`, bool.
    """
    now, then = pose[frames][:, None], pose[memory][None]
    distance = (now[..., :2] - then[..., :2]).norm(dim=-1)
    turn = ((now[..., 2] - then[..., 2] + 180) % 360 - 180).abs()
    return ((distance <= max_distance) & (turn <= max_turn)).any(dim=1)
