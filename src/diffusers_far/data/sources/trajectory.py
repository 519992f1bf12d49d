"""What the readers of people's own data have in common."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..rows import BadExampleError


@dataclass(frozen=True)
class Trajectory:
    """One video and what belongs to it, as its source has it.

    Args:
        name (`str`): Its own within the source and the same wherever the source lies.
        frames (iterable of `np.ndarray` of shape `(H, W, 3)`): uint8; all frames, decoded as they are asked for, once.
        actions (`np.ndarray` or sequence, *optional*): Not yet checked against the frames.
        label (`str`, *optional*): Name of its class.
        columns (mapping of `str` to anything that `np.asarray` takes): What else is kept of it.
        left_out (sequence of `str`): What else its source has of it.
    """

    name: str
    frames: Iterable[np.ndarray]
    actions: np.ndarray | Sequence | None = None
    label: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    left_out: Sequence[str] = ()


class TrajectorySource(Protocol):
    """A folder of trajectories. Opening one that is damaged raises a `BadExampleError`, at once or on a frame."""

    names: list[str]
    class_names: list[str] | None
    splits: list[str] | None  # of each trajectory, where the source says so

    def __getitem__(self, index: int) -> Trajectory: ...


def path_inside(folder: str | Path, name: str) -> Path:
    """The file that a dataset calls `name`: a dataset of strangers must not bring in other files of this machine.

    Args:
        folder (`str` or `Path`): Of the dataset.
        name (`str`): Relative to the folder.

    Raises:
        BadExampleError: If the name leads out of the folder: by `..`, as an absolute path, or by a symbolic link. Only the
            links of the Hub's cache may, from its `snapshots` to its `blobs`.
    """
    path, root = Path(folder) / name, Path(folder).resolve()
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise BadExampleError(
            f"{name!r} leads out of the folder {str(folder)!r}; give a name of a file in it, without '..'."
        )
    for parent in (root, *root.parents):
        if parent.parent.name == "snapshots":
            root = parent.parent.parent
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # links that lead to each other
        raise BadExampleError(f"{str(path)!r} cannot be opened ({error}); copy the file into the folder.") from error
    if not target.is_relative_to(root):
        raise BadExampleError(
            f"{str(path)!r} is a link to {str(target)!r}, out of the folder {str(folder)!r}; copy the file into the folder, "
            "or name the folder that it is in."
        )
    return path


def read_json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """The rows of a file of JSON lines, each with the number of its line, from 1; empty lines are passed over.

    Raises:
        ValueError: If a line is no JSON object; names the file and the line.
    """
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{str(path)!r}, line {number} is no JSON: {error}.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{str(path)!r}, line {number} is no JSON object, {{...}}, but {str(row)[:40]!r}.")
        yield number, row


def choose_columns(
    available: Sequence[str], wanted: Sequence[str], used: Sequence[str], where: str
) -> tuple[list[str], list[str]]:
    """Of what a trajectory has beside what is `used`: what is `wanted`, and what is left out.

    Raises:
        BadExampleError: If it lacks a column that is wanted; `where` names it.
    """
    missing = [name for name in wanted if name not in available]
    if missing:
        raise BadExampleError(f"{where} lacks {missing}; it has {sorted(available)}. Choose `keep_columns` of these.")
    return list(wanted), [name for name in available if name not in (*wanted, *used)]
