"""Rivals timed in turn in one process: the machine's noise then hits all of them alike."""

import os
import platform
import time
from collections.abc import Callable, Mapping

import diffusers
import psutil
import torch

import diffusers_far

from .measurement import Measurement


MAX_LONG_ROUNDS = 5  # of runs that take many seconds


def time_in_turn(
    rivals: Mapping[str, Callable[[], object]],
    num_rounds: int,
    prepare: Mapping[str, Callable[[], object]] | None = None,
    *,
    is_warm: bool = False,
) -> dict[str, Measurement]:
    """Run every rival once to warm up, then `num_rounds` times in turn.

    Args:
        rivals (`Mapping`): What is timed, by name.
        num_rounds (`int`): At least 1.
        prepare (`Mapping`, *optional*): What a rival needs before each of its runs, by its name; not timed.
        is_warm (`bool`): Every rival has just been run.

    Returns:
        Seconds of each rival, round by round.
    """
    prepare = prepare or {}
    seconds = {name: [] for name in rivals}
    for round_number in range(num_rounds if is_warm else num_rounds + 1):
        for name, run in rivals.items():
            if name in prepare:
                prepare[name]()
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: Measurement(tuple(runs[-num_rounds:]), "s") for name, runs in seconds.items()}


def timed(run: Callable[[], object]) -> tuple[object, Measurement]:
    """What one run returns, and its seconds."""
    start = time.perf_counter()
    result = run()
    return result, Measurement((time.perf_counter() - start,), "s")


def describe_machine() -> dict[str, str | int | None]:
    """What a figure was measured on, and when."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "diffusers_far": diffusers_far.__version__,
    }


def processor_name() -> str:
    """As the system calls it, where that is known; else its architecture."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0]} ({platform.machine()})" if names else platform.machine()
