"""Equal budgets are equal, and a variant's script is told what its settings say."""

import json
import subprocess
from dataclasses import replace

import torch

from benchmarks.studies import training
from benchmarks.studies.data import DataFolder
from benchmarks.studies.plan import describe_plan, training_flops
from benchmarks.studies.results import STUDIES
from benchmarks.studies.scripts import command_line
from benchmarks.studies.settings import read_settings
from benchmarks.studies.study import Study, StudyPart
from benchmarks.studies.training import DRY_RUN, TrainingRun, model_config, num_steps, step_flops
from diffusers_far import FARTransformer3DModel, TokenARConfig, TokenARForVideo


def test_variants_of_equal_operations_differ_by_less_than_a_step():
    settings = read_settings("convergence")
    reference = settings.budget.steps * step_flops(settings, settings.variants["far"])
    for variant in settings.variants.values():
        cost = step_flops(settings, variant)
        for share in settings.budget.shares:
            assert abs(num_steps(settings, variant, share) * cost - share * reference) <= cost / 2
    assert num_steps(settings, settings.variants["far"], 1) == settings.budget.steps


def test_variants_of_equal_steps_take_them_whatever_they_cost():
    settings = read_settings("clean_context")
    costs = {name: step_flops(settings, variant) for name, variant in settings.variants.items()}
    assert costs["with"] == costs["without"] < costs["teacher_forcing"] < 2 * costs["with"]
    steps = {num_steps(settings, variant, 0.5) for variant in settings.variants.values()}
    assert steps == {settings.budget.steps // 2}


def test_the_models_that_converge_are_of_about_one_size():
    """Within 15%, conditions and codes included."""
    settings, sizes = read_settings("convergence"), {}
    for name, variant in settings.variants.items():
        config = model_config(settings, variant)
        with torch.device("meta"):
            if variant.script == "train_far":
                model = FARTransformer3DModel(**config)
            else:
                model = TokenARForVideo(TokenARConfig(num_codes=512, tokens_per_frame=64, num_actions=3, **config))
        sizes[name] = model.num_parameters()
    assert max(sizes.values()) < 1.15 * min(sizes.values()), sizes


def test_a_video_dit_costs_more_a_step_for_it_masks_nothing():
    settings = read_settings("convergence")
    assert step_flops(settings, settings.variants["video_dit"]) > step_flops(settings, settings.variants["far"])


def test_a_variant_s_arguments_win_over_the_study_s(tmp_path):
    settings = read_settings("compression")
    run = TrainingRun(tmp_path / "run", settings, settings.variants["kernel4"], 3, DataFolder(tmp_path / "data"))
    arguments = run.arguments(last_step=7)
    assert arguments["seed"] == 3 and arguments["max_train_steps"] == 7 and arguments["teacher_forcing"] is True
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config == {**settings.transformer, "long_patch_size": 8}

    settings = read_settings("clean_context")
    variant = replace(settings.variants["without"], arguments={"clean_context_ratio": 0.0, "num_frames": 9})
    run = TrainingRun(tmp_path / "other", settings, variant, 0, DataFolder(tmp_path / "data"))
    assert run.arguments(last_step=7)["num_frames"] == 9
    words = command_line(run.arguments(last_step=7))
    assert words[words.index("--clean_context_ratio") + 1] == "0.0" and "--teacher_forcing" not in words


def test_a_variant_goes_on_from_the_model_of_another(tmp_path):
    settings, data = read_settings("memory"), DataFolder(tmp_path / "data")
    last = Study(settings, data, tmp_path).training_run("short_long", 5)
    middle, first = last.start, last.start.start
    assert [run.path.name for run in (last, middle, first)] == [
        f"{name}-seed5" for name in ("short_long", "short", "full_pose_repeat")
    ]
    assert first.start is None and "transformer_config" in first.arguments(1)
    arguments = middle.arguments(1)
    assert arguments["pretrained_model_name_or_path"] == first.model_dir and "transformer_config" not in arguments
    costs = [step_flops(settings, run.variant) for run in (first, middle, last)]
    assert costs[0] == 2 * costs[2] and costs[2] > costs[1] > 0
    assert last.flops(10) == settings.budget.steps * (costs[0] + costs[1]) + 10 * costs[2]


def test_what_a_variant_goes_on_from_is_trained_first_and_once(tmp_path, monkeypatch):
    settings, data = read_settings("memory"), DataFolder(tmp_path / "data")
    run, trained = Study(settings, data, tmp_path).training_run("short", 0), []
    monkeypatch.setattr(training, "run_script", lambda name, arguments: trained.append(arguments["output_dir"]))
    run.train(7)
    assert trained == [run.start.model_dir, run.model_dir]
    run.start.measurements(settings.budget.steps).mkdir(parents=True)
    run.train(8)
    assert trained[2:] == [run.model_dir]


def test_a_start_that_is_not_measured_is_trained_and_counted_all_the_same(tmp_path, monkeypatch):
    settings, data = read_settings("compression", smoke=True), DataFolder(tmp_path / "data")
    study, trained = Study(settings, data, tmp_path), []
    run = study.training_run("window2", 0)
    monkeypatch.setattr(training, "run_script", lambda name, arguments: trained.append(arguments["output_dir"]))
    run.train(settings.budget.steps)
    assert trained == [tmp_path / f"{name}-seed0" / "model" for name in ("window2_start", "window2")]
    steps = settings.budget.steps
    costs = [step_flops(settings, each) for each in (settings.starts["window2_start"], run.variant)]
    assert run.flops(steps) == steps * sum(costs)
    assert StudyPart().runs_of(settings) == [(name, 0) for name in settings.variants]
    alone = {name: replace(each, starts_from=None) for name, each in settings.variants.items()}
    without = replace(settings, starts={}, variants=alone)
    by_starts = sum(step_flops(settings, each) for each in settings.starts.values())
    assert training_flops(settings) == training_flops(without) + steps * by_starts


def test_a_cost_is_measured_without_the_model_that_a_run_goes_on_from_and_in_float32(tmp_path, monkeypatch):
    settings, commands = read_settings("memory"), []
    printed = "600 tokens per clip of\n5.87 M parameters\n1.25 GiB of memory at the peak, 0.98 s per step"

    def fake_run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, printed, "")

    monkeypatch.setattr(training.subprocess, "run", fake_run)
    run = Study(settings, DataFolder(tmp_path / "data"), tmp_path).training_run("full_pose_repeat", 0)
    goes_on = Study(settings, DataFolder(tmp_path / "data"), tmp_path).training_run("short", 0)
    for each in (run, goes_on):
        assert each.measure_cost()["gib"] == 1.25
    for command in commands:
        assert "--pretrained_model_name_or_path" not in command and "--transformer_config" in command
        assert command[command.index("--mixed_precision") + 1] == "no"


