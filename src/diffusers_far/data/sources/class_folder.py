"""Videos in a folder per class, as UCF-101 comes."""

from pathlib import Path

from ..video import VIDEO_SUFFIXES, iter_video
from .trajectory import Trajectory, path_inside


class ClassFolderSource:
    """`Class/video.avi`, or another suffix of `VIDEO_SUFFIXES`; the folder's name is the label.

    Args:
        folder (`str` or `Path`): The folder of the class folders.

    Raises:
        ValueError: If no subfolder holds a video.
    """

    splits = None

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        paths = [path for path in self.folder.glob("*/*") if path.suffix.lower() in VIDEO_SUFFIXES]
        paths = [path for path in paths if not path.name.startswith(".")]
        if not paths:
            raise ValueError(
                f"`folder` {str(folder)!r} has no video in its subfolders (one of {VIDEO_SUFFIXES}); name the folder "
                "that holds the class folders."
            )
        self.names = sorted(path.relative_to(self.folder).as_posix() for path in paths)
        self.class_names = sorted({path.parent.name for path in paths})

    def __getitem__(self, index: int) -> Trajectory:
        path = path_inside(self.folder, self.names[index])
        return Trajectory(self.names[index], iter_video(path), label=path.parent.name)
