"""Keeping the codebook of a VQ autoencoder in use.

B batch, D latent channels, H/W latent height/width, N size of the codebook.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..models.codec import encode_codes, nearest_codes


class CodebookRestart:
    """Puts codes that no latent is near to where latents are. Such a code has no gradient and would never move.

    Args:
        vq (`VQModel`): In training.
        num_idle_steps (`int`): Steps without use after which a code is restarted, at least 1.
    """

    def __init__(self, vq: nn.Module, num_idle_steps: int) -> None:
        if num_idle_steps < 1:
            raise ValueError(f"`num_idle_steps` is {num_idle_steps}; it counts steps, so give 1 or more.")
        self.vq = vq
        self.num_idle_steps = num_idle_steps
        self.idle_steps = torch.zeros(vq.config.num_vq_embeddings, dtype=torch.int64)

    @torch.no_grad()
    def step(self, latents: torch.Tensor, generator: torch.Generator) -> int:
        """Count which codes a training step used, and restart the idle ones at random latents of that step.

        Args:
            latents (`torch.Tensor` of shape `(B, D, H, W)`): Of all processes, before quantization.
            generator (`torch.Generator`): On the CPU, the same on all processes.

        Returns:
            `int`: How many codes were restarted.
        """
        codebook = self.vq.quantize.embedding.weight
        latents = latents.to(codebook)
        self.idle_steps += 1
        self.idle_steps[nearest_codes(self.vq, latents).unique().cpu()] = 0
        idle = (self.idle_steps >= self.num_idle_steps).nonzero().squeeze(1)
        if len(idle):
            places = latents.movedim(1, -1).flatten(0, -2)  # (B * H * W, D)
            chosen = torch.randint(len(places), (len(idle),), generator=generator)
            codebook[idle.to(codebook.device)] = places[chosen.to(places.device)]
            self.idle_steps[idle] = 0
        return len(idle)

    def state_dict(self) -> dict[str, Any]:
        return {"idle_steps": self.idle_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.idle_steps = state_dict["idle_steps"].cpu()


def measure_codebook(vq: nn.Module, batches: Iterable[torch.Tensor]) -> dict[str, float]:
    """How much of the codebook some images use.

    Args:
        vq (`VQModel`): The autoencoder.
        batches (iterable of `torch.Tensor` of shape `(B, 3, height, width)`): uint8.

    Returns:
        `codes_used`, a count; `perplexity`, the number of equally frequent codes that would be as hard to guess.
    """
    num_codes = vq.config.num_vq_embeddings
    counts = sum(torch.bincount(encode_codes(vq, batch).flatten(), minlength=num_codes) for batch in batches)
    frequencies = counts[counts > 0] / counts.sum()
    entropy = -(frequencies * frequencies.log()).sum()
    return {"codes_used": float((counts > 0).sum()), "perplexity": entropy.exp().item()}
