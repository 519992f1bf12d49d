"""Record a Gymnasium environment as a dataset to train on: frames, actions and chosen facts of each episode.

    python examples/record_gym.py --environment CarRacing-v3 --output_dir racing --size 64 --repeat_action 4 \\
        --num_train 200 --num_validation 8 --num_test 8 --num_frames 200

Any environment that renders (`render_mode="rgb_array"`) and takes `Discrete` or `Box` actions will do; one of your own is
named with its module, `my_game:MyGame-v0`. An episode is a row, as `prepare_dataset.py` writes them: `video` (lossless PNG),
`actions`, `source`, `seed`, and what `--keep_columns` names of the environment's `info`. Actions are drawn at random. The
same seed gives the same episode wherever it is recorded, as far as the environment keeps that promise.

The result appears under `--output_dir` when it is whole; `load_dataset` opens it, and so do the training scripts.
"""

import argparse
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from diffusers_far.command_line import HelpWithDefaults, Progress, set_up_logging


logger = logging.getLogger(__name__)

# A split draws from a range of seeds that is its own, so no episode is in two splits, however far one of them grows.
SPLITS = ("train", "validation", "test")
SEEDS_PER_SPLIT = 1_000_000

# An environment is made anew for each shard. The number is fixed, as the files should not depend on that of the processes.
EPISODES_PER_SHARD = 16


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    parser.add_argument("--environment", required=True, help="Its id, such as CartPole-v1 or my_game:MyGame-v0.")
    parser.add_argument(
        "--environment_arguments", type=json.loads, default={}, help="JSON object of what its constructor takes."
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="New or empty folder.")
    parser.add_argument("--num_frames", type=int, default=200, help="At most so many of an episode.")
    parser.add_argument("--size", type=int, nargs="+", help="Height and width, or one for both: crop and resize.")
    parser.add_argument("--repeat_action", type=int, default=1, help="Frames for which a drawn action is kept.")
    parser.add_argument(
        "--keep_columns", nargs="+", default=[], metavar="KEY", help="Of the environment's `info`: a value per frame."
    )
    parser.add_argument("--num_train", type=int, default=100, help="Episodes to train on.")
    parser.add_argument("--num_validation", type=int, default=8, help="Episodes to watch the training with.")
    parser.add_argument("--num_test", type=int, default=8, help="Episodes to report results on.")
    parser.add_argument("--seed", type=int, default=0, help="Of the first episode to train on.")
    parser.add_argument("--num_processes", type=int, default=1)
    parser.add_argument("--license", default="unknown", help="Hub's identifier, such as mit; for the card.")
    args = parser.parse_args(arguments)
    if args.size is not None and len(args.size) > 2:
        parser.error(f"--size has {len(args.size)} numbers; give height and width, or one for both.")
    args.size = None if args.size is None else (args.size[0], args.size[-1])
    return args


if __name__ == "__main__":
    args = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

import gymnasium
import numpy as np

from diffusers_far.data.preparation import (
    RESERVED_COLUMNS,
    Preparation,
    PreparedTrajectory,
    RowForm,
    write_trajectories,
)
from diffusers_far.data.sources import Trajectory
from diffusers_far.data.workers import share_work
from diffusers_far.files import UNFINISHED, written_whole


@dataclass(frozen=True)
class Shard:
    """A parquet file to be written: its split, its number in it, and the seeds of its episodes."""

    split: str
    number: int
    seeds: range


