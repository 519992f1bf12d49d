"""Make a data set of walks through Crafter, a top-down world of tiles: frames, actions, positions and tiles in view.

Every seed gives a world of its own and one walk through it. The same seed gives the same bytes, in whatever process
and beside whatever other seeds it is recorded. Needs no display. Its packages are the extra `worlds` of diffusers-far.

    python examples/make_crafter_dataset.py --output_dir crafter --num_frames 256 --num_train 1000

    >>> from datasets import load_dataset
    >>> walks = load_dataset("crafter", split="train")  # columns video, actions, pose, tiles, seed, source

The result appears under `--output_dir` when it is whole.
"""

import argparse
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from crafter_world.settings import MIXED, STARTS, WALKS, CrafterSettings

from diffusers_far.command_line import HelpWithDefaults, set_up_logging


logger = logging.getLogger(__name__)

# The number is fixed, as the files should not depend on that of the workers.
WALKS_PER_SHARD = 50

LICENSE = "mit"
PROVENANCE = """Frames are drawn by the package crafter {version} (https://github.com/danijar/crafter) with its own
textures, which are under the MIT licence, Copyright (c) 2021 Danijar Hafner. Made by
`examples/make_crafter_dataset.py` of diffusers-far:

```
python examples/make_crafter_dataset.py {flags}
```"""
WALKS_IN_WORDS = {
    "wander": "The walker wanders.",
    "out_and_back": "The walker wanders for half of the frames, goes back over its own steps to where it began, and "
    "wanders on.",
    "round_trip": "The walker wanders for 8 to 32 frames and takes the shortest way back to where it began, again and "
    "again.",
    MIXED: "Seeds take turns: a walker that wanders; one that goes out for half of the frames and back over its own "
    "steps; one that makes round trips from where it began.",
}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Make a data set of walks through Crafter.", formatter_class=HelpWithDefaults
    )
    defaults = CrafterSettings()
    parser.add_argument("--output_dir", type=Path, required=True, help="New or empty folder.")
    parser.add_argument("--num_frames", type=int, default=defaults.num_frames, help="Frames of a walk.")
    parser.add_argument("--area", type=int, default=defaults.area, help="Tiles along each side of a world.")
    parser.add_argument("--walk", choices=(*WALKS, MIXED), default=defaults.walk, help="Where the walker goes.")
    parser.add_argument("--start", choices=STARTS, default=defaults.start, help="Anywhere: caves as often as meadows.")
    parser.add_argument("--creatures", action="store_true", help="Add cows, zombies and skeletons, moved by chance.")
    parser.add_argument("--night", action="store_true", help="Let it become dark every 300 frames.")
    parser.add_argument("--num_train", type=int, default=1000, help="Walks to train on.")
    parser.add_argument("--num_validation", type=int, default=16, help="Walks to watch the training with.")
    parser.add_argument("--num_test", type=int, default=64, help="Walks to report results on.")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="Processes that record.")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    args = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

from crafter_world.recording import record_walk

from diffusers_far.data.dataset_folder import check_folder, dataset_card, plan_shards, seeds_by_split, write_dataset
from diffusers_far.data.preparation import Preparation
from diffusers_far.data.sources import Trajectory
from diffusers_far.evaluation.tiles import ACTION_NAMES, MATERIALS


def read_walk(settings: CrafterSettings, seed: int) -> Trajectory:
    """The walk of a seed as a trajectory. Its last frame has no action: nothing follows."""
    walk = record_walk(seed, settings)
    columns = {"pose": walk.pose, "tiles": walk.tiles, "seed": seed}
    return Trajectory(f"crafter seed {seed}", walk.video, walk.actions, columns=columns)


@contextmanager
def recording(settings: CrafterSettings) -> Iterator[Callable[[int], Trajectory]]:
    """Records the walk of a seed. Nothing is shared between walks."""
    yield partial(read_walk, settings)


