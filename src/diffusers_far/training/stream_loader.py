"""Loading what a training draws from a stream: one process reads, others decode, and the place is kept in checkpoints."""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..data.streaming import StoredTrajectory
from .launch import leave_signals_to_parent
from .streams import StreamPosition, TrajectoryStream


logger = logging.getLogger(__name__)


class StreamLoader(Dataset):
    """What one process takes from a stream, step after step.

    However many processes decode, one alone reads, so that the order does not depend on their number.

    Args:
        stream (`TrajectoryStream`): Where it comes from.
        read_step (callable): From the stream's draws, without end, and the number of a step to what the step takes, not
            yet decoded: an iterator over one or more batches.
        decode (callable): From such a batch to what the training loop takes.
        num_read_ahead (`int`): Batches that are read before they are needed, where a process reads.

    Attributes:
        position (`StreamPosition`): After the last batch that was taken from `load`.
    """

    def __init__(
        self,
        stream: TrajectoryStream,
        read_step: Callable[[Iterator[tuple[StoredTrajectory, int]], int], Iterator[Any]],
        decode: Callable[[Any], Any],
        num_read_ahead: int = 2,
    ) -> None:
        self.stream, self.read_step, self.decode, self.num_read_ahead = stream, read_step, decode, num_read_ahead
        self.position = stream.start

    def load(self, first_step: int, last_step: int, num_workers: int = 0) -> Iterator[Any]:
        """The batches of the steps from `first_step` to before `last_step`, from `position` on.

        Args:
            first_step, last_step (`int`): Of the run.
            num_workers (`int`): Processes that decode; one more reads. 0: all in this process.
        """
        reader = DataLoader(
            _Reader(self, range(first_step, last_step)),
            batch_size=None,
            num_workers=min(num_workers, 1),
            prefetch_factor=self.num_read_ahead if num_workers else None,
            collate_fn=_as_it_is,
            worker_init_fn=leave_signals_to_parent,
        )
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=reader,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=leave_signals_to_parent,
        )
        # Begun here and not with the first batch: to begin draws from the generator that the network draws from.
        return self._take(iter(loader))

    def _take(self, loaded: Iterator[tuple[Any, StreamPosition]]) -> Iterator[Any]:
        for batch, position in loaded:
            self.position = position
            yield batch

    def __getitem__(self, read: tuple[Any, StreamPosition]) -> tuple[Any, StreamPosition]:
        batch, position = read
        return self.decode(batch), position

    def save_with(self, accelerator: Accelerator) -> None:
        """Let the checkpoints of `accelerator` hold the position: each process's own, as each reads other shards."""
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    def _file(self, folder: str) -> Path:
        return Path(folder) / f"stream-{self.stream.process_index}.json"

    def _save(self, models: list, weights: list, folder: str) -> None:
        self._file(folder).write_text(json.dumps(asdict(self.position) | {"order": self.stream.identity}))

    def _load(self, models: list, folder: str) -> None:
        file = self._file(folder)
        saved = json.loads(file.read_text()) if file.is_file() else {}
        if saved.get("order") != self.stream.identity:
            logger.warning("The checkpoint holds no position in a stream of this order; it begins anew.")
            return
        self.position = StreamPosition(tuple((number, row) for number, row in saved["lanes"]), saved["num_served"])


class _Reader(IterableDataset):
    def __init__(self, loader: StreamLoader, steps: range) -> None:
        self.loader, self.steps = loader, steps
        self._position = loader.position

    def __iter__(self) -> Iterator[tuple[Any, StreamPosition]]:
        draws = self._draws()
        for step in self.steps:
            for batch in self.loader.read_step(draws, step):
                yield batch, self._position

    def _draws(self) -> Iterator[tuple[StoredTrajectory, int]]:
        for trajectory, draw, self._position in self.loader.stream.draws(self._position):
            yield trajectory, draw


def _as_it_is(batch: Any) -> Any:
    return batch
