"""Long work on many trajectories: shared among processes that end when their parent does, with lines that say how far it
is."""

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any


logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """How far a long work is: a line of the log every ten seconds, which is readable in a file too.

    Args:
        total (`int`): Trajectories to be done by this run.
        unit (`str`): What they are called.
    """

    def __init__(self, total: int, unit: str = "trajectories") -> None:
        self.total, self.unit, self.num_done = total, unit, 0
        self._start = self._last_line = time.monotonic()

    def reach(self, num_done: int) -> None:
        """So many are done by now; says so if the last line is old, or all are done."""
        is_last = num_done >= self.total > self.num_done
        self.num_done, now = num_done, time.monotonic()
        if is_last or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            logger.info(self._line(now - self._start))

    def add(self, num_done: int = 1) -> None:
        """So many more are done."""
        self.reach(self.num_done + num_done)

    def _line(self, seconds: float) -> str:
        rate = self.num_done / max(seconds, 1e-6)
        rate_text = f"{rate:.3g} a second" if rate >= 1 or rate == 0 else f"{1 / rate:.3g} seconds each"
        left = f", {duration((self.total - self.num_done) / rate)} left" if 0 < self.num_done < self.total else ""
        return f"{self.num_done:,} of {self.total:,} {self.unit}, {rate_text}{left}"


def duration(seconds: float) -> str:
    """Such as `"1 h 20 min"`, `"5 min"` or `"40 s"`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def share_work(
    work: Callable[[Any, Callable[[], None]], Any], parts: Sequence[Any], num_processes: int, progress: Progress
) -> list[Any]:
    """Do `work(part, count)` for each part, in this process or in several, and return the results in order.

    The processes end when this one does, however it ends. The first error of one ends all of them.

    Args:
        work (callable): Called with a part and with `count`, which it calls after each trajectory. Must be picklable.
        parts (sequence): Of the work.
        num_processes (`int`): 1: this process alone.
        progress (`Progress`): Told of every trajectory.

    Raises:
        RuntimeError: A process was killed, such as for want of memory.
    """
    if num_processes == 1:
        return [work(part, progress.add) for part in parts]
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    pool = ProcessPoolExecutor(num_processes, mp_context=context, initializer=_begin_worker, initargs=(counter,))
    try:
        futures = [pool.submit(_work_and_count, work, part) for part in parts]
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=1, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            progress.reach(counter.value)
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"One of {num_processes} processes was killed, perhaps for want of memory; give a smaller `--num_processes`."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """Let this process, which `multiprocessing` started, end as soon as its parent does, even if that one is killed."""
    threading.Thread(target=_wait_and_exit, args=(multiprocessing.parent_process(),), daemon=True).start()


def _wait_and_exit(parent) -> None:
    parent.join()
    os._exit(1)  # nobody waits for what this process does, and nothing that it writes has its final name yet


_counter = None  # of a worker: the trajectories that all of them have done


def _begin_worker(counter) -> None:
    global _counter
    _counter = counter
    end_with_parent()


def _count() -> None:
    with _counter.get_lock():
        _counter.value += 1


def _work_and_count(work: Callable, part: Any) -> Any:
    return work(part, _count)
