"""Imports between the rooms of the package point one way."""

import ast
import importlib
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
    "baselines": {"models", "hooks", "loaders", "pipelines"},
    "data": {"models"},
    "training": {"models", "data", "pipelines", "baselines"},
    "evaluation": {"models", "hooks", "loaders", "pipelines", "baselines", "data"},
    "environments": {"models", "pipelines", "data"},
    "commands": {"models", "hooks", "loaders", "pipelines", "baselines", "data", "evaluation"},
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


SHARED = {"checks", "files", "pictures", "on_demand", "command_line"}  # single modules that every room may import


def test_every_room_is_listed():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - SHARED - {"__init__"}
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | modules == set(MAY_IMPORT)


def test_rooms_import_only_rooms_before_them():
    for room, allowed in MAY_IMPORT.items():
        for path in [*(PACKAGE / room).rglob("*.py"), *PACKAGE.glob(f"{room}.py")]:
            forbidden = imported_rooms(path) - allowed - {room, *SHARED}
            assert not forbidden, f"{path.relative_to(PACKAGE)} imports from {forbidden}"


def test_sessions_know_no_pipeline():
    for path in (PACKAGE / "pipelines").glob("session*.py"):
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert not [node.module for node in imports if node.module in ("pipeline_far", "hub", "pipelines")], path.name


def test_no_module_gives_a_name_twice():
    for path in PACKAGE.rglob("*.py"):
        made = []
        for node in ast.parse(path.read_text()).body:
            targets = node.targets if isinstance(node, ast.Assign) else [node]
            made += [name for each in targets if (name := getattr(each, "name", getattr(each, "id", None)))]
        assert len(made) == len(set(made)), f"{path.relative_to(PACKAGE)}: {sorted(made)}"


@pytest.mark.parametrize("package", ["diffusers_far", "diffusers_far.models", "diffusers_far.baselines"])
def test_names_for_type_checkers_are_those_that_are_imported_on_demand(package):
    module = importlib.import_module(package)
    blocks = [node for node in ast.parse(Path(module.__file__).read_text()).body if isinstance(node, ast.If)]
    stated = {
        alias.asname: importlib.import_module(f".{node.module}", package)
        for node in blocks[0].body
        for alias in node.names
    }
    assert set(module.__all__) == set(stated)
    for name, home in stated.items():
        assert getattr(module, name) is getattr(home, name)
        assert name in dir(module)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        module.Nothing


def run(code: str) -> str:
    """What a fresh process prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.full
def test_using_the_package_brings_no_training_library():
    """datasets, accelerate's launcher, PyAV and metrics are extras: the library works without them."""
    libraries = ("datasets", "av", "torchmetrics", "vizdoom")
    code = f"import sys; from diffusers_far import *; print([m for m in {libraries} if m in sys.modules])"
    assert run(code) == "[]"


@pytest.mark.full
def test_importing_the_package_imports_neither_torch_nor_diffusers_nor_peft():
    code = "import sys, diffusers_far.models.presets; print({'torch', 'diffusers', 'transformers', 'peft'} & set(sys.modules))"
    assert run(code) == "set()"


@pytest.mark.full
@pytest.mark.parametrize("order", ["diffusers, diffusers_far", "diffusers_far, diffusers"])
def test_classes_are_found_in_diffusers_whichever_is_imported_first(order):
    code = f"""
import sys
import {order}
brought = 'peft' in sys.modules
try:
    diffusers.Nothing
except AttributeError as error:
    print(error)
from diffusers import AutoencoderDC, FARPipeline, FARTransformer3DModel
print(brought, FARPipeline is diffusers_far.FARPipeline, hasattr(diffusers, 'VideoDiTPipeline'), hasattr(diffusers, 'FARSession'))
"""
    assert run(code).splitlines() == ["module diffusers has no attribute Nothing", "False True True False"]
