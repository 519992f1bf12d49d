"""Which paths this process changes, wherever they are; what C libraries open by themselves is not seen."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path


# What Python tells audit hooks of, and which of its arguments are paths that change.
CHANGES = {
    "os.link": (1,),
    "os.mkdir": (0,),
    "os.remove": (0,),
    "os.rename": (0, 1),
    "os.rmdir": (0,),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "shutil.rmtree": (0,),
}

_watches: list[list[Path]] = []


@contextmanager
def watched_writes() -> Iterator[list[Path]]:
    """Inside, the list grows by each absolute path that is opened for writing, made, renamed or removed.

    Python's own compiled modules are left out, and what is removed relative to an open folder: its tree is named before.
    """
    _install_hook()
    paths = []
    _watches.append(paths)
    try:
        yield paths
    finally:
        _watches.pop()


@cache
def _install_hook() -> None:
    sys.addaudithook(_note)  # for good: hooks cannot be taken back, but this one notes nothing outside of a watch


def _note(event: str, arguments: tuple) -> None:
    if not _watches:
        return
    if event == "open":
        path, _, flags = arguments
        changed = [path] if isinstance(flags, int) and flags & os.O_ACCMODE != os.O_RDONLY else []
    elif event in ("os.remove", "os.rmdir") and arguments[1] != -1:
        changed = []
    else:
        changed = [arguments[place] for place in CHANGES.get(event, ())]
    for path in changed:
        if isinstance(path, (str, bytes, os.PathLike)) and "__pycache__" not in os.fsdecode(path):
            _watches[-1].append(Path(os.path.abspath(os.fsdecode(path))))
