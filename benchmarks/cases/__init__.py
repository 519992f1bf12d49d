"""The benchmarks, by name. Each is a function of the number of rounds that yields rows; its sizes are arguments too."""

from collections.abc import Callable, Iterator

from ..measurement import Row
from . import frame, growth, int8, loading, prefill, rollout, step, training


CASES = {
    "step": step.run,
    "frame": frame.run,
    "rollout": rollout.run,
    "prefill": prefill.run,
    "training": training.run,
    "loading": loading.run,
    "growth": growth.run,
    "int8": int8.run,
}


def all_rows(case: Callable[[int], Iterator[Row]], num_rounds: int) -> list[Row]:
    """What a case yields; to be called in another process."""
    return list(case(num_rounds))
