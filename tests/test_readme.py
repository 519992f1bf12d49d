"""What the README shows is what the repository measures."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.studies.predictors import checkpoint_hash


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FRAMES = (1, 8, 32)
ROWS = [  # what stands in the first column, figure, source, factor
    ("tiles right, %", "in view", "predicted", 100),
    ("repeating the last frame", "in view", "repeated", 100),
    ("PSNR, dB", "psnr", "predicted", 1),
    ("repeating the last frame", "psnr", "repeated", 1),
    ("its VAE's own reconstruction", "psnr", "reconstructed", 1),
]


@pytest.mark.parametrize("title, figure, source, factor", ROWS)
def test_the_table_of_quality_is_that_of_the_shipped_scores(title, figure, source, factor):
    scores = json.loads((ROOT / "checkpoints" / "far-crafter" / "scores.json").read_text())
    known = scores["known"]["wandering"]
    estimates = (known["accuracy"] | known)[figure][source]["by_frame"]
    measured = [estimates[frame - 1] for frame in FRAMES]
    cells = [f"{factor * each['mean']:.1f} ± {factor * each['half_width']:.1f}" for each in measured]
    assert f"| {title} | {' | '.join(cells)} |" in README
    assert f"on {known['num_walks']} walks" in README
    assert "({num_inference_steps} steps a frame, seed {seed};".format(**scores["protocol"]) in README


@pytest.mark.parametrize("model, frames", [("far-b", 64), ("far-b", 128), ("far-b-long", 256), ("far-b-long", 1000)])
def test_the_table_of_speed_is_that_of_the_benchmarks(model, frames):
    results = json.loads((ROOT / "docs" / "results" / "step.json").read_text())
    (row,) = [
        row
        for row in results["rows"]
        if row["case"] == "step" and row["settings"] == {"model": model, "frames": frames}
    ]
    measured = {name: quantity["median"] for name, quantity in row["measurements"].items()}
    kind = "long and short" if model.endswith("long") else "in full"
    cells = f"{measured['FAR']:.2f} s | {measured['of the limit']:.0%} | {measured['naive / FAR']:.1f}x"
    assert f"| {frames:,}, {kind} | {cells} | {measured['AnyFlow / FAR']:.1f}x |" in README


@pytest.mark.parametrize("study", ["compression", "cache"])
def test_the_numbers_of_the_shipped_model_are_its_own(study):
    records = json.loads((ROOT / "docs" / "results" / f"{study}.json").read_text())["records"]
    shipped = checkpoint_hash("checkpoints/far-maze")
    assert {record["pipeline"] for record in records if "pipeline" in record} == {shipped}


def test_pictures_are_small_and_the_moving_one_moves():
    pictures = [ROOT / path for path in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)]
    assert len(pictures) == 2 and all(path.stat().st_size < 2 * 2**20 for path in pictures)
    with Image.open(pictures[0]) as picture:
        assert picture.n_frames > 64
