"""Work in several processes, as a launcher starts them; and in threads that stand for them, where a test is to be quick."""

import multiprocessing
import os
import pickle
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from diffusers_far.data.workers import Share


CONTEXT = multiprocessing.get_context("forkserver")
LIBRARIES = ("accelerate", "datasets", "diffusers", "diffusers_far", "peft")


def start(num_processes: int, work: Callable, log: Path, *args: Any) -> list:
    """Starts `work(*args)` in each of several processes that can find each other; what they tell is added to `log`. Each is
    forked from one which has imported everything already."""
    CONTEXT.set_forkserver_preload([name for name in sys.modules if name.split(".")[0] in LIBRARIES])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    counts = {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    processes = []
    for rank in range(num_processes):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        environment = {} if num_processes == 1 else address | counts | ranks
        processes.append(CONTEXT.Process(target=_begin, args=(environment, log, work, args)))
        processes[-1].start()
    return processes


def _begin(environment: dict[str, str], log: Path, work: Callable, args: tuple) -> None:
    import torch

    os.environ.update(environment, ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    work(*args)


def finish(num_processes: int, work: Callable, log: Path, *args: Any) -> None:
    """The same, to its end."""
    wait_for(start(num_processes, work, log, *args), log)


def wait_for(processes: list, log: Path) -> None:
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * len(processes), log.read_text()


def kill_when(has_come: Callable[[], Any], processes: list, log: Path) -> None:
    """Kills all processes as soon as something has come so far."""
    while not has_come():
        assert all(process.is_alive() for process in processes), log.read_text()
        processes[0].join(0.01)
    for process in processes:
        process.kill()
        process.join()


def in_threads(num_processes: int, work: Callable[[Share], Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `work(share)` gives in each of several processes. Threads stand for them, of which one runs at a time, as libraries
    want it; what they exchange is pickled, as between processes."""
    barrier, turn, here = threading.Barrier(num_processes, timeout=60), threading.Lock(), threading.local()
    given = []  # by process, for each exchange

    def gather_object(results: list) -> list:
        if here.num_exchanges == len(given):
            given.append({})
        exchange = given[here.num_exchanges]
        exchange[here.share.process_index] = pickle.dumps(results)
        here.num_exchanges += 1
        turn.release()
        try:
            barrier.wait()
        finally:
            turn.acquire()
        return [each for index in range(num_processes) for each in pickle.loads(exchange[index])]

    def process(index: int) -> Any:
        here.share, here.num_exchanges = Share(index, num_processes), 0
        try:
            with turn:
                return work(here.share)
        except BaseException:
            barrier.abort()
            raise

    monkeypatch.setattr("diffusers_far.data.workers.gather_object", gather_object)
    monkeypatch.setattr(Share, "of_launch", lambda what, cpu=False: here.share)
    monkeypatch.setattr(Share, "leave", lambda share: None)
    with ThreadPoolExecutor(num_processes) as pool:
        return list(pool.map(process, range(num_processes)))
