"""Opening a dataset's split, with errors that say what is there."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Image, Video, get_dataset_split_names, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetsError

from .streaming import StreamedSplit, require_own_file


def load_split(dataset_name: str, split: str) -> Dataset:
    """Open one split of a dataset from a folder or the Hub; what is on the Hub is downloaded first.

    Args:
        dataset_name (`str`): A folder or a Hub id, which may end in `@` and a revision.
        split (`str`): Name of the split, such as `"train"`; slices such as `"train[:10]"` are allowed.

    Raises:
        ValueError: If the folder does not exist, has no such split or is damaged, or a row of it names a file elsewhere.
    """
    path, revision = locate_dataset(dataset_name)
    _require_split(path, revision, split.split("[")[0], split)
    try:
        dataset = load_dataset(path, split=split, revision=revision)
    except DatasetsError as error:
        raise _unreadable(path, error) from error
    _require_own_files(dataset, path)
    for column, feature in dataset.features.items():
        if isinstance(feature, Video):  # decoded by PyAV, so that no other decoder need be installed
            dataset = dataset.cast_column(column, Video(decode=False))
    return dataset


def stream_split(dataset_name: str, split: str, column: str = "video") -> StreamedSplit:
    """Open one split of a dataset without reading it: its rows are read when they are asked for, and nothing is copied.

    Args:
        dataset_name (`str`): As for [`load_split`].
        split (`str`): Name of the split, whole.
        column (`str`): The videos: `List(Image())` or `Video`.

    Raises:
        ValueError: If the folder does not exist, has no such split, or holds no videos.
    """
    path, revision = locate_dataset(dataset_name)
    if "[" in split:
        raise ValueError(
            f"`split` is {split!r}, but a stream has no slices; pass {split.split('[')[0]!r}, or do not stream."
        )
    _require_split(path, revision, split, split)
    builder = load_dataset_builder(path, revision=revision)
    return StreamedSplit(builder.as_streaming_dataset(split=split), builder.config.data_files[split], column, path)


def has_split(dataset_name: str, split: str) -> bool:
    """Whether a dataset, named as for [`load_split`], has such a split."""
    path, revision = locate_dataset(dataset_name)
    return split.split("[")[0] in get_dataset_split_names(path, revision=revision)


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


def _require_split(path: str, revision: str | None, name: str, split: str) -> None:
    try:
        available = get_dataset_split_names(path, revision=revision)
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
