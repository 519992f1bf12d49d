"""Clips of a dataset's videos, encoded when they are asked for: training without cached latents."""

from collections.abc import Callable

import numpy as np
import torch
from datasets import Dataset

from ..models.codec import encode_video, spatial_compression
from .fingerprint import dataset_fingerprint, vae_hash
from .latents import LatentClip
from .video_clips import VideoClips


class EncodedDataset:
    """As [`LatentDataset`], of videos instead of cached latents. Encoding every clip again takes time at each step:
    cache the latents of a dataset that is seen more than once.

    Args:
        trajectories (`datasets.Dataset`): A row per trajectory, with `actions` and `label` where there are any.
        vae (`nn.Module`): Encodes, where it lies.
        column (`str`): The videos: `List(Image())` or `Video`.
        combine_actions (callable, *optional*): As for [`LatentDataset`].

    Attributes:
        videos ([`VideoClips`]): The same clips before they are encoded.
        num_frames (`np.ndarray` of shape `(num_trajectories,)`, int64): Frames of each trajectory.
        latent_shape (`tuple`): `(C, H, W)`.
        dataset_fingerprint (`str`), vae_hash (`str`): What it is made of.
        num_actions (`int`, *optional*): One above the highest discrete action.
    """

    def __init__(
        self,
        trajectories: Dataset,
        vae: torch.nn.Module,
        column: str = "video",
        combine_actions: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.videos = VideoClips(trajectories, column, combine_actions)
        self.vae = vae
        self.num_frames, self.num_actions = self.videos.num_frames, self.videos.num_actions
        self.dataset_fingerprint, self.vae_hash = dataset_fingerprint(trajectories), vae_hash(vae)
        first_frame = self.videos.frames.clip(0, 0, 1)
        unit = spatial_compression(vae)
        if first_frame.shape[2] % unit or first_frame.shape[3] % unit:
            raise ValueError(
                f"Frames of {first_frame.shape[2]}x{first_frame.shape[3]} cannot be encoded: the VAE needs multiples of "
                f"{unit}; prepare the dataset with prepare_dataset.py and `--size`."
            )
        self.latent_shape = tuple(encode_video(vae, first_frame).shape[1:])

    def __len__(self) -> int:
        return len(self.num_frames)

    def check_rows(self, num_actions: int | None = None, num_classes: int | None = None) -> None:
        """See [`VideoClips.check_rows`]."""
        self.videos.check_rows(num_actions, num_classes)

    def clip(self, trajectory: int, start: int, length: int, interval: int = 1) -> LatentClip:
        """Decode and encode `length` frames, `interval` apart, from frame `start` on.

        Raises:
            BadExampleError: If the trajectory's file is damaged or its actions do not fit its frames.
        """
        clip = self.videos.clip(trajectory, start, length, interval)
        return LatentClip(encode_video(self.vae, clip.frames).float().cpu(), clip.actions, clip.label)
