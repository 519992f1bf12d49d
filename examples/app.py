"""Play in the browser: `far play`, by default with the model and the mazes of this repository."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from diffusers_far.commands import run
from diffusers_far.commands.arguments import parse_play


ROOT = Path(__file__).resolve().parent.parent
MAZE_MODEL, MAZES = str(ROOT / "checkpoints" / "far-maze"), str(ROOT / "examples" / "mazes")


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    return parse_play(arguments, model=MAZE_MODEL, dataset_name=MAZES)


if __name__ == "__main__":
    sys.exit(run("play", parse_args()))
