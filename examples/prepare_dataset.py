"""Turn a folder of your own videos into a dataset to train on: frames as lossless PNG, actions, labels.

    python examples/prepare_dataset.py --source npz --input dmlab/train --output dmlab-train
    python examples/prepare_dataset.py --source classfolder --input UCF-101 --output ucf-64 --size 64 --frame_interval 3
    python examples/prepare_dataset.py --source videofolder --input drives --output drives-64 --size 64 --test_share 0.1
    python examples/prepare_dataset.py --source lerobot --input pusht --output pusht-96 --video_key observation.image

`--source` is the layout of `--input`:

    npz          TECO's trajectories, in any subfolder: `video` uint8 (F, H, W, 3) and `actions` (F,) integers
    classfolder  `Class/video.avi`, or mp4, mkv, mov, webm, as UCF-101: the folder is the label
    videofolder  `metadata.jsonl`, a line per video: `file_name`, and `actions` and `label` where there are any
    lerobot      a LeRobot dataset of version 2 or 3: continuous actions

Folders in `--input` that are called `train`, `validation` or `test` (or `val`, `dev` and the like) are these splits.

The result appears under `--output` when it is whole; `load_dataset` opens it, and so do the training scripts.
"""

import argparse
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from diffusers_far.command_line import HelpWithDefaults, Progress, require_one_process, set_up_logging
from diffusers_far.data.rows import COMBINATION_RULES, ActionCombiner, BadExampleError
from diffusers_far.data.sources import SOURCES, TrajectorySource


logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
SHARES = ("validation_share", "test_share")
# Which sources take them.
KEYS = {
    "video_key": ("lerobot", "npz"),
    "action_key": ("lerobot", "npz"),
    "keep_columns": ("lerobot", "npz", "videofolder"),
}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    parser.add_argument("--source", choices=SOURCES, required=True, help="Layout of --input, see above.")
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="New or empty folder.")

    parser.add_argument("--frame_interval", type=int, default=1, help="Keep one frame in so many.")
    rules = "; ".join(f"{rule}: {meaning}" for rule, meaning in COMBINATION_RULES.items())
    parser.add_argument(
        "--combine_actions",
        choices=COMBINATION_RULES,
        help=f"What the actions between two kept frames become; needed if there are any. {rules}.",
    )
    parser.add_argument("--num_actions", type=int, help="Number of discrete actions, for --combine_actions joint.")
    parser.add_argument("--size", type=int, nargs="+", help="Height and width, or one for both: crop and resize.")
    parser.add_argument(
        "--video_key",
        help="For lerobot: which camera, if there are several. For npz: the array's name if not `video`.",
    )
    parser.add_argument(
        "--action_key", help="For npz and lerobot: the name of the actions if not `actions` or `action`."
    )
    parser.add_argument(
        "--keep_columns",
        nargs="+",
        metavar="NAME",
        help="What else to keep of each trajectory: arrays of npz, fields of `metadata.jsonl`, columns of lerobot. Of those "
        "with a value for each frame, the values of the kept frames.",
    )

    parser.add_argument(
        "--split",
        choices=SPLITS,
        help="Where trajectories go that no share takes; left out: by the folders that are named after splits, else train.",
    )
    parser.add_argument(
        "--validation_share",
        type=float,
        default=0.0,
        help="By a hash of the trajectory's name; of folders that are named after splits, of `train` alone.",
    )
    parser.add_argument("--test_share", type=float, default=0.0, help="Likewise: a file never changes its split.")

    parser.add_argument("--license", default="unknown", help="Hub's identifier, such as cc-by-4.0; for the card.")
    parser.add_argument("--description", default="", help="Where the data come from, for the card.")
    parser.add_argument("--skip_bad_examples", action="store_true", help="Leave damaged ones out, and list them.")
    parser.add_argument("--trajectories_per_shard", type=int, default=64)
    parser.add_argument("--num_processes", type=int, default=1)
    args = parser.parse_args(arguments)
    if args.size is not None and len(args.size) > 2:
        parser.error(f"--size has {len(args.size)} numbers; give height and width, or one for both.")
    args.size = None if args.size is None else (args.size[0], args.size[-1])
    return args


if __name__ == "__main__":
    args = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

from diffusers_far.data.loading import choose_split
from diffusers_far.data.preparation import (
    RESERVED_COLUMNS,
    Preparation,
    PreparedTrajectory,
    RowForm,
    write_trajectories,
)
from diffusers_far.data.sources import open_split_folders
from diffusers_far.data.workers import share_work
from diffusers_far.files import UNFINISHED, written_whole


@dataclass(frozen=True)
class Shard:
    """A parquet file to be written: its split, its number in it, and the trajectories that go there."""

    split: str
    number: int
    indices: list[int]


