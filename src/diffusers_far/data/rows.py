"""What a row of a dataset holds beside its frames: actions as people store them, brought to one per frame and to one per
kept frame, and a label. A row that is wrong is refused before work on it begins, and the error has its name.

`actions[t]` leads from frame t to frame t + 1. With every k-th frame kept, the actions `j * k` to `j * k + k - 1` lead
from kept frame j to kept frame j + 1, and become one: none is lost without the user saying so.

F frames, K kept frames, k interval, A action channels. Discrete actions are (F,) int64, continuous ones (F, A) float32.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class BadExampleError(ValueError):
    """One trajectory cannot be used. The message names its file; a run may skip it and go on with the others."""


SOURCE_COLUMN = "source"  # what `far prepare` calls the name that a trajectory had in its source


def row_name(row: int, source: object | None) -> str:
    """`"Trajectory 3"`, with the file or the name that the trajectory had in its source where that is known."""
    return f"Trajectory {row}" if source is None else f"Trajectory {row} ({str(source)!r})"


# A joint action needs a row of the model's action table for every sequence of actions.
MAX_JOINT_ACTIONS = 65_536

COMBINATION_RULES = {
    "first": "the first of them",
    "last": "the last of them, as for actions that are target positions",
    "joint": "one index for the whole sequence of them",
    "sum": "their sum, as for actions that are displacements",
    "mean": "their mean, as for actions that are velocities",
    "stack": "all of them, as channels",
}
DISCRETE_RULES = ("joint", "first", "last")
CONTINUOUS_RULES = ("sum", "mean", "first", "last", "stack")


def align_actions(actions: np.ndarray | Sequence, num_frames: int) -> np.ndarray:
    """Check the actions of a trajectory and bring them to one per frame.

    Args:
        actions (`np.ndarray` or sequence): `(F,)` whole numbers of any type, which are discrete, or `(F, A)` numbers,
            which are continuous; or one fewer: the action that leads out of the video is unknown, so the last one is
            repeated.
        num_frames (`int`): F.

    Returns:
        `np.ndarray` of shape `(F,)`, int64, or `(F, A)`, float32.

    Raises:
        ValueError: If their shape, their number or their values do not fit.
    """
    try:
        actions = np.asarray(actions)
    except ValueError as error:
        raise ValueError("`actions` differ in their number of channels; give each as many.") from error
    discrete = actions.ndim == 1 and _are_whole(actions)
    continuous = actions.ndim == 2 and actions.dtype.kind in "iuf" and actions.shape[1] > 0
    if not (discrete or continuous):
        raise ValueError(
            f"`actions` has shape {actions.shape} and type {actions.dtype}; give (F,) whole numbers for discrete actions "
            "or (F, A) numbers for continuous ones."
        )
    if len(actions) not in (num_frames, num_frames - 1) or len(actions) == 0:
        raise ValueError(
            f"`actions` has {len(actions)} for {num_frames} frames; give one per frame, or one fewer, without the one "
            "that leads out of the video."
        )
    actions = actions.astype(np.int64 if discrete else np.float32)
    wrong = actions < 0 if discrete else ~np.isfinite(actions).all(axis=1)
    if wrong.any():
        first = int(wrong.argmax())
        rule = "indices from 0" if discrete else "finite numbers"
        raise ValueError(f"`actions[{first}]` is {actions[first].tolist()}; actions must be {rule}.")
    return actions if len(actions) == num_frames else np.concatenate([actions, actions[-1:]])


def _are_whole(numbers: np.ndarray) -> bool:
    if numbers.dtype.kind == "f":
        return numbers.size > 0 and bool(np.isfinite(numbers).all() and (numbers == np.rint(numbers)).all())
    return numbers.dtype.kind in "iub"


def group_actions(actions: np.ndarray, interval: int) -> np.ndarray:
    """Group actions by the kept frame that they follow: `(F, ...)` -> `(K, interval, ...)`, `K = ceil(F / interval)`.

    The last group may be incomplete; it leads out of the video, and the last action fills it.
    """
    missing = -len(actions) % interval
    actions = np.concatenate([actions, np.repeat(actions[-1:], missing, axis=0)])
    return actions.reshape(-1, interval, *actions.shape[1:])


def clip_actions(
    actions: np.ndarray,
    length: int,
    interval: int = 1,
    combine_actions: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """The actions of a clip of `length` frames that are `interval` apart.

    Args:
        actions (`np.ndarray` of shape `(F,)` or `(F, A)`): Of the trajectory, from the clip's first frame on. The last
            kept frame leads out of the clip; where the trajectory ends first, its last action stands in.
        length (`int`): Frames of the clip.
        interval (`int`): Distance between them.
        combine_actions (callable, *optional*): Such as an [`ActionCombiner`]; needed when `interval` is above 1.

    Returns:
        `np.ndarray` of shape `(length,)`, int64, or `(length, A)`, float32.

    Raises:
        ValueError: If actions would be lost.
    """
    if interval > 1 and combine_actions is None:
        raise ValueError(
            f"`interval` is {interval}: the actions of skipped frames would be lost; give `combine_actions`."
        )
    actions = actions[: length * interval]
    missing = length * interval - len(actions)
    actions = np.concatenate([actions, np.repeat(actions[-1:], missing, axis=0)]) if missing else actions
    if interval > 1:
        actions = combine_actions(actions.reshape(length, interval, *actions.shape[1:]))
    return actions.astype(np.int64 if actions.dtype.kind in "iu" else np.float32)


def read_actions(actions: pa.ListScalar) -> np.ndarray | list:
    """The actions of one row of an Arrow table: a list per action only where each has several channels."""
    values = actions.values
    return values.to_pylist() if pa.types.is_nested(values.type) else values.to_numpy(zero_copy_only=False)


def are_discrete(column_type: pa.DataType) -> bool:
    """Whether a column of trajectories has one number per action, and not a list of channels.

    Raises:
        ValueError: If it has neither.
    """
    depth, value_type = 0, column_type
    while hasattr(value_type, "value_type"):  # a list, of whatever kind
        depth, value_type = depth + 1, value_type.value_type
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
    if depth not in (1, 2) or not any(is_kind(value_type) for is_kind in kinds):
        raise ValueError(
            f"`actions` is a column of type {column_type}; give each trajectory a list of whole numbers, or of lists of "
            "numbers."
        )
    return depth == 1


def count_actions(actions: pa.ChunkedArray | None) -> int | None:
    """One above the highest discrete action of a column of trajectories; `None` without discrete actions."""
    if actions is None or not are_discrete(actions.type):
        return None
    highest = pc.max(pc.list_flatten(actions)).as_py()
    return None if highest is None or not math.isfinite(highest) else int(highest) + 1


def join_actions(actions: np.ndarray, num_actions: int) -> np.ndarray:
    """One index per sequence of discrete actions: `(K, k)` -> `(K,)`, digits to base `num_actions`, first one highest.

    Raises:
        ValueError: If an action is not in `range(num_actions)`, or there are more sequences than `MAX_JOINT_ACTIONS`.
    """
    interval = actions.shape[1]
    if num_actions**interval > MAX_JOINT_ACTIONS:
        raise ValueError(
            f"`num_actions` {num_actions} over {interval} frames gives {num_actions**interval} joint actions, above "
            f"{MAX_JOINT_ACTIONS}; choose a smaller interval or another rule."
        )
    if actions.size and not 0 <= actions.min() <= actions.max() < num_actions:
        raise ValueError(
            f"`actions` has {actions.min()} to {actions.max()}, but `num_actions` is {num_actions}; they must be below."
        )
    return actions @ num_actions ** np.arange(interval)[::-1]


def split_joint_actions(joint_actions: np.ndarray, num_actions: int, interval: int) -> np.ndarray:
    """The inverse of [`join_actions`]: `(K,)` -> `(K, interval)`."""
    return joint_actions[:, None] // num_actions ** np.arange(interval)[::-1] % num_actions


@dataclass(frozen=True)
class ActionCombiner:
    """Makes one action of those between two kept frames; with an interval of 1 every rule leaves them as they are.

    Args:
        rule (`str`): A key of `COMBINATION_RULES`.
        num_actions (`int`, *optional*): Number of discrete actions, for the rule `"joint"` alone.
    """

    rule: str
    num_actions: int | None = None

    def __post_init__(self) -> None:
        if self.rule not in COMBINATION_RULES:
            raise ValueError(f"`rule` is {self.rule!r}; it must be one of {list(COMBINATION_RULES)}.")
        if (self.rule == "joint") != (self.num_actions is not None):
            raise ValueError(
                f"`num_actions` is {self.num_actions} with the rule {self.rule!r}; 'joint' needs the number of discrete "
                "actions and no other rule takes it."
            )
        if self.num_actions is not None and self.num_actions < 1:
            raise ValueError(f"`num_actions` is {self.num_actions}; it must be at least 1.")

    def __call__(self, actions: np.ndarray) -> np.ndarray:
        """Combine along the second axis.

        Args:
            actions (`np.ndarray` of shape `(K, k)`, integers, or `(K, k, A)`, floating): What [`group_actions`] gives.

        Returns:
            `np.ndarray` of shape `(K,)` or `(K, A)`, of the same type; `(K, k * A)` for `"stack"`, in order of time.

        Raises:
            ValueError: If the rule does not suit such actions.
        """
        allowed = DISCRETE_RULES if actions.ndim == 2 else CONTINUOUS_RULES
        if self.rule not in allowed:
            kind = "discrete" if actions.ndim == 2 else "continuous"
            raise ValueError(f"`rule` is {self.rule!r}, but the actions are {kind}; choose one of {list(allowed)}.")
        if self.rule == "joint":
            return join_actions(actions, self.num_actions)
        if self.rule == "stack":
            return actions.reshape(len(actions), -1)
        if self.rule in ("first", "last"):
            return actions[:, 0 if self.rule == "first" else -1]
        return actions.sum(axis=1) if self.rule == "sum" else actions.mean(axis=1)


# Columns of rows, looked at before work on them begins


def check_conditions(
    actions: pa.ChunkedArray | None,
    labels: pa.ChunkedArray | None,
    num_frames: np.ndarray,
    name_of: Callable[[int], str],
    combine_actions: Callable[[np.ndarray], np.ndarray] | None = None,
    num_actions: int | None = None,
    num_classes: int | None = None,
) -> None:
    """Refuse columns of actions and labels that no model can be trained on, or not this one; see [`check_actions`] and
    [`check_labels`]. Actions that are joined must be below the number of them that are joined."""
    if actions is not None:
        limit = getattr(combine_actions, "num_actions", None) or num_actions
        check_actions(actions, num_frames, limit, name_of)
    if labels is not None and num_classes is not None:
        check_labels(labels, num_classes, name_of)


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
        ValueError: The column can hold no actions.
        BadExampleError: A row has too few or too many actions, a negative or missing one, one that is not finite, another
            number of channels than the first row, or one that is not below `num_actions`; names the row.
    """
    is_discrete = are_discrete(actions.type)
    lengths = pc.fill_null(pc.list_value_length(actions), 0).to_numpy().astype(np.int64)
    is_wrong = (lengths == 0) | ((lengths != num_frames) & (lengths != num_frames - 1))
    ends, values, per_action = np.cumsum(lengths), pc.list_flatten(actions), 1
    if pa.types.is_nested(values.type):
        channels = pc.fill_null(pc.list_value_length(values), 0).to_numpy()
        _mark(is_wrong, ends, channels != (channels[0] if len(channels) else 0))
        # Where the numbers of channels differ, a value cannot be counted back to its row, and the error is found anyway.
        values, per_action = pc.list_flatten(values), max(1, int(channels[0])) if len(channels) else 1
    if not is_wrong.any():
        _mark(is_wrong, ends, _are_unusable(values, is_discrete), per_action)
    if is_wrong.any():
        row = int(is_wrong.argmax())
        raise BadExampleError(f"{name_of(row)}: {_what_is_wrong(actions[row], int(num_frames[row]))}")
    if num_actions is not None and is_discrete and len(values):
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
