"""How far predicted frames are from true ones, and one set of features from another (the Fréchet distance).

B batch, F frames, N samples, D features; h/w pixels. Videos are (B, F, 3, h, w) in [0, 1].
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from .protocols import MAX_DISTANCE, MAX_RECENT_AGE, MAX_TURN, MIN_REVISIT_AGE


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian by its mean and a factor of its covariance, which is never formed.

    Args:
        mean (`torch.Tensor` of shape `(D,)`): float64.
        factor (`torch.Tensor` of shape `(K, D)`): float64, with `factor.T @ factor` the covariance.
        num_samples (`int`, *optional*): How many samples it was estimated from, where it was.
    """

    mean: torch.Tensor
    factor: torch.Tensor
    num_samples: int | None = None

    @classmethod
    def of_samples(cls, features: torch.Tensor) -> "Gaussian":
        """Of a sample `(N, D)`, its covariance unbiased.

        Raises:
            ValueError: Another shape, fewer than two samples, or values that are not finite.
        """
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"`features` has shape {tuple(features.shape)}; pass (samples, features), two at least.")
        if not torch.isfinite(features).all():
            raise ValueError("`features` has NaN or infinite values; look for frames that are not finite.")
        features = features.double()
        mean = features.mean(dim=0)
        factor = (features - mean) / (len(features) - 1) ** 0.5
        if factor.shape[0] > factor.shape[1]:
            factor = torch.linalg.qr(factor, mode="r").R  # the same covariance in at most D rows
        return cls(mean, factor, len(features))

    @classmethod
    def of_moments(cls, mean: torch.Tensor, covariance: torch.Tensor) -> "Gaussian":
        """Of a mean `(D,)` and a covariance `(D, D)`, symmetric and without negative eigenvalues beyond rounding."""
        eigenvalues, eigenvectors = torch.linalg.eigh(covariance.double())
        return cls(mean.double(), eigenvalues.clamp(min=0).sqrt()[:, None] * eigenvectors.T)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Squared Fréchet (2-Wasserstein) distance, in closed form:

        |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))

    With `S = A.T @ A` the last trace is the sum of the singular values of `A1 @ A2.T`. So no square root is taken of
    eigenvalues that rounding has moved around zero, as happens where there are fewer samples than features.

    Source: Dowson and Landau, "The Fréchet distance between multivariate normal distributions", 1982.

    Raises:
        ValueError: The two have different numbers of features.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"`first` has {len(first.mean)} features and `second` {len(second.mean)}; compare features of one network."
        )
    between_means = (first.mean - second.mean).square().sum()
    variances = first.factor.square().sum() + second.factor.square().sum()
    shared = torch.linalg.svdvals(first.factor @ second.factor.T).sum()
    return max(0.0, (between_means + variances - 2 * shared).item())  # a distance is not negative, rounding may be


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

    def to_json(self) -> dict[str, float | int | None]:
        """Its fields; `None` for a mean of no samples and for an interval of fewer than two, which JSON has no number for."""
        values = {"mean": self.mean, "half_width": self.half_width, "num_samples": self.num_samples}
        return {name: None if math.isnan(value) else value for name, value in values.items()}

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


