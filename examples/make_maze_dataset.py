"""Make a data set of walks through first-person mazes: frames, actions and poses, as a Hugging Face dataset folder.

Every seed gives a maze of its own (plan, textures, landmarks, light) and one walk through it on shortest paths between
random cells. The same seed gives the same bytes, in whatever process and beside whatever other seeds it is recorded.
Needs no display. Its packages are the `data` extra of diffusers-far.

    python examples/make_maze_dataset.py --output_dir mazes --look plain --cells 5 --num_train 1000

    >>> from datasets import load_dataset
    >>> mazes = load_dataset("mazes", split="train")  # columns video, actions, pose, seed
"""

import argparse
import io
import multiprocessing
import os
import signal
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from maze_world.looks import LOOKS
from maze_world.recording import FRAMES_PER_SECOND, MazeSettings, record_mazes
from maze_world.walker import ACTION_NAMES, TURN_DEGREES

from diffusers_far.command_line import HelpWithDefaults, Progress, set_up_logging


def parse_args(arguments=None):
    parser = argparse.ArgumentParser(
        description="Make a data set of walks through first-person mazes.", formatter_class=HelpWithDefaults
    )
    defaults = MazeSettings()
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write; must be new or empty")
    parser.add_argument(
        "--look", choices=LOOKS, default=defaults.look, help="rich textures, or bright and simple ones"
    )
    parser.add_argument("--cells", type=int, default=defaults.cells, help="cells along each side of a maze")
    parser.add_argument("--size", type=int, default=defaults.size, help="height and width of a frame in pixels")
    parser.add_argument("--num_frames", type=int, default=defaults.num_frames, help="frames of a walk")
    parser.add_argument("--num_train", type=int, default=1000, help="mazes to train on")
    parser.add_argument("--num_validation", type=int, default=16, help="mazes to watch the training with")
    parser.add_argument("--num_test", type=int, default=64, help="mazes to report results on")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="mazes drawn at a time")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    args = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

import datasets
import pyarrow.parquet
from PIL import Image


# A split draws from a range of seeds that is its own, so no maze is in two splits, however far one of them grows.
SPLITS = ("train", "validation", "test")
SEEDS_PER_SPLIT = 1_000_000

# One engine start draws a shard. The number is fixed, as the files should not depend on the number of workers.
MAZES_PER_SHARD = 50
ATTEMPTS_PER_SHARD = 2

FEATURES = datasets.Features(
    {
        "video": datasets.List(datasets.Image()),
        "actions": datasets.List(datasets.Value("int64")),
        "pose": datasets.List(datasets.List(datasets.Value("float32"))),
        "seed": datasets.Value("int64"),
    }
)

LICENSES = {"doom": "bsd-3-clause", "plain": "apache-2.0"}
PROVENANCE = {
    "doom": "Frames are drawn by the ViZDoom engine with the textures of Freedoom, which are under the BSD-3-Clause "
    "licence (https://freedoom.github.io). No other asset is seen in them.",
    "plain": "Frames are drawn by the ViZDoom engine with textures that the script draws itself, under the Apache-2.0 "
    "licence. No asset of a game is seen in them.",
}


@dataclass(frozen=True)
class Shard:
    """One parquet file of the data set.

    Args:
        path (`Path`): Where it is written; absolute, as its writer works in a folder of its own.
        seeds (`range`): Its rows, in order.
        settings (`MazeSettings`): Common to all shards.
    """

    path: Path
    seeds: range
    settings: MazeSettings


def split_seeds(split, num_mazes):
    """The seeds of a split: `range(0, ...)` for train, a million further on for each split after it."""
    if not 0 <= num_mazes <= SEEDS_PER_SPLIT:
        raise ValueError(
            f"`num_{split}` is {num_mazes} but a split holds 0 to {SEEDS_PER_SPLIT:,} mazes; choose a number in between."
        )
    first = SPLITS.index(split) * SEEDS_PER_SPLIT
    return range(first, first + num_mazes)


def plan_shards(output_dir, seeds_by_split, settings):
    """The parquet files that hold the splits, `MAZES_PER_SHARD` mazes in each but the last of a split."""
    shards = []
    for split, seeds in seeds_by_split.items():
        parts = [seeds[start : start + MAZES_PER_SHARD] for start in range(0, len(seeds), MAZES_PER_SHARD)]
        for index, part in enumerate(parts):
            name = f"{split}-{index:05d}-of-{len(parts):05d}.parquet"
            shards.append(Shard(output_dir.resolve() / "data" / name, part, settings))
    return shards


def encode_png(frame):
    png = io.BytesIO()
    Image.fromarray(frame).save(png, "PNG")
    return png.getvalue()


def recording_to_row(recording):
    """A `Recording` as a row of the data set, its frames as PNG files."""
    return {
        "video": [{"bytes": encode_png(frame), "path": None} for frame in recording.video],
        "actions": recording.actions.tolist(),
        "pose": recording.pose.tolist(),
        "seed": recording.seed,
    }


