"""The endless order of the trajectories of a streamed split, as a function of the seed, and the place in it at which a run
resumes.

The shards follow each other epoch after epoch, each epoch in an order of its own, and are dealt to lanes like cards. A
process reads from several lanes at once, so that what it mixes comes from several shards. What it has read makes a block,
and is served in a random order before the next one is read. A place is therefore a few numbers: where each lane stood when
the block began, and how much of the block is served. Resuming reads one block again, and nothing is guessed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..data.streaming import StoredTrajectory, StreamedSplit
from .order import step_indices


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

    def __init__(
        self,
        split: StreamedSplit,
        draws_per_row: int | None = 1,
        *,
        min_frames: int,
        block_size: int,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        if block_size < 1:
            raise ValueError(f"`block_size` is {block_size}; a block holds at least 1 row.")
        self.split = split
        self.draws_per_row = draws_per_row
        self.min_frames = min_frames
        self.seed = seed
        self.process_index = process_index
        self.num_lanes = int(np.clip(split.num_shards // num_processes, 1, MAX_LANES))
        self.stride = self.num_lanes * num_processes
        self.first_lane = process_index * self.num_lanes
        size = FILES_PER_BLOCK if split.points_to_files else block_size
        self.rows_per_lane = -(-size // self.num_lanes)

    @property
    def identity(self) -> list:
        """What a position depends on; JSON values."""
        return [self.split.fingerprint, self.rows_per_lane, self.stride, self.draws_per_row, self.seed]

    @property
    def start(self) -> StreamPosition:
        """Where a new run begins."""
        return StreamPosition(tuple((self.first_lane + lane, 0) for lane in range(self.num_lanes)))

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
            entries = [(row, draw) for row in rows for draw in range(self._num_draws(row))]
            order = np.random.default_rng((self.seed, *sum(block_start, ()))).permutation(len(entries))
            for served in range(num_served, len(entries)):
                row, draw = entries[order[served]]
                trajectory = self.split.trajectory(row.values, row.name)
                if trajectory.num_frames >= self.min_frames:
                    last_useful_epoch = self._epoch(lanes)
                    yield trajectory, draw, StreamPosition(block_start, served + 1)
            num_served = 0
            del rows, entries  # before the next block is read
        raise ValueError(
            f"No trajectory of the stream has {self.min_frames} frames; lower `--num_frames` or `--frame_interval`."
        )

    def _num_draws(self, row: "_Row") -> int:
        return len(row.values[self.split.column]) if self.draws_per_row is None else self.draws_per_row

    def _epoch(self, lanes: list["_Lane"]) -> int:
        """The epoch of the lane that is furthest behind."""
        return min(lane.number for lane in lanes) // self.split.num_shards


@dataclass(frozen=True)
class _Row:
    name: str
    values: dict


class _Lane:
    """The rows of every `stride`-th shard of the endless row of shards."""

    def __init__(self, stream: TrajectoryStream, number: int, row: int) -> None:
        self.stream, self.number, self.row = stream, number, row
        self._rows = None

    @property
    def position(self) -> tuple[int, int]:
        return self.number, self.row

    def take(self, num_rows: int) -> list[_Row]:
        """The next rows: `num_rows`, or those that are left of the epoch."""
        split, rows = self.stream.split, []
        while len(rows) < num_rows:
            (shard,) = step_indices(split.num_shards, 1, self.stream.seed, self.number)
            if self._rows is None:
                self._rows = split.rows(int(shard), self.row)
            values = next(self._rows, None)
            if values is not None:
                rows.append(_Row(f"row {self.row} of shard {shard}", values))
                self.row += 1
                continue
            epoch = self.number // split.num_shards
            self.number, self.row, self._rows = self.number + self.stream.stride, 0, None
            if rows and self.number // split.num_shards > epoch:
                break
        return rows
