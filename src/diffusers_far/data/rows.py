"""What every row of a dataset must hold, checked before work on it begins: a fault is told by the name of its row."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .actions import align_actions, are_discrete, read_actions


class BadExampleError(ValueError):
    """One trajectory cannot be used. The message names its file; a run may skip it and go on with the others."""


SOURCE_COLUMN = "source"  # what `far prepare` calls the name that a trajectory had in its source


def row_name(row: int, source: object | None) -> str:
    """`"Trajectory 3"`, with the file or the name that the trajectory had in its source where that is known."""
    return f"Trajectory {row}" if source is None else f"Trajectory {row} ({str(source)!r})"


def check_actions(
    actions: pa.ChunkedArray, num_frames: np.ndarray, num_actions: int | None, name_of: Callable[[int], str]
) -> None:
    """Refuse a column of actions that no model can be trained on, or not this one.

    Args:
        actions (`pa.ChunkedArray`): The column `actions`, a list per trajectory.
        num_frames (`np.ndarray` of shape `(num_trajectories,)`, int64): Frames of each.
        num_actions (`int`, *optional*): Discrete actions that there are; `None`: any number.
        name_of (callable): The name of a row, for errors.

    Raises:
        BadExampleError: A row has too few or too many actions, a negative or missing one, one that is not finite, another
            number of channels than the first row, or one that is not below `num_actions`; names the row.
    """
    lengths = pc.fill_null(pc.list_value_length(actions), 0).to_numpy().astype(np.int64)
    is_wrong = (lengths == 0) | ((lengths != num_frames) & (lengths != num_frames - 1))
    ends, values, per_action = np.cumsum(lengths), pc.list_flatten(actions), 1
    if pa.types.is_nested(values.type):
        channels = pc.fill_null(pc.list_value_length(values), 0).to_numpy()
        _mark(is_wrong, ends, channels != (channels[0] if len(channels) else 0))
        # Where the numbers of channels differ, a value cannot be counted back to its row, and the error is found anyway.
        values, per_action = pc.list_flatten(values), max(1, int(channels[0])) if len(channels) else 1
    if not is_wrong.any():
        _mark(is_wrong, ends, _are_unusable(values, are_discrete(actions.type)), per_action)
    if is_wrong.any():
        row = int(is_wrong.argmax())
        raise BadExampleError(f"{name_of(row)}: {_what_is_wrong(actions[row], int(num_frames[row]))}")
    if num_actions is not None and are_discrete(actions.type) and len(values):
        highest = int(np.argmax(values.to_numpy()))
        if values[highest].as_py() >= num_actions:
            row = int(np.searchsorted(ends, highest, side="right"))
            raise BadExampleError(
                f"{name_of(row)} has the action {values[highest]} at frame {highest - int(ends[row] - lengths[row])}, but "
                f"there are {num_actions} actions, 0 to {num_actions - 1}; give the model a larger `num_actions`, or leave "
                "the trajectory out."
            )


def check_labels(labels: pa.ChunkedArray, num_classes: int, name_of: Callable[[int], str]) -> None:
    """Refuse a column of labels unless each is in `range(num_classes)`; a `BadExampleError` names the row.

    Raises:
        ValueError: If it holds no whole numbers.
    """
    if not (pa.types.is_integer(labels.type) or pa.types.is_null(labels.type)):
        raise ValueError(
            f"`label` is a column of type {labels.type}; give whole numbers from 0, or cast it to a `ClassLabel`."
        )
    numbers = pc.fill_null(labels, -1).to_numpy()
    is_wrong = (numbers < 0) | (numbers >= num_classes)
    if is_wrong.any():
        row = int(is_wrong.argmax())
        raise BadExampleError(
            f"{name_of(row)} has the label {labels[row]}, but there are {num_classes} classes, 0 to {num_classes - 1}; "
            "give the model a larger `num_classes`, or leave the trajectory out."
        )


def _are_unusable(values: pa.ChunkedArray, discrete: bool) -> np.ndarray:
    numbers = values.to_numpy()  # missing ones become NaN
    if not pa.types.is_floating(values.type):
        return (numbers < 0) if discrete and values.null_count == 0 else values.is_null().to_numpy()
    wrong = ~np.isfinite(numbers)
    return wrong | (numbers < 0) | (numbers != np.rint(numbers)) if discrete else wrong


def _mark(is_wrong: np.ndarray, ends: np.ndarray, unusable: np.ndarray, per_action: int = 1) -> None:
    """Mark the rows of values that cannot be used; `ends` are the rows' ends, counted in actions."""
    places = np.flatnonzero(unusable) // per_action
    is_wrong[np.unique(np.searchsorted(ends, places, side="right"))] = True


def _what_is_wrong(actions: pa.ListScalar, num_frames: int) -> str:
    if not actions.is_valid or actions.values.null_count:
        return "`actions` are missing; give each frame one."
    try:
        aligned = align_actions(read_actions(actions), num_frames)
    except ValueError as error:
        return str(error)
    return (
        f"`actions` have {aligned.shape[1]} channels, but the first row's have another number; give each row as many."
    )
