"""The scripts of `examples/`, run in this process as a user would run them: a launch of its own for each of a study's
dozens of short runs would cost more than the run."""

import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@cache
def load_script(name: str) -> ModuleType:
    """A script as a module, with the modules beside it within reach."""
    path = EXAMPLES / f"{name}.py"
    specification = importlib.util.spec_from_file_location(f"studied_{name}", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses and worker processes look their module up
    with patch.object(sys, "path", [str(EXAMPLES), *sys.path]):
        specification.loader.exec_module(module)
    return module


def run_script(name: str, arguments: Mapping[str, Any]) -> None:
    """Run a script's `main` on these arguments."""
    script = load_script(name)
    script.main(script.parse_args(command_line(arguments)))


def run_script_alone(name: str, arguments: Mapping[str, Any]) -> None:
    """Run a script in a process of its own: one that starts worker processes, which import what started them.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    subprocess.run([sys.executable, str(EXAMPLES / f"{name}.py"), *command_line(arguments)], check=True)


def command_line(arguments: Mapping[str, Any]) -> list[str]:
    """Arguments by name as a command line has them: `True` is a flag, `False` and `None` are left out."""
    words = []
    for name, value in arguments.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if value is not True:
            words.append(str(value))
    return words
