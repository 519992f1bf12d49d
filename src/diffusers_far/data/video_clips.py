"""Datasets of videos that are decoded when they are asked for: clips in any order, clips of a stream, single frames.

F frames, C latent channels, H/W latent height/width; h/w pixels.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset

from ..models.codec import encode_video, spatial_compression
from ..models.identity import vae_hash
from .clips import Clip, StoredTrajectory, holds_video_files
from .loading import dataset_fingerprint
from .rows import SOURCE_COLUMN, BadExampleError, check_conditions, count_actions, read_actions, row_name
from .streaming import StreamedSplit
from .video import FrameTimes, count_frames, read_frame_times


PNG_SIZE_BYTES = 24  # signature, name of the first chunk, width and height


class VideoClips:
    """The clips of a dataset, by trajectory and first frame. It holds no model, so that it can be sent to a process.

    Args:
        trajectories (`datasets.Dataset`): A row per trajectory.
        column (`str`): The videos: `List(Image())`, or `Video`: files that PyAV decodes.
        combine_actions (callable, *optional*): Such as an [`ActionCombiner`]: what becomes of the actions between two
            frames of a clip whose frames lie more than one apart.
        conditions (sequence of `str`): What else a clip has, where the dataset has it: `actions`, `label`, `pose`.

    Attributes:
        num_frames (`np.ndarray` of shape `(num_trajectories,)`, int64): Frames of each trajectory.

    Raises:
        ValueError: If `column` is missing, empty or of another type.
    """

    def __init__(
        self,
        trajectories: Dataset,
        column: str = "video",
        combine_actions: Callable[[np.ndarray], np.ndarray] | None = None,
        conditions: Sequence[str] = ("actions", "label"),
    ) -> None:
        self.holds_files = holds_video_files(trajectories.features, column)
        self.column, self.combine_actions = column, combine_actions
        self.conditions = [name for name in conditions if name in trajectories.column_names]
        known = [SOURCE_COLUMN] if SOURCE_COLUMN in trajectories.column_names else []
        self.rows = trajectories.select_columns([column, *self.conditions, *known]).with_format("arrow")
        self._times: dict[int, FrameTimes | None] = {}
        videos = trajectories.select_columns([column]).with_format("arrow")
        self.num_frames = np.array(
            [
                count_frames(_file(video)) if self.holds_files else len(video)
                for batch in videos.iter(batch_size=1 if self.holds_files else 64)
                for video in batch[column]
            ],
            dtype=np.int64,
        )
        if not self.num_frames.any():
            raise ValueError(f"The dataset's column {column!r} holds no frames.")

    def __len__(self) -> int:
        return len(self.num_frames)

    @cached_property
    def num_actions(self) -> int | None:
        """One above the highest discrete action in the data; `None` without discrete actions."""
        return count_actions(self._column("actions"))

    def trajectory(self, trajectory: int) -> StoredTrajectory:
        """A row, not decoded."""
        row, given = self.rows[trajectory], self.conditions
        video = row[self.column][0]
        return StoredTrajectory(
            self.name(trajectory, row),
            _file(video) if self.holds_files else video.values,
            int(self.num_frames[trajectory]),
            read_actions(row["actions"][0]) if "actions" in given else None,
            row["label"][0].as_py() if "label" in given else None,
            row["pose"][0].as_py() if "pose" in given else None,
        )

    def clip(self, trajectory: int, start: int, length: int, interval: int = 1) -> Clip:
        """Decode `length` frames, `interval` apart, from frame `start` on.

        Raises:
            BadExampleError: If the trajectory's file is damaged or its actions do not fit its frames.
        """
        times = partial(self._frame_times, trajectory)
        return self.trajectory(trajectory).clip(start, length, interval, self.combine_actions, times)

    def frames(self, trajectory: int, start: int, length: int, interval: int = 1) -> torch.Tensor:
        """The frames of [`VideoClips.clip`] alone: `(length, 3, h, w)`, uint8."""
        times = partial(self._frame_times, trajectory)
        return self.trajectory(trajectory).frames(start, length, interval, times)

    def name(self, trajectory: int, row: pa.Table | None = None) -> str:
        """What an error calls a trajectory: its number, and its file or its name in the source where these are known."""
        row = self.rows[trajectory] if row is None else row
        if SOURCE_COLUMN in row.column_names:
            return row_name(trajectory, row[SOURCE_COLUMN][0])
        return row_name(trajectory, row[self.column][0]["path"].as_py() if self.holds_files else None)

    def check_rows(self, num_actions: int | None = None, num_classes: int | None = None) -> None:
        """Look at every row before work on them begins: at the number and the values of its actions, at its label, and at
        the size of its frames: of all images if they are PNG, else of its first frame, which is decoded.

        Args:
            num_actions, num_classes (`int`, *optional*): Discrete actions and classes that there are; `None`: any number.

        Raises:
            BadExampleError: Names the first row that does not fit, and what is wrong with it.
        """
        columns = (self._column("actions"), self._column("label"))
        check_conditions(*columns, self.num_frames, self.name, self.combine_actions, num_actions, num_classes)
        self.check_frame_sizes()

    def check_frame_sizes(self) -> None:
        """The part of [`VideoClips.check_rows`] that looks at frames."""
        first = None
        for trajectory in range(len(self)):
            sizes = set() if self.holds_files else self._png_sizes(trajectory)
            if not sizes:
                sizes = {tuple(self.frames(trajectory, 0, 1).shape[2:])}
            first = first or sizes
            if len(sizes | first) > 1:
                raise BadExampleError(
                    f"{self.name(trajectory)} has frames of {sorted(sizes)}, but the first trajectory's are "
                    f"{sorted(first)} (height, width); prepare the dataset with `far prepare` and `--size`."
                )

    def _png_sizes(self, trajectory: int) -> set[tuple[int, int]]:
        """The sizes of a trajectory's images, as their headers say; none unless all of them are PNG files."""
        images = self.rows[trajectory][self.column][0].values.field("bytes")
        headers = pc.binary_slice(images, 0, PNG_SIZE_BYTES).unique().to_pylist()
        if not all(header is not None and header.startswith(b"\x89PNG") for header in headers):
            return set()
        return {(int.from_bytes(header[20:24]), int.from_bytes(header[16:20])) for header in headers}

    def _frame_times(self, trajectory: int) -> FrameTimes | None:
        """Read once: they are small beside the file that they spare."""
        if trajectory not in self._times:
            self._times[trajectory] = read_frame_times(self.trajectory(trajectory).video)
        return self._times[trajectory]

    def _column(self, name: str) -> pa.ChunkedArray | None:
        """Of the rows that were selected, in their order."""
        return self.rows.select_columns([name])[:].column(name) if name in self.conditions else None