def check_request(args: argparse.Namespace) -> None:
    if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
        raise ValueError(
            f"`--output_dir` is {str(args.output_dir)!r}, which exists, and nothing is overwritten; name a new folder."
        )
    for name, least in (("num_frames", 2), ("repeat_action", 1), ("num_processes", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"`--{name}` is {getattr(args, name)}; it must be at least {least}.")
    for split in SPLITS:
        if not 0 <= getattr(args, f"num_{split}") <= SEEDS_PER_SPLIT:
            raise ValueError(
                f"`--num_{split}` is {getattr(args, f'num_{split}')}; it must be 0 to {SEEDS_PER_SPLIT:,}."
            )
    if not any(getattr(args, f"num_{split}") for split in SPLITS):
        raise ValueError("`--num_train`, `--num_validation` and `--num_test` are all 0; ask for at least 1 episode.")
    reserved = set(args.keep_columns) & {*RESERVED_COLUMNS, "seed"}
    if reserved:
        raise ValueError(
            f"`--keep_columns` names {sorted(reserved)}, which the dataset has of its own; leave them out."
        )
    if not isinstance(args.environment_arguments, dict):
        raise ValueError(f"`--environment_arguments` is {args.environment_arguments!r}; give a JSON object, {{...}}.")
    if not re.fullmatch(r"[a-z0-9.\-]+", args.license):
        raise ValueError(f"`--license` is {args.license!r}; give an identifier of the Hub, such as mit.")


def plan_shards(args: argparse.Namespace) -> list[Shard]:
    shards = []
    for place, split in enumerate(SPLITS):
        first = args.seed + place * SEEDS_PER_SPLIT
        seeds = range(first, first + getattr(args, f"num_{split}"))
        parts = [seeds[start : start + EPISODES_PER_SHARD] for start in range(0, len(seeds), EPISODES_PER_SHARD)]
        shards += [Shard(split, number, part) for number, part in enumerate(parts)]
    return shards


def make_environment(args: argparse.Namespace) -> gymnasium.Env:
    """The environment, checked to render and to take actions that can be stored."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # games made with pygame then need no screen
    environment = gymnasium.make(args.environment, **({"render_mode": "rgb_array"} | args.environment_arguments))
    if environment.render_mode != "rgb_array":
        raise ValueError(
            f"`--environment` {args.environment!r} has the `render_mode` {environment.render_mode!r}, of "
            f"{environment.metadata.get('render_modes')}; it must render as 'rgb_array'."
        )
    space = environment.action_space
    if not isinstance(space, (gymnasium.spaces.Discrete, gymnasium.spaces.Box)):
        raise ValueError(
            f"`--environment` {args.environment!r} takes actions of {space}; only Discrete and Box can be recorded. Make "
            "them one of these with a `gymnasium.ActionWrapper`."
        )
    return environment


def action_to_store(action: np.ndarray | int, space: gymnasium.Space) -> int | list[float]:
    """An index from 0, or a list of numbers."""
    if isinstance(space, gymnasium.spaces.Discrete):
        return int(action - space.start)
    return np.asarray(action, np.float32).reshape(-1).tolist()


def record_episode(environment: gymnasium.Env, seed: int, args: argparse.Namespace) -> Trajectory:
    """One episode at random actions, to its end or to `--num_frames`. Its last frame has no action: nothing follows."""
    space, columns = environment.action_space, {name: [] for name in args.keep_columns}
    space.seed(seed)
    _, facts = environment.reset(seed=seed)
    frames, actions, has_ended = [], [], False
    while True:
        frames.append(rendered_frame(environment, args.environment))
        for name, values in columns.items():
            if name not in facts:
                raise ValueError(
                    f"`--keep_columns` names {name!r}, but the `info` of {args.environment!r} has {sorted(facts)} at frame "
                    f"{len(frames) - 1} of the episode of seed {seed}; choose of what it has at each frame."
                )
            values.append(facts[name])
        if has_ended or len(frames) == args.num_frames:
            return Trajectory(f"{args.environment} seed {seed}", frames, actions, columns=columns | {"seed": seed})
        if len(actions) % args.repeat_action == 0:
            action = space.sample()
        actions.append(action_to_store(action, space))
        _, _, terminated, truncated, facts = environment.step(action)
        has_ended = terminated or truncated


def rendered_frame(environment: gymnasium.Env, name: str) -> np.ndarray:
    frame = np.asarray(environment.render())
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(f"{name!r} renders {frame.shape}, {frame.dtype}; a frame must be (height, width, 3), uint8.")
    return frame.copy()  # some environments draw every frame into the same memory


def record_shard(
    args: argparse.Namespace, form: RowForm, folder: Path, shard: Shard, count: Callable[[], None]
) -> list[int]:
    """Write one shard, perhaps in a process of its own; returns the lengths of its episodes."""
    preparation, lengths = Preparation(size=args.size), []
    environment = make_environment(args)

    def episodes() -> Iterator[PreparedTrajectory]:
        for seed in shard.seeds:
            episode = preparation(record_episode(environment, seed, args))
            episode.require_form(form)
            lengths.append(len(episode.frames))
            yield episode
            count()

    write_trajectories(folder / "data" / f"{shard.split}-{shard.number:05d}.parquet", episodes(), form.features)
    environment.close()
    return lengths


def dataset_card(
    args: argparse.Namespace, form: RowForm, lengths: dict[str, list[int]], space: gymnasium.Space
) -> str:
    """The README.md of the dataset: what its splits hold, what a row means, where it comes from."""
    rows = "\n".join(f"| {split} | {len(each):,} | {sum(each):,} |" for split, each in lengths.items())
    kept = "".join(f"- `{name}`: of the environment's `info`, a value per frame.\n" for name in args.keep_columns)
    height, width = form.frame_size
    return f"""---
license: {args.license}
pretty_name: {json.dumps(args.output_dir.name)}
tags:
- video
- world-model
---

# {args.output_dir.name}

Episodes of the Gymnasium environment `{args.environment}` at random actions, each kept for {args.repeat_action} frames.

```python
from datasets import load_dataset

episodes = load_dataset("path/to/this/folder", split="{next(iter(lengths))}")
```

| split | episodes | frames |
|---|---|---|
{rows}

## Columns

- `video`: {height}x{width} RGB, lossless PNG.
- `actions`: of `{space}`, indices counted from 0; `actions[t]` leads from frame `t` to frame `t + 1`. An episode's last
  frame has the action of the frame before it.
- `seed`: what the episode follows from.
- `source`: the environment and the seed.
{kept}
Recorded by `examples/record_gym.py` of diffusers-far with gymnasium {gymnasium.__version__}. Licence as given by who made
this folder: {args.license}.
"""


def main(args: argparse.Namespace) -> None:
    set_up_logging(__name__)
    # 1. Look at the first episode
    check_request(args)
    shards = plan_shards(args)
    environment = make_environment(args)
    first = Preparation(size=args.size)(record_episode(environment, shards[0].seeds[0], args))
    form, space = first.form(None), environment.action_space
    environment.close()

    # 2. Write under another name, and rename when all is there
    unfinished = args.output_dir.with_name(UNFINISHED + args.output_dir.name)
    if unfinished.exists():
        raise ValueError(f"{str(unfinished)!r} exists: a run writes to it or was killed; in that case delete it.")
    (unfinished / "data").mkdir(parents=True)
    try:
        progress = Progress(sum(len(shard.seeds) for shard in shards), unit="episode", seconds_between_lines=10)
        record = partial(record_shard, args, form, unfinished)
        recorded = share_work(record, shards, args.num_processes, progress)
        lengths = {shard.split: [] for shard in shards}
        for shard, each in zip(shards, recorded):
            lengths[shard.split] += each
        with written_whole(unfinished / "README.md") as card:
            card.write_text(dataset_card(args, form, lengths, space))
        unfinished.rename(args.output_dir)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)

    # 3. Say what became of it
    for split, each in lengths.items():
        logger.info(f"{split}: {len(each):,} episodes of {min(each)} to {max(each)} frames")
    logger.info(f"Saved to {args.output_dir}")


if __name__ == "__main__":
    main(args)
