"""Training on a streamed split: the order of its trajectories, which has no end, their clips, and the processes that load
them.

The order is a function of the seed. The shards follow each other epoch after epoch, each epoch in an order of its own, and
are dealt to lanes like cards. A process reads from several lanes at once, so that what it mixes comes from several shards.
What it has read makes a block, and is served in a random order before the next one is read. A place is therefore a few
numbers: where each lane stood when the block began, and how much of the block is served. Checkpoints keep it. A resumed run
reads one block again and goes on at the exact place.

B batch, F frames, C latent channels, H/W latent height/width.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..data.clips import ClipBatch, StoredTrajectory
from ..data.streaming import StreamedSplit
from ..data.video_clips import StreamedClips
from .clips import CLIP_STREAM, START_STREAM, StepBatches, draw_start, step_indices
from .launch import leave_signals_to_parent
from .objective import ObjectiveDraw, TrainingObjective


logger = logging.getLogger(__name__)

MAX_LANES = 8  # of a process
FILES_PER_BLOCK = 8192  # where rows only name their files, and so are small
MAX_EPOCHS_WITHOUT_USE = 8


@dataclass(frozen=True)
class StreamPosition:
    """A place in a stream.

    Args:
        lanes (tuple of `(int, int)`): Of each lane, at the beginning of a block: the number of its shard in the endless
            row of shards, and the next row in it.
        num_served (`int`): How many of the block's draws are served.
    """

    lanes: tuple[tuple[int, int], ...]
    num_served: int = 0


@dataclass(frozen=True)
class TrajectoryStream:
    """The trajectories that one process draws, in order and without end.

    Args:
        split (`StreamedSplit`): Where they come from.
        draws_per_row (`int`, *optional*): How often a row is drawn each time it is read; `None`: once for each frame.
        min_frames (`int`): Shorter trajectories are passed over.
        block_size (`int`): Rows that are held in memory and mixed.
        seed (`int`): Of the run.
        process_index, num_processes (`int`): This process's share; two processes read different shards.
    """

    split: StreamedSplit
    draws_per_row: int | None = 1
    _: KW_ONLY
    min_frames: int
    block_size: int
    seed: int
    process_index: int = 0
    num_processes: int = 1

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"`block_size` is {self.block_size}; a block holds at least 1 row.")

    @property
    def num_lanes(self) -> int:
        """Lanes of this process."""
        return int(np.clip(self.split.num_shards // self.num_processes, 1, MAX_LANES))

    @property
    def stride(self) -> int:
        """Lanes of all processes: from one shard of a lane to its next one."""
        return self.num_lanes * self.num_processes

    @property
    def rows_per_lane(self) -> int:
        """Rows of a block that come from one lane."""
        size = FILES_PER_BLOCK if self.split.points_to_files else self.block_size
        return -(-size // self.num_lanes)

    @property
    def identity(self) -> list:
        """What a position depends on; JSON values."""
        return [self.split.fingerprint, self.rows_per_lane, self.stride, self.draws_per_row, self.seed]

    @property
    def start(self) -> StreamPosition:
        """Where a new run begins."""
        first_lane = self.process_index * self.num_lanes
        return StreamPosition(tuple((first_lane + lane, 0) for lane in range(self.num_lanes)))

    def draws(self, position: StreamPosition) -> Iterator[tuple[StoredTrajectory, int, StreamPosition]]:
        """From `position` on: a trajectory, which draw of it this is (from 0), and the position after it.

        Raises:
            ValueError: No trajectory is long enough.
        """
        lanes = [_Lane(self, number, row) for number, row in position.lanes]
        num_served, last_useful_epoch = position.num_served, self._epoch(lanes)
        while self._epoch(lanes) <= last_useful_epoch + MAX_EPOCHS_WITHOUT_USE:
            block_start = tuple(lane.position for lane in lanes)
            rows = [row for lane in lanes for row in lane.take(self.rows_per_lane)]
            entries = [
                (row, draw)
                for row in rows
                for draw in range(self.draws_per_row or len(row[1][self.split.column]))  # else one for each frame
            ]
            order = np.random.default_rng((self.seed, *sum(block_start, ()))).permutation(len(entries))
            for served in range(num_served, len(entries)):
                (name, values), draw = entries[order[served]]
                trajectory = self.split.trajectory(values, name)
                if trajectory.num_frames >= self.min_frames:
                    last_useful_epoch = self._epoch(lanes)
                    yield trajectory, draw, StreamPosition(block_start, served + 1)
            num_served = 0
            del rows, entries  # before the next block is read
        raise ValueError(
            f"No trajectory of the stream has {self.min_frames} frames; lower `--num_frames` or `--frame_interval`."
        )

    def _epoch(self, lanes: list["_Lane"]) -> int:
        """The epoch of the lane that is furthest behind."""
        return min(lane.number for lane in lanes) // self.split.num_shards


class _Lane:
    """The rows of every `stride`-th shard of the endless row of shards."""

    def __init__(self, stream: TrajectoryStream, number: int, row: int) -> None:
        self.stream, self.number, self.row = stream, number, row
        self._rows = None

    @property
    def position(self) -> tuple[int, int]:
        return self.number, self.row

    def take(self, num_rows: int) -> list[tuple[str, dict]]:
        """The next rows with their names: `num_rows`, or those that are left of the epoch."""
        split, rows = self.stream.split, []
        while len(rows) < num_rows:
            (shard,) = step_indices(split.num_shards, 1, self.stream.seed, self.number)
            if self._rows is None:
                self._rows = split.rows(int(shard), self.row)
            values = next(self._rows, None)
            if values is not None:
                rows.append((f"row {self.row} of shard {shard}", values))
                self.row += 1
                continue
            epoch = self.number // split.num_shards
            self.number, self.row, self._rows = self.number + self.stream.stride, 0, None
            if rows and self.number // split.num_shards > epoch:
                break
        return rows


class StreamLoader(Dataset):
    """What one process takes from a stream, step after step. A subclass says what a step reads, and how that is decoded.

    However many processes decode, one alone reads, so that the order does not depend on their number.

    Args:
        stream (`TrajectoryStream`): Where it comes from.

    Attributes:
        position (`StreamPosition`): After the last batch that was taken from `load`.
        num_read_ahead (`int`): Batches that are read before they are needed, where a process reads.
    """

    num_read_ahead = 2

    def __init__(self, stream: TrajectoryStream) -> None:
        self.stream, self.position = stream, stream.start

    def read_step(self, draws: Iterator[tuple[StoredTrajectory, int]], step: int) -> Iterator[Any]:
        """Take what a step needs from the stream's draws, which have no end.

        Yields:
            One or more batches, not decoded.
        """
        raise NotImplementedError

    def decode(self, read: Any) -> Any:
        """What the training loop takes, of a batch of `read_step`."""
        raise NotImplementedError

    @property
    def description(self) -> str:
        """How much there is, in words for the log."""
        return f"a stream of {len(self.stream.split.files)} files"

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


class StreamedBatches(StepBatches, StreamLoader):
    """The batches of one process, of a stream.

    Args:
        clips (`StreamedClips`): Where the clips come from.
        objective (`TrainingObjective`): Draws what is noisy.
        block_size (`int`): Trajectories that are held in memory and mixed.
        clips_per_trajectory (`int`): Clips that are cut of a trajectory each time it is read.
        sizes: As of [`StepBatches`].
    """

    def __init__(
        self,
        clips: StreamedClips,
        objective: TrainingObjective,
        *,
        block_size: int,
        clips_per_trajectory: int = 1,
        **sizes,
    ) -> None:
        super().__init__(objective=objective, latent_shape=clips.latent_shape, **sizes)
        if clips_per_trajectory < 1:
            raise ValueError(f"`clips_per_trajectory` is {clips_per_trajectory}; it must be at least 1.")
        stream = TrajectoryStream(
            clips.split,
            draws_per_row=clips_per_trajectory,
            min_frames=(self.num_frames - 1) * self.interval + 1,
            block_size=block_size,
            seed=self.seed,
            process_index=self.process_index,
            num_processes=self.num_processes,
        )
        StreamLoader.__init__(self, stream)
        self.clips = clips
        if not clips.split.points_to_files:
            # As much as a block, so that the next one is read while this one is served.
            self.num_read_ahead = max(2, block_size * clips_per_trajectory // self.batch_size)

    def read_step(self, draws: Iterator[tuple[StoredTrajectory, int]], step: int) -> Iterator[tuple]:
        """Of each batch of a step: which one it is, its trajectories, and where their clips start."""
        length = self.clip_length(step)
        for accumulated in range(self.num_accumulated):
            places = []
            for generator in self.generators(step, accumulated, START_STREAM):
                trajectory, _ = next(draws)
                start = draw_start(trajectory.num_frames, length, self.interval, generator)
                places.append((trajectory.without_other_images(start, length, self.interval), start))
            yield step, accumulated, places

    def decode(self, read: tuple) -> tuple[ClipBatch, ObjectiveDraw]:
        """The clips of a batch and what chance decides for them."""
        step, accumulated, places = read
        length = self.clip_length(step)
        clips = [self.clips.cut(trajectory, start, length, self.interval) for trajectory, start in places]
        return ClipBatch.stack(clips), self.draw(step, self.generators(step, accumulated, CLIP_STREAM))
