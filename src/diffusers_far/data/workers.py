"""Long work on many trajectories, shared among processes: those that a launcher started, and those that this one starts, which
end when it does."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env

from ..command_line import Progress, require_one_process


# Who has done its share waits for the others. If one of them fails, the launcher ends all.
LONGEST_WAIT = timedelta(days=1)


@dataclass(frozen=True)
class Share:
    """Which parts of a work are this process's, of several that a launcher started: every `num_processes`-th one.

    The parts are the same whatever the number of processes, and so are the results, if a part knows nothing of the others.

    Args:
        process_index (`int`), num_processes (`int`): The first and the distance. By default all parts.
        device (`torch.device`, *optional*): Where this one of several processes works.
    """

    process_index: int = 0
    num_processes: int = 1
    device: torch.device | None = None

    @classmethod
    def of_launch(cls, what: str, *, cpu: bool = False) -> "Share":
        """What the launcher left to this process.

        Args:
            what (`str`): Is run, such as the script's name.
            cpu (`bool`): Works on the CPU, whatever else there is.

        Raises:
            ValueError: There are several processes of which Accelerate knows nothing; each would do the whole work.
        """
        state = PartialState(cpu=cpu or parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST_WAIT)
        if state.num_processes == 1:
            require_one_process(f"{what} without `accelerate launch`")
            return cls()
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that tells and writes what all have in common."""
        return self.process_index == 0

    def of(self, parts: Sequence[Any]) -> Sequence[Any]:
        """This process's parts."""
        return parts[self.process_index :: self.num_processes]

    def do(self, work: Callable[[Any], Any], parts: Sequence[Any]) -> list[Any]:
        """`work(part)` of all parts, in order, the same in every process: each does its own, and they exchange what came of it,
        which must be picklable and on the CPU."""
        done = [(number, work(parts[number])) for number in self.of(range(len(parts)))]
        if self.num_processes > 1:
            done = sorted(gather_object(done), key=lambda pair: pair[0])
        return [result for _, result in done]

    def leave(self) -> None:
        """Wait until all processes have come so far; after it they exchange nothing more."""
        if self.num_processes > 1:
            PartialState().wait_for_everyone()
            PartialState().destroy_process_group()


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
