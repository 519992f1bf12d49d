"""Peaks are those of a process of its own."""

import numpy as np
import pytest

from benchmarks.memory import in_fresh_process, peak_memory, peak_memory_of, resident_memory


SIZE = 300 * 2**20


def hold(num_bytes: int) -> None:
    np.ones(num_bytes, np.uint8)


def test_a_peak_stays_when_the_memory_is_given_back():
    before = resident_memory()
    hold(SIZE)
    assert peak_memory() >= before + 0.9 * SIZE and resident_memory() < before + SIZE / 2


@pytest.mark.full
def test_a_fresh_process_counts_its_own_memory_and_not_that_of_its_parent():
    mine = np.ones(SIZE, np.uint8)
    idle, busy = peak_memory_of(hold, 0), peak_memory_of(hold, SIZE)
    assert idle.unit == "bytes" and idle.median < resident_memory() - SIZE / 2
    assert 0.9 * SIZE < busy.median - idle.median < 1.1 * SIZE
    assert mine.any()


@pytest.mark.full
def test_an_error_in_a_fresh_process_is_raised_here():
    with pytest.raises(ZeroDivisionError):
        in_fresh_process(divmod, 1, 0)
