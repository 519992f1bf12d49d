"""`far prepare`: from folders as people have them to a dataset that the training scripts open."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Image, List, Value, load_dataset
from video_files import frame_numbers, gray_frames, truncate, write_video

from diffusers_far.commands.arguments import parse_prepare as parse_args
from diffusers_far.commands.prepare import main
from diffusers_far.data.loading import load_split
from diffusers_far.data.video_clips import FrameDataset


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def prepare(source, folder, *arguments) -> Path:
    """Run the script in this process; returns the folder that it wrote."""
    output = folder.with_name(folder.name + "-prepared")
    main(parse_args(["--source", source, "--input", str(folder), "--output", str(output), *map(str, arguments)]))
    return output


def images_of(row) -> np.ndarray:
    return np.stack([np.asarray(image) for image in row["video"]])


@pytest.fixture
def npz_folder(tmp_path) -> Path:
    """Ten trajectories of 64x64 frames, the first action of each its number."""
    folder = tmp_path / "dmlab"
    random = np.random.default_rng(0)
    for number in range(10):
        path = folder / str(number % 2) / f"{number}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        video = random.integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
        np.savez_compressed(path, video=video, actions=np.array([number, 0, 1, 2, 1], dtype=np.int32))
    return folder


def test_npz_trajectories_come_back_to_the_bit(npz_folder):
    rows = load_dataset(str(prepare("npz", npz_folder)), split="train")
    assert rows.features == {"video": List(Image()), "actions": List(Value("int64")), "source": Value("string")}
    for row, path in zip(rows, sorted(npz_folder.rglob("*.npz")), strict=True):
        with np.load(path) as archive:
            assert np.array_equal(images_of(row), archive["video"])
            assert row["actions"] == archive["actions"].tolist()


def test_the_training_scripts_open_what_is_written(npz_folder):
    frames = FrameDataset(load_split(str(prepare("npz", npz_folder)), "train"))
    with np.load(npz_folder / "0" / "2.npz") as archive:
        assert np.array_equal(frames[6].permute(1, 2, 0), archive["video"][1])


def test_class_folders_give_labels_and_frames_of_the_wanted_size(tmp_path):
    for name in ("Surfing/v_b.avi", "Archery/v_c.mp4"):
        write_video(tmp_path / "ucf" / name, gray_frames(11, 48, 64), "mpeg4")
    output = prepare("classfolder", tmp_path / "ucf", "--size", 16, "--frame_interval", 3)
    rows = load_dataset(str(output), split="train")
    labels = ClassLabel(names=["Archery", "Surfing"])
    assert rows.features == {"video": List(Image()), "label": labels, "source": Value("string")}
    assert rows["label"] == [0, 1]
    assert images_of(rows[1]).shape == (4, 16, 16, 3)
    assert frame_numbers(images_of(rows[1])) == [0, 3, 6, 9]


def test_a_video_folder_gives_joint_actions_and_labels(tmp_path):
    write_video(tmp_path / "drives" / "a.mp4", gray_frames(5))
    line = {"file_name": "a.mp4", "actions": [0, 2, 1, 1], "label": "town"}  # one fewer than frames
    (tmp_path / "drives" / "metadata.jsonl").write_text(json.dumps(line))
    joint = ("--frame_interval", 2, "--combine_actions", "joint", "--num_actions", 3)
    rows = load_dataset(str(prepare("videofolder", tmp_path / "drives", *joint)), split="train")
    assert rows[0]["actions"] == [0 * 3 + 2, 1 * 3 + 1, 1 * 3 + 1]
    assert frame_numbers(images_of(rows[0])) == [0, 2, 4]
    assert rows.features["label"].int2str(rows[0]["label"]) == "town"


def test_continuous_actions_are_combined_by_the_rule_that_is_asked_for(tmp_path):
    write_video(tmp_path / "arm" / "a.mp4", gray_frames(4))
    line = {"file_name": "a.mp4", "actions": [[0.5, 1], [1, 1], [2, 2], [4, 0]]}
    (tmp_path / "arm" / "metadata.jsonl").write_text(json.dumps(line))
    output = prepare("videofolder", tmp_path / "arm", "--frame_interval", 2, "--combine_actions", "sum")
    rows = load_dataset(str(output), split="train")
    assert rows.features["actions"] == List(List(Value("float32")))
    assert rows[0]["actions"] == [[1.5, 2], [6, 2]]
    assert "their sum" in (output / "README.md").read_text()


def test_actions_that_an_interval_would_lose_stop_the_run_even_if_bad_examples_are_skipped(npz_folder):
    with pytest.raises(ValueError, match="`combine_actions`, one of .'joint', 'first', 'last'"):
        prepare("npz", npz_folder, "--frame_interval", 2, "--skip_bad_examples")


def test_shares_make_splits_that_depend_on_names_alone(npz_folder):
    shares = ("--validation_share", 0.3, "--test_share", 0.3)
    output = prepare("npz", npz_folder, *shares, "--trajectories_per_shard", 2)
    splits = {name: {row["actions"][0] for row in rows} for name, rows in load_dataset(str(output)).items()}
    assert sorted(number for numbers in splits.values() for number in numbers) == list(range(10))

    (npz_folder / "0" / "2.npz").unlink()
    output.rename(output.with_name("before"))
    after = load_dataset(str(prepare("npz", npz_folder, *shares)))
    assert {name: {row["actions"][0] for row in rows} for name, rows in after.items()} == {
        name: numbers - {2} for name, numbers in splits.items()
    }


def test_a_dataset_that_is_made_anew_is_not_taken_from_the_cache_of_datasets(npz_folder, tmp_path):
    load_dataset(str(prepare("npz", npz_folder)))
    other = tmp_path / "elsewhere" / npz_folder.name
    other.mkdir(parents=True)
    video = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez(other / "a.npz", video=video, actions=np.array([1, 2]))
    assert load_dataset(str(prepare("npz", other)), split="train")["actions"] == [[1, 2]]


def test_the_card_says_what_the_user_said_and_what_was_done(npz_folder):
    arguments = ("--license", "cc-by-4.0", "--description", "Walks of a friend.", "--split", "validation")
    card = (prepare("npz", npz_folder, *arguments) / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    assert "Walks of a friend." in card
    assert "| validation | 10 | 50 |" in card
    assert "--source npz --input DIR --output DIR --frame_interval 1 --split validation" in card
    assert str(npz_folder) not in card


def test_folders_named_after_splits_become_them_and_shares_take_from_train_alone(npz_folder):
    for name, folder in (("train", "0"), ("val", "1")):
        (npz_folder / folder).rename(npz_folder / name)
    splits = load_dataset(str(prepare("npz", npz_folder)))
    assert {name: sorted(row[0] for row in rows["actions"]) for name, rows in splits.items()} == {
        "train": [0, 2, 4, 6, 8],
        "validation": [1, 3, 5, 7, 9],
    }
    assert splits["validation"]["source"][0] == "val/1.npz"
    npz_folder.with_name("dmlab-prepared").rename(npz_folder.with_name("before"))
    splits = load_dataset(str(prepare("npz", npz_folder, "--test_share", 0.6)))
    assert len(splits["validation"]) == 5 and 0 < len(splits["test"]) < 5
    npz_folder.with_name("dmlab-prepared").rename(npz_folder.with_name("also-before"))
    assert len(load_dataset(str(prepare("npz", npz_folder, "--split", "test")), split="test")) == 10


def test_columns_are_kept_on_request_and_what_is_left_out_is_said(npz_folder, caplog):
    for path in npz_folder.rglob("*.npz"):
        with np.load(path) as archive:
            arrays = dict(archive)
        np.savez(path, position=np.arange(10, dtype=np.float32).reshape(5, 2), seed=7, **arrays)
    with caplog.at_level(logging.INFO):
        output = prepare(
            "npz", npz_folder, "--keep_columns", "position", "--frame_interval", 2, "--combine_actions", "first"
        )
    assert "Left out of each trajectory: seed" in caplog.text
    rows = load_dataset(str(output), split="train")
    assert rows.features["position"] == List(List(Value("float32"))) and "seed" not in rows.features
    assert rows[3]["position"] == [[0, 1], [4, 5], [8, 9]] and rows[3]["source"] == "0/6.npz"
    card = (output / "README.md").read_text()
    assert "- `position`: float32, 2 dimensions" in card and "--keep_columns position" in card
    assert "10 of 10 trajectories" in caplog.text


def damage(npz_folder) -> dict[str, str]:
    """Five of the ten trajectories; returns what an error must say of each."""
    video = np.zeros((5, 64, 64, 3), np.uint8)
    truncate(npz_folder / "0" / "0.npz", 0.5)
    np.savez(npz_folder / "0" / "4.npz", video=video, actions=np.zeros(2, int))
    np.savez(npz_folder / "1" / "1.npz", video=video)
    np.savez(npz_folder / "1" / "3.npz", video=video[:, :32], actions=np.zeros(5, int))
    np.savez(npz_folder / "1" / "7.npz", video=video, actions=np.array([[0, 1], [np.nan, 0], [0, 0], [0, 0], [0, 0]]))
    return {
        "0/0.npz": "no readable",
        "0/4.npz": "has 2 for 5 frames",
        "1/1.npz": "lacks `actions`",
        "1/3.npz": "(32, 64)",
        "1/7.npz": "`actions[1]` is [nan, 0.0]",
    }


def test_bad_examples_are_left_out_counted_and_listed_if_that_is_asked_for(npz_folder, caplog):
    faults = damage(npz_folder)
    with caplog.at_level(logging.INFO):
        output = prepare("npz", npz_folder, "--skip_bad_examples")
    rows = load_dataset(str(output), split="train")
    assert [row["actions"][0] for row in rows] == [2, 6, 8, 5, 9]
    assert "Saved 5 of 10 trajectories" in caplog.text and "Left out 5 damaged trajectories" in caplog.text
    for line, (name, fault) in zip(caplog.text.splitlines()[-5:], faults.items(), strict=True):
        assert name in line and fault in line
    assert "5 damaged trajectories of the source were left out" in (output / "README.md").read_text()


@pytest.mark.parametrize("name", ["0/0.npz", "1/7.npz"])
def test_a_bad_example_stops_the_run_and_nothing_is_left(npz_folder, name):
    truncate(npz_folder / name, 0.5)
    with pytest.raises(ValueError, match=f"{name}.*`--skip_bad_examples`"):
        prepare("npz", npz_folder)
    assert [path.name for path in npz_folder.parent.iterdir() if path.name.endswith("prepared")] == []


def test_a_folder_of_nothing_but_bad_examples_is_refused(npz_folder):
    for path in npz_folder.rglob("*.npz"):
        truncate(path, 0.5)
    with pytest.raises(ValueError, match="None of the 10 trajectories"):
        prepare("npz", npz_folder, "--skip_bad_examples")


def test_a_shard_without_a_good_trajectory_leaves_no_file(npz_folder):
    truncate(npz_folder / "0" / "2.npz", 0.5)
    output = prepare("npz", npz_folder, "--skip_bad_examples", "--trajectories_per_shard", 1)
    assert len(list(output.glob("data/*"))) == len(load_dataset(str(output), split="train")) == 9


def test_nothing_is_overwritten(npz_folder):
    output = prepare("npz", npz_folder)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with pytest.raises(ValueError, match="nothing is overwritten"):
        prepare("npz", npz_folder)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_the_unfinished_work_of_another_run_is_not_touched(npz_folder):
    other = npz_folder.with_name("unfinished-dmlab-prepared")
    other.mkdir()
    with pytest.raises(ValueError, match="unfinished-dmlab-prepared.*delete it"):
        prepare("npz", npz_folder)
    assert other.is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--validation_share 0.6 --test_share 0.6", r"\(0.6, 0.6\)"),
        ("--source classfolder --keep_columns pose", "`--keep_columns` is for lerobot and npz and videofolder only"),
        ("--keep_columns pose label", "none of .'video', 'actions', 'label', 'source'"),
        ("--keep_columns pose pose", "name each column once"),
        (
            "--source classfolder --action_key act",
            "`--action_key` is for lerobot and npz only, but `--source` is 'classfolder'",
        ),
        (
            "--source classfolder --video_key top",
            "`--video_key` is for lerobot and npz only, but `--source` is 'classfolder'",
        ),
        ("--num_actions 3", "`--num_actions` is 3"),
        ("--license My_Own", "`--license` is 'My_Own'"),
        ("--num_processes 0", "`--num_processes` is 0"),
        ("--trajectories_per_shard 0", "`--trajectories_per_shard` is 0"),
        ("--frame_interval 0", "`frame_interval` is 0"),
    ],
)
def test_a_wrong_argument_is_refused_with_its_value(npz_folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare("npz", npz_folder, *arguments.split())


def test_a_missing_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        prepare("npz", tmp_path / "nowhere")


def launch(npz_folder: Path, output: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, EXAMPLES / "prepare_dataset.py", "--source", "npz", "--input", npz_folder]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*map(str, command), "--output", str(output), *arguments], env=environment)


@pytest.mark.full
def test_two_processes_write_what_one_writes(npz_folder, tmp_path):
    arguments = ("--trajectories_per_shard", "3", "--test_share", "0.3")
    assert launch(npz_folder, tmp_path / "two", *arguments, "--num_processes", "2").wait(timeout=600) == 0
    one = prepare("npz", npz_folder, *arguments)
    files = sorted(path.relative_to(one) for path in one.glob("data/*"))
    assert files == sorted(path.relative_to(tmp_path / "two") for path in (tmp_path / "two").glob("data/*"))
    assert all((one / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)


@pytest.mark.full
def test_a_run_that_is_killed_leaves_no_dataset(npz_folder, tmp_path):
    for number in range(200):
        os.link(npz_folder / "0" / "0.npz", npz_folder / "0" / f"copy-{number}.npz")
    run, unfinished = launch(npz_folder, tmp_path / "killed"), tmp_path / "unfinished-killed"
    while not list(unfinished.glob("data/*")) and run.poll() is None:
        time.sleep(0.01)
    run.kill()
    run.wait()
    assert unfinished.is_dir() and not (tmp_path / "killed").exists()
