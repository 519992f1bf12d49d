"""Every case runs, compares its output with the naive reference's, and its results are written with all that they need."""

import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from tiny_benchmarks import FLOW_MAPS, LONG, SCD, TINY_CASES, call_here, peak_here
from tiny_models import tiny_pipeline, tiny_transformer

from benchmarks import __main__ as command
from benchmarks.cases import frame, growth, loading, prefill, step, training
from benchmarks.checks import require_close
from benchmarks.measurement import Measurement
from benchmarks.models import latent_pipeline, start_session
from benchmarks.naive import NaiveFAR
from diffusers_far import FARSession


ROOT = Path(__file__).parents[2]
DIFFERENCES = {"loading": 2, "frame": 3}  # of the import there is none; of frames, for each model and the world


@pytest.fixture
def in_this_process(tmp_path, monkeypatch):
    world = tiny_pipeline(tiny_transformer(num_actions=4, action_shift=1), height=16, width=16)
    world.save_pretrained(tmp_path / "world")
    monkeypatch.setattr(frame, "WORLDS", [tmp_path / "missing", tmp_path / "world"])
    for module in (frame, growth, step):
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
        assert all(min(timing.values) > 0 for timing in timings.values())
        assert all(len(timing.values) == (1 if "once" in name else 2) for name, timing in timings.items())
        assert timings or "difference" in row.measurements
    differences = [row.measurements["difference"].median for row in rows if "difference" in row.measurements]
    assert len(differences) == (len(rows) if name not in DIFFERENCES else DIFFERENCES[name])
    assert all(0 <= difference < 1e-4 for difference in differences)


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
    run_command("step", "int8", "--num_rounds", 3, "--output", output)
    results = json.loads(output.read_text())
    assert {"processor", "cores", "threads", "python", "torch", "diffusers", "diffusers_far"} <= set(
        results["machine"]
    )
    assert results["seed"] == 0 and results["num_rounds"] == 3
    assert {row["case"] for row in results["rows"]} == {"step", "int8"}
    far = results["rows"][0]["measurements"]["FAR"]
    assert far["low"] <= far["median"] <= far["high"] and len(far["values"]) == 3
    assert "differences" in " ".join(results["rows"][0]["notes"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_rounds", 1], "2 runs at least"),
        (["--output", __file__], "exists"),
        (["no_such_case"], "invalid choice"),
        (["--frames", 16], "the cases are ['step']; name it alone"),
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
    """Each run begins where the first one began: so a later run makes the same frame."""
    clip = LONG.clip(8)
    made = frame.SessionFrame(latent_pipeline(LONG.build()), clip)
    frames = []
    for _ in range(3):
        made.go_back()
        frames.append(made.session.advance(clip.actions[:, -2], noise=clip.noise[:, -1:]))
        assert made.session.num_frames == 8
    assert torch.equal(frames[1], frames[0]) and torch.equal(frames[2], frames[0])


def test_a_world_whose_window_is_encoded_anew_every_few_frames_makes_so_many_in_a_run():
    clip = LONG.clip(8)
    made = frame.SessionFrame(latent_pipeline(LONG.build()), clip, short_cache=2)
    made(1)
    assert made.num_frames == 2 and made.session.num_frames == 9
    made.go_back()
    assert made.session.num_frames == 7


@pytest.mark.parametrize("model", [*FLOW_MAPS, SCD], ids=lambda model: model.name)
@pytest.mark.parametrize("num_frames", [2, 7])
def test_a_random_context_has_the_places_and_bytes_of_a_written_one(model, num_frames):
    transformer, clip = model.build(), model.clip(num_frames + 1)
    far = frame.FARFrame(transformer, clip)
    written = start_session(latent_pipeline(transformer), clip)
    written.advance(clip.actions[:, -2])
    expected = {name: each.shape for name, each in written.rollout.kv_cache.state()[0].items()}
    expected.pop("kept_action_mask", None)  # a session says with it that all actions are given
    for _ in range(2):
        tensors, clock = far.kv_cache.state()
        assert clock == written.rollout.kv_cache.state()[1]
        assert {name: each.shape for name, each in tensors.items() if name != "kept_action_mask"} == expected
        assert far().isfinite().all()
        far.unwrite()
        far.write()


@pytest.mark.parametrize("model", FLOW_MAPS, ids=lambda model: model.name)
def test_a_random_naive_context_has_the_sizes_of_a_written_one(model):
    transformer, clip = model.build(), model.clip(8)
    random, written = frame.NaiveFrame(transformer, clip).cache, step.NaiveStep(transformer, clip).cache
    assert random.num_long_frames == written.num_long_frames and random.num_frames == written.num_frames == 7
    assert torch.equal(random.keys.positions, written.keys.positions)
    assert random.keys.layers[0][0].shape == written.keys.layers[0][0].shape


@pytest.mark.parametrize("model", [*FLOW_MAPS, SCD], ids=lambda model: model.name)
def test_a_frame_that_is_not_what_it_is_without_a_cache_has_no_figures(model, in_this_process, monkeypatch):
    right = FARSession.advance
    monkeypatch.setattr(FARSession, "advance", lambda *inputs, **named: right(*inputs, **named) * 1.01)
    with pytest.raises(RuntimeError, match="without a cache"):
        frame.measure((model,), 3, (1,), 2, is_checked=True)


def test_the_world_may_be_named_and_must_have_actions_and_a_size(tmp_path, in_this_process):
    with_actions = tiny_pipeline(tiny_transformer(num_actions=4, action_shift=1), height=16, width=16)
    with_actions.save_pretrained(tmp_path / "mine")
    tiny_pipeline(tiny_transformer(), height=16, width=16).save_pretrained(tmp_path / "without")
    row, check = frame.measure_world(tmp_path / "mine", (3,), (1,), 2)
    assert row.settings == check.settings == {"model": "mine", "context": 3}
    speed = row.measurements[f"frames/s, {frame.show_steps(with_actions.default_inference_steps)}"]
    assert speed.unit == "frames/s" and speed.median > 0 and {"1 step", "VAE", "cache"} <= row.measurements.keys()
    with pytest.raises(ValueError, match="num_actions. None"):
        frame.measure_world(tmp_path / "without", (3,), (1,), 2)


def test_a_frame_is_the_sum_of_its_parts_in_each_round():
    place = frame.Place(SCD, 3, (50, 1), is_checked=False)
    times = {"write": (5.0, 7.0), "step": (1.0, 2.0), 50: (0.5, 0.5), 1: (0.25, 0.25)}
    timings = {place.key("FAR", what): Measurement(each, "s") for what, each in times.items()}
    timings |= {place.key("limit", what): Measurement((1.0, 1.0), "s") for what in ("write", "step")}
    (row,) = place.rows(timings, place)
    assert row.measurements["50 steps"].values == (55.5, 107.5) and row.measurements["1 step"].values == (6.25, 9.25)
    assert row.measurements["of the limit, 50 steps"].values == (51 / 55.5, 51 / 107.5)
    assert row.measurements["of tiny-scd, 50 steps"].values == (1, 1)
    assert row.measurements["a frame adds"].median == 2 * 2 * 16 * 32 * 4  # keys and values, layers, tokens, width
