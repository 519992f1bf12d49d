"""Single frames of trajectories, for training and measuring autoencoders."""

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset, Image


class FrameDataset(torch.utils.data.Dataset):
    """All frames of all trajectories, one after another; decodes only the frame that is asked for.

    A row of 300 decoded frames would be slow to read for one of them, so the encoded bytes are taken from the Arrow
    table, which is memory-mapped.

    Args:
        trajectories (`datasets.Dataset`): A row per trajectory.
        column (`str`): The column of type `List(Image())`.

    Raises:
        ValueError: If `column` is missing or empty.
    """

    def __init__(self, trajectories: Dataset, column: str = "video") -> None:
        if column not in trajectories.column_names:
            raise ValueError(
                f"`column` is {column!r}, but the dataset has {trajectories.column_names}; name the frames'."
            )
        self.rows = trajectories.select_columns([column]).with_format("arrow")
        self.column = column
        self.decoder = Image(mode="RGB")
        lengths = [len(video) for batch in self.rows.iter(batch_size=64) for video in batch[column]]
        self.first_frame = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        if len(self) == 0:
            raise ValueError(f"The dataset's column {column!r} holds no frames.")

    def __len__(self) -> int:
        return int(self.first_frame[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """The trajectory and the frame within it that a flat index stands for."""
        trajectory = int(np.searchsorted(self.first_frame, index, side="right")) - 1
        return trajectory, int(index - self.first_frame[trajectory])

    def __getitem__(self, index: int) -> torch.Tensor:
        """`torch.Tensor` of shape `(3, height, width)`, uint8."""
        trajectory, frame = self.locate(index)
        encoded = self.rows[trajectory][self.column][0].values[frame].as_py()
        image = np.array(self.decoder.decode_example(encoded))
        return torch.from_numpy(image).permute(2, 0, 1)


def evenly_spaced(num_samples: int, num_wanted: int) -> Sequence[int]:
    """At most `num_wanted` indices spread over `range(num_samples)`, for a sample that is the same in every run."""
    return np.linspace(0, num_samples - 1, min(num_samples, num_wanted)).round().astype(int).tolist()
