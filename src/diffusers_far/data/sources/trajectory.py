"""What the readers of people's own data have in common."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Trajectory:
    """One video and what belongs to it, as its source has it.

    Args:
        name (`str`): Its own within the source and the same wherever the source lies.
        frames (iterable of `np.ndarray` of shape `(H, W, 3)`): uint8; all frames, decoded as they are asked for, once.
        actions (`np.ndarray` or sequence, *optional*): Not yet checked against the frames.
        label (`str`, *optional*): Name of its class.
    """

    name: str
    frames: Iterable[np.ndarray]
    actions: np.ndarray | Sequence | None = None
    label: str | None = None


class TrajectorySource(Protocol):
    """A folder of trajectories. Opening one that is damaged raises a `BadExampleError`, at once or on a frame."""

    names: list[str]
    class_names: list[str] | None

    def __getitem__(self, index: int) -> Trajectory: ...
