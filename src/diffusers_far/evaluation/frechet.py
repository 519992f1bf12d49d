"""The Fréchet distance between two sets of features, each taken as one Gaussian.

N samples, D features.
"""

from dataclasses import dataclass

import torch


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
