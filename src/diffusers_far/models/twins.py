"""Twins: the same frame in one pass twice, clean for those after it to see, and noisy to be denoised.

B batch, F frames.
"""

import torch

from .context_plan import ContextPlan
from .frame_batch import FrameBatch


def pair_with_clean(
    frames: FrameBatch, timestep: torch.Tensor, clean_latents: torch.Tensor, plan: ContextPlan, clean_timestep: float
) -> tuple[FrameBatch, torch.Tensor]:
    """All frames clean, and after them the short ones as they were given: their twins. Timesteps likewise."""
    clean_frames = FrameBatch(clean_latents, frames.actions, frames.action_mask)
    twins = frames.last(plan.num_short_frames)
    return clean_frames.append(twins), torch.cat(
        [torch.full_like(timestep, clean_timestep), timestep[:, plan.num_long_frames :]], dim=1
    )
