"""The curves of a healthy training and of mistakes are those that the script makes, and can be drawn again."""

import json
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from plot_failures import KEPT, RUNS, delay_actions, main, parse_args  # noqa: E402


CURVES = ROOT / "docs" / "results" / "failures.json"


def test_the_kept_curves_have_every_run_and_are_drawn_again(tmp_path):
    pytest.importorskip("matplotlib")
    logs = json.loads(CURVES.read_text())
    assert list(logs) == list(RUNS) and all(list(log) == list(KEPT) for log in logs.values())
    steps = {tuple(log[KEPT[1]]) for log in logs.values()}
    assert len(steps) == 1
    main(parse_args(["--from_json", str(CURVES), "--plot", str(tmp_path / "failures.png")]))
    assert (tmp_path / "failures.png").stat().st_size > 10_000


def test_the_trainings_differ_in_their_mistake_alone():
    words = {name: set(arguments.split()) for name, (_, _, arguments) in RUNS.items()}
    assert words["actions"] == words["healthy"] and RUNS["actions"][1] and not RUNS["healthy"][1]
    assert words["context"] - words["healthy"] == {"--clean_context_ratio", "0"}
    assert words["rate"] ^ words["healthy"] == {"2e-2", "2e-3"}


def test_late_actions_are_each_one_frame_late():
    assert delay_actions({"actions": [1, 2, 0, 2]}) == {"actions": [1, 1, 2, 0]}