@dataclass(frozen=True)
class ShardReport:
    """What became of a shard: the lengths of its trajectories, and what is wrong with those that were left out."""

    split: str
    num_frames: list[int]
    faults: list[str]


def open_source(args: argparse.Namespace) -> TrajectorySource:
    keys = {name: getattr(args, name) for name in KEYS if getattr(args, name) is not None}
    open_folder = partial(SOURCES[args.source], **keys)
    return open_folder(args.input) if args.split else open_split_folders(open_folder, args.input)


def build_preparation(args: argparse.Namespace) -> Preparation:
    combiner = None if args.combine_actions is None else ActionCombiner(args.combine_actions, args.num_actions)
    return Preparation(args.frame_interval, args.size, combiner)


def check_request(args: argparse.Namespace) -> None:
    if not args.input.is_dir():
        raise ValueError(f"`--input` is {str(args.input)!r}, which is not a folder; name the folder of your data.")
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ValueError(
            f"`--output` is {str(args.output)!r}, which exists, and nothing is overwritten; name a new folder."
        )
    shares = (args.validation_share, args.test_share)
    if min(shares) < 0 or sum(shares) > 1:
        raise ValueError(f"`--validation_share` and `--test_share` are {shares}; they must be in [0, 1] together.")
    for name, sources in KEYS.items():
        if getattr(args, name) is not None and args.source not in sources:
            raise ValueError(
                f"`--{name}` is for {' and '.join(sources)} only, but `--source` is {args.source!r}; leave it out."
            )
    reserved = set(args.keep_columns or ()) & set(RESERVED_COLUMNS)
    if reserved or len(set(args.keep_columns or ())) < len(args.keep_columns or ()):
        raise ValueError(
            f"`--keep_columns` is {args.keep_columns}; name each column once, and none of {list(RESERVED_COLUMNS)}, which the "
            "dataset has of its own."
        )
    if args.num_actions is not None and args.combine_actions != "joint":
        raise ValueError(f"`--num_actions` is {args.num_actions}, which only `--combine_actions joint` takes.")
    if not re.fullmatch(r"[a-z0-9.\-]+", args.license):
        raise ValueError(f"`--license` is {args.license!r}; give an identifier of the Hub, such as cc-by-4.0.")
    for name in ("num_processes", "trajectories_per_shard"):
        if getattr(args, name) < 1:
            raise ValueError(f"`--{name}` is {getattr(args, name)}; it must be at least 1.")


def plan_shards(source: TrajectorySource, args: argparse.Namespace) -> list[Shard]:
    indices = {split: [] for split in SPLITS}
    for index, name in enumerate(source.names):
        split = args.split or "train" if source.splits is None else source.splits[index]
        if source.splits is None or split == "train":
            split = choose_split(name, args.validation_share, args.test_share, rest=split)
        indices[split].append(index)
    length = args.trajectories_per_shard
    return [
        Shard(split, number, indices[split][start : start + length])
        for split in SPLITS
        for number, start in enumerate(range(0, len(indices[split]), length))
    ]


def find_form(source: TrajectorySource, args: argparse.Namespace) -> RowForm:
    """The form of the first trajectory that is not damaged, which all others must have."""
    preparation = build_preparation(args)
    for index in range(len(source.names)):
        try:
            trajectory = source[index]
            first = preparation(trajectory)
        except BadExampleError:
            if not args.skip_bad_examples:
                raise
        else:
            if trajectory.left_out:
                names = " ".join(trajectory.left_out)
                logger.info(f"Left out of each trajectory: {names}; `--keep_columns` keeps what it names")
            return first.form(source.class_names)
    raise ValueError(f"None of the {len(source.names)} trajectories in {str(args.input)!r} can be used.")


def prepare_shard(
    args: argparse.Namespace, form: RowForm, folder: Path, shard: Shard, count: Callable[[], None]
) -> ShardReport:
    """Write one shard, perhaps in a process of its own. A shard without a good trajectory leaves no file."""
    source, preparation, report = open_source(args), build_preparation(args), ShardReport(shard.split, [], [])

    def good_trajectories() -> Iterator[PreparedTrajectory]:
        for index in shard.indices:
            try:
                trajectory = preparation(source[index])
                trajectory.require_form(form)
            except BadExampleError as error:
                if not args.skip_bad_examples:
                    raise
                report.faults.append(str(error))
            else:
                report.num_frames.append(len(trajectory.frames))
                yield trajectory
            count()

    path = folder / "data" / f"{shard.split}-{shard.number:05d}.parquet"
    write_trajectories(path, good_trajectories(), form.features)
    if not report.num_frames:
        path.unlink()
    return report


