"""Opening a split of a dataset, with errors that say what is there.

A trajectory's split is a function of its name alone, so that it never moves as a dataset grows. A dataset is
identified by its content, not by where it lies or when it was written.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Image, Video, get_dataset_split_names, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetsError

from .streaming import StreamedSplit, require_own_file


def choose_split(name: str, validation_share: float, test_share: float, rest: str = "train") -> str:
    """Place a name in [0, 1) by its hash: test from the lower end, validation from the upper, `rest` in between.

    So a share that grows takes trajectories from `rest` only.
    """
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    if place < test_share:
        return "test"
    return "validation" if place >= 1 - validation_share else rest


def dataset_fingerprint(dataset: Dataset, num_rows: int = 32) -> str:
    """Sha256 (hex) of the features, the number of rows and the content of up to `num_rows` evenly spaced rows.

    Of a video in a file of its own the content counts, not where it lies.
    """
    digest = hashlib.sha256(json.dumps([dataset.num_rows, str(dataset.features)]).encode())
    rows = dataset.with_format("arrow")
    for row in np.unique(np.linspace(0, dataset.num_rows - 1, min(num_rows, dataset.num_rows)).astype(int)):
        for name, column in zip(dataset.column_names, rows[int(row)].columns):
            values = column.to_pylist()
            if isinstance(dataset.features[name], Video):
                values = [_content_hash(file) for file in values]
            digest.update(repr(values).encode())
    return digest.hexdigest()


def _content_hash(file: dict) -> str:
    content = Path(file["path"]).read_bytes() if file["bytes"] is None else file["bytes"]
    return hashlib.sha256(content).hexdigest()


def load_split(dataset_name: str, split: str, config_name: str | None = None) -> Dataset:
    """Open one split of a dataset from a folder or the Hub; what is on the Hub is downloaded first.

    Args:
        dataset_name (`str`): A folder or a Hub id, which may end in `@` and a revision.
        split (`str`): Name of the split, such as `"train"`; slices such as `"train[:10]"` are allowed.
        config_name (`str`, *optional*): Of a dataset with several configurations.

    Raises:
        ValueError: If the folder does not exist, has no such split or is damaged, or a row of it names a file elsewhere.
    """
    path, revision = locate_dataset(dataset_name)
    _require_split(path, config_name, revision, split.split("[")[0], split)
    try:
        dataset = load_dataset(path, config_name, split=split, revision=revision)
    except DatasetsError as error:
        raise _unreadable(path, error) from error
    _require_own_files(dataset, path)
    for column, feature in dataset.features.items():
        if isinstance(feature, Video):  # decoded by PyAV, so that no other decoder need be installed
            dataset = dataset.cast_column(column, Video(decode=False))
    return dataset


def stream_split(
    dataset_name: str, split: str, column: str = "video", config_name: str | None = None
) -> StreamedSplit:
    """Open one split of a dataset without reading it: its rows are read when they are asked for, and nothing is copied.

    Args:
        dataset_name (`str`): As for [`load_split`].
        split (`str`): Name of the split, whole.
        column (`str`): The videos: `List(Image())` or `Video`.
        config_name (`str`, *optional*): As for [`load_split`].

    Raises:
        ValueError: If the folder does not exist, has no such split, or holds no videos.
    """
    path, revision = locate_dataset(dataset_name)
    if "[" in split:
        raise ValueError(
            f"`split` is {split!r}, but a stream has no slices; pass {split.split('[')[0]!r}, or do not stream."
        )
    _require_split(path, config_name, revision, split, split)
    builder = load_dataset_builder(path, config_name, revision=revision)
    return StreamedSplit(builder.as_streaming_dataset(split=split), builder.config.data_files[split], column, path)


def has_split(dataset_name: str, split: str, config_name: str | None = None) -> bool:
    """Whether a dataset, named as for [`load_split`], has such a split."""
    path, revision = locate_dataset(dataset_name)
    return split.split("[")[0] in get_dataset_split_names(path, config_name, revision=revision)


def locate_dataset(dataset_name: str) -> tuple[str, str | None]:
    """The folder or Hub id, and the revision if one is given.

    Raises:
        ValueError: If the name is that of a folder which does not exist.
    """
    if Path(dataset_name).is_dir():
        return dataset_name, None
    if dataset_name.startswith((".", "/", "~")):
        folder = Path(dataset_name).expanduser()
        if not folder.is_dir():
            raise ValueError(
                f"`dataset_name` {str(folder)!r} is not a folder; pass a prepared dataset's folder or Hub id."
            )
        return str(folder), None
    path, _, revision = dataset_name.partition("@")
    return path, revision or None


def _require_split(path: str, config_name: str | None, revision: str | None, name: str, split: str) -> None:
    try:
        available = get_dataset_split_names(path, config_name, revision=revision)
    except ValueError as error:  # of a damaged file
        raise _unreadable(path, error) from error
    if name not in available:
        raise ValueError(f"`split` is {split!r}, but {path!r} has {available}; pass one of these.")


def _unreadable(path: str, error: Exception) -> ValueError:
    cause = error.__cause__ or error
    return ValueError(f"The dataset {path!r} cannot be read: {type(cause).__name__}: {cause}; copy or make it again.")


def _require_own_files(dataset: Dataset, path: str) -> None:
    """Refuse a dataset whose rows name images or videos that are not its own. Rows that hold their content name nothing."""
    for column, feature in dataset.features.items():
        if not isinstance(getattr(feature, "feature", feature), (Image, Video)):
            continue
        for batch in dataset.select_columns([column]).with_format("arrow").iter(batch_size=1024):
            files = batch[column].combine_chunks()
            files = files.flatten() if pa.types.is_nested(files.type) and not pa.types.is_struct(files.type) else files
            for name in files.field("path").filter(pc.is_null(files.field("bytes"))).to_pylist():
                require_own_file(name, path)
