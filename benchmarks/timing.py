"""Rivals timed in turn in one process: the machine's noise then hits all of them alike."""

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import diffusers
import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one rival: the median of its runs, and the first and third quartile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        low, median, high = statistics.quantiles(seconds, n=4)
        return cls(median, low, high)


def time_in_turn(rivals: Mapping[str, Callable[[], object]], num_rounds: int) -> dict[str, Timing]:
    """Run every rival once to warm up, then `num_rounds` times in turn."""
    for run in rivals.values():
        run()
    seconds = {name: [] for name in rivals}
    for _ in range(num_rounds):
        for name, run in rivals.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing.of(runs) for name, runs in seconds.items()}


def peak_memory() -> float:
    """The largest resident size of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def describe_machine() -> dict[str, str | int]:
    """What a figure was measured on, and when."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
