"""Data in the forms that people have: prepared and trained on at the first try."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from tiny_models import tiny_dc
from video_files import write_video

from diffusers_far.commands.arguments import parse_prepare as parse_args
from diffusers_far.commands.prepare import main
from diffusers_far.data.loading import load_split
from diffusers_far.data.video import count_frames, read_video


pytestmark = pytest.mark.full

EXAMPLES = Path(__file__).parents[2] / "examples"

TRANSFORMER = {
    "in_channels": 4,
    "num_layers": 1,
    "num_attention_heads": 1,
    "attention_head_dim": 16,
    "axes_dims_rope": [4, 6, 6],
    "patch_size": 4,
    "short_window": 4,
    "action_shift": 1,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def prepare(source: str, folder: Path, *arguments) -> Path:
    output = folder.with_name(folder.name + "-prepared")
    main(parse_args(["--source", source, "--input", str(folder), "--output", str(output), *map(str, arguments)]))
    return output


def train(dataset: Path, workplace: Path, *more: str, **config) -> None:
    """Two steps of a tiny model on a dataset as it is."""
    tiny_dc().save_pretrained(workplace / "vae")
    (workplace / "transformer.json").write_text(json.dumps(TRANSFORMER | config))
    arguments = {
        "dataset_name": dataset,
        "vae": workplace / "vae",
        "transformer_config": workplace / "transformer.json",
        "output_dir": workplace / "far",
        "num_frames": 8,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "report_to": "none",
    }
    flags = [str(text) for name, value in arguments.items() for text in (f"--{name}", value)]
    environment = os.environ | {"HF_HOME": str(workplace / "huggingface"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / "train_far.py"), *flags, *more]
    result = subprocess.run(command, env=environment | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (workplace / "far" / "model_index.json").is_file()


def test_dmlab(tmp_path):
    """TECO's: 300 frames of 64x64 with actions 0 to 2, here of every type and length that files come with."""
    random = np.random.default_rng(0)
    video = random.integers(0, 256, (300, 64, 64, 3), dtype=np.uint8)
    actions = random.integers(0, 3, 300)
    forms = {
        "int64": actions,
        "int32": actions.astype(np.int32),
        "uint8-but-one": actions[:-1].astype(np.uint8),
        "float32": actions.astype(np.float32),
        "float64-but-one": actions[:-1].astype(np.float64),
    }
    for name, stored in forms.items():
        path = tmp_path / "dmlab" / "train" / "0" / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, video=video, actions=stored)
    prepared = prepare("npz", tmp_path / "dmlab" / "train")
    rows = load_split(str(prepared), "train")
    assert len(rows) == len(forms)
    for row in rows.select_columns(["actions"]):
        assert row["actions"][:-1] == actions[:-1].tolist() and len(row["actions"]) == 300
    assert np.array_equal(np.asarray(rows[0]["video"][299]), video[299])
    train(prepared, tmp_path, num_actions=3)


@pytest.fixture
def ucf(tmp_path) -> Path:
    """UCF-101's: 320x240 in avi, here H.264, MPEG-4 as XviD writes it, with sound, and with frames at uneven times."""
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (30, 15, 20, 3), dtype=np.uint8)
    frames = small.repeat(16, axis=1).repeat(16, axis=2)
    write_video(tmp_path / "ucf" / "Archery" / "v_Archery_g01_c01.avi", frames, "libx264")
    write_video(tmp_path / "ucf" / "Archery" / "v_Archery_g01_c02.avi", frames, "mpeg4", codec_tag="XVID")
    xvid = {"codec_tag": "XVID", "codec_options": {"bf": "2"}}
    write_video(tmp_path / "ucf" / "Surfing" / "v_Surfing_g01_c01.avi", frames, "mpeg4", audio=True, **xvid)
    uneven = np.cumsum(random.integers(1, 4, len(frames))).tolist()
    write_video(tmp_path / "ucf" / "Surfing" / "v_Surfing_g01_c02.avi", frames, "mpeg4", times=uneven)
    return tmp_path / "ucf"


def test_ucf_101_prepared(ucf, tmp_path):
    prepared = prepare("classfolder", ucf, "--size", 64, "--frame_interval", 3)
    rows = load_split(str(prepared), "train")
    assert [len(video) for video in rows["video"]] == [10] * 4 and rows["label"] == [0, 0, 1, 1]
    train(prepared, tmp_path, num_classes=2)


@pytest.mark.parametrize("streaming", [(), ("--streaming",)])
def test_ucf_101_as_it_is(ucf, tmp_path, streaming):
    train(ucf, tmp_path, "--frame_interval", "3", *streaming, num_classes=2)


def test_every_frame_of_such_files_is_there(ucf):
    for path in ucf.rglob("v_*"):
        assert len(read_video(path)) == 30, path
        assert count_frames(path) == 30, path


def test_odd_sizes_are_cut_to_what_is_asked_for_and_refused_by_the_vae_otherwise(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (9, 33, 47, 3), dtype=np.uint8)
    write_video(tmp_path / "odd" / "A" / "a.avi", frames, "ffv1", "bgr0")
    rows = load_split(str(prepare("classfolder", tmp_path / "odd")), "train")
    assert np.array_equal(np.stack([np.asarray(image) for image in rows[0]["video"]]), frames)
    with pytest.raises(
        AssertionError, match="Frames of 33x47 cannot be encoded: the VAE needs multiples of 4.*`--size`"
    ):
        train(tmp_path / "odd-prepared", tmp_path)
