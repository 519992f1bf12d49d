"""Play in the browser: `far play`, by default with the model and the walks through Crafter of this repository."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from diffusers_far.commands import run
from diffusers_far.commands.arguments import parse_play


ROOT = Path(__file__).resolve().parent.parent
MODEL, WALKS = str(ROOT / "checkpoints" / "far-crafter"), str(ROOT / "examples" / "crafter_walks")


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    return parse_play(arguments, model=MODEL, dataset_name=WALKS)


if __name__ == "__main__":
    sys.exit(run("play", parse_args()))
