"""Clips of a dataset's videos, encoded when they are asked for: training without cached latents."""

from collections.abc import Callable

import numpy as np
import torch
from datasets import Dataset

from ..models.codec import encode_video, spatial_compression
from .actions import align_actions, clip_actions, count_actions
from .faults import BadExampleError
from .fingerprint import dataset_fingerprint, vae_hash
from .frames import VideoFrames
from .latents import LatentClip


class EncodedDataset:
    """As [`LatentDataset`], of videos instead of cached latents. Encoding every clip again takes time at each step:
    cache the latents of a dataset that is seen more than once.

    Args:
        trajectories (`datasets.Dataset`): A row per trajectory, with `actions` and `label` where there are any.
        vae (`nn.Module`): Encodes, where it lies.
        column (`str`): The videos: `List(Image())` or `Video`.
        combine_actions (callable, *optional*): As for [`LatentDataset`].

    Attributes:
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
        self.frames = VideoFrames(trajectories, column)
        self.vae = vae
        self.combine_actions = combine_actions
        self.num_frames = self.frames.num_frames
        self.dataset_fingerprint, self.vae_hash = dataset_fingerprint(trajectories), vae_hash(vae)
        self.rows = trajectories.remove_columns(column)
        columns = self.rows.column_names
        self._has_actions, self._has_labels = "actions" in columns, "label" in columns
        self.num_actions = count_actions(self.rows.data.column("actions")) if self._has_actions else None
        first_frame = self.frames.clip(0, 0, 1)
        unit = spatial_compression(vae)
        if first_frame.shape[2] % unit or first_frame.shape[3] % unit:
            raise ValueError(
                f"Frames of {first_frame.shape[2]}x{first_frame.shape[3]} cannot be encoded: the VAE needs multiples of "
                f"{unit}; prepare the dataset with prepare_dataset.py and `--size`."
            )
        self.latent_shape = tuple(encode_video(vae, first_frame).shape[1:])

    def __len__(self) -> int:
        return len(self.num_frames)

    def clip(self, trajectory: int, start: int, length: int, interval: int = 1) -> LatentClip:
        """Decode and encode `length` frames, `interval` apart, from frame `start` on.

        Raises:
            BadExampleError: If the trajectory's file is damaged or its actions do not fit its frames.
        """
        latents = encode_video(self.vae, self.frames.clip(trajectory, start, length, interval))
        row = self.rows[trajectory] if self.rows.column_names else {}
        actions = None
        if self._has_actions:
            try:
                actions = align_actions(row["actions"], int(self.num_frames[trajectory]))[start:]
            except ValueError as error:
                raise BadExampleError(f"Trajectory {trajectory}: {error}") from error
            actions = torch.from_numpy(clip_actions(actions, length, interval, self.combine_actions))
        return LatentClip(latents.float().cpu(), actions, row["label"] if self._has_labels else None)
