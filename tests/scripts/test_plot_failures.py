"""The curves of a healthy training and of mistakes are those that the script makes, and can be drawn again."""

import json
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import plot_failures  # noqa: E402
from plot_failures import KEPT, MODEL, RUNS, main, parse_args  # noqa: E402


CURVES = ROOT / "docs" / "results" / "failures.json"


def test_the_kept_curves_have_every_run_and_are_drawn_again(tmp_path):
    pytest.importorskip("matplotlib")
    logs = json.loads(CURVES.read_text())
    main(parse_args(["--from_json", str(CURVES), "--plot", str(tmp_path / "failures.png")]))
    assert list(logs) == list(RUNS) and (tmp_path / "failures.png").stat().st_size > 10_000


def test_the_kept_curves_were_all_measured_at_the_same_steps():
    logs = json.loads(CURVES.read_text())
    assert list(logs) == list(RUNS) and all(list(log) == list(KEPT) for log in logs.values())
    assert len({tuple(log["validation/loss"]) for log in logs.values()}) == 1


def test_the_trainings_differ_in_their_mistake_alone(tmp_path, monkeypatch):
    started, configs = {}, {}

    def note(script, *words):
        name = Path(words[words.index("--output_dir") + 1]).name
        started[name] = " ".join(str(word) for word in words if str(tmp_path) not in str(word))
        configs[name] = json.loads(Path(words[words.index("--transformer_config") + 1]).read_text())

    monkeypatch.setattr(plot_failures, "run", note)
    monkeypatch.setattr(plot_failures, "training_log", lambda folder: dict.fromkeys(KEPT, {}))
    logs = plot_failures.train(tmp_path, 300)
    assert list(logs) == list(started) == list(RUNS)
    assert started["actions"] == started["healthy"]
    assert started["context"] == started["healthy"] + " --clean_context_ratio 0"
    assert started["rate"] == started["healthy"].replace("--learning_rate 2e-3", "--learning_rate 2e-2")
    assert started["rate"] != started["healthy"]
    assert configs["actions"] == MODEL | {"action_shift": 0}
    assert configs["healthy"] == configs["rate"] == configs["context"] == MODEL
