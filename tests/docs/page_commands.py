"""The commands of a block of shell, found without running them, and whether each would be accepted.

A block is given to bash with nothing on its path but programs that write down how they were called, so that loops, variables
and quotes mean what they mean. Then each call is checked: scripts and commands by their own parsers, make by its targets, pip by the
package's extras.
"""

import configparser
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

from accelerate.commands.launch import launch_command_parser
from docs_site.pages import CodeBlock

from diffusers_far.commands.arguments import PARSERS


ROOT = Path(__file__).parents[2]

# Ends each argument with a NUL and each call with a line feed.
RECORDER = """#!/bin/sh
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\n'; } >> "$CALLS"
"""


def recorded_commands(block: CodeBlock, folder: Path) -> list[list[str]]:
    """What the block would call, in order. `folder` is empty, for what this needs.

    Raises:
        AssertionError: The block fails: its syntax is wrong, or it calls a program that has no check here.
    """
    programs, calls = folder / "programs", folder / "calls"
    programs.mkdir(parents=True)
    for name in CHECKS:
        program = programs / name
        program.write_text(RECORDER)
        program.chmod(0o755)
    calls.touch()
    environment = {"PATH": str(programs), "CALLS": str(calls)}
    result = subprocess.run(
        ["/bin/bash", "-e", "-c", block.code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{block}: {result.stderr}"
    return [call.split("\0")[:-1] for call in calls.read_text().split("\n")[:-1]]


def check_command(command: list[str]) -> None:
    """Fail unless the command names things that exist, and arguments that are accepted."""
    CHECKS[command[0]](command[1:])


def check_python(arguments: list[str]) -> None:
    if arguments[:2] == ["-m", "pytest"]:
        assert all((ROOT / path).exists() for path in arguments[2:] if not path.startswith("-"))
    elif arguments[0] == "-m":
        accept(importlib.import_module(f"{arguments[1]}.__main__"), arguments[2:])
    else:
        accept(load_script(arguments[0]), arguments[1:])


def check_accelerate(arguments: list[str]) -> None:
    assert arguments[0] == "launch", arguments
    launch = launch_command_parser().parse_args(arguments[1:])
    assert launch.config_file is None or (ROOT / launch.config_file).is_file(), launch.config_file
    accept(load_script(launch.training_script), launch.training_script_args)


def check_far(arguments: list[str]) -> None:
    try:
        PARSERS[arguments[0]](arguments[1:], "far")
    except (SystemExit, ValueError) as error:
        raise AssertionError(f"far refuses {arguments}: {error}") from error


def check_make(targets: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"make has no target {target}"


def check_pip(arguments: list[str]) -> None:
    assert arguments[:2] == ["install", "-e"] and len(arguments) == 3, arguments
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", arguments[2])[1]
    for extra in extras.split(",") if extras else ():
        assert extra in setup["options.extras_require"], f"the package has no extra {extra}"


def check_bash(arguments: list[str]) -> None:
    assert os.access(ROOT / arguments[0], os.X_OK), f"{arguments[0]} is no program"


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "python": check_python,
    "accelerate": check_accelerate,
    "far": check_far,
    "make": check_make,
    "pip": check_pip,
    "bash": check_bash,
}


@cache
def load_script(path: str) -> ModuleType:
    """A script as a module, with the modules beside it within reach, as when it is run."""
    script = ROOT / path
    assert script.is_file(), f"there is no {path}"
    specification = importlib.util.spec_from_file_location(f"documented_{script.stem}", script)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up
    with patch.object(sys, "path", [str(script.parent), *sys.path]):
        specification.loader.exec_module(module)
    return module


def accept(module: ModuleType, arguments: list[str]) -> None:
    with patch.object(sys, "argv", [module.__file__, *arguments]):
        try:
            module.parse_args()
        except (SystemExit, ValueError) as error:
            raise AssertionError(f"{Path(module.__file__).name} refuses {arguments}: {error}") from error
