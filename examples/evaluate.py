"""Measure a model by a protocol; the same as `far evaluate`, which an installed package brings."""

import sys

from diffusers_far.commands import run
from diffusers_far.commands.arguments import parse_evaluate as parse_args


if __name__ == "__main__":
    sys.exit(run("evaluate", parse_args()))
