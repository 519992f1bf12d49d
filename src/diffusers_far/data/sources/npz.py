"""TECO's trajectories, as DMLab and Minecraft come."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..rows import BadExampleError
from ..video import iter_video
from .trajectory import Trajectory, choose_columns, path_inside


class NpzSource:
    """All `.npz` files of a folder and its subfolders: `video` uint8 (F, H, W, 3) and `actions` (F,) integers.

    A file without `video` may have an `.mp4` of the same name beside it, as in Minecraft.

    Args:
        folder (`str` or `Path`): Nothing in it is unpickled.
        video_key, action_key (`str`): What the two arrays are called.
        keep_columns (sequence of `str`): Other arrays that are kept.

    Raises:
        ValueError: If there is no such file.
    """

    class_names = splits = None

    def __init__(
        self,
        folder: str | Path,
        video_key: str = "video",
        action_key: str = "actions",
        keep_columns: Sequence[str] = (),
    ) -> None:
        self.folder, self.video_key, self.action_key = Path(folder), video_key, action_key
        self.keep_columns = keep_columns
        self.names = sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*.npz"))
        if not self.names:
            raise ValueError(f"`folder` {str(folder)!r} holds no `.npz` file; name the folder of the trajectories.")

    def __getitem__(self, index: int) -> Trajectory:
        path = path_inside(self.folder, self.names[index])
        used = (self.video_key, self.action_key)
        try:
            with np.load(path, allow_pickle=False) as archive:
                names = archive.files
                arrays = {name: archive[name] for name in (*used, *self.keep_columns) if name in names}
        except Exception as error:  # a damaged archive or array makes zipfile, zlib and numpy raise nearly anything
            raise BadExampleError(
                f"{str(path)!r} is no readable `.npz` file ({type(error).__name__}: {error}); copy or write it again, "
                "with arrays of numbers or text and no Python objects."
            ) from error
        if self.action_key not in arrays:
            raise BadExampleError(
                f"{str(path)!r} lacks `{self.action_key}`; it has {names}, and needs a video and its actions. Say what "
                "they are called with `video_key` and `action_key`."
            )
        kept, left_out = choose_columns(names, self.keep_columns, used, repr(str(path)))
        return Trajectory(
            self.names[index],
            self._frames(path, arrays.get(self.video_key)),
            arrays[self.action_key],
            columns={name: arrays[name] for name in kept},
            left_out=left_out,
        )

    def _frames(self, path: Path, video: np.ndarray | None) -> Iterable[np.ndarray]:
        if video is None:
            beside = path.with_suffix(".mp4")
            if beside.is_file():
                return iter_video(path_inside(self.folder, beside.relative_to(self.folder).as_posix()))
            raise BadExampleError(
                f"{str(path)!r} lacks `{self.video_key}`, and there is no {path.stem}.mp4 beside it; it needs one of "
                "them. Say what the video is called with `video_key`."
            )
        if video.ndim != 4 or video.shape[3] != 3 or 0 in video.shape or video.dtype != np.uint8:
            raise BadExampleError(
                f"{str(path)!r} has `{self.video_key}` of shape {video.shape} and type {video.dtype}; it must be "
                "(F, H, W, 3), uint8."
            )
        return video
