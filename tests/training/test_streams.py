"""The order of a streamed split, and the places in it at which a run resumes."""

from collections import Counter
from dataclasses import dataclass
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import property_test

from diffusers_far.training.streaming import TrajectoryStream


@dataclass(frozen=True)
class FakeTrajectory:
    name: str
    number: int
    num_frames: int


class FakeSplit:
    """Rows that are numbered through all shards; row t has `lengths[t]` frames."""

    column, fingerprint, points_to_files = "video", "fake", False

    def __init__(self, shard_sizes, lengths=None):
        ends = [sum(shard_sizes[: shard + 1]) for shard in range(len(shard_sizes))]
        self.shards = [range(end - size, end) for size, end in zip(shard_sizes, ends)]
        self.lengths = lengths or [3] * ends[-1]
        self.num_shards = len(shard_sizes)

    def rows(self, shard, first_row=0):
        return iter(
            [{"number": number, "video": [None] * self.lengths[number]} for number in self.shards[shard]][first_row:]
        )

    def trajectory(self, row, name):
        return FakeTrajectory(name, row["number"], len(row["video"]))


def stream_of(shard_sizes, lengths=None, draws_per_row=1, **changes) -> TrajectoryStream:
    arguments = {"min_frames": 1, "block_size": 4, "seed": 0}
    return TrajectoryStream(FakeSplit(shard_sizes, lengths), draws_per_row, **(arguments | changes))


def served(stream, num_draws, position=None) -> list:
    return list(islice(stream.draws(position or stream.start), num_draws))


def numbers(draws) -> list[int]:
    return [trajectory.number for trajectory, _, _ in draws]


@property_test
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=12).filter(any),
    st.integers(1, 9),
    st.integers(1, 3),
    st.sampled_from([1, 2, None]),
    st.integers(0, 2**31),
    st.data(),
)
def test_a_stream_goes_on_from_every_place_as_if_it_had_not_stopped(
    shard_sizes, block_size, num_processes, draws_per_row, seed, data
):
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=sum(shard_sizes), max_size=sum(shard_sizes)))
    lengths[-1] = 4
    process = {"process_index": data.draw(st.integers(0, num_processes - 1)), "num_processes": num_processes}
    settings = {"min_frames": 2, "block_size": block_size, "seed": seed, **process}
    whole = served(stream_of(shard_sizes, lengths, draws_per_row, **settings), 40)
    place = data.draw(st.integers(0, 38))
    rest = served(stream_of(shard_sizes, lengths, draws_per_row, **settings), 39 - place, whole[place][2])
    assert rest == whole[place + 1 :]


@pytest.mark.parametrize("block_size", [1, 4, 100])
def test_each_epoch_shows_each_row_once_in_an_order_of_its_own(block_size):
    draws = numbers(served(stream_of([3] * 8, block_size=block_size), 48))
    assert sorted(draws[:24]) == sorted(draws[24:]) == list(range(24))
    assert draws[:24] != draws[24:]
    assert draws[:24] != numbers(served(stream_of([3] * 8, block_size=block_size, seed=1), 24))


def test_a_block_mixes_several_shards():
    draws = numbers(served(stream_of([50] * 8, block_size=40), 40))
    assert {number // 50 for number in draws[:20]} == set(range(8))


def test_rows_are_drawn_as_often_as_is_asked_for():
    twice = served(stream_of([2, 2], draws_per_row=2), 8)
    assert Counter((trajectory.number, draw) for trajectory, draw, _ in twice) == {
        (number, draw): 1 for number in range(4) for draw in range(2)
    }
    each_frame = served(stream_of([2], lengths=[1, 3], draws_per_row=None), 4)
    assert sorted((trajectory.number, draw) for trajectory, draw, _ in each_frame) == [(0, 0), (1, 0), (1, 1), (1, 2)]


def test_processes_read_different_shards_and_all_of_them():
    shares = [numbers(served(stream_of([3] * 8, process_index=index, num_processes=2), 24)) for index in range(2)]
    first_epochs = [share[:12] for share in shares]
    assert sorted(first_epochs[0] + first_epochs[1]) == list(range(24))
    assert set(shares[0]) | set(shares[1]) == set(range(24))


def test_a_single_shard_serves_every_process():
    shares = [numbers(served(stream_of([6], process_index=index, num_processes=2), 12)) for index in range(2)]
    assert all(sorted(share[:6]) == sorted(share[6:]) == list(range(6)) for share in shares)
    assert shares[0] != shares[1]


def test_short_trajectories_are_passed_over():
    draws = served(stream_of([2, 3], lengths=[1, 5, 1, 5, 2], min_frames=3), 4)
    assert sorted(numbers(draws)) == [1, 1, 3, 3]


def test_a_stream_without_a_long_enough_trajectory_is_an_error_and_not_a_hang():
    with pytest.raises(ValueError, match="No trajectory of the stream has 9 frames; lower `--num_frames`"):
        served(stream_of([2, 0, 3], min_frames=9), 1)


def test_a_block_of_no_rows_is_refused():
    with pytest.raises(ValueError, match="`block_size` is 0"):
        stream_of([2], block_size=0)
