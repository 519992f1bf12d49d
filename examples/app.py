"""Play a FAR world model in the browser: pick a start, press an action, see the next frame.

    python examples/app.py
    python examples/app.py --model far-pong --dataset_name pong --dataset_split validation

Serves this machine only, at http://127.0.0.1:7860. Needs Gradio: `make app` installs it and starts this script.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from app_world import WorldLimits, checked_hosts
from argument_types import whole_number

from diffusers_far.command_line import HelpWithDefaults


ROOT = Path(__file__).resolve().parent.parent
MAZE_MODEL, MAZES = str(ROOT / "checkpoints" / "far-maze"), str(ROOT / "examples" / "mazes")


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    parser.add_argument(
        "--model", default=MAZE_MODEL, help="Pipeline folder or Hub id; the maze model that is shipped by default."
    )
    parser.add_argument(
        "--dataset_name",
        "--mazes",
        help="Recordings to start from, a folder or Hub id, or ''; those of the mazes for the default model, else none.",
    )
    parser.add_argument("--dataset_split", default="test", help="Of --dataset_name.")
    parser.add_argument("--port", type=whole_number(1, 65535), default=7860)
    parser.add_argument(
        "--max_visitors",
        type=whole_number(1, 1000),
        default=WorldLimits().max_visitors,
        help="At one time.",
    )
    parser.add_argument(
        "--allowed_hosts",
        nargs="+",
        default=[],
        metavar="NAME",
        help="Names under which a proxy serves the page; calls to other names than these and localhost are refused.",
    )
    args = parser.parse_args(arguments)
    try:
        checked_hosts(args.allowed_hosts)
    except ValueError as error:
        parser.error(str(error))
    if args.dataset_name is None:
        args.dataset_name = MAZES if args.model == MAZE_MODEL else ""
    return args


if __name__ == "__main__":
    args = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

from app_world import RecordedWalks, WorldModel
from app_world.ui import AppParts, serve
from generate import load_pipeline


def main(args: argparse.Namespace) -> None:
    limits = WorldLimits(max_visitors=args.max_visitors)
    pipe = load_pipeline(args.model)
    pipe.set_progress_bar_config(disable=True)
    model = WorldModel(pipe)
    walks = None
    if args.dataset_name:
        num_actions = len(model.action_names)
        walks = RecordedWalks(args.dataset_name, model.size, limits, split=args.dataset_split, num_actions=num_actions)
    serve(AppParts(model, walks, limits), args.allowed_hosts, server_name="127.0.0.1", server_port=args.port)


if __name__ == "__main__":
    try:
        main(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
