"""Datasets whose rows are read as they are needed, from a folder or the Hub, and never copied to a cache.

A split is made of shards: its parquet files, or the rows of a `metadata.jsonl`. A shard is read from its front.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset, List, Value
from huggingface_hub.constants import HF_HUB_CACHE

from .clips import StoredTrajectory, holds_video_files
from .rows import SOURCE_COLUMN, BadExampleError
from .sources.trajectory import path_inside
from .video import count_frames


# A dataset of video files has a shard for each file. If there are more, several are read as one.
MAX_SHARDS = 256
SAMPLED_FILES = 32
SAMPLED_BYTES = 2**16


class StreamedSplit:
    """A split that is read as it is needed.

    Args:
        dataset (`datasets.IterableDataset`): Its rows; nothing is decoded.
        files (sequence of `str`): What it is made of: paths or `hf://` addresses, in order.
        column (`str`): The videos: `List(Image())` or `Video`.
        place (`str`, *optional*): The dataset's folder or Hub id: its rows may name no other files. `None`: not
            checked.

    Attributes:
        holds_files (`bool`): Whether a row is a video file rather than a list of images.
        points_to_files (`bool`): Whether a row only names its video file, so that it is read for itself.
        num_shards (`int`): At least 1.

    Raises:
        ValueError: If `column` is missing or of another type, or there is no row.
    """

    def __init__(
        self, dataset: IterableDataset, files: Sequence[str], column: str = "video", place: str | None = None
    ) -> None:
        self.holds_files = holds_video_files(dataset.features or {}, column)
        self.place = place
        self.dataset, self.files, self.column = dataset.decode(False), list(files), column
        self.num_shards = min(dataset.num_shards, MAX_SHARDS)
        first = next(iter(self.dataset.take(1)), None)
        if first is None:
            raise ValueError(f"The dataset of {self.files[:3]} has no rows; pass another split.")
        self.points_to_files = self.holds_files and first[column]["bytes"] is None

    @property
    def has_discrete_actions(self) -> bool:
        """Whether an action is one whole number; as far as the column's type says."""
        feature = self.dataset.features.get("actions")
        return isinstance(feature, List) and isinstance(feature.feature, Value) and "int" in feature.feature.dtype

    def rows(self, shard: int, first_row: int = 0) -> Iterator[dict]:
        """The rows of a shard from `first_row` on, counted within it."""
        return iter(self.dataset.shard(self.num_shards, shard).skip(first_row))

    def trajectory(self, row: dict, name: str) -> StoredTrajectory:
        """A row's trajectory, not decoded. A video file that is elsewhere is fetched.

        Raises:
            BadExampleError: If the video file cannot be fetched or opened, or is not the dataset's own.
        """
        self._require_own_files(row)
        video = row[self.column]
        if row.get(SOURCE_COLUMN) is not None:
            name = f"{row[SOURCE_COLUMN]!r}, {name}"
        if self.holds_files:
            name = repr(video["path"]) if video["path"] else name
            video = fetch_file(video)
        num_frames = count_frames(video) if self.holds_files else len(video)
        return StoredTrajectory(name, video, num_frames, row.get("actions"), row.get("label"))

    def all_rows(self, first_row: int = 0) -> Iterator[dict]:
        """The rows of all shards in order, from `first_row` on."""
        return iter(self.dataset.skip(first_row))

    def head(self, num_rows: int) -> Dataset:
        """The first rows, held in memory."""
        return self.in_memory(list(self.dataset.take(num_rows)))

    def in_memory(self, rows: list[dict]) -> Dataset:
        """Rows of the split as a dataset to read in any order; with their video files, if these are elsewhere."""
        for row in rows:
            self._require_own_files(row)
        if self.holds_files:
            files = [fetch_file(row[self.column]) for row in rows]
            stored = [
                {"path": None, "bytes": file} if isinstance(file, bytes) else {"path": file, "bytes": None}
                for file in files
            ]
            rows = [row | {self.column: file} for row, file in zip(rows, stored)]
        return Dataset.from_list(rows, features=self.dataset.features)

    def _require_own_files(self, row: dict) -> None:
        for file in [row[self.column]] if self.holds_files else row[self.column]:
            if self.place is not None and file["bytes"] is None:
                require_own_file(file["path"], self.place)

    @cached_property
    def num_rows(self) -> int:
        """Rows of all shards; parquet files say how many they have, others are read to count them."""
        if not all(file.endswith(".parquet") for file in self.files):
            return sum(1 for _ in self.all_rows())
        total = 0
        for file in self.files:
            with fsspec.open(file, "rb") as content:
                total += pq.read_metadata(content).num_rows
        return total

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 (hex) of the features and the files: of those on the Hub the names, sizes and content that the Hub
        vouches for; of those in a folder the names, the sizes, and the beginnings and ends of up to 32 of them.

        Where a folder lies and when it was written does not count, nor a commit that leaves the files as they are.
        """
        sample = set(np.linspace(0, len(self.files) - 1, min(SAMPLED_FILES, len(self.files))).astype(int).tolist())
        parts = [_identify(file, number in sample) for number, file in enumerate(self.files)]
        folder = _common_folder([part[0] for part in parts])
        parts = [[name[len(folder) :], *rest] for name, *rest in parts]
        return hashlib.sha256(json.dumps([str(self.dataset.features), parts]).encode()).hexdigest()


def require_own_file(name: str | None, place: str) -> None:
    """Refuse an image or a video that a row only names, unless it is the dataset's own: rows of strangers must not bring in
    other files of this machine, or make it fetch what they like.

    Args:
        name (`str`, *optional*): As the row has it: a path or an address.
        place (`str`): The dataset's folder, or its id on the Hub, whose files lie in the caches of `datasets`.

    Raises:
        BadExampleError: If it is not.
    """
    if name is None:
        return
    name = name.split("::")[-1].removeprefix("file://")  # of a file in an archive: the archive
    caches = (HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)
    if ".." not in Path(name).parts and any(Path(name).is_relative_to(cache) for cache in caches):
        return
    if "://" not in name and Path(place).is_dir():
        folder = Path(place).resolve() if Path(name).is_relative_to(Path(place).resolve()) else Path(place).absolute()
        path_inside(folder, os.path.relpath(name, folder) if Path(name).is_relative_to(folder) else name)
    elif not name.startswith((f"hf://datasets/{place}/", f"hf://datasets/{place}@")):
        raise BadExampleError(
            f"A row names {name!r}, which is no file of the dataset {place!r}; use rows that hold their files."
        )


def fetch_file(file: dict) -> str | bytes:
    """What can be opened of a video file as `datasets` has it: its path on this machine, else its content.

    Raises:
        BadExampleError: If it cannot be fetched.
    """
    if file["bytes"] is not None or "://" not in file["path"]:
        return file["path"] if file["bytes"] is None else file["bytes"]
    try:
        with fsspec.open(file["path"], "rb") as content:
            return content.read()
    except OSError as error:
        raise BadExampleError(f"{file['path']!r} cannot be fetched ({error}); try again.") from error


def _identify(file: str, is_sampled: bool) -> list:
    """Name, size and what tells of the content."""
    if "://" in file:
        filesystem, path = fsspec.core.url_to_fs(file)
        entry = filesystem.info(path)
        return [file.split("@", 1)[-1].split("/", 1)[-1], entry["size"], entry.get("blob_id")]
    path = Path(file)
    size = path.stat().st_size
    if not (is_sampled or path.suffix in (".jsonl", ".csv")):
        return [path.as_posix(), size, None]
    digest = hashlib.sha256()
    with path.open("rb") as content:
        if size <= 2 * SAMPLED_BYTES or path.suffix in (".jsonl", ".csv"):
            digest.update(content.read())
        else:
            digest.update(content.read(SAMPLED_BYTES))
            content.seek(size - SAMPLED_BYTES)
            digest.update(content.read())
    return [path.as_posix(), size, digest.hexdigest()]


def _common_folder(names: list[str]) -> str:
    """What all names begin with, up to a slash."""
    first, last = min(names), max(names)
    length = next((place for place, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    return first[: first.rfind("/", 0, length) + 1]
