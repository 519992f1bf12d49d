"""Memory of a process, and fresh processes to measure it in: a peak only ever rises."""

import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from .measurement import Measurement


STATUS = Path("/proc/self/status")


def resident_memory() -> int:
    """Bytes that this process has in memory now."""
    return psutil.Process().memory_info().rss


def peak_memory() -> int:
    """The most bytes that this process has had in memory."""
    # Linux counts in `ru_maxrss` what the parent held when it started this process, but not in its status.
    if STATUS.exists():
        (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a module in a new Python process; what it takes and returns is pickled."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def peak_memory_of(function: Callable[..., Any], *arguments: Any) -> Measurement:
    """The peak of a new process that calls a function once. Nothing is subtracted: Python, the libraries and whatever the
    function makes, such as a model, are included."""
    return Measurement((in_fresh_process(_peak_after, function, arguments),), "bytes")


def _peak_after(function: Callable[..., Any], arguments: tuple) -> int:
    function(*arguments)
    return peak_memory()
