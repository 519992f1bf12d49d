"""Clips of a dataset's videos, decoded and not yet encoded: what the processes that load the data work on."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset

from .actions import align_actions, clip_actions, count_actions, read_actions
from .frames import VideoFrames
from .rows import SOURCE_COLUMN, BadExampleError, check_actions, check_labels, row_name


PNG_SIZE_BYTES = 24  # signature, name of the first chunk, width and height


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
        columns = [name for name in ("actions", "label", SOURCE_COLUMN) if name in trajectories.column_names]
        self.rows = trajectories.select_columns(columns).with_format("arrow")
        self.num_actions = count_actions(self._column("actions"))

    def __len__(self) -> int:
        return len(self.num_frames)

    def clip(self, trajectory: int, start: int, length: int, interval: int = 1) -> VideoClip:
        """Decode `length` frames, `interval` apart, from frame `start` on.

        Raises:
            BadExampleError: If the trajectory's file is damaged or its actions do not fit its frames.
        """
        try:
            frames = self.frames.clip(trajectory, start, length, interval)
        except (ValueError, OSError) as error:  # frames of several sizes, an image that is none
            raise BadExampleError(f"{self.name(trajectory)} has frames that cannot be read: {error}") from error
        row = self.rows[trajectory] if self.rows.column_names else None
        actions, label = None, None
        if "actions" in self.rows.column_names:
            num_frames = int(self.num_frames[trajectory])
            actions = cut_actions(
                read_actions(row["actions"][0]),
                num_frames,
                start,
                length,
                interval,
                self.combine_actions,
                lambda: self.name(trajectory),
            )
        if "label" in self.rows.column_names:
            label = row["label"][0].as_py()
        return VideoClip(frames, None if actions is None else torch.from_numpy(actions), label)

    def name(self, trajectory: int) -> str:
        """What an error calls a trajectory: its number, and its file or its name in the source where these are known."""
        source = None
        if SOURCE_COLUMN in self.rows.column_names:
            source = self.rows[trajectory][SOURCE_COLUMN][0]
        elif self.frames.holds_files:
            source = self.frames.rows[trajectory][self.frames.column]["path"]
        return row_name(trajectory, source)

    def check_rows(self, num_actions: int | None = None, num_classes: int | None = None) -> None:
        """Look at every row before work on them begins: at the number and the values of its actions, at its label, and at
        the size of its frames: of all images if they are PNG, else of its first frame, which is decoded.

        Args:
            num_actions, num_classes (`int`, *optional*): Discrete actions and classes that there are; `None`: any number.

        Raises:
            BadExampleError: Names the first row that does not fit, and what is wrong with it.
        """
        if "actions" in self.rows.column_names:
            limit = getattr(self.combine_actions, "num_actions", None) or num_actions
            check_actions(self._column("actions"), self.num_frames, limit, self.name)
        if "label" in self.rows.column_names and num_classes is not None:
            check_labels(self._column("label"), num_classes, self.name)
        self.check_frame_sizes()

    def check_frame_sizes(self) -> None:
        """The part of [`VideoClips.check_rows`] that looks at frames."""
        first = None
        for trajectory in range(len(self)):
            sizes = set() if self.frames.holds_files else self._png_sizes(trajectory)
            if not sizes:
                sizes = {tuple(self.clip(trajectory, 0, 1).frames.shape[2:])}
            first = first or sizes
            if len(sizes | first) > 1:
                raise BadExampleError(
                    f"{self.name(trajectory)} has frames of {sorted(sizes)}, but the first trajectory's are "
                    f"{sorted(first)} (height, width); prepare the dataset with prepare_dataset.py and `--size`."
                )

    def _png_sizes(self, trajectory: int) -> set[tuple[int, int]]:
        """The sizes of a trajectory's images, as their headers say; none unless all of them are PNG files."""
        images = self.frames.rows[trajectory][self.frames.column][0].values.field("bytes")
        headers = pc.binary_slice(images, 0, PNG_SIZE_BYTES).unique().to_pylist()
        if not all(header is not None and header.startswith(b"\x89PNG") for header in headers):
            return set()
        return {(int.from_bytes(header[20:24]), int.from_bytes(header[16:20])) for header in headers}

    def _column(self, name: str) -> pa.ChunkedArray | None:
        """Of the rows that were selected, in their order."""
        return self.rows.select_columns([name])[:].column(name) if name in self.rows.column_names else None


def cut_actions(
    actions: np.ndarray | list,
    num_frames: int,
    start: int,
    length: int,
    interval: int,
    combine_actions: Callable[[np.ndarray], np.ndarray] | None,
    name: Callable[[], str],
) -> np.ndarray:
    """The actions of a clip of the trajectory that an error calls `name()`, see [`align_actions`] and [`clip_actions`].

    Raises:
        BadExampleError: If the trajectory's actions do not fit its `num_frames` frames.
    """
    try:
        actions = align_actions(actions, num_frames)
    except ValueError as error:
        raise BadExampleError(f"{name()}: {error}") from error
    return clip_actions(actions[start:], length, interval, combine_actions)
