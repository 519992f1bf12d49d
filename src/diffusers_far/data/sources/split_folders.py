"""A folder for each split, in whatever layout its files have."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .trajectory import Trajectory, TrajectorySource
from .video_folder import VideoFolderSource


# The names that `datasets` takes for splits as well.
SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


class SplitFoldersSource:
    """Several sources as one: a trajectory is called by its folder and its name in it.

    Args:
        sources (`dict` of `str` to `TrajectorySource`): By the names of their folders, each one of `SPLIT_FOLDERS`.
    """

    def __init__(self, sources: dict[str, TrajectorySource]) -> None:
        places = [(folder, source, index) for folder, source in sources.items() for index in range(len(source.names))]
        self.places = [(source, index) for _, source, index in places]
        self.names = [f"{folder}/{source.names[index]}" for folder, source, index in places]
        self.splits = [SPLIT_FOLDERS[folder.lower()] for folder, _, _ in places]
        names = {name for source in sources.values() for name in source.class_names or ()}
        # Labels that are numbers stay these numbers.
        self.class_names = sorted(names, key=int if all(name.isdecimal() for name in names) else None) or None

    def __getitem__(self, index: int) -> Trajectory:
        source, place = self.places[index]
        return replace(source[place], name=self.names[index])


def open_split_folders(open_source: Callable[[Path], TrajectorySource], folder: Path) -> TrajectorySource:
    """What lies in `folder`, with the splits that its subfolders are named after; without such subfolders, as it is.

    Args:
        open_source (callable): Opens a folder.
        folder (`Path`): Of the data.

    Raises:
        ValueError: If one of the subfolders cannot be opened, or there are trajectories outside of them.
    """
    sources, faults = {}, []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name.lower() in SPLIT_FOLDERS:
            try:
                sources[path.name] = open_source(path)
            except ValueError as error:
                # It may be a class that is called "train", or a folder of videos with `metadata.jsonl` above it.
                faults.append(error)
    if not sources:
        source = open_source(folder)
        if isinstance(source, VideoFolderSource):  # its `file_name` may begin with the folder of a split
            source.splits = _splits_of_names(source.names, folder)
        return source
    if faults:
        raise faults[0]
    try:
        rest = open_source(folder).names
    except ValueError:
        rest = []
    _refuse_outside([name for name in rest if name.split("/")[0] not in sources], sorted(sources), folder)
    return SplitFoldersSource(sources)


def _splits_of_names(names: list[str], folder: Path) -> list[str] | None:
    tops = [name.split("/")[0] if "/" in name else "" for name in names]
    found = sorted({top for top in tops if top.lower() in SPLIT_FOLDERS})
    if not found:
        return None
    _refuse_outside([name for name, top in zip(names, tops) if top not in found], found, folder)
    return [SPLIT_FOLDERS[top.lower()] for top in tops]


def _refuse_outside(outside: list[str], folders: list[str], folder: Path) -> None:
    if outside:
        raise ValueError(
            f"{str(folder)!r} has the folders {folders}, named after splits, and {len(outside)} trajectories outside of "
            f"them, such as {outside[0]!r}; move these into one of the folders, or give `--split` to put all into one split."
        )
