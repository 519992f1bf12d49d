"""A dataset folder that is made of trajectories: parquet files and a card, which appear when all of it is written."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..command_line import Progress
from ..files import UNFINISHED, written_whole
from .preparation import Preparation, PreparedTrajectory, RowForm, write_trajectories
from .rows import BadExampleError
from .sources.trajectory import Trajectory
from .workers import share_work


# A split draws from a range of seeds that is its own, so nothing is in two splits, however far one of them grows.
SPLITS = ("train", "validation", "test")
SEEDS_PER_SPLIT = 1_000_000


@dataclass(frozen=True)
class Shard:
    """A parquet file to be written: its split, its number in it, and the numbers of the trajectories that go there."""

    split: str
    number: int
    trajectories: Sequence[int]


@dataclass(frozen=True)
class ShardReport:
    """What became of a shard: the lengths of its trajectories, and what is wrong with those that were left out."""

    split: str
    num_frames: list[int]
    faults: list[str]


# Opens what the trajectories are read from, and gives the function that reads one by its number. Called in each process.
Reader = Callable[[], AbstractContextManager[Callable[[int], Trajectory]]]


def check_folder(argument: str, path: Path, license: str) -> None:
    """Refuse, before any work, a folder that would be overwritten, one that another run writes to, and a licence that the Hub
    does not know the form of.

    Raises:
        ValueError: Says what to give instead.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(
            f"`--{argument}` is {str(path)!r}, which exists, and nothing is overwritten; name a new folder."
        )
    unfinished = path.with_name(UNFINISHED + path.name)
    if unfinished.exists():
        raise ValueError(f"{str(unfinished)!r} exists: a run writes to it or was killed; in that case delete it.")
    if not re.fullmatch(r"[a-z0-9.\-]+", license):
        raise ValueError(f"`--license` is {license!r}; give an identifier of the Hub, such as cc-by-4.0.")


def seeds_by_split(counts: Mapping[str, int], *, unit: str, first: int = 0) -> dict[str, range]:
    """The seeds of what is recorded for each split.

    Args:
        counts (`dict` of `str` to `int`): How many there are to be of each of `SPLITS`.
        unit (`str`): What is recorded from a seed, for errors.
        first (`int`): Seed of the first one to train on.

    Raises:
        ValueError: A count is negative or above `SEEDS_PER_SPLIT`, or all are 0.
    """
    for split in SPLITS:
        if not 0 <= counts[split] <= SEEDS_PER_SPLIT:
            raise ValueError(f"`--num_{split}` is {counts[split]}; it must be 0 to {SEEDS_PER_SPLIT:,}.")
    if not any(counts.values()):
        raise ValueError(f"`--num_train`, `--num_validation` and `--num_test` are all 0; ask for at least 1 {unit}.")
    starts = {split: first + place * SEEDS_PER_SPLIT for place, split in enumerate(SPLITS)}
    return {split: range(start, start + counts[split]) for split, start in starts.items()}


def plan_shards(trajectories: Mapping[str, Sequence[int]], length: int) -> list[Shard]:
    """Cut the trajectories of each split into shards of `length`; the last one of a split may be shorter."""
    return [
        Shard(split, number, of_split[start : start + length])
        for split, of_split in trajectories.items()
        for number, start in enumerate(range(0, len(of_split), length))
    ]


