"""TECO's trajectories, as DMLab and Minecraft come."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from ..faults import BadExampleError
from ..video import iter_video
from .trajectory import Trajectory


class NpzSource:
    """All `.npz` files of a folder and its subfolders: `video` uint8 (F, H, W, 3) and `actions` (F,) integers.

    A file without `video` may have an `.mp4` of the same name beside it, as in Minecraft.

    Args:
        folder (`str` or `Path`): Nothing in it is unpickled.

    Raises:
        ValueError: If there is no such file.
    """

    class_names = None

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.names = sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*.npz"))
        if not self.names:
            raise ValueError(f"`folder` {str(folder)!r} holds no `.npz` file; name the folder of the trajectories.")

    def __getitem__(self, index: int) -> Trajectory:
        path = self.folder / self.names[index]
        arrays = _read_npz(path)
        if "actions" not in arrays:
            raise BadExampleError(f"{str(path)!r} lacks `actions`; it needs `video` and `actions`.")
        return Trajectory(self.names[index], _frames(path, arrays), arrays["actions"])


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in ("video", "actions") if name in archive.files}
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BadExampleError(
            f"{str(path)!r} is no readable `.npz` file ({error}); copy or write it again."
        ) from error


def _frames(path: Path, arrays: dict[str, np.ndarray]):
    if "video" in arrays:
        video = arrays["video"]
        if video.ndim != 4 or video.shape[3] != 3 or 0 in video.shape or video.dtype != np.uint8:
            raise BadExampleError(
                f"{str(path)!r} has `video` of shape {video.shape} and type {video.dtype}; it must be (F, H, W, 3), uint8."
            )
        return video
    if path.with_suffix(".mp4").is_file():
        return iter_video(path.with_suffix(".mp4"))
    raise BadExampleError(
        f"{str(path)!r} lacks `video`, and there is no {path.stem}.mp4 beside it; it needs one of them."
    )
