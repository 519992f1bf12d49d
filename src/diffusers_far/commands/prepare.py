"""`far prepare`: open what people have, find the form of its rows, write it as a dataset, say what became of it."""

import argparse
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from ..command_line import require_one_process, set_up_logging
from ..data.dataset_folder import check_folder, dataset_card, plan_shards, write_dataset
from ..data.loading import choose_split
from ..data.preparation import RESERVED_COLUMNS, Preparation, RowForm
from ..data.rows import COMBINATION_RULES, ActionCombiner, BadExampleError
from ..data.sources import SOURCES, Trajectory, TrajectorySource, open_split_folders
from .arguments import SPLITS


logger = logging.getLogger(__name__)

SHARES = ("validation_share", "test_share")
# Which sources take them.
KEYS = {
    "video_key": ("lerobot", "npz"),
    "action_key": ("lerobot", "npz"),
    "keep_columns": ("lerobot", "npz", "videofolder"),
}


def main(args: argparse.Namespace) -> None:
    """Run with the arguments of [`parse_prepare`].

    Raises:
        ValueError, OSError: What the user can mend. Nothing is left under `--output` then.
    """
    require_one_process("far prepare")
    set_up_logging(__name__)
    # 1. Open
    check_request(args)
    source = open_source(args)
    combiner = None if args.combine_actions is None else ActionCombiner(args.combine_actions, args.num_actions)
    preparation = Preparation(args.frame_interval, args.size, combiner)
    shards = plan_shards(trajectories_by_split(source, args), args.trajectories_per_shard)

    # 2. Write
    try:
        form = find_form(source, preparation, args)
        lengths, faults = write_dataset(
            args.output,
            partial(reading, args),
            shards,
            preparation,
            form,
            partial(describe, args, form),
            num_processes=args.num_processes,
            skip_bad_examples=args.skip_bad_examples,
        )
    except BadExampleError as error:
        raise ValueError(f"{error} With `--skip_bad_examples` such trajectories are left out and listed.") from error

    # 3. Say what became of it
    num_saved = sum(map(len, lengths.values()))
    logger.info(f"Saved {num_saved} of {len(source.names)} trajectories to {args.output}")
    if faults:
        logger.warning("\n  ".join([f"Left out {len(faults)} damaged trajectories:", *faults]))


def check_request(args: argparse.Namespace) -> None:
    """Refuse arguments that cannot be meant, before anything is opened."""
    if not args.input.is_dir():
        raise ValueError(f"`--input` is {str(args.input)!r}, which is not a folder; name the folder of your data.")
    check_folder("output", args.output, args.license)
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
    for name in ("num_processes", "trajectories_per_shard"):
        if getattr(args, name) < 1:
            raise ValueError(f"`--{name}` is {getattr(args, name)}; it must be at least 1.")


def open_source(args: argparse.Namespace) -> TrajectorySource:
    """The recordings in `--input`, of one split or of the folders that are called like splits."""
    keys = {name: getattr(args, name) for name in KEYS if getattr(args, name) is not None}
    open_folder = partial(SOURCES[args.source], **keys)
    return open_folder(args.input) if args.split else open_split_folders(open_folder, args.input)


@contextmanager
def reading(args: argparse.Namespace) -> Iterator[Callable[[int], Trajectory]]:
    """The source opened anew, for a process that writes a shard."""
    yield open_source(args).__getitem__


def trajectories_by_split(source: TrajectorySource, args: argparse.Namespace) -> dict[str, list[int]]:
    """Which trajectories go to which split: by folder, by share, or all to `--split`."""
    indices = {split: [] for split in SPLITS}
    for index, name in enumerate(source.names):
        split = args.split or "train" if source.splits is None else source.splits[index]
        if source.splits is None or split == "train":
            split = choose_split(name, args.validation_share, args.test_share, rest=split)
        indices[split].append(index)
    return indices


def find_form(source: TrajectorySource, preparation: Preparation, args: argparse.Namespace) -> RowForm:
    """The form of the first trajectory that is not damaged, which all others must have."""
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


def describe(
    args: argparse.Namespace, form: RowForm, lengths: Mapping[str, Sequence[int]], faults: Sequence[str]
) -> str:
    """The dataset's card."""
    return dataset_card(
        args.output.name,
        args.license,
        args.description or "No description was given.",
        describe_columns(args, form),
        f"Converted by `far prepare` of diffusers-far:\n\n```\n{command_line(args)}\n```",
        lengths,
        note=f"{len(faults)} damaged trajectories of the source were left out." if faults else "",
    )


def describe_columns(args: argparse.Namespace, form: RowForm) -> list[str]:
    """What each column of the dataset holds, a line each, for its card."""
    height, width = form.frame_size
    kept = "every frame" if args.frame_interval == 1 else f"one frame in {args.frame_interval}"
    lines = [f"`video`: {kept} of the source, {height}x{width} RGB, lossless PNG."]
    if form.action_shape is not None:
        kind = "an integer" if form.action_shape == () else f"a list of {form.action_shape[0]} numbers"
        lines.append(
            f"`actions`: {kind} per frame; `actions[t]` leads from frame `t` to frame `t + 1`, so the last one leads "
            "out of the video. Where the source lacks that one, the one before is repeated."
        )
        if args.frame_interval > 1:
            rule = COMBINATION_RULES[args.combine_actions]
            lines[-1] += f" Each is made of {args.frame_interval} of the source: {rule}."
    if form.class_names is not None:
        lines.append(f"`label`: one of {len(form.class_names)} classes.")
    lines.append("`source`: what the trajectory is called in the source.")
    for name, column in form.columns.items():
        lines.append(f"`{name}`: {column.dtype}, {column.num_dimensions} dimensions, as the source has it.")
    return lines


def command_line(args: argparse.Namespace) -> str:
    """What made the dataset, but for the folders, which are the maker's own."""
    command = f"far prepare --source {args.source} --input DIR --output DIR"
    for name in ("frame_interval", "combine_actions", "num_actions", "size", *KEYS, "split", *SHARES):
        value = getattr(args, name)
        if value:
            values = value if isinstance(value, (tuple, list)) else [value]
            command += f" --{name} {' '.join(map(str, values))}"
    return command
