"""Every case runs, compares its output with the naive reference's, and its results are written with all that they need."""

import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from tiny_benchmarks import LONG, TINY_CASES, call_here, peak_here

from benchmarks import __main__ as command
from benchmarks.cases import growth, loading, prefill, step, training
from benchmarks.checks import require_close
from benchmarks.naive import NaiveFAR


ROOT = Path(__file__).parents[2]


@pytest.fixture
def in_this_process(monkeypatch):
    for module in (growth, step):
        monkeypatch.setattr(module, "in_fresh_process", call_here)
    monkeypatch.setattr(prefill, "peak_memory_of", peak_here)
    monkeypatch.setattr(training, "peak_memory_of", peak_here)
    monkeypatch.setattr(loading, "STATEMENTS", {"FAR": "pass", "diffusers": "pass"})


@pytest.mark.parametrize("name", TINY_CASES)
def test_a_case_runs_and_is_right(name, in_this_process):
    rows = list(TINY_CASES[name](2))
    assert rows and all(row.case == name for row in rows)
    for row in rows:
        timings = {name: each for name, each in row.measurements.items() if each.unit == "s"}
        assert timings and all(min(timing.values) > 0 for timing in timings.values())
        assert all(len(timing.values) == (1 if "once" in name else 2) for name, timing in timings.items())
        if row.settings.get("what") != "import":
            assert 0 <= row.measurements["difference"].median < 1e-4


def run_command(*arguments) -> None:
    argv = ["benchmarks", *map(str, arguments)]
    with (
        patch.object(sys, "argv", argv),
        patch.object(command, "CASES", TINY_CASES),
        patch.object(command, "in_fresh_process", call_here),
    ):
        command.main(command.parse_args())


@pytest.mark.full
def test_the_command_runs_each_case_in_a_process_of_its_own(tmp_path):
    output = tmp_path / "results.json"
    command_line = [sys.executable, "-m", "benchmarks", "int8", "--num_rounds", "2", "--output", str(output)]
    result = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert {row["case"] for row in json.loads(output.read_text())["rows"]} == {"int8"}


def test_results_have_machine_versions_seed_and_spread(tmp_path, in_this_process):
    output = tmp_path / "results.json"
    run_command("step", "frame", "--num_rounds", 3, "--output", output)
    results = json.loads(output.read_text())
    assert {"processor", "cores", "threads", "python", "torch", "diffusers", "diffusers_far"} <= set(
        results["machine"]
    )
    assert results["seed"] == 0 and results["num_rounds"] == 3
    assert {row["case"] for row in results["rows"]} == {"step", "frame"}
    far = results["rows"][0]["measurements"]["FAR"]
    assert far["low"] <= far["median"] <= far["high"] and len(far["values"]) == 3
    assert "differences" in " ".join(results["rows"][0]["notes"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_rounds", 1], "2 runs at least"),
        (["--output", __file__], "exists"),
        (["no_such_case"], "invalid choice"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run_command("step", *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["step", "frame", "rollout", "prefill", "growth"])
def test_a_wrong_result_has_no_figures(name, in_this_process, monkeypatch):
    right = NaiveFAR.step
    monkeypatch.setattr(NaiveFAR, "step", lambda *arguments, **named: right(*arguments, **named) * 1.01)
    with pytest.raises(RuntimeError, match="differ by"):
        list(TINY_CASES[name](2))


def test_a_wrong_gradient_has_no_figures(in_this_process, monkeypatch):
    right = NaiveFAR.__call__

    def wrong(naive, *inputs):
        velocity = right(naive, *inputs)
        velocity.register_hook(lambda gradient: gradient * 1.01)  # the loss stays as it is
        return velocity

    monkeypatch.setattr(NaiveFAR, "__call__", wrong)
    with pytest.raises(RuntimeError, match="the gradient of"):
        list(TINY_CASES["training"](2))


def test_not_a_number_is_not_right():
    with pytest.raises(RuntimeError, match="nan"):
        require_close(torch.tensor([float("nan")]), torch.tensor([0.0]), "a test")


def test_a_frame_is_made_at_the_same_place_in_every_round():
    """After each run the session stands where it stood: so a later run makes the same frame."""
    from benchmarks.cases.frame import start_session

    transformer, clip = LONG.build(), LONG.clip(8)
    session = start_session(transformer, clip)
    frames = []
    for _ in range(3):
        frames.append(session.advance(clip.actions[:, -2], noise=clip.noise[:, -1:]))
        assert session.num_frames == 8
        session.rewind(1)
    torch.testing.assert_close(frames[1], frames[0], atol=1e-6, rtol=1e-6)
    assert torch.equal(frames[2], frames[1])
