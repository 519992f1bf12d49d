"""Clips of a dataset's videos, decoded and not yet encoded: what the processes that load the data work on."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset

from .actions import align_actions, clip_actions, count_actions, read_actions
from .faults import BadExampleError
from .frames import VideoFrames


@dataclass(frozen=True)
class VideoClip:
    """Frames of one trajectory.

    Attributes:
        frames (`torch.Tensor` of shape `(F, 3, height, width)`): uint8, RGB.
        actions (`torch.Tensor` of shape `(F,)`, int64, or `(F, A)`, float32): As of [`LatentClip`].
        label (`int`): As of [`LatentClip`].
    """

    frames: torch.Tensor
    actions: torch.Tensor | None
    label: int | None


class VideoClips:
    """The clips of a dataset, by trajectory and first frame. It holds no model, so that it can be sent to a process.

    Args:
        trajectories (`datasets.Dataset`): A row per trajectory, with `actions` and `label` where there are any.
        column (`str`): The videos: `List(Image())` or `Video`.
        combine_actions (callable, *optional*): As for [`LatentDataset`].

    Attributes:
        num_frames (`np.ndarray` of shape `(num_trajectories,)`, int64): Frames of each trajectory.
        num_actions (`int`, *optional*): One above the highest discrete action.
    """

    def __init__(
        self,
        trajectories: Dataset,
        column: str = "video",
        combine_actions: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.frames = VideoFrames(trajectories, column)
        self.num_frames = self.frames.num_frames
        self.combine_actions = combine_actions
        columns = [name for name in ("actions", "label") if name in trajectories.column_names]
        self.rows = trajectories.select_columns(columns).with_format("arrow")
        self.num_actions = count_actions(self.rows.data.column("actions")) if "actions" in columns else None

    def __len__(self) -> int:
        return len(self.num_frames)

    def clip(self, trajectory: int, start: int, length: int, interval: int = 1) -> VideoClip:
        """Decode `length` frames, `interval` apart, from frame `start` on.

        Raises:
            BadExampleError: If the trajectory's file is damaged or its actions do not fit its frames.
        """
        frames = self.frames.clip(trajectory, start, length, interval)
        row = self.rows[trajectory] if self.rows.column_names else None
        actions, label = None, None
        if "actions" in self.rows.column_names:
            num_frames = int(self.num_frames[trajectory])
            name = f"Trajectory {trajectory}"
            actions = cut_actions(
                read_actions(row["actions"][0]), num_frames, start, length, interval, self.combine_actions, name
            )
        if "label" in self.rows.column_names:
            label = row["label"][0].as_py()
        return VideoClip(frames, None if actions is None else torch.from_numpy(actions), label)


def cut_actions(
    actions: np.ndarray | list,
    num_frames: int,
    start: int,
    length: int,
    interval: int,
    combine_actions: Callable[[np.ndarray], np.ndarray] | None,
    name: str,
) -> np.ndarray:
    """The actions of a clip of the trajectory `name`, see [`align_actions`] and [`clip_actions`].

    Raises:
        BadExampleError: If the trajectory's actions do not fit its `num_frames` frames.
    """
    try:
        actions = align_actions(actions, num_frames)
    except ValueError as error:
        raise BadExampleError(f"{name}: {error}") from error
    return clip_actions(actions[start:], length, interval, combine_actions)