def write_dataset(
    folder: Path,
    reader: Reader,
    shards: Sequence[Shard],
    preparation: Preparation,
    form: RowForm,
    card: Callable[[dict[str, list[int]], list[str]], str],
    *,
    unit: str = "trajectory",
    num_processes: int = 1,
    skip_bad_examples: bool = False,
) -> tuple[dict[str, list[int]], list[str]]:
    """Write a dataset under another name beside `folder`, and rename it when all is there.

    Args:
        folder (`Path`): New, or empty; see [`check_folder`].
        reader (callable): Opens what the trajectories are read from; must be picklable.
        shards (sequence of [`Shard`]): See [`plan_shards`].
        preparation ([`Preparation`]): What is done to each trajectory.
        form ([`RowForm`]): What all of them must have.
        card (callable): Makes the README.md of what is returned; see [`dataset_card`].
        unit (`str`): What a trajectory is called in the log.
        num_processes (`int`): How many write at one time; the files do not depend on it.
        skip_bad_examples (`bool`): Leave damaged trajectories out instead of stopping.

    Returns:
        The lengths in frames of the trajectories of each split that has any, and what was wrong with those left out.

    Raises:
        BadExampleError: A trajectory is damaged, and none is to be skipped.
        ValueError, OSError: It could not be written. Nothing is left then.
    """
    unfinished = folder.with_name(UNFINISHED + folder.name)
    (unfinished / "data").mkdir(parents=True)
    try:
        progress = Progress(sum(len(shard.trajectories) for shard in shards), unit=unit, seconds_between_lines=10)
        write = partial(write_shard, reader, preparation, form, unfinished / "data", skip_bad_examples)
        lengths, faults = {}, []
        for report in share_work(write, shards, num_processes, progress):
            if report.num_frames:
                lengths.setdefault(report.split, []).extend(report.num_frames)
            faults += report.faults
        with written_whole(unfinished / "README.md") as file:
            file.write_text(card(lengths, faults))
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return lengths, faults


def write_shard(
    reader: Reader,
    preparation: Preparation,
    form: RowForm,
    folder: Path,
    skip_bad_examples: bool,
    shard: Shard,
    count: Callable[[], None],
) -> ShardReport:
    """Write one shard, perhaps in a process of its own. A shard without a good trajectory leaves no file."""
    report = ShardReport(shard.split, [], [])

    def good_trajectories(read: Callable[[int], Trajectory]) -> Iterator[PreparedTrajectory]:
        for number in shard.trajectories:
            try:
                trajectory = preparation(read(number))
                trajectory.require_form(form)
            except BadExampleError as error:
                if not skip_bad_examples:
                    raise
                report.faults.append(str(error))
            else:
                report.num_frames.append(len(trajectory.frames))
                yield trajectory
            count()

    path = folder / f"{shard.split}-{shard.number:05d}.parquet"
    with reader() as read:
        write_trajectories(path, good_trajectories(read), form.features)
    if not report.num_frames:
        path.unlink()
    return report


def dataset_card(
    name: str,
    license: str,
    description: str,
    columns: Sequence[str],
    origin: str,
    lengths: Mapping[str, Sequence[int]],
    *,
    units: str = "trajectories",
    note: str = "",
) -> str:
    """The README.md of a dataset: what its splits hold, what a row means, where it comes from.

    It names no files: `datasets` knows a split by the names of its files, and with a list of them in the card it would
    take what it cached of another dataset of the same name.

    Args:
        name (`str`), license (`str`), description (`str`): Of the dataset.
        columns (sequence of `str`): What each column means, a list item each.
        origin (`str`): How it was made.
        lengths (`dict` of `str` to list of `int`): Frames of each trajectory, by split.
        units (`str`): What trajectories are called.
        note (`str`): After the table of splits.
    """
    counts = "\n".join(f"| {split} | {len(each):,} | {sum(each):,} |" for split, each in lengths.items())
    meanings = "\n".join(f"- {column}" for column in columns)
    note = f"\n{note}\n" if note else ""
    return f"""---
license: {license}
pretty_name: {json.dumps(name)}
tags:
- video
- world-model
---

# {name}

{description}

```python
from datasets import load_dataset

{units} = load_dataset("path/to/this/folder", split="{next(iter(lengths))}")
```

| split | {units} | frames |
|---|---|---|
{counts}
{note}
## Columns

{meanings}

## Provenance and licence

Licence as given by who made this folder: {license}. {origin}
"""
