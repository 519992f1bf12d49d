"""From logits to a code, by random numbers that are drawn beforehand.

B batch, T codes per frame, N size of the codebook.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class CodeSampling:
    """Chooses a code for each video.

    Args:
        temperature (`float`): At least 0; 0 takes the likeliest code.
        top_k (`int`, *optional*): Draw only from the k likeliest codes.
        top_p (`float`, *optional*): Above 0, at most 1: draw only from the likeliest codes that together have
            probability p.

    Raises:
        ValueError: A value is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"`temperature` is {self.temperature}; give 0 for the likeliest code, or a number above 0."
            )
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"`top_k` is {self.top_k!r}; it counts codes, so give a whole number from 1, or None.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` is {self.top_p}; it is a probability above 0 and at most 1, or None.")

    def __call__(self, logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Choose.

        Args:
            logits (`torch.Tensor` of shape `(B, N)`): Of the next code.
            uniform (`torch.Tensor` of shape `(B,)`): Random numbers in [0, 1).

        Returns:
            `torch.Tensor` of shape `(B,)`, int64.
        """
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        scores = logits.double() / self.temperature
        if self.top_k is not None:
            scores = TopKLogitsWarper(self.top_k)(None, scores)
        if self.top_p is not None:
            scores = TopPLogitsWarper(self.top_p)(None, scores)
        # The inverse of the distribution function, in float64: a float32 draw times the total stays below the total, so
        # a code that was ruled out, whose step has no height, is never hit.
        cumulative = scores.softmax(dim=-1).cumsum(dim=-1)
        threshold = uniform.double()[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, threshold, right=True).squeeze(1)


def draw_uniform(
    batch_size: int, num_draws: int, generator: torch.Generator | Sequence[torch.Generator] | None = None
) -> torch.Tensor:
    """Random numbers in [0, 1), of each video from its own generator where there is a list of them.

    Args:
        batch_size (`int`): B.
        num_draws (`int`): Numbers for each video.
        generator (`torch.Generator` or a list of B, *optional*): On any device, where the numbers then lie; on the CPU
            they are the same whatever device computes the rest.

    Returns:
        `torch.Tensor` of shape `(B, num_draws)`, float32.

    Raises:
        ValueError: There are more or fewer generators than videos.
    """
    if generator is None or isinstance(generator, torch.Generator):
        device = None if generator is None else generator.device
        return torch.rand(batch_size, num_draws, generator=generator, device=device)
    if len(generator) != batch_size:
        raise ValueError(
            f"`generator` has {len(generator)} for a batch of {batch_size} videos; give one for each, or a single one."
        )
    return torch.stack([torch.rand(num_draws, generator=each, device=each.device) for each in generator])