def _file(video: pa.StructScalar) -> str | bytes:
    """A video file's path, or its content."""
    file = video.as_py()
    return file["path"] if file["bytes"] is None else file["bytes"]


class EncodedDataset(VideoClips):
    """Videos to train on, and what is known of them once a VAE encodes them, batch by batch. To encode every clip again takes
    time at each step: cache the latents of a dataset that is seen more than once.

    Args:
        trajectories (`datasets.Dataset`): A row per trajectory, with `actions` and `label` where there are any.
        vae (`nn.Module`): Encodes one frame here; it is not kept.
        column (`str`), combine_actions (callable, *optional*): As for [`VideoClips`].

    Attributes:
        latent_shape (`tuple`): `(C, H, W)`.
        dataset_fingerprint (`str`), vae_hash (`str`): What the latents are made of.

    Raises:
        ValueError: The VAE cannot encode frames of this size.
    """

    def __init__(
        self,
        trajectories: Dataset,
        vae: torch.nn.Module,
        column: str = "video",
        combine_actions: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        super().__init__(trajectories, column, combine_actions)
        self.dataset_fingerprint, self.vae_hash = dataset_fingerprint(trajectories), vae_hash(vae)
        first_frame = self.frames(0, 0, 1)
        unit = spatial_compression(vae)
        if first_frame.shape[2] % unit or first_frame.shape[3] % unit:
            raise ValueError(
                f"Frames of {first_frame.shape[2]}x{first_frame.shape[3]} cannot be encoded: the VAE needs multiples of "
                f"{unit}; prepare the dataset with `far prepare` and `--size`."
            )
        self.latent_shape = tuple(encode_video(vae, first_frame).shape[1:])


class StreamedClips:
    """As [`EncodedDataset`], of a split that is streamed: what a training must know before it reads it.

    Args:
        split (`StreamedSplit`): Its rows.
        vae (`nn.Module`): Encodes one frame here; it is not kept.
        combine_actions (callable, *optional*): As for [`VideoClips`].
        num_actions (`int`, *optional*): Number of discrete actions, which a stream cannot be asked for.

    Attributes:
        latent_shape (`tuple`): `(C, H, W)`.
        dataset_fingerprint (`str`), vae_hash (`str`): What the latents are made of.

    Raises:
        ValueError: The actions are discrete and `num_actions` is missing, or the VAE cannot encode the frames.
    """

    def __init__(
        self,
        split: StreamedSplit,
        vae: torch.nn.Module,
        combine_actions: Callable[[np.ndarray], np.ndarray] | None = None,
        num_actions: int | None = None,
    ) -> None:
        if split.has_discrete_actions and num_actions is None:
            raise ValueError(
                "`--num_actions` is missing: the actions are discrete, and a stream is not read to its end to count them; "
                "say how many there are."
            )
        self.split, self.combine_actions = split, combine_actions
        self.num_actions = num_actions if split.has_discrete_actions else None
        self._first = EncodedDataset(split.head(1), vae, split.column, combine_actions)
        self.latent_shape, self.vae_hash = self._first.latent_shape, self._first.vae_hash
        self.dataset_fingerprint = split.fingerprint
        self.frame_size = tuple(self._first.frames(0, 0, 1).shape[2:])
        self.num_classes = None

    def __getstate__(self) -> dict:
        # The processes that load need none of the rows that are held in memory.
        return {name: value for name, value in self.__dict__.items() if name != "_first"}

    def clip(self, trajectory: int, start: int, length: int, interval: int = 1) -> Clip:
        """A clip of the first trajectory, number 0: the others can only be had in the order of the stream."""
        return self._first.clip(trajectory, start, length, interval)

    def check_rows(self, num_actions: int | None = None, num_classes: int | None = None) -> None:
        """Look at the first row now, and at each of the others when it is read; see [`VideoClips.check_rows`]."""
        self._first.check_rows(num_actions, num_classes)
        self.num_classes = num_classes

    def cut(self, trajectory: StoredTrajectory, start: int, length: int, interval: int = 1) -> Clip:
        """A clip of a trajectory of the stream, decoded.

        Raises:
            BadExampleError: Its frames cannot be read or have another size than the first trajectory's, its actions do not
                fit its frames, or one of them or its label is not below what there is.
        """
        if self.num_classes is not None and not (
            trajectory.label is not None and 0 <= trajectory.label < self.num_classes
        ):
            raise BadExampleError(
                f"{trajectory.name} has the label {trajectory.label}, but there are {self.num_classes} classes, 0 to "
                f"{self.num_classes - 1}; give the model a larger `num_classes`."
            )
        clip = trajectory.clip(start, length, interval, self.combine_actions)
        highest = max(trajectory.actions, default=0) if self.num_actions is not None else 0
        if self.num_actions is not None and highest >= self.num_actions:
            raise BadExampleError(
                f"{trajectory.name} has the action {highest}, but `--num_actions` is {self.num_actions}; it must be "
                "above every action."
            )
        if tuple(clip.frames.shape[2:]) != self.frame_size:
            raise BadExampleError(
                f"{trajectory.name} has frames of {tuple(clip.frames.shape[2:])}, but the first trajectory's are "
                f"{self.frame_size} (height, width); prepare the dataset with `far prepare` and `--size`."
            )
        return clip


class FrameDataset(torch.utils.data.Dataset):
    """All frames of all trajectories, one after another; decodes only the frame that is asked for.

    Args:
        trajectories (`datasets.Dataset`): A row per trajectory.
        column (`str`): The column of type `List(Image())`.

    Raises:
        ValueError: If `column` is missing, empty or of another type.
    """

    def __init__(self, trajectories: Dataset, column: str = "video") -> None:
        if holds_video_files(trajectories.features, column):
            raise ValueError(
                f"`column` is {column!r}, which holds video files: to find one frame in such a file, many are decoded. "
                "Turn them into images with `far prepare`."
            )
        self.clips = VideoClips(trajectories, column, conditions=())
        self.first_frame = np.concatenate([[0], np.cumsum(self.clips.num_frames)])

    def __len__(self) -> int:
        return int(self.first_frame[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """The trajectory and the frame within it that a flat index stands for."""
        trajectory = int(np.searchsorted(self.first_frame, index, side="right")) - 1
        return trajectory, int(index - self.first_frame[trajectory])

    def __getitem__(self, index: int) -> torch.Tensor:
        """`torch.Tensor` of shape `(3, height, width)`, uint8."""
        trajectory, frame = self.locate(index)
        return self.clips.frames(trajectory, frame, 1)[0]
