"""What is kept of a training's log, and the picture of it."""

import json
import sys
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter


sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import plot_training  # noqa: E402
from plot_training import main, parse_args, thin_out, training_log  # noqa: E402


def write_run(folder: Path, losses: dict[int, float], psnr: dict[int, float]) -> None:
    """One launch of a run."""
    with SummaryWriter(str(folder)) as writer:
        for step, loss in losses.items():
            writer.add_scalar("train/loss", loss, step)
            writer.add_scalar("train/learning_rate", 1e-4, step)
        for step, value in psnr.items():
            writer.add_scalar("validation/psnr_of_frame_1", value, step)


def test_a_long_curve_becomes_means_under_the_last_step_of_each_stretch():
    assert thin_out({step: float(step) for step in range(1, 7)}, num_points=3) == {2: 1.5, 4: 3.5, 6: 5.5}
    assert thin_out({1: 0.5, 2: 0.25}, num_points=200) == {1: 0.5, 2: 0.25}


def test_a_resumed_run_counts_with_what_it_logged_last(tmp_path):
    write_run(tmp_path / "first", {1: 1.0, 2: 0.5, 3: 9.0}, {2: 20.0})
    write_run(tmp_path / "second", {3: 0.25}, {3: 21.0})
    assert training_log(tmp_path) == {
        "train/loss": {1: 1.0, 2: 0.5, 3: 0.25},
        "validation/psnr_of_frame_1": {2: 20.0, 3: 21.0},
    }


def test_a_folder_without_logs_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="holds no tensorboard files"):
        training_log(tmp_path)


def test_the_log_is_kept_and_drawn_and_a_kept_log_is_drawn_again(tmp_path):
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "run", {1: 1.0, 2: 0.5}, {2: 20.0})
    log, picture = tmp_path / "log.json", tmp_path / "pictures" / "training.png"
    main(parse_args_of("--output_dir", tmp_path / "run", "--json", log, "--plot", picture))
    assert json.loads(log.read_text())["train/loss"] == {"1": 1.0, "2": 0.5}
    drawn = picture.read_bytes()
    main(parse_args_of("--from_json", log, "--plot", picture))
    assert picture.read_bytes() == drawn


def test_a_kept_log_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "log.json").write_text("{}")
    with pytest.raises(SystemExit):
        parse_args_of("--output_dir", tmp_path, "--json", tmp_path / "log.json")
    assert "log.json exists" in capsys.readouterr().err


def parse_args_of(*arguments) -> plot_training.argparse.Namespace:
    return parse_args([str(argument) for argument in arguments])
