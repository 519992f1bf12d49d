"""The demo, with a model of random weights."""

import json

import pytest
from PIL import Image
from tiny_models import tiny_pipeline, tiny_transformer

from benchmarks.studies.scripts import load_script
from diffusers_far.evaluation.tiles import ACTION_NAMES


demo = load_script("demo")


@pytest.mark.full
@pytest.mark.parametrize("num_walks", [1, 2])
def test_the_demo_prints_its_scores_and_shows_every_walk(num_walks, tmp_path, monkeypatch, capsys):
    transformer = tiny_transformer(num_actions=5, action_shift=1)
    tiny_pipeline(transformer, height=64, width=64, action_names=list(ACTION_NAMES)).save_pretrained(
        tmp_path / "model"
    )
    output_dir = tmp_path / "out"
    what = f"--num_walks {num_walks} --num_frames 8 --num_inference_steps 1"
    arguments = [*what.split(), "--model", str(tmp_path / "model"), "--output_dir", str(output_dir)]
    monkeypatch.setattr("sys.argv", ["demo.py", *arguments])
    demo.main(demo.parse_args())

    known = json.loads((output_dir / "scores.json").read_text())["known"]["wandering"]
    printed = capsys.readouterr().out
    in_view = [known["accuracy"]["in view"][name]["by_frame"][0]["mean"] for name in ("predicted", "repeated")]
    (row,) = [line for line in printed.splitlines() if line.startswith("in view")]
    assert "{:.1f} ({:.1f})".format(*(100 * each for each in in_view)) in row
    assert f"{known['share_scored'][7]:.0%}" in printed
    assert len(list(output_dir.glob("walk_*.mp4"))) == num_walks
    with Image.open(output_dir / "contact_sheet.png") as sheet:
        assert sheet.width > num_walks * 4 * 64 * 2 and sheet.height > 2 * 64 * 2
