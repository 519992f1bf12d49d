"""Turn a folder of your own videos into a dataset; the same as `far prepare`, which an installed package brings."""

import sys

from diffusers_far.commands import run
from diffusers_far.commands.arguments import parse_prepare as parse_args


if __name__ == "__main__":
    sys.exit(run("prepare", parse_args()))
