"""Imports between the rooms of the package point one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diffusers_far


PACKAGE = Path(diffusers_far.__file__).parent

MAY_IMPORT = {
    "models": set(),
    "hooks": {"models"},
    "loaders": {"models", "hooks"},
    "pipelines": {"models", "hooks", "loaders"},
    "data": {"models"},
    "training": {"models", "data", "pipelines"},
    "evaluation": {"models", "hooks", "loaders", "pipelines", "data"},
}


def imported_rooms(path: Path) -> set[str]:
    """The rooms of the package that a module imports from."""
    here = path.relative_to(PACKAGE.parent).with_suffix("").parts
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = here[: -node.level] if node.level else ()
            target = (*base, *(node.module or "").split("."))
            if target[0] == PACKAGE.name and len(target) > 1:
                rooms.add(target[1])
    return rooms


def test_every_room_is_listed():
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == set(MAY_IMPORT)


def test_rooms_import_only_rooms_before_them():
    for room, allowed in MAY_IMPORT.items():
        for path in (PACKAGE / room).rglob("*.py"):
            forbidden = imported_rooms(path) - allowed - {room, "files", "pictures"}
            assert not forbidden, f"{path.relative_to(PACKAGE)} imports from {forbidden}"


@pytest.mark.full
def test_importing_the_package_brings_no_training_library():
    """datasets, accelerate's launcher, PyAV and metrics are extras: the library works without them."""
    code = "import sys, diffusers_far; print([m for m in ('datasets', 'av', 'torchmetrics', 'vizdoom') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
