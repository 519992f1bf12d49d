import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launched import in_threads

from diffusers_far.command_line import Progress
from diffusers_far.data import workers
from diffusers_far.data.workers import Share, share_work


def double(part, count):
    for _ in range(part):
        count()
    return 2 * part


def test_the_results_come_in_the_order_of_the_parts_and_every_trajectory_is_counted():
    progress = Progress(6)
    assert share_work(double, [1, 3, 2], 1, progress) == [2, 6, 4] and progress.num_done == 6


@given(num_parts=st.integers(0, 9), num_processes=st.integers(1, 4))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_process_has_all_results_in_order_and_does_only_its_own_part(num_parts, num_processes, monkeypatch):
    done = []

    def work(part):
        done.append(part)
        return {"twice": torch.tensor(2 * part)}

    results = in_threads(num_processes, lambda share: share.do(work, range(10, 10 + num_parts)), monkeypatch)
    expected = [{"twice": torch.tensor(2 * part)} for part in range(10, 10 + num_parts)]
    assert results == [expected] * num_processes and sorted(done) == list(range(10, 10 + num_parts))


def test_processes_that_accelerate_does_not_know_are_refused(monkeypatch):
    class Alone:
        num_processes, process_index = 1, 0

    monkeypatch.setattr(workers, "PartialState", lambda **arguments: Alone)
    assert Share.of_launch("cache_latents.py") == Share() and Share().is_main
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="cache_latents.py without `accelerate launch` was launched as 2 processes"):
        Share.of_launch("cache_latents.py")


SLOW = """
import sys, time
from diffusers_far.command_line import Progress
from diffusers_far.data.workers import share_work

def sleep(part, count):
    print("began", flush=True)
    time.sleep(600)

def die(part, count):
    import os
    os._exit(1)

if __name__ == "__main__":
    share_work({"sleep": sleep, "die": die}[sys.argv[1]], [1, 2], 2, Progress(2))
"""


def launch(tmp_path: Path, work: str) -> subprocess.Popen:
    (tmp_path / "slow.py").write_text(SLOW)
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "slow.py"), work], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_a_parent_that_is_killed(tmp_path, sent):
    run = launch(tmp_path, "sleep")
    assert [run.stdout.readline() for _ in range(2)] == ["began\n"] * 2
    left = [path for path in Path("/proc").glob("[0-9]*") if parent_of(path) == run.pid]
    assert len(left) >= 2
    run.send_signal(sent)
    run.wait()
    deadline = time.monotonic() + 20
    while any(is_running(path) for path in left) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [path for path in left if is_running(path)]


def parent_of(path: Path) -> int | None:
    try:
        return int((path / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def is_running(path: Path) -> bool:
    try:
        return (path / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.full
def test_a_worker_that_is_killed_ends_the_work_with_a_reason(tmp_path):
    run = launch(tmp_path, "die")
    assert "One of 2 processes was killed" in run.communicate(timeout=600)[1] and run.returncode != 0
