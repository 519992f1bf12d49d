"""The studies, shrunk to seconds: they run from data to page, and what is interrupted goes on."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.studies import __main__ as command
from benchmarks.studies import study as study_module
from benchmarks.studies.cache import CacheStudy
from benchmarks.studies.data import DataFolder, prepare
from benchmarks.studies.poses import pose_actions
from benchmarks.studies.predictors import checkpoint_hash, load_predictor
from benchmarks.studies.report import study_section
from benchmarks.studies.results import STUDIES, finished_results, read_results, run_part, run_study, write_results
from benchmarks.studies.settings import StudySettings, merge, read_settings
from benchmarks.studies.study import Study, StudyPart
from benchmarks.studies.training import TrainingRun
from diffusers_far.commands import main as far
from diffusers_far.data.latents import LatentDataset
from diffusers_far.training import run as training_run


pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets-cache")
        yield folder


@pytest.fixture(scope="module")
def data(workplace) -> DataFolder:
    folder = DataFolder(workplace / "data")
    prepare(folder, num_processes=2, smoke=True)
    return folder


def run_command(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["studies", *map(str, words)])
    command.main(command.parse_args())


def small_study(path: Path, data: DataFolder, **overrides) -> Study:
    """Two variants, measured twice in their training."""
    values = read_settings("clean_context", smoke=True).to_json()
    del values["name"]
    shrunk = {"variants": {"without": None}, "tasks": {"one": None}, "comparisons": [], "budget": {"steps": 4}}
    return Study(StudySettings.of("small", merge(merge(values, shrunk), overrides)), data, path)


def test_what_is_prepared_is_not_made_again(data):
    files = [path for path in data.path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    before = {path: path.stat().st_mtime_ns for path in files}
    prepare(data, smoke=True)
    assert {path: path.stat().st_mtime_ns for path in files} == before
    for folder in (data.latents, data.poses, data.codes):
        assert sorted(path.name for path in folder.iterdir()) == ["test", "train", "validation"]


def test_poses_stand_beside_the_latents_of_the_same_frames(data):
    latents, poses = LatentDataset(data.latents, "test"), LatentDataset(data.poses, "test")
    assert len(poses) == len(latents)
    for walk in range(len(latents)):
        clip = poses.clip(walk, 5, 4)
        assert torch.equal(clip.latents, latents.clip(walk, 5, 4).latents)
        pose = np.array(latents.table["pose"][walk])[5:9]
        torch.testing.assert_close(clip.actions, torch.from_numpy(pose_actions(pose)))


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs_from_data_to_page(name, data, workplace, monkeypatch):
    work = workplace / "work"
    run_command(monkeypatch, name, "--data_dir", data.path, "--work_dir", work, "--smoke")
    results, settings = read_results(name, work / "results"), read_settings(name, smoke=True)
    assert results["smoke"] and results["study"] == name and results["settings"]["name"] == name
    assert results["records"]
    for record in results["records"]:
        assert len(record["by_walk"]["psnr"]) == settings.evaluation.num_walks
        assert all(0 < value < 100 for value in record["by_walk"]["psnr"])
    if name == "cache":
        assert len(results["timings"]) == len(settings.modes) * len(settings.num_frames)
        assert all(len(each["seconds"]) == settings.num_rounds for each in results["timings"])
    else:
        groups = (settings.seeds, settings.variants, settings.budget.shares, settings.tasks, settings.methods)
        expected = 1
        for group in groups:
            expected *= len(group)
        assert len(results["records"]) == expected
        trained = {name for name, variant in settings.variants.items() if variant.script is not None}
        assert set(results["costs"]) == (trained if settings.measures_cost else set())
    assert "smoke test" in study_section(name, results, workplace / "images")

    again = []
    monkeypatch.setattr(TrainingRun, "train", lambda run, last_step: again.append(run.path))
    run_command(monkeypatch, name, "--data_dir", data.path, "--work_dir", work, "--smoke")
    assert not again
    repeated = read_results(name, work / "results")
    assert {**repeated, "machine": None} == {**results, "machine": None}


def test_the_nearest_view_is_measured_beside_what_is_trained_and_trains_nothing(data, workplace):
    variants = {"nearest": {"label": "nearest view", "script": None}}
    study = small_study(workplace / "nearest", data, variants=variants, budget={"shares": [1]}, measures_cost=True)
    records = study.run()
    nearest = [record for record in records if record["variant"] == "nearest"]
    assert nearest and all(record["flops"] == 0 and min(record["by_walk"]["psnr"]) > 0 for record in nearest)
    assert not (workplace / "nearest" / "nearest-seed0" / "model").exists()


def test_a_checkpoint_is_measured_as_it_is_and_its_numbers_are_no_other_checkpoints(data, workplace, monkeypatch):
    variants = {"shipped": {"label": "shipped", "script": None, "checkpoint": "checkpoints/far-maze"}}
    study = small_study(workplace / "shipped", data, variants=variants, budget={"shares": [1]}, measures_cost=True)
    shipped = [record for record in study.run() if record["variant"] == "shipped"]
    assert shipped and all(record["flops"] == 0 and min(record["by_walk"]["psnr"]) > 0 for record in shipped)
    predictor = load_predictor(study.settings.variants["shipped"], workplace, data.vae, study.settings.evaluation)
    assert predictor.pipe.transformer.config.trained_frames == 136
    assert {record["pipeline"] for record in shipped} == {checkpoint_hash("checkpoints/far-maze")}

    monkeypatch.setattr(study_module, "checkpoint_hash", lambda checkpoint: "another")
    monkeypatch.setattr(Study, "_measure", None)  # would fail
    with pytest.raises(TypeError):
        replace(study, known=shipped).run()


def test_quality_that_is_known_is_not_measured_again(data, workplace, monkeypatch):
    settings = read_settings("cache", smoke=True)
    records = CacheStudy(settings, data, workplace / "measured").run()
    monkeypatch.setattr(CacheStudy, "_measure_quality", None)
    assert CacheStudy(settings, data, workplace / "known", records).run() == records

    monkeypatch.setattr(CacheStudy, "_measure_quality", lambda study, mode: {"label": mode.label})
    of_another_model = [{**record, "pipeline": "another"} for record in records]
    anew = CacheStudy(settings, data, workplace / "anew", of_another_model).run()
    assert [record["pipeline"] for record in anew] == [record["pipeline"] for record in records]
    assert all("label" in record for record in anew)


def test_an_interrupted_study_goes_on_and_ends_as_an_uninterrupted_one(data, workplace, monkeypatch):
    whole = small_study(workplace / "whole", data).run()
    trained, measured, measure, train = [], [], study_module.measure, TrainingRun.train

    def interrupted_measure(*arguments):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(arguments)
        return measure(*arguments)

    def counted_train(run, last_step):
        trained.append((run.path.name, last_step))
        train(run, last_step)

    monkeypatch.setattr(study_module, "measure", interrupted_measure)
    monkeypatch.setattr(TrainingRun, "train", counted_train)
    study = small_study(workplace / "interrupted", data)
    with pytest.raises(KeyboardInterrupt):
        study.run()
    assert trained == [(name, step) for name in ("with-seed0", "teacher_forcing-seed0") for step in (2, 4)]
    trained.clear()
    monkeypatch.setattr(study_module, "measure", measure)
    assert study.run() == whole
    assert trained == [("teacher_forcing-seed0", 4)]  # to be saved as it is; no step was left


def test_a_run_that_was_killed_in_training_ends_with_the_weights_of_an_uninterrupted_one(data, workplace, monkeypatch):
    settings = {"training": {"checkpointing_steps": 1}, "budget": {"steps": 4, "shares": [1]}}
    runs = []
    for name in ("killed", "alive"):
        run = small_study(workplace / name, data, **settings).training_run("with", 0)
        if name == "killed":
            save = training_run.save_checkpoint

            def save_and_die(accelerator, output_dir, step, *arguments):
                save(accelerator, output_dir, step, *arguments)
                if step == 2:
                    raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(training_run, "save_checkpoint", save_and_die)
                with pytest.raises(KeyboardInterrupt):
                    run.train(4)
            assert run.steps == 2 and run.seconds_per_step is None
        run.train(4)
        assert run.steps == 4
        runs.append(load_file(run.model_dir / "transformer" / "diffusion_pytorch_model.safetensors"))
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())


def test_a_study_goes_on_from_its_numbers_on_another_machine(data, workplace, monkeypatch):
    """Of which there is nothing but the file of numbers."""
    changes = {"budget": {"steps": 1, "shares": [1]}, "seeds": [0, 1]}
    expected = small_study(workplace / "at-once", data, **changes).run()
    folder, train, trained = workplace / "numbers", TrainingRun.train, []

    def train_three_runs(run, last_step):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(run.path.name)
        train(run, last_step)

    monkeypatch.setattr(TrainingRun, "train", train_three_runs)
    settings = small_study(workplace / "there", data, **changes).settings
    with pytest.raises(KeyboardInterrupt):
        run_study(settings, data, workplace / "there", folder)
    assert trained == ["with-seed0", "teacher_forcing-seed0", "with-seed1"]
    shown = finished_results("small", folder)
    assert shown["settings"]["seeds"] == [0] and {record["seed"] for record in shown["records"]} == {0}

    trained.clear()
    run_study(settings, data, workplace / "here", folder)
    assert trained == ["teacher_forcing-seed1"]
    results = read_results("small", folder)
    assert results["records"] == expected
    costs = {"with": {"seconds": 1.0}}  # measured there, and not here
    write_results({**results, "costs": costs}, folder)
    run_study(settings, data, workplace / "elsewhere", folder)
    assert read_results("small", folder)["costs"] == costs
    with pytest.raises(ValueError, match="`latent_size` was 8 and is 4"):
        run_study(replace(settings, latent_size=4), data, workplace / "other", folder)


def test_parts_of_a_study_leave_their_numbers_for_the_whole_to_collect(data, workplace, monkeypatch):
    changes = {"budget": {"steps": 1, "shares": [1]}, "seeds": [0, 1]}
    study = small_study(workplace / "parts", data, **changes)
    expected = small_study(workplace / "in-one", data, **changes).run()
    trained, train, folder = [], TrainingRun.train, workplace / "numbers-of-parts"

    def counted_train(run, last_step):
        trained.append(run.path.name)
        train(run, last_step)

    monkeypatch.setattr(TrainingRun, "train", counted_train)
    run_part(study.settings, data, study.path, folder, StudyPart(variants=["teacher_forcing"]))
    run_part(study.settings, data, study.path, folder, StudyPart(seeds=[0]))
    assert trained == ["teacher_forcing-seed0", "teacher_forcing-seed1", "with-seed0"]
    assert read_results("small", folder) is None
    run_study(study.settings, data, study.path, folder)
    assert trained[3:] == ["with-seed1"]
    assert read_results("small", folder)["records"] == expected


def test_a_folder_of_other_settings_is_refused_and_so_is_one_beyond_its_step(data, workplace):
    study = small_study(workplace / "refusing", data, budget={"steps": 2, "shares": [1]})
    study.run()
    with pytest.raises(ValueError, match="`latent_size` was 8 and is 4"):
        small_study(workplace / "refusing", data, budget={"steps": 2, "shares": [1]}, latent_size=4).run()
    with pytest.raises(ValueError, match="is at step 2, beyond 1"):
        study.training_run("with", 0).train(1)


def test_missing_data_are_named_with_the_command_that_makes_them(tmp_path):
    with pytest.raises(ValueError, match="lacks mazes, latents; make it with `python -m benchmarks.studies prepare"):
        small_study(tmp_path / "work", DataFolder(tmp_path / "data")).run()


def test_evaluate_takes_the_folder_of_a_video_dit(data, workplace):
    """What `train_far.py --objective video_dit` saves, measured by `evaluate.py` like any other model."""
    overrides = {
        "variants": {
            "with": None,
            "teacher_forcing": None,
            "video_dit": {"label": "Video DiT", "arguments": {"objective": "video_dit"}},
        },
        "budget": {"steps": 1, "shares": [1]},
    }
    study = small_study(workplace / "evaluated", data, **overrides)
    study.run()
    frames = ["--num_context_frames", "2", "--num_frames", "2", "--num_videos", "2", "--num_trajectories", "1"]
    what = ["--model", str(study.training_run("video_dit", 0).model_dir), "--dataset_name", str(data.mazes)]
    output = workplace / "scores"
    steps = ["--num_inference_steps", "2", "--output", str(output)]
    assert far(["evaluate", "--protocol", "mcvd", *what, *frames, *steps]) == 0
    scores = json.loads((output / "scores.json").read_text())
    assert 0 < scores["tasks"]["prediction"]["psnr"]["best"]["mean"] < 100
