"""Frames of trajectories: single ones, for autoencoders, and runs of them, whether stored as images or as video files."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from datasets import Dataset, Features, Image, Video

from ..pictures import upright_rgb
from .rows import BadExampleError
from .video import FrameTimes, count_frames, read_frame_times, read_frames


IMAGE_DECODER = Image()


class FrameDataset(torch.utils.data.Dataset):
    """All frames of all trajectories, one after another; decodes only the frame that is asked for.

    A row of 300 decoded frames would be slow to read for one of them, so the encoded bytes are taken from the Arrow
    table, which is memory-mapped.

    Args:
        trajectories (`datasets.Dataset`): A row per trajectory.
        column (`str`): The column of type `List(Image())`.

    Raises:
        ValueError: If `column` is missing, empty or of another type.
    """

    def __init__(self, trajectories: Dataset, column: str = "video") -> None:
        if column not in trajectories.column_names:
            raise ValueError(
                f"`column` is {column!r}, but the dataset has {trajectories.column_names}; name the frames'."
            )
        if holds_video_files(trajectories.features, column):
            raise ValueError(
                f"`column` is {column!r}, which holds video files: to find one frame in such a file, many are decoded. "
                "Turn them into images with prepare_dataset.py."
            )
        self.rows = trajectories.select_columns([column]).with_format("arrow")
        self.column = column
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
        return decode_images([encoded])[0]


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
            self._times = {}
        else:
            frames = FrameDataset(trajectories, column)
            self.rows = frames.rows
            self.num_frames = np.diff(frames.first_frame)

    def clip(self, trajectory: int, start: int, length: int, interval: int = 1) -> torch.Tensor:
        """`length` frames from frame `start` on, `interval` apart: `(length, 3, height, width)`, uint8.

        Raises:
            BadExampleError: If the trajectory's file is damaged, or shorter than it says.
        """
        if self.holds_files:
            times = self._frame_times(trajectory) if start else None
            return decode_file(self._file(trajectory), start, length, interval, times)
        places = np.arange(start, start + (length - 1) * interval + 1, interval)
        return decode_images(self.rows[trajectory][self.column][0].values.take(places).to_pylist())

    def _file(self, trajectory: int) -> str | bytes:
        file = self.rows[trajectory][self.column]
        return file["path"] if file["bytes"] is None else file["bytes"]

    def _frame_times(self, trajectory: int) -> FrameTimes | None:
        """Read once: they are small beside the file that they spare."""
        if trajectory not in self._times:
            self._times[trajectory] = read_frame_times(self._file(trajectory))
        return self._times[trajectory]


def decode_images(images: Iterable[dict]) -> torch.Tensor:
    """Images as `datasets` stores them, `{"bytes": ..., "path": ...}`: `(F, 3, height, width)`, uint8, RGB.

    Raises:
        BadExampleError: If one is missing or damaged, has pixels of an unknown scale, or another size than the others.
    """
    frames = [_decode_image(image) for image in images]
    sizes = sorted({frame.shape[:2] for frame in frames})
    if len(sizes) != 1:
        raise BadExampleError(f"{len(frames)} images are of sizes {sizes} (height, width); a clip has frames of one.")
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def _decode_image(image: dict) -> np.ndarray:
    try:
        return upright_rgb(IMAGE_DECODER.decode_example(image))
    except Exception as error:  # Pillow's decoders raise whatever the broken bytes lead them to
        name = repr(image["path"]) if image and image.get("path") else "An image without a name"
        reason = " ".join(str(error).split())[:300]
        raise BadExampleError(f"{name} cannot be read ({type(error).__name__}: {reason}); write it anew.") from error


def decode_file(
    file: str | bytes, start: int, length: int, interval: int = 1, times: FrameTimes | None = None
) -> torch.Tensor:
    """As [`read_frames`]: `(length, 3, height, width)`, uint8, RGB."""
    return torch.from_numpy(read_frames(file, start, length, interval, times)).permute(0, 3, 1, 2)


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
