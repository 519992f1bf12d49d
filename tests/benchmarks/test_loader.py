import json

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from tiny_models import tiny_dc, tiny_transformer
from video_files import write_video

from benchmarks import loader, loader_sets
from benchmarks.loader import LoaderBenchmark, models_to_train, parse_args
from benchmarks.loader_sets import DataSets
from benchmarks.report import sections


QUICK = ["--num_frames", "5", "--batch_size", "2", "--num_workers", "0", "--num_rounds", "2", "--seconds", "0.02"]
FORMS = ["images", "images, streamed", "videos", "videos, streamed"]


@pytest.fixture
def sets(tmp_path, monkeypatch) -> DataSets:
    """Two trajectories of 12 frames, as images and as videos."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    videos = np.random.default_rng(0).integers(0, 256, (2, 12, 16, 16, 3), dtype=np.uint8)
    actions, features = [[0, 1, 2] * 4] * 2, Features({"video": List(Image()), "actions": List(Value("int64"))})
    images = Dataset.from_dict({"video": [list(video) for video in videos], "actions": actions}, features=features)
    images.to_parquet(tmp_path / "images" / "train.parquet")
    loader_sets.write_video_folder(tmp_path / "videos", list(zip(videos, map(np.array, actions))))
    return DataSets(tmp_path / "images", tmp_path / "videos")


def test_every_form_is_timed_beside_the_trainings(sets):
    models = {name: tiny_transformer(num_actions=3) for name in ("small", "other")}
    rows = list(LoaderBenchmark(parse_args(QUICK), tiny_dc(), models).rows(sets))
    assert [row.settings["model"] for row in rows if row.case == "training"] == ["small", "other"]
    loaders = [row for row in rows if row.case == "loader"]
    assert [row.settings["form"] for row in loaders] == FORMS
    assert [row.settings["form"] for row in rows if row.case == "encoding"] == ["images", "videos"]
    for row in loaders:
        speed, ratio = row.measurements["frames a second"], row.measurements["of small"]
        assert len(speed.values) == 2 and min(speed.values) > 0
        assert ratio.values == speed.per(rows[0].measurements["frames a second"]).values


def test_a_loader_is_built_as_train_far_builds_it(sets):
    benchmark = LoaderBenchmark(
        parse_args([*QUICK, "--seed", "3"]), tiny_dc(), {"small": tiny_transformer(num_actions=3)}
    )
    for form in loader.forms_of(sets):
        batches = benchmark.batches(form, benchmark.models["small"].config)
        assert (batches.num_frames, batches.batch_size, batches.seed, batches.interval) == (5, 2, 3, 1)
        clips, draw = next(batches.load(0, 1))
        assert clips.frames.shape == (2, 5, 3, 16, 16) and draw.noise.shape == (2, 5, 4, 4, 4)


def test_the_smallest_of_the_papers_sizes_and_the_shipped_one_are_trained():
    models = models_to_train(parse_args(["--num_actions", "5"]), in_channels=8)
    assert list(models) == ["far-b", "far-maze"]
    for model in models.values():
        assert (model.config.in_channels, model.config.num_actions) == (8, 5)


def test_a_file_that_exists_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "loader.json").write_text("{}")
    with pytest.raises(SystemExit):
        parse_args(["--output", str(tmp_path / "loader.json")])
    assert "loader.json exists; name another file" in capsys.readouterr().err


@pytest.mark.full
def test_sets_of_every_form_are_made_of_mazes_and_the_results_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(
        loader,
        "models_to_train",
        lambda args, in_channels: {"small": tiny_transformer(in_channels=in_channels, num_actions=3)},
    )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", datasets.config.HF_DATASETS_CACHE)
    output = tmp_path / "loader.json"
    sizes = ["--num_trajectories", "2", "--num_trajectory_frames", "12", "--output", str(output)]
    loader.main(parse_args([*QUICK, *sizes]))
    results = json.loads(output.read_text())
    forms = [row["settings"]["form"] for row in results["rows"] if row["case"] == "loader"]
    assert forms == ["cached latents", *FORMS]
    sources = [row["settings"]["source"].split(",")[0] for row in results["rows"] if row["case"] == "preparation"]
    assert sorted(sources) == ["classfolder", "lerobot", "npz", "videofolder"]
    tables = sections(results)
    assert tables["loader"].startswith("| form | worker processes | frames a second | of small |")
    assert "seed 0, 2 rounds" in tables["machine"]


def test_what_is_prepared_is_counted(tmp_path):
    write_video(tmp_path / "a" / "0.avi", np.zeros((7, 48, 64, 3), np.uint8))
    assert loader_sets.prepare("classfolder", tmp_path, (16, 16)) == 7
