"""`record_gym.py`: from an environment to a dataset that the training scripts open."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Image, List, Value, load_dataset


EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), str(Path(__file__).parent)]

import record_gym  # noqa: E402

from diffusers_far.data.loading import load_split  # noqa: E402
from diffusers_far.data.video_clips import VideoClips  # noqa: E402


GAME = "tiny_games:TinyGame-v0"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def record(folder: Path, *arguments, **game) -> Path:
    numbers = ("--num_train", 3, "--num_validation", 1, "--num_test", 0)
    arguments = ("--environment", GAME, "--output_dir", folder, *numbers, *arguments)
    arguments += ("--environment_arguments", json.dumps(game))
    record_gym.main(record_gym.parse_args([str(argument) for argument in arguments]))
    return folder


def levels(row) -> list[int]:
    return [int(np.asarray(image)[0, 0, 0]) for image in row["video"]]


def test_frames_actions_and_chosen_facts_are_rows_like_those_of_prepare_dataset(tmp_path, caplog):
    caplog.set_level("INFO")
    splits = load_dataset(str(record(tmp_path / "game", "--keep_columns", "level", "place")))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 3, "validation": 1}
    rows = splits["train"]
    assert rows.features == {
        "video": List(Image()),
        "actions": List(Value("int64")),
        "source": Value("string"),
        "level": List(Value("int64")),
        "place": List(List(Value("float64"))),
        "seed": Value("int64"),
    }
    for row in rows:
        first = row["level"][0]
        assert levels(row) == row["level"] == list(range(first, first + 7))  # after reset and after each of 6 steps
        assert row["place"][3] == [first + 3, 0.5]
        assert len(row["actions"]) == 7 and set(row["actions"]) <= {0, 1, 2}  # from 0, though the game counts from 5
    assert rows["seed"] == [0, 1, 2] and splits["validation"]["seed"] == [1_000_000]
    assert len({row["level"][0] for row in rows}) > 1 and rows[0]["source"] == f"{GAME} seed 0"
    assert "episode 4 of 4" in caplog.text and "train: 3 episodes of 7 to 7 frames" in caplog.text


def test_what_is_recorded_can_be_trained_on_and_depends_on_the_seed_alone(tmp_path):
    clips = VideoClips(load_split(str(record(tmp_path / "game", "--size", 8, "--num_frames", 5)), "train"))
    clips.check_rows(num_actions=3)
    clip = clips.clip(1, 1, 4)
    assert clip.frames.shape == (4, 3, 8, 8) and clip.actions.shape == (4,)
    later = load_split(str(record(tmp_path / "later", "--size", 8, "--num_frames", 5, "--seed", 1)), "train")
    assert np.array_equal(VideoClips(later).clip(0, 1, 4).frames, clip.frames)
    assert VideoClips(later).clip(0, 1, 4).actions.tolist() == clip.actions.tolist()


def test_continuous_actions_are_lists_of_numbers_and_are_repeated(tmp_path):
    folder = record(tmp_path / "game", "--repeat_action", 3, actions="box", length=8)
    rows = load_dataset(str(folder), split="train")
    assert rows.features["actions"] == List(List(Value("float32")))
    for actions in rows["actions"]:
        assert actions[0] == actions[1] == actions[2] != actions[3] == actions[4] == actions[5] != actions[6]
        assert all(len(action) == 2 and all(-1 <= value <= 1 for value in action) for action in actions)


@pytest.mark.parametrize(
    ("arguments", "game", "message"),
    [
        ((), {"actions": "several"}, "takes actions of MultiDiscrete.*only Discrete and Box"),
        ((), {"render_mode": "ansi"}, "`render_mode` 'ansi', of .'rgb_array', 'ansi'.; it must render"),
        ((), {"floats": True}, "renders .12, 16, 3., float64"),
        (("--keep_columns", "speed"), {}, r"'speed', but the `info` of .* has \['level', 'place'\]"),
        (("--keep_columns", "level"), {"forgets": True}, "'level'.*at frame 1 of the episode of seed 0"),
        (("--keep_columns", "actions"), {}, "which the dataset has of its own"),
        (("--num_frames", 1), {}, "`--num_frames` is 1; it must be at least 2"),
        (("--repeat_action", 0), {}, "`--repeat_action` is 0"),
        (("--num_train", 0, "--num_validation", 0), {}, "all 0"),
        (("--num_train", -1), {}, "`--num_train` is -1"),
        (("--license", "My Own"), {}, "`--license` is 'My Own'"),
    ],
)
def test_what_cannot_be_recorded_is_refused_and_nothing_is_left(tmp_path, arguments, game, message):
    with pytest.raises(ValueError, match=message):
        record(tmp_path / "game", *arguments, **game)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "game").mkdir()
    (tmp_path / "game" / "mine").touch()
    with pytest.raises(ValueError, match="nothing is overwritten"):
        record(tmp_path / "game")


@pytest.mark.full
def test_two_processes_record_what_one_records(tmp_path):
    command = [
        sys.executable,
        EXAMPLES / "record_gym.py",
        "--environment",
        GAME,
        "--num_train",
        "40",
        "--num_test",
        "3",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), environment.get("PYTHONPATH", "")])
    for number in ("1", "2"):
        subprocess.run(
            [*map(str, command), "--output_dir", tmp_path / number, "--num_processes", number],
            env=environment,
            check=True,
        )
    files = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1" / "data").iterdir())
    assert len(files) == 5
    assert all((tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes() for file in files)