def frame_ssim(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Structural similarity of every frame: a Gaussian window of 11 pixels, the mean over pixels and channels.

    Args:
        predicted, target (`torch.Tensor` of shape `(B, F, 3, h, w)`): In [0, 1].

    Returns:
        `torch.Tensor` of shape `(B, F)`, at most 1, which equal frames have.
    """
    ssim = [
        structural_similarity_index_measure(ours, truth, data_range=1.0, reduction="none").reshape(len(ours))
        for ours, truth in zip(predicted, target)
    ]
    return torch.stack(ssim)


def frame_lpips(lpips: torch.nn.Module, predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Perceptual distance of every frame.

    Args:
        lpips ([`~diffusers_far.evaluation.networks.LPIPS`]): From images in [-1, 1] to one distance each; on any device.
        predicted, target (`torch.Tensor` of shape `(B, F, 3, h, w)`): In [0, 1].

    Returns:
        `torch.Tensor` of shape `(B, F)`, at least 0, on the CPU.
    """
    device = next(lpips.parameters()).device
    with torch.no_grad():
        distance = [
            lpips(ours.to(device) * 2 - 1, truth.to(device) * 2 - 1).cpu()
            for ours, truth in zip(predicted.flatten(0, 1).split(32), target.flatten(0, 1).split(32))
        ]
    return torch.cat(distance).unflatten(0, predicted.shape[:2])


def best_trajectory(scores: torch.Tensor, *, higher_is_better: bool) -> torch.Tensor:
    """Of several trajectories of each video, the one whose mean over frames is best.

    Args:
        scores (`torch.Tensor` of shape `(num_videos, num_trajectories, F)`): One score per frame.
        higher_is_better (`bool`): `False` for distances.

    Returns:
        `torch.Tensor` of shape `(num_videos, F)`: all frames of that one trajectory, so that a video's mean is the best
        mean and no frame is picked from another trajectory.
    """
    means = scores.double().mean(dim=2)
    best = means.argmax(dim=1) if higher_is_better else means.argmin(dim=1)
    return scores[torch.arange(len(scores)), best]


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
    pose: torch.Tensor,
    memory: slice,
    frames: slice,
    *,
    max_distance: float = MAX_DISTANCE,
    max_turn: float = MAX_TURN,
    min_age: int = 1,
    max_age: int | None = None,
) -> torch.Tensor:
    """Whether the view of each frame was seen in a stretch of memory: near in place and heading.

    Args:
        pose (`torch.Tensor` of shape `(F, 3)`): Position (x, y), and heading in degrees.
        memory (`slice`): Frames that may be remembered.
        frames (`slice`): Frames that are asked about.
        max_distance (`float`): In units of the position.
        max_turn (`float`): In degrees, whichever way round.
        min_age (`int`), max_age (`int`, *optional*): Only what was seen so many frames before the frame asked about counts.

    Returns:
        `torch.Tensor` of shape `(number of frames asked about,)`, bool.
    """
    now, then = pose[frames][:, None], pose[memory][None]
    distance = (now[..., :2] - then[..., :2]).norm(dim=-1)
    turn = ((now[..., 2] - then[..., 2] + 180) % 360 - 180).abs()
    frame_index = torch.arange(len(pose))
    age = frame_index[frames][:, None] - frame_index[memory][None]
    counts = (age >= min_age) & (age <= (len(pose) if max_age is None else max_age))
    return ((distance <= max_distance) & (turn <= max_turn) & counts).any(dim=1)


def revisited_and_unseen(seen_long_ago: torch.Tensor, seen_since: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a revisit is: a view that was seen long ago and not since. A view that was seen at neither time is unseen; one that
    was seen since is neither. Masks of one shape, bool."""
    return seen_long_ago & ~seen_since, ~seen_long_ago & ~seen_since


def revisits_by_age(
    pose: torch.Tensor,
    frames: slice,
    *,
    min_revisit_age: int = MIN_REVISIT_AGE,
    max_recent_age: int = MAX_RECENT_AGE,
    max_distance: float = MAX_DISTANCE,
    max_turn: float = MAX_TURN,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which frames revisit a view, and which show one that was never seen, where long ago is told by age.

    Args:
        pose (`torch.Tensor` of shape `(F, 3)`): Of everything that may be remembered; see [`seen_before`].
        frames (`slice`): Frames that are asked about.
        min_revisit_age (`int`): Seen at least so many frames before is long ago.
        max_recent_age (`int`): The last so many frames led to the view, and do not count.

    Returns:
        Two `torch.Tensor` of shape `(number of frames asked about,)`, bool: see [`revisited_and_unseen`].
    """
    everything, near = slice(0, len(pose)), {"max_distance": max_distance, "max_turn": max_turn}
    long_ago = seen_before(pose, everything, frames, **near, min_age=min_revisit_age)
    since = seen_before(pose, everything, frames, **near, min_age=max_recent_age + 1, max_age=min_revisit_age - 1)
    return revisited_and_unseen(long_ago, since)


def mean_where(values: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    """Mean over the masked frames of each walk, NaN where a walk has none: (B, F), (B, F) -> (B,)."""
    return (values.double().masked_fill(~mask, 0).sum(dim=1) / mask.sum(dim=1)).numpy()


def scores_by_view(psnr: torch.Tensor, gain: torch.Tensor, masks: dict[str, torch.Tensor]) -> dict:
    """PSNR and its gain over repeating the last frame on the frames of each mask, ready for JSON; all are `(B, F)`."""
    return {
        view: {
            "share_of_frames": mask.double().mean().item(),
            "psnr": Estimate.of(mean_where(psnr, mask)).to_json(),
            "gain_over_repeating": Estimate.of(mean_where(gain, mask)).to_json(),
        }
        for view, mask in masks.items()
    }
