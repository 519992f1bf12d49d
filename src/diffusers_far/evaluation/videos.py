"""The true videos of a protocol, with the conditions that they were recorded under.

F frames; h/w pixels.
"""

import numpy as np
from datasets import Dataset

from ..data.clips import Clip, evenly_spaced
from ..data.video_clips import VideoClips
from .protocols import LatteProtocol, RolloutProtocol


class TrueVideos:
    """The clips that a protocol asks for, by number.

    Args:
        dataset (`datasets.Dataset`): A row per video: `video` (images or a file), and `actions`, `label` and `pose` where
            they exist.
        protocol ([`RolloutProtocol`]): How many, how long, where they start.
        transformer_config: Which conditions the model takes.

    Attributes:
        rows (`list[int]`): The row of each video.
        num_too_short (`int`): Rows that are not long enough.

    Raises:
        ValueError: Too few videos that are long enough, or a column that the model needs is missing.
    """

    def __init__(self, dataset: Dataset, protocol: RolloutProtocol, transformer_config) -> None:
        self.protocol = protocol
        self.needs_actions = transformer_config.num_actions is not None or transformer_config.action_dim is not None
        self.needs_label = transformer_config.num_classes is not None and getattr(protocol, "condition", "") != "free"
        check_conditions(dataset, protocol, self.needs_actions, self.needs_label, transformer_config)
        conditions = {"actions": self.needs_actions, "label": self.needs_label, "pose": True}
        self.clips = VideoClips(dataset, conditions=[name for name, is_needed in conditions.items() if is_needed])
        usable = np.flatnonzero(self.clips.num_frames >= protocol.num_frames_needed)
        self.num_too_short = len(self.clips.num_frames) - len(usable)
        if len(usable) < protocol.num_videos:
            raise ValueError(
                f"`num_videos` is {protocol.num_videos}, but {len(usable)} of {len(dataset)} videos have the "
                f"{protocol.num_frames_needed} frames that this protocol needs; lower it, or the numbers of frames."
            )
        self.rows = usable[evenly_spaced(len(usable), protocol.num_videos)].tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def clip(self, video: int, num_frames: int) -> Clip:
        """The first `num_frames` frames of a video's clip, with the conditions that the model takes, and poses."""
        row = self.rows[video]
        start = self.protocol.first_frame(video, int(self.clips.num_frames[row]))
        return self.clips.clip(row, start, num_frames, self.protocol.frame_interval)


def check_conditions(
    dataset: Dataset, protocol: RolloutProtocol, needs_actions: bool, needs_label: bool, transformer_config
) -> None:
    """Refuse a dataset without the columns that the model takes, or a protocol that the model cannot follow."""
    for column, is_needed in (("actions", needs_actions), ("label", needs_label)):
        if is_needed and column not in dataset.column_names:
            raise ValueError(
                f"The model takes {column}, but the dataset has the columns {dataset.column_names}; name one with "
                f"`{column}`."
            )
    if needs_actions and protocol.frame_interval > 1:
        raise ValueError(
            f"`frame_interval` is {protocol.frame_interval}, and the actions between two frames would be lost; prepare "
            "the dataset with `prepare_dataset.py --frame_interval ... --combine_actions ...`, and leave it at 1 here."
        )
    is_under_classes = isinstance(protocol, LatteProtocol) and protocol.condition == "class"
    if is_under_classes and transformer_config.num_classes is None:
        raise ValueError("`condition` is 'class', but this model knows no classes; pass `--condition free`.")
