"""One launch of a training script: it has its output folder to itself, and signals end it with a checkpoint."""

import atexit
import errno
import fcntl
import functools
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator
from accelerate.utils import get_int_from_env

from .config import RunSettings


logger = logging.getLogger(__name__)

INTERRUPTED = 75  # exit code, "try again later" (EX_TEMPFAIL): a signal ended the run, its checkpoint is saved
SECONDS_TO_END = 2.0  # for processes that load data, at the exit of their parent
LOCK_FILE = ".lock"  # in the output folder of a run that goes on
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
LAUNCHER_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # `accelerate launch` and torchrun set them


class Launch:
    """Says when a run has to end before its last step.

    Args:
        max_hours (`float`, *optional*): Of this launch, from `begin` on.

    Attributes:
        is_interrupted (`bool`): A signal ended the loop: save a checkpoint and leave; the run is not finished.
    """

    def __init__(self, max_hours: float | None = None) -> None:
        self.max_hours = max_hours
        self.is_interrupted = False
        self._start_time = time.perf_counter()
        self._signal: signal.Signals | None = None
        self._signal_time = 0.0
        self._earlier_handlers = {}
        is_launched = any(name in os.environ for name in LAUNCHER_VARIABLES)
        self._launcher = os.getppid() if is_launched else None

    def begin(self) -> None:
        """From here on a signal waits for `must_stop`; before, with nothing to save, it ends the process at once, as ever.
        Call it before processes that load data are started, which inherit it until `leave_signals_to_parent`."""
        self._start_time = time.perf_counter()
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets no other thread handle signals
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup does with SIGHUP
                self._earlier_handlers[number] = signal.signal(number, self._receive)

    def end(self) -> None:
        """Signals do again what they did before `begin`."""
        for number, handler in self._earlier_handlers.items():
            signal.signal(number, handler)
        self._earlier_handlers.clear()

    def must_stop(self, accelerator: Accelerator, finished: int) -> bool:
        """Whether the loop ends after step `finished`: a signal came, or the time is over. All processes ask after each
        step and hear the same, since a signal may reach one of them only."""
        hours = (time.perf_counter() - self._start_time) / 3600
        is_over = self.max_hours is not None and hours > self.max_hours
        # `accelerate launch` passes no signal on: when it is ended, this process only sees that its parent is another.
        is_orphan = self._launcher is not None and os.getppid() != self._launcher
        asked = torch.tensor([self._signal is not None or is_orphan, is_over], dtype=torch.int32)
        is_interrupted, is_over = accelerator.reduce(asked.to(accelerator.device)).tolist()
        self.is_interrupted = self.is_interrupted or bool(is_interrupted)
        if (is_interrupted or is_over) and accelerator.is_main_process:
            self._say_why(finished, is_orphan)
        return bool(is_interrupted or is_over)

    def _say_why(self, finished: int, is_orphan: bool) -> None:
        """Why the loop ends, and how to go on."""
        if not self.is_interrupted:
            logger.info(f"Stopped after step {finished}: --max_train_hours {self.max_hours} are over.")
            return
        reason = "its launcher is gone" if is_orphan else "a signal came to another process"
        reason = f"{self._signal.name} came" if self._signal is not None else reason
        logger.warning(
            f"Stopped after step {finished}: {reason}. The run is saved and leaves with exit code {INTERRUPTED}; go on with "
            "`--resume_from_checkpoint latest`."
        )

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # torchrun hands a signal on that its processes got from the terminal themselves; that is no second one.
        patience = 1.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
        if self._signal is None:
            self._signal, self._signal_time = signal.Signals(number), time.perf_counter()
        elif number == signal.SIGINT and time.perf_counter() - self._signal_time > patience:
            self.end()
            raise KeyboardInterrupt


def launched(main: Callable[[RunSettings, Launch], None]) -> Callable[[RunSettings], None]:
    """Decorates a training script's `main`, which gets a [`Launch`] beside its settings.

    `settings.output_dir` belongs to this launch alone until `main` is through, except with `settings.dry_run`, which writes nothing.

    Raises:
        ValueError: Another process trains in `settings.output_dir`, which is named.
        SystemExit: With code `INTERRUPTED`: a signal ended the loop.
    """

    @functools.wraps(main)
    def wrapped(settings: RunSettings) -> None:
        launch = Launch(settings.max_train_hours)
        # The processes of one launch share the folder; the first one locks it for all.
        is_first = get_int_from_env(RANK_VARIABLES, 0) == 0
        output_dir = settings.output_dir if is_first and not settings.dry_run else None
        try:
            with locked(output_dir):
                main(settings, launch)
        finally:
            launch.end()
        if launch.is_interrupted:
            raise SystemExit(INTERRUPTED)

    return wrapped


@contextmanager
def locked(output_dir: str | os.PathLike | None) -> Iterator[None]:
    """Have a folder to oneself, which is created if need be; a folder that stays empty is removed again.

    The lock is the operating system's, so that it ends with the process however that ends; the file only tells people who
    holds it.

    Args:
        output_dir (`str` or `os.PathLike`, *optional*): `None` locks nothing.

    Raises:
        ValueError: Another process has it, or nothing can be written there.
    """
    if output_dir is None:
        yield
        return
    folder = Path(output_dir)
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _lock(path)
    except OSError as error:
        raise ValueError(
            f"`output_dir` {str(folder)!r} cannot be written to ({error}); pass another folder."
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
        for empty in created:
            if not empty.is_dir() or any(empty.iterdir()):
                break
            empty.rmdir()


def _lock(path: Path):
    """The open, locked file, with the name of this process in it."""
    while True:
        file = open(path, "a+")
        try:
            # Of the process, not of the open file: worker processes that outlive it do not keep it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                _refuse_folder_in_use(path, file)
            logger.warning(f"{str(path)!r} cannot be locked ({error}): see to it that no other run writes there.")
            return file
        # Whoever had it before may have removed the file between our opening and our locking it.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    file.truncate(0)
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    file.write(f"process {os.getpid()} on {socket.gethostname()}, started {started}\n")
    file.flush()
    return file


def _refuse_folder_in_use(path: Path, file) -> None:
    """Say who has the lock: the open `file` at `path` has the name."""
    with file:
        file.seek(0)
        holder = file.read().strip() or "another process"
    raise ValueError(
        f"`output_dir` {str(path.parent)!r} is in use by {holder}; wait until that run ends or stop it, or pass another "
        "folder."
    ) from None


def leave_signals_to_parent(worker: int) -> None:
    """For the processes that load data (`worker_init_fn` of a `DataLoader`). A signal to all processes of a run, as from a
    terminal or a cluster, would end them, and with them the run, before it is saved; they end with their parent."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """End the processes that load data, at the exit of their parent. Python ends them by SIGTERM, which they leave to their
    parent, and waits for them: after an error that keeps hold of a loader, for ever."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    for worker in workers:
        worker.terminate()
    time_is_up = time.monotonic() + SECONDS_TO_END
    for worker in workers:
        worker.join(max(0, time_is_up - time.monotonic()))
        worker.kill()
