"""Importing no sooner than needed: the names of a package, and our classes in diffusers."""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any


def import_on_demand(
    package: str, homes: dict[str, tuple[str, ...]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__` (PEP 562), `__dir__` and `__all__` of a package whose names are imported when first asked for.

    Args:
        package (`str`): Its `__name__`.
        homes (`dict[str, tuple[str, ...]]`): The names that each of its modules makes.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name in homes:
            return import_module(f".{name}", package)
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f".{home_of[name]}", package), name)
        setattr(sys.modules[package], name, value)  # asked for once
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *homes, *home_of}), list(home_of)


def register_in_diffusers(get: Callable[[str], type], names: tuple[str, ...]) -> None:
    """Let `diffusers.NAME` be `get(NAME)`, from now on or as soon as somebody imports diffusers."""

    def get_registered(name: str) -> type:
        if name not in names:
            raise AttributeError(f"module 'diffusers' has no attribute {name!r}")
        return get(name)

    def register() -> None:
        sys.modules["diffusers"].__getattr__ = get_registered  # asked for what diffusers itself does not have

    if "diffusers" in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, AfterImport("diffusers", register))


class AfterImport(MetaPathFinder):
    """Calls `action` once, after the module `name` was imported."""

    def __init__(self, name: str, action: Callable[[], None]):
        self.name, self.action = name, action

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_act(module):
                execute(module)
                sys.meta_path.remove(self)
                self.action()

            spec.loader.exec_module = execute_and_act
        return spec
