"""The program `far`: generate, play, evaluate and prepare from the command line. Each command is a module of its name.

Imports nothing that takes seconds: help and wrong arguments are answered at once.
"""

import argparse
import inspect
import sys
from collections.abc import Sequence
from importlib import import_module

from .arguments import PARSERS, OneLineParser


EXTRAS = {"generate": "data", "play": "app", "evaluate": "train", "prepare": "data"}  # of the package, which they need


def main(arguments: Sequence[str] | None = None) -> int:
    """`far COMMAND ...`; returns the exit code. `arguments` are those of the process where they are left out."""
    first_lines = ((name, inspect.cleandoc(parse.__doc__).partition("\n")[0]) for name, parse in PARSERS.items())
    parser = OneLineParser(
        "Long-context video and world models.\n\n"
        + "\n".join(f"    far {name:<10}{line}" for name, line in first_lines),
        prog="far",
        usage="far COMMAND ...",
        epilog="`far COMMAND --help` lists what a command takes.",
    )
    parser.add_argument("command", choices=PARSERS, metavar="COMMAND", help=", ".join(PARSERS))
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = parser.parse_args(arguments[:1]).command
    return run(name, PARSERS[name](arguments[1:], f"far {name}"))


def run(name: str, args: argparse.Namespace) -> int:
    """Run a command with parsed arguments. What the user can mend is one line on stderr.

    Returns:
        `int`: The exit code: 0; 2 for what the user can mend; 130 if interrupted.
    """
    try:
        import_module(f".{name}", __name__).main(args)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(__package__.partition(".")[0]):
            raise
        extra = f'pip install "diffusers-far[{EXTRAS[name]}]"'
        return _fail(f"`far {name}` needs {error.name}, which is not installed; `{extra}` brings it.", 2)
    except (ValueError, OSError, MemoryError) as error:
        return _fail(str(error) or type(error).__name__, 2)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was left half written.", 130)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
