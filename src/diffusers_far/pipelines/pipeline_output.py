from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


Frame = list[PIL.Image.Image] | np.ndarray | torch.Tensor  # one frame of every sample of a batch


@dataclass
class FARPipelineOutput(BaseOutput):
    """Output of [`FARPipeline`].

    Args:
        frames (`list[list[PIL.Image.Image]]`, `np.ndarray` or `torch.Tensor`): The new frames only: a list of videos;
            `(B, F, height, width, 3)` in [0, 1]; `(B, F, 3, height, width)` in [0, 1]; or latents `(B, F, C, H, W)`.
    """

    frames: list[list[PIL.Image.Image]] | np.ndarray | torch.Tensor


def join_frames(frames: list, output_type: str) -> list[list[PIL.Image.Image]] | np.ndarray | torch.Tensor:
    """Frames of all samples, one after the other, as videos: a list per sample, or `(B, F, ...)`."""
    if not frames:
        return []  # interrupted before the first frame was finished
    if output_type == "pil":
        return [list(video) for video in zip(*frames)]
    return np.stack(frames, axis=1) if output_type == "np" else torch.stack(frames, dim=1)
