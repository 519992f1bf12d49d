"""Where rollouts start: a recording, with what truly came next, or a visitor's own clip or image.

F context frames, T true frames after them; h/w pixels.
"""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from ...data.loading import load_split
from ...data.media_files import read_clip
from ...data.rows import align_actions
from ...data.video_clips import VideoClips
from ...pictures import fit_frame
from .settings import WorldError, WorldLimits, require_number


NOOP_NAMES = ("noop", "none", "nothing", "wait", "stay", "idle", "donothing")  # of an action that does nothing


@dataclass(frozen=True)
class Start:
    """Context, and what was recorded after it.

    Args:
        title (`str`): For the visitor.
        frames (`np.ndarray` of shape `(F, h, w, 3)`): uint8.
        actions (`list[int]`): F - 1, between the context frames.
        true_frames (`np.ndarray` of shape `(T, h, w, 3)`, *optional*): uint8; `None` where nothing was recorded.
        true_actions (`list[int]`): T or fewer; `true_actions[t]` leads to `true_frames[t]`.
        note (`str`): What was done to the frames or is assumed about them; may be empty.
    """

    title: str
    frames: np.ndarray
    actions: list[int]
    true_frames: np.ndarray | None = None
    true_actions: tuple[int, ...] = ()
    note: str = ""


def new_world(size: tuple[int, int]) -> Start:
    """A start without frames, of a model that knows its size."""
    return Start("A new world", np.empty((0, *size, 3), np.uint8), [])


class RecordedWalks:
    """The recordings of a dataset that have two frames or more.

    Args:
        dataset_name (`str`): Folder or Hub id; rows with `video`, and `actions` if the model takes them.
        size (`tuple`, *optional*): `(height, width)` that the model knows.
        limits (`WorldLimits`).
        split (`str`): Of the dataset.
        num_actions (`int`): Of the model, which knows the actions below; 0 for one that takes none.

    Raises:
        ValueError: No such dataset, nothing in it to start from, or actions that the model does not know.
    """

    def __init__(
        self,
        dataset_name: str,
        size: tuple[int, int] | None,
        limits: WorldLimits = WorldLimits(),
        *,
        split: str = "test",
        num_actions: int,
    ):
        dataset = load_split(dataset_name, split)
        self.videos = VideoClips(dataset)
        self.rows = np.flatnonzero(self.videos.num_frames >= 2).tolist()
        if not self.rows:
            raise ValueError(f"`dataset_name` {dataset_name!r} has no recording of two frames or more in {split!r}.")
        self.size = size
        self.limits = limits
        self.num_frames = self.videos.num_frames[self.rows].tolist()
        self.actions = [[0] * num_frames for num_frames in self.num_frames]
        if num_actions:
            if "actions" not in dataset.column_names:
                raise ValueError(
                    f"`dataset_name` {dataset_name!r} has the columns {dataset.column_names}, but the model takes actions; "
                    "name a dataset with `actions`."
                )
            column = dataset.select(self.rows)["actions"]
            self.actions = [
                checked_actions(actions, num_frames, num_actions, f"row {row} of {dataset_name!r}")
                for row, actions, num_frames in zip(self.rows, column, self.num_frames)
            ]
        self._walk = lru_cache(maxsize=8)(self._read_walk)

    @property
    def titles(self) -> list[str]:
        return [f"Recording {index + 1}" for index in range(len(self.rows))]

    def start(self, walk: int, frame: int, num_context_frames: int) -> Start:
        """A start at one frame of a walk.

        Args:
            walk (`int`): From 0.
            frame (`int`): The last frame of the context, from 0; one must follow.
            num_context_frames (`int`): Fewer are used where the walk has no more before `frame`.

        Raises:
            WorldError: There is no such walk or frame.
        """
        if isinstance(walk, bool) or not isinstance(walk, int) or not 0 <= walk < len(self.rows):
            raise WorldError(f"There are {len(self.rows)} recordings, not {str(walk)[:20]!r}; choose one of these.")
        require_number("The frame to start at", frame, 0, self.num_frames[walk] - 2, whole=True)
        require_number(
            "The number of context frames", num_context_frames, 1, self.limits.max_context_frames, whole=True
        )
        frames, actions = self._walk(walk)
        first = max(0, frame + 1 - num_context_frames)
        return Start(
            title=f"{self.titles[walk]}, frame {frame}",
            frames=frames[first : frame + 1],
            actions=actions[first:frame],
            true_frames=frames[frame + 1 :],
            true_actions=tuple(actions[frame:-1]),
        )

    def _read_walk(self, walk: int) -> tuple[np.ndarray, list[int]]:
        frames = self.videos.frames(self.rows[walk], 0, self.num_frames[walk]).permute(0, 2, 3, 1).numpy()
        return np.stack([fit_frame(frame, self.size) for frame in frames]), self.actions[walk]


def checked_actions(actions: list, num_frames: int, num_actions: int, where: str) -> list[int]:
    """One discrete action per frame, each below `num_actions`.

    Raises:
        ValueError: They are not; says `where`.
    """
    try:
        actions = align_actions(actions, num_frames)
    except ValueError as error:
        raise ValueError(f"In {where}: {error}") from error
    if actions.ndim > 1 or actions.max() >= num_actions:
        found = "continuous actions" if actions.ndim > 1 else f"the action {actions.max()}"
        raise ValueError(f"In {where}: {found}, but the model knows 0 to {num_actions - 1}; name its own dataset.")
    return actions.tolist()


def uploaded_start(
    path: str | Path,
    size: tuple[int, int] | None,
    num_context_frames: int,
    action_names: list[str],
    limits: WorldLimits = WorldLimits(),
) -> Start:
    """A start from a visitor's own clip or image: its last frames.

    Args:
        path (`str` or `Path`): Any file; what it holds is told by its content.
        size (`tuple`, *optional*): `(height, width)`: frames are cut around their centre and resized.
        num_context_frames (`int`): Fewer are used where there are fewer.
        action_names (`list[str]`): The one that does nothing is assumed between the frames, else the first; empty for a
            model without actions.
        limits (`WorldLimits`).

    Raises:
        WorldError: Nothing that can be read, or beyond the limits.
    """
    require_number("The number of context frames", num_context_frames, 1, limits.max_context_frames, whole=True)
    if os.path.isdir(path):
        raise WorldError("A folder cannot be uploaded; choose one video or image.")
    try:
        clip = read_clip(path, num_context_frames, size, limits.upload)
    except ValueError as error:
        # Where uploads lie is not the visitor's concern.
        raise WorldError(str(error).replace(str(path), Path(path).name)) from error
    (old_height, old_width), (height, width) = clip.original_size, clip.frames.shape[1:3]
    is_noop = [name.lower().replace("_", "").replace(" ", "") in NOOP_NAMES for name in action_names]
    assumed = is_noop.index(True) if any(is_noop) else 0
    notes = []
    if (old_height, old_width) != (height, width):
        notes.append(f"cut around the centre and resized from {old_width}x{old_height} to {width}x{height} pixels")
    if len(clip.frames) > 1 and action_names:
        notes.append(f"its {len(clip.frames) - 1} actions are unknown, {action_names[assumed]!r} is assumed for each")
    return Start(
        title="Your image" if clip.num_frames_in_file == 1 else f"Your clip, its last {len(clip.frames)} frames",
        frames=clip.frames,
        actions=[assumed] * (len(clip.frames) - 1),
        note="; ".join(notes),
    )