def prepare_shards(args: argparse.Namespace, form: RowForm, folder: Path, shards: list[Shard]) -> list[ShardReport]:
    progress = Progress(sum(len(shard.indices) for shard in shards), unit="trajectory", seconds_between_lines=10)
    return share_work(partial(prepare_shard, args, form, folder), shards, args.num_processes, progress)


def describe_columns(args: argparse.Namespace, form: RowForm) -> str:
    height, width = form.frame_size
    kept = "every frame" if args.frame_interval == 1 else f"one frame in {args.frame_interval}"
    lines = [f"- `video`: {kept} of the source, {height}x{width} RGB, lossless PNG."]
    if form.action_shape is not None:
        kind = "an integer" if form.action_shape == () else f"a list of {form.action_shape[0]} numbers"
        lines.append(
            f"- `actions`: {kind} per frame; `actions[t]` leads from frame `t` to frame `t + 1`, so the last one leads "
            "out of the video. Where the source lacks that one, the one before is repeated."
        )
        if args.frame_interval > 1:
            rule = COMBINATION_RULES[args.combine_actions]
            lines[-1] += f" Each is made of {args.frame_interval} of the source: {rule}."
    if form.class_names is not None:
        lines.append(f"- `label`: one of {len(form.class_names)} classes.")
    lines.append("- `source`: what the trajectory is called in the source.")
    for name, column in form.columns.items():
        lines.append(f"- `{name}`: {column.dtype}, {column.num_dimensions} dimensions, as the source has it.")
    return "\n".join(lines)


def command_line(args: argparse.Namespace) -> str:
    """What made the dataset, but for the folders, which are the maker's own."""
    command = f"python examples/prepare_dataset.py --source {args.source} --input DIR --output DIR"
    for name in ("frame_interval", "combine_actions", "num_actions", "size", *KEYS, "split", *SHARES):
        value = getattr(args, name)
        if value:
            values = value if isinstance(value, (tuple, list)) else [value]
            command += f" --{name} {' '.join(map(str, values))}"
    return command


def dataset_card(args: argparse.Namespace, form: RowForm, reports: list[ShardReport]) -> str:
    """The README.md of the dataset: what its splits hold, what a row means, where it comes from.

    It names no files: `datasets` knows a split by the names of its files, and with a list of them in the card it would
    take what it cached of another dataset of the same name.
    """
    lengths = {split: sum((report.num_frames for report in reports if report.split == split), []) for split in SPLITS}
    lengths = {split: each for split, each in lengths.items() if each}
    counts = "\n".join(f"| {split} | {len(each):,} | {sum(each):,} |" for split, each in lengths.items())
    num_faults = sum(len(report.faults) for report in reports)
    skipped = f"\n{num_faults} damaged trajectories of the source were left out.\n" if num_faults else ""
    return f"""---
license: {args.license}
pretty_name: {json.dumps(args.output.name)}
tags:
- video
- world-model
---

# {args.output.name}

{args.description or "No description was given."}

```python
from datasets import load_dataset

trajectories = load_dataset("path/to/this/folder", split="{next(iter(lengths))}")
```

| split | trajectories | frames |
|---|---|---|
{counts}
{skipped}
## Columns

{describe_columns(args, form)}

## Provenance and licence

Licence as given by who made this folder: {args.license}. Converted by `examples/prepare_dataset.py` of diffusers-far:

```
{command_line(args)}
```
"""


def main(args: argparse.Namespace) -> None:
    require_one_process("prepare_dataset.py")
    set_up_logging(__name__)
    # 1. Open
    check_request(args)
    source = open_source(args)
    shards = plan_shards(source, args)
    unfinished = args.output.with_name(UNFINISHED + args.output.name)
    if unfinished.exists():
        raise ValueError(f"{str(unfinished)!r} exists: a run writes to it or was killed; in that case delete it.")

    # 2. Write under another name, and rename when all is there
    (unfinished / "data").mkdir(parents=True)
    try:
        form = find_form(source, args)
        reports = prepare_shards(args, form, unfinished, shards)
        with written_whole(unfinished / "README.md") as card:
            card.write_text(dataset_card(args, form, reports))
        unfinished.rename(args.output)
    except BadExampleError as error:
        raise ValueError(f"{error} With `--skip_bad_examples` such trajectories are left out and listed.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)

    # 3. Say what became of it
    num_saved = sum(len(report.num_frames) for report in reports)
    logger.info(f"Saved {num_saved} of {len(source.names)} trajectories to {args.output}")
    faults = [fault for report in reports for fault in report.faults]
    if faults:
        logger.warning("\n  ".join([f"Left out {len(faults)} damaged trajectories:", *faults]))


if __name__ == "__main__":
    main(args)
