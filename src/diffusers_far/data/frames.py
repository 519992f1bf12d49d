"""Frames of trajectories: single ones, for autoencoders, and runs of them, whether stored as images or as video files."""

from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch
from datasets import Dataset, Features, Image, Video

from .faults import BadExampleError
from .video import count_frames, iter_video


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


class VideoFrames:
    """Runs of consecutive frames of the trajectories of a dataset.

    Args:
        trajectories (`datasets.Dataset`): A row per trajectory.
        column (`str`): Of type `List(Image())`, or `Video`: files that PyAV decodes.

    Attributes:
        num_frames (`np.ndarray` of shape `(num_trajectories,)`, int64): Frames of each trajectory.

    Raises:
        ValueError: If `column` is missing or of another type.
    """

    def __init__(self, trajectories: Dataset, column: str = "video") -> None:
        self.holds_files = holds_video_files(trajectories.features, column)
        self.column = column
        if self.holds_files:
            self.rows = trajectories.select_columns([column]).cast_column(column, Video(decode=False))
            self.num_frames = np.array(
                [count_frames(self._file(row)) for row in range(len(self.rows))], dtype=np.int64
            )
        else:
            frames = FrameDataset(trajectories, column)
            self.rows, self.decoder = frames.rows, frames.decoder
            self.num_frames = np.diff(frames.first_frame)

    def clip(self, trajectory: int, start: int, length: int, interval: int = 1) -> torch.Tensor:
        """`length` frames from frame `start` on, `interval` apart: `(length, 3, height, width)`, uint8.

        Raises:
            BadExampleError: If the trajectory's file is damaged, or shorter than it says.
        """
        end = start + (length - 1) * interval + 1
        if self.holds_files:
            frames = list(islice(iter_video(self._file(trajectory)), start, end, interval))
            if len(frames) < length:
                raise BadExampleError(f"Trajectory {trajectory} ends before frame {end}; copy or encode it again.")
        else:
            encoded = self.rows[trajectory][self.column][0].values.slice(start, end - start).to_pylist()
            frames = [np.array(self.decoder.decode_example(image)) for image in encoded[::interval]]
        return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)

    def _file(self, trajectory: int) -> str | bytes:
        file = self.rows[trajectory][self.column]
        return file["path"] if file["bytes"] is None else file["bytes"]


def holds_video_files(features: Features, column: str) -> bool:
    """Whether a column holds video files rather than lists of images.

    Raises:
        ValueError: If it is missing, or neither of the two.
    """
    feature = features.get(column)
    if isinstance(feature, Video):
        return True
    if not isinstance(getattr(feature, "feature", None), Image):
        raise ValueError(
            f"`column` is {column!r}, but the dataset has {dict(features)}; name a column of type `List(Image())` or "
            "`Video`, or prepare the dataset with prepare_dataset.py."
        )
    return False


def evenly_spaced(num_samples: int, num_wanted: int) -> Sequence[int]:
    """At most `num_wanted` indices spread over `range(num_samples)`, for a sample that is the same in every run."""
    return np.linspace(0, num_samples - 1, min(num_samples, num_wanted)).round().astype(int).tolist()
