"""Measurements keep their spread, ratios are of the same round, tables have the columns of their rows."""

import time

import pytest

from benchmarks.measurement import Measurement, Row, compared
from benchmarks.table import ScreenTable, markdown_tables
from benchmarks.timing import time_in_turn


FAR = Measurement((1.0, 2.0, 4.0), "s")
NAIVE = Measurement((4.0, 8.0, 12.0), "s")


def test_a_ratio_is_taken_in_each_round():
    ratio = NAIVE.per(FAR)
    assert ratio.values == (4.0, 4.0, 3.0) and ratio.median == 4.0 and (ratio.low, ratio.high) == (3.5, 4.0)
    with pytest.raises(ValueError):
        NAIVE.per(Measurement((1.0,), "s"))


def test_rivals_are_compared_with_far():
    columns = compared({"FAR": FAR, "limit": Measurement((0.5, 1.0, 2.0), "s"), "naive": NAIVE})
    assert list(columns) == ["FAR", "limit", "naive", "of the limit", "naive / FAR"]
    assert str(columns["of the limit"]) == "50% (50% to 50%)"
    assert str(columns["naive / FAR"]) == "4.00x (3.50x to 4.00x)"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0123456, "s", "12.3 ms"),
        (0.25, "s", "0.25 s"),
        (12.345, "s", "12.3 s"),
        (1234.5, "s", "1234 s"),
        (3 * 2**29, "bytes", "1.50 GiB"),
        (2**20, "bytes", "1.0 MiB"),
        (1.6e-6, "difference", "2e-06"),
        (0.0, "difference", "0"),
    ],
)
def test_values_are_shown_with_their_unit(value, unit, text):
    assert str(Measurement((value,), unit)) == text


def test_a_measurement_needs_a_value_and_a_known_unit():
    for values, unit in (((), "s"), ((1.0,), "hours")):
        with pytest.raises(ValueError, match="units"):
            Measurement(values, unit)


def test_a_row_survives_json_with_its_spread():
    row = Row("step", {"model": "tiny", "frames": 3}, {"FAR": FAR, "naive / FAR": NAIVE.per(FAR)}, {"why": "a test"})
    content = row.to_json()
    assert content["measurements"]["FAR"] == {
        "unit": "s",
        "median": 2.0,
        "low": 1.5,
        "high": 3.0,
        "values": [1.0, 2.0, 4.0],
    }
    assert Row.from_json(content) == row


def test_each_kind_of_row_has_its_own_columns(capsys):
    rows = [
        Row("step", {"frames": 3}, {"FAR": FAR}),
        Row("step", {"frames": 5}, {"FAR": FAR}),
        Row("growth", {"early": 3}, {"growth": NAIVE.per(FAR)}),
    ]
    table = ScreenTable()
    for row in rows:
        table.print(row)
    assert [line.split() for line in capsys.readouterr().out.splitlines() if line] == [
        ["case", "frames", "FAR"],
        ["step", "3", "2", "s"],
        ["step", "5", "2", "s"],
        ["case", "early", "growth"],
        ["growth", "3", "4.00x", "(3.50x", "to", "4.00x)"],
    ]
    assert markdown_tables(rows).split("\n\n") == [
        "| frames | FAR |\n| --- | --- |\n| 3 | 2 s |\n| 5 | 2 s |",
        "| early | growth |\n| --- | --- |\n| 3 | 4.00x (3.50x to 4.00x) |",
    ]


def test_rivals_run_in_turn_and_neither_the_warm_up_nor_preparation_is_timed():
    calls = []

    def run_slowly_at_first():
        time.sleep(0 if "a" in calls else 0.05)
        calls.append("a")

    rivals = {"a": run_slowly_at_first, "b": lambda: calls.append("b")}
    timings = time_in_turn(rivals, 2, prepare={"a": lambda: (calls.append("prepare"), time.sleep(0.05))})
    assert calls == ["prepare", "a", "b"] * 3
    assert all(len(timing.values) == 2 and timing.unit == "s" for timing in timings.values())
    assert max(timings["a"].values) < 0.05
    calls.clear()
    time_in_turn(rivals, 2, is_warm=True)
    assert calls == ["a", "b"] * 2
