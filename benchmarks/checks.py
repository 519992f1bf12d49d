"""No figure is bought with a wrong result: every case compares its output with the naive reference's."""

import torch

from .measurement import Measurement


TOLERANCE = 1e-4


def require_close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> Measurement:
    """The largest difference of two outputs, whose values are of about unit size.

    Raises:
        RuntimeError: It is above the tolerance, or not a number.
    """
    difference = (actual - expected).abs().max().item()
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"FAR and the naive reference differ by {difference} in {what}; at most {TOLERANCE} is right."
        )
    return Measurement((difference,), "difference")
