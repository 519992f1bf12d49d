"""Record a Gymnasium environment as a dataset to train on: frames, actions and chosen facts of each episode.

    python examples/record_gym.py --environment CarRacing-v3 --output_dir racing --size 64 --repeat_action 4 \\
        --num_train 200 --num_validation 8 --num_test 8 --num_frames 200

Any environment that renders (`render_mode="rgb_array"`) and takes `Discrete` or `Box` actions will do; one of your own is
named with its module, `my_game:MyGame-v0`. An episode is a row, as `far prepare` writes them: `video` (lossless PNG),
`actions`, `source`, `seed`, and what `--keep_columns` names of the environment's `info`. Actions are drawn at random. The
same seed gives the same episode wherever it is recorded, as far as the environment keeps that promise.

The result appears under `--output_dir` when it is whole; `load_dataset` opens it, and so do the training scripts.
"""

import argparse
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from diffusers_far.command_line import HeightAndWidth, HelpWithDefaults, set_up_logging


logger = logging.getLogger(__name__)

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
    parser.add_argument("--size", type=int, nargs="+", action=HeightAndWidth)
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
    return parser.parse_args(arguments)


if __name__ == "__main__":
    args = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

import gymnasium
import numpy as np

from diffusers_far.data.dataset_folder import (
    SPLITS,
    check_folder,
    dataset_card,
    plan_shards,
    seeds_by_split,
    write_dataset,
)
from diffusers_far.data.preparation import RESERVED_COLUMNS, Preparation, RowForm
from diffusers_far.data.sources import Trajectory


def check_request(args: argparse.Namespace) -> None:
    check_folder("output_dir", args.output_dir, args.license)
    for name, least in (("num_frames", 2), ("repeat_action", 1), ("num_processes", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"`--{name}` is {getattr(args, name)}; it must be at least {least}.")
    reserved = set(args.keep_columns) & {*RESERVED_COLUMNS, "seed"}
    if reserved:
        raise ValueError(
            f"`--keep_columns` names {sorted(reserved)}, which the dataset has of its own; leave them out."
        )
    if not isinstance(args.environment_arguments, dict):
        raise ValueError(f"`--environment_arguments` is {args.environment_arguments!r}; give a JSON object, {{...}}.")


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


@contextmanager
def recording(args: argparse.Namespace) -> Iterator[Callable[[int], Trajectory]]:
    """An environment of its own for a process that writes a shard; records the episode of a seed."""
    environment = make_environment(args)
    yield lambda seed: record_episode(environment, seed, args)
    environment.close()


def describe(
    args: argparse.Namespace,
    form: RowForm,
    space: gymnasium.Space,
    lengths: Mapping[str, Sequence[int]],
    faults: Sequence[str],
) -> str:
    """The dataset's card."""
    height, width = form.frame_size
    columns = [
        f"`video`: {height}x{width} RGB, lossless PNG.",
        f"`actions`: of `{space}`, indices counted from 0; `actions[t]` leads from frame `t` to frame `t + 1`. An "
        "episode's last frame has the action of the frame before it.",
        "`seed`: what the episode follows from.",
        "`source`: the environment and the seed.",
        *(f"`{name}`: of the environment's `info`, a value per frame." for name in args.keep_columns),
    ]
    return dataset_card(
        args.output_dir.name,
        args.license,
        f"Episodes of the Gymnasium environment `{args.environment}` at random actions, each kept for "
        f"{args.repeat_action} frames.",
        columns,
        f"Recorded by `examples/record_gym.py` of diffusers-far with gymnasium {gymnasium.__version__}.",
        lengths,
        units="episodes",
    )


def main(args: argparse.Namespace) -> None:
    set_up_logging(__name__)
    # 1. Look at the first episode
    check_request(args)
    counts = {split: getattr(args, f"num_{split}") for split in SPLITS}
    shards = plan_shards(seeds_by_split(counts, unit="episode", first=args.seed), EPISODES_PER_SHARD)
    preparation = Preparation(size=args.size)
    environment = make_environment(args)
    form = preparation(record_episode(environment, shards[0].trajectories[0], args)).form(None)
    space = environment.action_space
    environment.close()

    # 2. Record
    lengths, _ = write_dataset(
        args.output_dir,
        partial(recording, args),
        shards,
        preparation,
        form,
        partial(describe, args, form, space),
        unit="episode",
        num_processes=args.num_processes,
    )

    # 3. Say what became of it
    for split, each in lengths.items():
        logger.info(f"{split}: {len(each):,} episodes of {min(each)} to {max(each)} frames")
    logger.info(f"Saved to {args.output_dir}")


if __name__ == "__main__":
    main(args)