def as_flags(settings: CrafterSettings, lengths: Mapping[str, Sequence[int]]) -> str:
    """The arguments that make this data set again."""
    counts = " ".join(f"--num_{split} {len(lengths.get(split, ()))}" for split in ("train", "validation", "test"))
    chance = "".join(f" --{name}" for name in ("creatures", "night") if getattr(settings, name))
    start = "" if settings.start == "middle" else f" --start {settings.start}"
    return f"--num_frames {settings.num_frames} --area {settings.area} --walk {settings.walk}{start}{chance} {counts}"


def describe(
    settings: CrafterSettings,
    seeds: Mapping[str, range],
    lengths: Mapping[str, Sequence[int]],
    faults: Sequence[str],
) -> str:
    """The data set's card."""
    names = ", ".join(f"{action} {name}" for action, name in enumerate(ACTION_NAMES))
    materials = ", ".join(f"{number} {name}" for number, name in enumerate(MATERIALS))
    columns = [
        "`video`: 64x64 RGB, lossless PNG. Tiles have 8x8 pixels: 8 columns and 6 rows of the world, the player in "
        "column 4 and row 3, and 2 rows of inventory below.",
        f"`actions`: {names}. `actions[t]` leads from frame `t` to frame `t + 1`. A walk's last frame has the action "
        "of the frame before it.",
        "`pose`: where the player stands: x and y in tiles from the upper left corner of the world, and 0, as the view "
        "never turns.",
        f"`tiles`: what is in view, 8 columns of 6 rows each: {materials}; -1 beyond the world. The tile under the player or a "
        "creature counts as if it were seen.",
        "`seed`: what world and walk follow from.",
        "`source`: the name of the walk.",
    ]
    chance = [
        "cows, zombies and skeletons move by chance" if settings.creatures else "there are no creatures",
        "it becomes dark every 300 frames" if settings.night else "it is always noon",
    ]
    is_anywhere = settings.start == "anywhere"
    start = " Walks begin on grass, sand and paths, which are caves, as often as each other." if is_anywhere else ""
    ranges = ", ".join(f"{split} {each[0]:,} to {each[-1]:,}" for split, each in seeds.items() if each)
    return dataset_card(
        "Walks through Crafter",
        LICENSE,
        f"Walks of {settings.num_frames} frames through random worlds of {settings.area}x{settings.area} tiles, seen "
        f"from above, with the actions that lead from one frame to the next. {WALKS_IN_WORDS[settings.walk]}{start} In these "
        f"worlds {chance[0]}, {chance[1]}, and health, food, drink and energy stay full.",
        columns,
        PROVENANCE.format(version=version("crafter"), flags=as_flags(settings, lengths)),
        lengths,
        units="walks",
        note=f"Seeds: {ranges}. The splits draw from ranges that do not meet, so no world is in two of them.",
    )


def main(args: argparse.Namespace) -> None:
    set_up_logging(__name__)
    settings = CrafterSettings(args.num_frames, args.area, args.walk, args.creatures, args.night, args.start)
    counts = {"train": args.num_train, "validation": args.num_validation, "test": args.num_test}
    seeds = seeds_by_split(counts, unit="walk")
    if args.num_workers < 1:
        raise ValueError(
            f"`--num_workers` is {args.num_workers} but at least 1 process has to record; leave it at its default."
        )
    check_folder("output_dir", args.output_dir, LICENSE)

    shards = plan_shards(seeds, WALKS_PER_SHARD)
    preparation = Preparation()
    form = preparation(read_walk(replace(settings, num_frames=2), shards[0].trajectories[0])).form(None)
    write_dataset(
        args.output_dir,
        partial(recording, settings),
        shards,
        preparation,
        form,
        partial(describe, settings, seeds),
        unit="walk",
        num_processes=args.num_workers,
    )
    logger.info(f"Saved to {args.output_dir}")


if __name__ == "__main__":
    main(args)
