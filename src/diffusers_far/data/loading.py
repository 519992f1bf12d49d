"""Opening a dataset's split, with errors that say what is there."""

from pathlib import Path

from datasets import Dataset, Video, get_dataset_split_names, load_dataset, load_dataset_builder

from .streaming import StreamedSplit


def load_split(dataset_name: str, split: str) -> Dataset:
    """Open one split of a dataset from a folder or the Hub; what is on the Hub is downloaded first.

    Args:
        dataset_name (`str`): A folder or a Hub id, which may end in `@` and a revision.
        split (`str`): Name of the split, such as `"train"`; slices such as `"train[:10]"` are allowed.

    Raises:
        ValueError: If the folder does not exist or has no such split.
    """
    path, revision = locate_dataset(dataset_name)
    _require_split(path, revision, split.split("[")[0], split)
    dataset = load_dataset(path, split=split, revision=revision)
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
    return StreamedSplit(builder.as_streaming_dataset(split=split), builder.config.data_files[split], column)


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
    available = get_dataset_split_names(path, revision=revision)
    if name not in available:
        raise ValueError(f"`split` is {split!r}, but {path!r} has {available}; pass one of these.")
