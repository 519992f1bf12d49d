"""The benchmark of GPUs runs on any machine at a size that takes no time, and what it writes is complete."""

import json

import pytest
import torch

from benchmarks import gpu
from benchmarks.report import sections


ROUNDS = ["--num_rounds", "2"]
CASES = ["gpu_frame", "gpu_training", "gpu_compiled"]


def run(*arguments) -> None:
    gpu.main(gpu.parse_args([*map(str, arguments), *ROUNDS]))


def test_every_part_is_measured_written_and_shown(tmp_path):
    output = tmp_path / "gpu.json"
    run("--smoke", "--output", output)
    results = json.loads(output.read_text())
    assert results["is_smoke"] and results["num_rounds"] == 2
    assert {"name", "memory", "cuda"} <= results["gpu"].keys() and "processor" in results["machine"]
    found = [(row["case"], row["settings"]["model"]) for row in results["rows"]]
    assert found == [(case, model) for case in CASES for model in ("tiny", "tiny-long")]
    for row in results["rows"]:
        timings = [each for each in row["measurements"].values() if each["unit"] == "s"]
        assert timings and all(len(each["values"]) == 2 and min(each["values"]) > 0 for each in timings)
    tables = sections(results)
    assert list(tables) == ["gpu_machine", *CASES]
    assert tables["gpu_frame"].startswith("| model | context | steps | with cache | without | without / with |")
    assert "of the product" in tables["gpu_training"] and "eager / compiled" in tables["gpu_compiled"]


def test_what_fails_is_named_and_the_rest_is_written(tmp_path, monkeypatch):
    def fail(self, model, *sizes):
        if model.name == "tiny":
            raise RuntimeError("out of memory")
        return training(self, model, *sizes)

    training = gpu.DeviceBenchmark.training
    monkeypatch.setattr(gpu.DeviceBenchmark, "training", fail)
    with pytest.raises(SystemExit, match="Not measured:\ntraining of tiny: out of memory"):
        run("--smoke", "--parts", "training", "--output", tmp_path / "gpu.json")
    (row,) = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert row["settings"]["model"] == "tiny-long"


def test_a_step_counts_the_operations_of_every_clip_forward_and_backward():
    benchmark = gpu.DeviceBenchmark(torch.device("cpu"), gpu.SMOKE, num_rounds=2)
    one, two = (benchmark.training(gpu.TINY, 3, num_clips) for num_clips in (1, 2))
    one, two = (row.notes["arithmetic of a step, GFLOP"] for row in (one, two))
    assert two == pytest.approx(2 * one) and one > 0


def test_frames_that_differ_with_the_cache_are_no_figure():
    with pytest.raises(RuntimeError, match="differs by 1.0; at most"):
        gpu.require_same(torch.ones(2), torch.zeros(2), "a frame")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_an_error_names_the_cure():
    with pytest.raises(SystemExit, match="a build of torch for CUDA, or try the program with --smoke"):
        run()


def test_a_file_that_exists_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "gpu.json").write_text("{}")
    with pytest.raises(SystemExit):
        gpu.parse_args(["--output", str(tmp_path / "gpu.json")])
    assert "gpu.json exists; name another file" in capsys.readouterr().err
