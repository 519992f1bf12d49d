"""From a trajectory as people have it to a row of our schema: frames as PNG files, one action per frame, a label."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image, List, Value

from ..files import written_whole
from ..pictures import encode_png, fit_frame
from .rows import (
    CONTINUOUS_RULES,
    DISCRETE_RULES,
    SOURCE_COLUMN,
    ActionCombiner,
    BadExampleError,
    align_actions,
    group_actions,
)
from .sources.trajectory import Trajectory


RESERVED_COLUMNS = ("video", "actions", "label", SOURCE_COLUMN)


@dataclass(frozen=True)
class ColumnForm:
    """What a kept column holds: `dtype` of `datasets`, in lists within lists, as many as `num_dimensions`."""

    dtype: str
    num_dimensions: int

    @classmethod
    def of(cls, values: np.ndarray) -> "ColumnForm":
        """Raises a `ValueError` unless they are numbers, truth values or texts."""
        kinds = {"i": "int64", "u": "uint64" if values.dtype.itemsize == 8 else "int64", "b": "bool", "U": "string"}
        kinds["f"] = "float64" if values.dtype.itemsize > 4 else "float32"
        if values.dtype.kind not in kinds:
            raise ValueError(
                f"it holds {values.dtype}; only numbers, truth values and texts can be kept, all of one shape"
            )
        return cls(kinds[values.dtype.kind], values.ndim)

    @property
    def feature(self) -> Value | List:
        feature = Value(self.dtype)
        for _ in range(self.num_dimensions):
            feature = List(feature)
        return feature

    def takes(self, other: "ColumnForm") -> bool:
        """Whether values of another form can be stored in this one; whole numbers can be stored as others."""
        is_same = self.dtype == other.dtype or (
            self.dtype.startswith("float") and other.dtype not in ("string", "bool")
        )
        return is_same and self.num_dimensions == other.num_dimensions


@dataclass(frozen=True)
class RowForm:
    """What all rows of a dataset have in common.

    Args:
        frame_size (`tuple`): `(height, width)`.
        action_shape (`tuple`, *optional*): Of one action: `()` if discrete, `(A,)` if continuous, `None` without any.
        class_names (`tuple`, *optional*): Names of the labels; `None` without any.
        columns (`dict` of `str` to `ColumnForm`): What else is kept.
    """

    frame_size: tuple[int, int]
    action_shape: tuple[int, ...] | None
    class_names: tuple[str, ...] | None
    columns: Mapping[str, ColumnForm] = field(default_factory=dict)

    @property
    def features(self) -> Features:
        features = {"video": List(Image())}
        if self.action_shape is not None:
            features["actions"] = List(Value("int64") if self.action_shape == () else List(Value("float32")))
        if self.class_names is not None:
            features["label"] = ClassLabel(names=list(self.class_names))
        features[SOURCE_COLUMN] = Value("string")
        features |= {name: column.feature for name, column in self.columns.items()}
        return Features(features)


@dataclass(frozen=True)
class PreparedTrajectory:
    """A row to be written.

    Args:
        name (`str`): The trajectory's.
        frames (`list` of `bytes`): PNG files.
        frame_size (`tuple`): `(height, width)` of all of them.
        actions (`np.ndarray` of shape `(F,)`, int64, or `(F, A)`, float32, *optional*): As many as frames.
        label (`str`, *optional*): Name of its class.
        columns (`dict` of `str` to `np.ndarray`): What else is kept.
    """

    name: str
    frames: list[bytes]
    frame_size: tuple[int, int]
    actions: np.ndarray | None
    label: str | None
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def action_shape(self) -> tuple[int, ...] | None:
        return None if self.actions is None else self.actions.shape[1:]

    def require_form(self, form: RowForm) -> None:
        """Raise a `BadExampleError` unless this row is like the others."""
        if self.frame_size != form.frame_size:
            raise BadExampleError(
                f"{self.name!r} has frames of {self.frame_size}, but the first trajectory's are {form.frame_size} "
                "(height, width); give `size` to make them one."
            )
        if self.action_shape != form.action_shape:
            raise BadExampleError(
                f"{self.name!r} has actions of shape {self.action_shape}, but the first trajectory's are "
                f"{form.action_shape} (`None`: no actions); all trajectories must be alike."
            )
        if (self.label is None) != (form.class_names is None):
            raise BadExampleError(f"{self.name!r} has the label {self.label!r}; all trajectories need one, or none.")
        for name, expected in form.columns.items():
            if not expected.takes(ColumnForm.of(self.columns[name])):
                raise BadExampleError(
                    f"{self.name!r} has {name!r} as {ColumnForm.of(self.columns[name])}, but the first trajectory's is "
                    f"{expected}; all trajectories must be alike, or leave it out of `keep_columns`."
                )

    def form(self, class_names: Sequence[str] | None) -> RowForm:
        """The form of a dataset whose other rows are like this one."""
        columns = {name: ColumnForm.of(values) for name, values in self.columns.items()}
        return RowForm(
            self.frame_size, self.action_shape, None if class_names is None else tuple(class_names), columns
        )

    def to_row(self, features: Features) -> dict:
        row = {"video": [{"bytes": frame, "path": None} for frame in self.frames], SOURCE_COLUMN: self.name}
        row |= {name: values.tolist() for name, values in self.columns.items()}
        if self.actions is not None:
            row["actions"] = self.actions.tolist()
        if self.label is not None:
            row["label"] = features["label"].str2int(self.label)
        return row


@dataclass(frozen=True)
class Preparation:
    """What is done to each trajectory.

    Args:
        frame_interval (`int`): Every so many frames one is kept, the first one among them.
        size (`tuple`, *optional*): `(height, width)` that frames are cropped and resized to.
        combine_actions (`ActionCombiner`, *optional*): Makes one action of those between two kept frames; needed if
            there are actions and `frame_interval` is above 1.
    """

    frame_interval: int = 1
    size: tuple[int, int] | None = None
    combine_actions: ActionCombiner | None = None

    def __post_init__(self) -> None:
        if self.frame_interval < 1:
            raise ValueError(f"`frame_interval` is {self.frame_interval}; it must be at least 1, for every frame.")
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"`size` is {self.size}; height and width must be at least 1.")

    def __call__(self, trajectory: Trajectory) -> PreparedTrajectory:
        """Decode, skip, resize and encode.

        Raises:
            BadExampleError: If the trajectory is damaged; the message names it.
            ValueError: If the request does not suit its actions.
        """
        frames, frame_sizes, num_frames = [], set(), 0
        for num_frames, frame in enumerate(trajectory.frames, 1):
            if (num_frames - 1) % self.frame_interval == 0:
                frame = fit_frame(frame, self.size)
                frame_sizes.add(frame.shape[:2])
                frames.append(encode_png(frame))
        if len(frame_sizes) != 1:
            raise BadExampleError(
                f"{trajectory.name!r} has {num_frames} frames of sizes {sorted(frame_sizes)}; give a video of one size, "
                "or `size` to make them one."
            )
        actions = None if trajectory.actions is None else self._prepare_actions(trajectory, num_frames)
        columns = {
            name: self._keep(trajectory.name, name, values, num_frames) for name, values in trajectory.columns.items()
        }
        return PreparedTrajectory(trajectory.name, frames, frame_sizes.pop(), actions, trajectory.label, columns)

    def _keep(self, trajectory: str, name: str, values: Any, num_frames: int) -> np.ndarray:
        """A column's values: those of the kept frames where there is one for each frame, else all of them."""
        try:
            values = np.asarray(values)
            ColumnForm.of(values)
        except ValueError as error:
            raise BadExampleError(f"{trajectory!r} has {name!r} that cannot be kept: {error}.") from error
        if values.ndim and len(values) == num_frames:
            return values[:: self.frame_interval]
        if self.frame_interval > 1 and values.ndim and abs(len(values) - num_frames) == 1:
            raise BadExampleError(
                f"{trajectory!r} has {len(values)} of {name!r} for {num_frames} frames, and which of them belong to the kept "
                "frames is not clear; leave it out of `keep_columns`, or keep every frame."
            )
        return values

    def _prepare_actions(self, trajectory: Trajectory, num_frames: int) -> np.ndarray:
        try:
            actions = align_actions(trajectory.actions, num_frames)
        except ValueError as error:
            raise BadExampleError(f"{trajectory.name!r}: {error}") from error
        if self.frame_interval == 1:
            return actions
        if self.combine_actions is None:
            rules = DISCRETE_RULES if actions.ndim == 1 else CONTINUOUS_RULES
            raise ValueError(
                f"`frame_interval` is {self.frame_interval}, and the actions of skipped frames would be lost; give "
                f"`combine_actions`, one of {list(rules)}."
            )
        try:
            return self.combine_actions(group_actions(actions, self.frame_interval))
        except ValueError as error:
            raise ValueError(f"{trajectory.name!r}: {error}") from error


def write_trajectories(path: Path, trajectories: Iterable[PreparedTrajectory], features: Features) -> None:
    """Write a parquet file that `datasets` opens, a row group per trajectory, so that reading one row reads no other.

    Raises:
        OSError: It could not be written; names the file, the reason and the room that is left.
    """
    schema = features.arrow_schema
    with written_whole(path) as unfinished, pq.ParquetWriter(unfinished, schema) as writer:
        for trajectory in trajectories:
            writer.write_table(pa.Table.from_pylist([trajectory.to_row(features)], schema=schema))
