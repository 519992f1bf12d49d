"""Means, differences and verdicts, on numbers made by hand."""

import math

import pytest

from benchmarks.studies.analysis import (
    CONTRADICTED,
    HOLDS,
    UNDECIDED,
    compare,
    estimate,
    judge,
    judge_speed,
    select,
)
from benchmarks.studies.settings import Comparison
from diffusers_far.evaluation.metrics import Estimate


def record(variant: str, seed: int, values: list, metric: str = "psnr", share: float = 1) -> dict:
    return {"variant": variant, "seed": seed, "share": share, "by_walk": {metric: values}}


def comparison(margin: float | None = None, metric: str = "psnr", **where) -> Comparison:
    return Comparison("A wins", "so", {"variant": "a"}, {"variant": "b"}, metric, where or None, margin)


def test_records_are_selected_by_all_that_is_asked():
    records = [record("a", 0, [1]), record("a", 1, [2]), record("b", 0, [3], share=0.5)]
    assert select(records, variant="a", seed=1) == [records[1]]
    assert select(records, share=0.5) == [records[2]]


def test_a_mean_is_over_seeds_first_and_then_over_walks():
    """The walks (1, 3) and (5, 7) have the means 3 and 5 over seeds."""
    found = estimate([record("a", 0, [1.0, 3.0]), record("a", 1, [5.0, 7.0])], "psnr")
    assert found.mean == 4.0 and found.num_samples == 2
    assert found.half_width == pytest.approx(1.96 * math.sqrt(2) / math.sqrt(2))


def test_a_walk_without_such_a_frame_does_not_count():
    found = estimate([record("a", 0, [1.0, None, 5.0])], "psnr")
    assert found.mean == 3.0 and found.num_samples == 2


def test_differences_are_taken_walk_by_walk():
    """The walks differ by far more than the sides do, and still every difference is 1 or 2."""
    records = [record("a", 0, [11.0, 22.0, 31.0]), record("b", 0, [10.0, 20.0, 30.0])]
    verdict = compare(records, comparison())
    assert verdict.difference.mean == pytest.approx(4 / 3) and verdict.difference.half_width < 1
    assert verdict.text == HOLDS and verdict.by_seed == (pytest.approx(4 / 3),)


def test_a_walk_that_one_side_lacks_is_left_out():
    records = [record("a", 0, [1.0, None, 2.0, 5.0]), record("b", 0, [0.0, 0.0, None, 4.0])]
    assert compare(records, comparison()).difference.num_samples == 2


def test_seeds_that_disagree_decide_nothing():
    records = [record("a", 0, [9.0, 9.1, 9.2]), record("b", 0, [0.0, 0.0, 0.0])]
    records += [record("a", 1, [0.0, 0.1, 0.2]), record("b", 1, [1.0, 1.0, 1.0])]
    verdict = compare(records, comparison())
    assert verdict.difference.mean - verdict.difference.half_width > 0
    assert verdict.by_seed[1] < 0 and verdict.text == UNDECIDED


def test_sides_need_the_same_seeds_and_one_record_each():
    with pytest.raises(ValueError, match=r"seeds \[0, 1\] with \[0\]"):
        compare([record("a", 0, [1]), record("a", 1, [1]), record("b", 0, [1])], comparison())
    with pytest.raises(ValueError, match=r"seeds \[\] with \[\]"):
        compare([], comparison())
    with pytest.raises(ValueError, match="Seed 0 has several records"):
        compare([record("a", 0, [1]), record("a", 0, [2]), record("b", 0, [1])], comparison())


def test_a_share_can_be_named():
    records = [record("a", 0, [3.0, 4.0], share=0.5), record("a", 0, [9.0, 9.0]), record("b", 0, [1.0, 1.5])]
    half = Comparison("early", "so", {"variant": "a", "share": 0.5}, {"variant": "b"}, "psnr")
    assert compare(records, half).difference.mean == pytest.approx(2.25)


@pytest.mark.parametrize(
    ("mean", "half_width", "seeds", "margin", "expected"),
    [
        (1.0, 0.5, (1.0, 1.0), None, HOLDS),
        (1.0, 1.5, (1.0, 1.0), None, UNDECIDED),
        (-1.0, 0.5, (-1.0, -1.0), None, CONTRADICTED),
        (-1.0, 0.5, (-2.5, 0.5), None, UNDECIDED),
        (0.0, 0.1, (0.0,), 0.2, HOLDS),
        (-1.0, 0.1, (-1.0,), 0.2, HOLDS),
        (0.1, 0.05, (0.1,), 0.2, HOLDS),
        (0.2, 0.1, (0.2,), 0.2, CONTRADICTED),
        (0.1, 0.3, (0.1,), 0.2, UNDECIDED),
        (1.0, 0.1, (2.5, -0.5), 0.2, UNDECIDED),
    ],
)
def test_the_rule_of_a_verdict(mean, half_width, seeds, margin, expected):
    assert judge(Estimate(mean, half_width, 10), seeds, margin) == expected


@pytest.mark.parametrize("margin", [None, 0.2])
def test_one_walk_decides_nothing(margin):
    assert judge(Estimate(5.0, float("nan"), 1), (5.0,), margin) == UNDECIDED
    assert judge(Estimate(float("nan"), float("nan"), 0), (float("nan"),), margin) == UNDECIDED


def test_faster_means_faster_in_every_round():
    assert judge_speed([1.2, 3.0]) == HOLDS
    assert judge_speed([0.9, 3.0]) == UNDECIDED
    assert judge_speed([0.9, 0.5]) == CONTRADICTED