def end_with_parent():
    """Let this process end as soon as its parent does, as `diffusers_far.data.workers.end_with_parent`: but the children
    draw mazes and nothing else, and spare themselves the seconds that importing the library takes."""

    def wait_and_exit():
        multiprocessing.parent_process().join()
        for path in Path("/proc/self/task").glob("*/children"):  # of Linux: the engine, which would go on
            for engine in path.read_text().split():
                os.kill(int(engine), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()


def write_shard(path, seeds, settings, working_dir):
    """Record the mazes of a shard and write them to `path`. Runs in a child process, which the engine may take down at its
    end."""
    end_with_parent()
    os.chdir(working_dir)
    datasets.disable_progress_bars()
    rows = [recording_to_row(recording) for recording in record_mazes(seeds, settings)]
    # One maze per row group, so that reading one row reads no other.
    datasets.Dataset.from_list(rows, features=FEATURES).to_parquet(path, batch_size=1)


def write_shard_in_child(shard):
    """Write a shard in a process of its own, once more if that fails.

    The exit code says nothing, as the engine may crash after all is done: the file decides.
    """
    from diffusers_far.files import written_whole  # not above: the children, which import this file, do without it

    for _ in range(ATTEMPTS_PER_SHARD):
        try:
            with tempfile.TemporaryDirectory() as working_dir, written_whole(shard.path) as unfinished:
                child = multiprocessing.get_context("spawn").Process(
                    target=write_shard, args=(unfinished, shard.seeds, shard.settings, working_dir), daemon=True
                )
                child.start()
                child.join()
                if not holds_rows(unfinished, len(shard.seeds)):
                    raise RuntimeError(
                        f"The mazes of seeds {shard.seeds[0]} to {shard.seeds[-1]} could not be recorded in "
                        f"{ATTEMPTS_PER_SHARD} attempts; the last process ended with exit code {child.exitcode}, and its "
                        "error is printed above."
                    )
            return shard
        except RuntimeError as error:
            fault = error
    raise fault


def holds_rows(path, num_rows):
    try:
        return pyarrow.parquet.read_metadata(path).num_rows == num_rows
    except (OSError, pyarrow.ArrowException):
        return False


def write_shards(shards, num_workers):
    """Write all shards, `num_workers` at a time; the threads only wait for their children."""
    progress = Progress(sum(len(shard.seeds) for shard in shards), unit="maze", seconds_between_lines=10)
    pool = ThreadPoolExecutor(num_workers)
    try:
        pending = [pool.submit(write_shard_in_child, shard) for shard in shards]
        for future in as_completed(pending):
            progress.update(len(future.result().seeds))
    finally:
        pool.shutdown(cancel_futures=True)


def dataset_card(seeds_by_split, settings):
    """The README.md of the data set: what a row means, and where it comes from. It names no data files: `datasets` finds
    them by their names, and would take another folder of the same name for this one if the card listed them."""
    counts = "\n".join(
        f"| {split} | {len(seeds):,} | {len(seeds) * settings.num_frames:,} | {seeds[0]:,} to {seeds[-1]:,} |"
        for split, seeds in seeds_by_split.items()
    )
    actions = "\n".join(f"| {action} | {name} |" for action, name in enumerate(ACTION_NAMES))
    return f"""---
license: {LICENSES[settings.look]}
pretty_name: First-person mazes ({settings.look}, {settings.cells}x{settings.cells})
tags:
- video
- world-model
---

# First-person mazes ({settings.look}, {settings.cells}x{settings.cells})

Walks through random mazes of {settings.cells}x{settings.cells} cells, seen by the walker: {settings.num_frames} frames of
{settings.size}x{settings.size} pixels each, with the actions that lead from one frame to the next. Each row has a maze of
its own (plan, textures, landmarks, light) and one walk on shortest paths between random cells.

```python
from datasets import load_dataset

mazes = load_dataset("path/to/this/folder", split="{next(iter(seeds_by_split))}")
```

| split | mazes | frames | seeds |
|---|---|---|---|
{counts}

The splits draw from ranges of seeds that do not meet, so no maze is in two of them.

## Columns

- `video`: {settings.num_frames} frames, {settings.size}x{settings.size} RGB, lossless PNG.
- `actions`: one per frame; `actions[t]` leads from frame `t` to frame `t + 1`, so the last one leads out of the video.
- `pose`: where frame `t` was seen from: x and y in map units (a cell and its wall are 112), heading in degrees,
  counted counter-clockwise from the x axis.
- `seed`: what maze and walk follow from.

| action | name |
|---|---|
{actions}

A turn is {TURN_DEGREES} degrees. Walking has momentum: a forward action covers about 10 map units from a stand and up to
45 at full speed, and the walker glides on for a moment when it turns. There are {FRAMES_PER_SECOND:g} frames a second.

## Provenance and licence

{PROVENANCE[settings.look]}

Made by `examples/make_maze_dataset.py` of diffusers-far with vizdoom {version("vizdoom")}:

```
python examples/make_maze_dataset.py --look {settings.look} --cells {settings.cells} --size {settings.size} \\
    --num_frames {settings.num_frames} {" ".join(f"--num_{split} {len(seeds)}" for split, seeds in seeds_by_split.items())}
```
"""


def check_request(output_dir, seeds_by_split, num_workers):
    if not seeds_by_split:
        raise ValueError("`num_train`, `num_validation` and `num_test` are all 0; ask for at least 1 maze.")
    if num_workers < 1:
        raise ValueError(
            f"`num_workers` is {num_workers} but at least 1 process has to draw; leave it at its default."
        )
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"`output_dir` is {output_dir}, which is a file; name a new folder.")
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(
            f"`output_dir` is {output_dir}, which is not empty, and nothing is overwritten; name a new folder or empty it."
        )


def main(args):
    set_up_logging(__name__)
    settings = MazeSettings(args.look, args.cells, args.size, args.num_frames)
    num_mazes = {"train": args.num_train, "validation": args.num_validation, "test": args.num_test}
    seeds_by_split = {split: split_seeds(split, count) for split, count in num_mazes.items() if count}
    check_request(args.output_dir, seeds_by_split, args.num_workers)

    shards = plan_shards(args.output_dir, seeds_by_split, settings)
    (args.output_dir / "data").mkdir(parents=True)
    write_shards(shards, args.num_workers)
    (args.output_dir / "README.md").write_text(dataset_card(seeds_by_split, settings))


if __name__ == "__main__":
    main(args)
