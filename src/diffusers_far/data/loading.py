"""Opening a dataset's split, with errors that say what is there."""

from pathlib import Path

from datasets import Dataset, Video, get_dataset_split_names, load_dataset


def load_split(dataset_name: str, split: str) -> Dataset:
    """Open one split of a dataset from a folder or the Hub.

    Args:
        dataset_name (`str`): A folder or a Hub id.
        split (`str`): Name of the split, such as `"train"`; slices such as `"train[:10]"` are allowed.

    Raises:
        ValueError: If the folder does not exist or has no such split.
    """
    if dataset_name.startswith((".", "/", "~")):
        dataset_name = str(Path(dataset_name).expanduser())
        if not Path(dataset_name).is_dir():
            raise ValueError(
                f"`dataset_name` {dataset_name!r} is not a folder; pass a prepared dataset's folder or Hub id."
            )
    name = split.split("[")[0]
    available = get_dataset_split_names(dataset_name)
    if name not in available:
        raise ValueError(f"`split` is {split!r}, but {dataset_name!r} has {available}; pass one of these.")
    dataset = load_dataset(dataset_name, split=split)
    for column, feature in dataset.features.items():
        if isinstance(feature, Video):  # decoded by PyAV, so that no other decoder need be installed
            dataset = dataset.cast_column(column, Video(decode=False))
    return dataset