def test_flags_are_named_or_left_out():
    assert command_line({"a": True, "b": False, "c": None, "d": 0, "e": "x"}) == ["--a", "--d", "0", "--e", "x"]


def test_the_cost_that_a_dry_run_prints_is_read():
    printed = (
        "600 tokens per clip of 40 frames, 88 of them long\n5.87 M parameters\n"
        "1.25 GiB of memory at the peak, 0.98 s per step of 8 clips\n"
    )
    found = {name: float(value) for name, value in DRY_RUN.search(printed).groupdict().items()}
    assert found == {"tokens": 600, "parameters": 5.87, "gib": 1.25, "seconds": 0.98}


def test_seconds_of_a_step_are_those_of_all_stretches(tmp_path):
    settings = read_settings("memory")
    run = TrainingRun(tmp_path, settings, settings.variants["full"], 0, DataFolder(tmp_path))
    assert run.seconds_per_step is None and run.steps == 0
    run._log({"first_step": 0, "last_step": 10, "seconds": 20.0})
    run._log({"first_step": 10, "last_step": 20, "seconds": 40.0})
    assert run.seconds_per_step == 3.0


def test_the_plan_has_a_line_for_each_study():
    plan = describe_plan(4e10)
    assert all(f"{name} " in plan for name in STUDIES)
