import os
import signal
import subprocess
import sys
import time

import pytest
from accelerate import Accelerator

from diffusers_far.training.config import RunSettings
from diffusers_far.training.launch import INTERRUPTED, LOCK_FILE, Launch, launched, locked


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write("process 7 on elsewhere")
file.flush()
print("held", flush=True)
time.sleep(60)
"""


FAIL_WITH_A_LOADER = """
from torch.utils.data import DataLoader
from diffusers_far.training.launch import leave_signals_to_parent

loaded = iter(DataLoader(range(10), num_workers=2, worker_init_fn=leave_signals_to_parent))
next(loaded)
raise ValueError("and the loader is still held")
"""


@pytest.fixture(autouse=True)
def usual_signals():
    """As in a terminal: tests that are started in the background or under nohup inherit signals that are ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL, signal.SIGTERM: signal.SIG_DFL}
    earlier = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in earlier.items():
        signal.signal(number, handler)


def args(tmp_path, **others):
    return RunSettings(output_dir=str(tmp_path / "new" / "run"), **others)


def test_a_second_run_in_a_folder_is_refused_and_the_first_one_named(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / LOCK_FILE)], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(ValueError, match="in use by process 7 on elsewhere; wait until that run ends or stop it"):
            with locked(tmp_path):
                pass
        holder.kill()
    with locked(tmp_path):  # what a killed run left is taken over
        assert f"process {os.getpid()} on " in (tmp_path / LOCK_FILE).read_text()
    assert not list(tmp_path.iterdir())


def test_a_run_holds_its_folder_from_its_start_and_other_processes_of_its_launch_need_no_lock(tmp_path, monkeypatch):
    seen = []

    @launched
    def main(args, launch):
        seen.append(os.path.exists(os.path.join(args.output_dir, LOCK_FILE)))
        raise KeyError

    for rank, others in ((0, {}), (1, {}), (0, {"dry_run": True})):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(KeyError):
            main(args(tmp_path, **others))
    assert seen == [True, False, False]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_is_refused_by_name(tmp_path):
    (tmp_path / "new").write_text("")
    with pytest.raises(ValueError, match="`output_dir` .*run' cannot be written to"), locked(tmp_path / "new" / "run"):
        pass


def test_a_worker_that_outlives_its_run_does_not_keep_the_folder(tmp_path):
    """Such as a process that loads data, for the seconds in which it does not know yet that its run was killed."""
    reading, writing = os.pipe()
    run = os.fork()
    if run == 0:
        lock = locked(tmp_path)
        lock.__enter__()
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
        os.write(writing, str(worker).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    worker = int(os.read(reading, 20))
    os.waitpid(run, 0)
    try:
        with locked(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_loop_after_its_step_and_the_process_with_a_code_of_its_own(tmp_path, number):
    earlier, steps = signal.getsignal(number), []

    @launched
    def main(args, launch):
        accelerator = Accelerator(cpu=True)
        launch.begin()
        for step in range(9):
            if step == 2:
                os.kill(os.getpid(), number)
            steps.append(step)
            if launch.must_stop(accelerator, step + 1):
                break
        assert launch.is_interrupted

    with pytest.raises(SystemExit) as end:
        main(args(tmp_path))
    assert end.value.code == INTERRUPTED and steps == [0, 1, 2]
    assert signal.getsignal(number) == earlier


def test_a_second_interrupt_ends_at_once(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    launch = Launch()
    launch.begin()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # schedulers repeat it
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        launch.end()


def test_a_run_whose_launcher_is_gone_is_interrupted(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    launch = Launch()
    assert not launch.must_stop(Accelerator(cpu=True), 1)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert launch.must_stop(Accelerator(cpu=True), 2) and launch.is_interrupted


def test_a_run_whose_time_is_over_stops_and_is_not_interrupted():
    assert not Launch(max_hours=1.0).must_stop(Accelerator(cpu=True), 1)
    launch = Launch(max_hours=0.0)
    assert launch.must_stop(Accelerator(cpu=True), 1) and not launch.is_interrupted


@pytest.mark.full
def test_an_error_ends_the_processes_that_load_data_too():
    result = subprocess.run([sys.executable, "-c", FAIL_WITH_A_LOADER], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "the loader is still held" in result.stderr
