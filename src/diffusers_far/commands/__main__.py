"""`python -m diffusers_far.commands COMMAND ...` is `far COMMAND ...`, for launchers that start modules."""

import sys

from . import main


if __name__ == "__main__":
    sys.exit(main())
