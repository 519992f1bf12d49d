"""Continue a clip or an image under actions; the same as `far generate`, which an installed package brings."""

import sys

from diffusers_far.commands import run
from diffusers_far.commands.arguments import parse_generate as parse_args


if __name__ == "__main__":
    sys.exit(run("generate", parse_args()))
