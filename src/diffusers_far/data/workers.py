"""Long work on many trajectories, shared among processes that end when their parent does."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from ..command_line import Progress


def share_work(
    work: Callable[[Any, Callable[[], None]], Any], parts: Sequence[Any], num_processes: int, progress: Progress
) -> list[Any]:
    """Do `work(part, count)` for each part, in this process or in several, and return the results in order.

    The processes end when this one does, however it ends. The first error of one ends all of them.

    Args:
        work (callable): Called with a part and with `count`, which it calls after each trajectory. Must be picklable.
        parts (sequence): Of the work.
        num_processes (`int`): 1: this process alone.
        progress ([`~command_line.Progress`]): Counts every trajectory, and nothing else.

    Raises:
        RuntimeError: A process was killed, such as for want of memory.
    """
    if num_processes == 1:
        return [work(part, progress.update) for part in parts]
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
            if counter.value > progress.num_done:
                progress.update(counter.value - progress.num_done)
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"One of {num_processes} processes was killed, perhaps for want of memory; give a smaller "
            "`--num_processes` or `--num_workers`."
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
