"""`train_token_ar.py`, run as a user runs it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Features, List, Value
from diffusers import VQModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import tiny_vq
from transformers import AutoModel

from diffusers_far import TokenARForVideo
from diffusers_far.data.latents import LatentSource, write_shard
from diffusers_far.models.identity import vae_hash


pytestmark = pytest.mark.full

SCRIPT = Path(__file__).parents[2] / "examples" / "train_token_ar.py"
ACCELERATE = ("-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu")
MODEL = {
    "decoder": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "attention_dropout": 0.1,
    }
}


def write_codes(folder: Path, vq: VQModel, split: str, num_trajectories: int, seed: int, dtype=np.uint8) -> None:
    """A split of cached codes; with a floating `dtype` a split of latents of the same shape."""
    random = np.random.default_rng(seed)
    source = LatentSource(vae_hash(vq), vq.config.scaling_factor, f"dataset {seed}", num_trajectories, 4)
    (folder / split).mkdir(parents=True)
    for shard in range(source.num_shards):
        lengths = [6 + row for row in source.shard_rows(shard)]
        actions = pa.table({"actions": [random.integers(0, 3, length - 1).tolist() + [2] for length in lengths]})
        codes = [random.integers(0, 16, (length, 1, 2, 3)).astype(dtype) for length in lengths]
        features = Features({"actions": List(Value("int64"))})
        write_shard(source.shard_path(folder / split, shard), codes, actions, features, source)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """Cached codes, the VQ autoencoder that they are of, and a tiny model's config."""
    folder = tmp_path_factory.mktemp("workplace")
    vq = tiny_vq()
    vq.save_pretrained(folder / "vq")
    write_codes(folder / "codes", vq, "train", 6, seed=0)
    write_codes(folder / "codes", vq, "validation", 3, seed=1)
    write_codes(folder / "latents", vq, "train", 4, seed=2, dtype=np.float16)
    (folder / "model.json").write_text(json.dumps(MODEL))
    return folder


def train(workplace: Path, output: str, *more: str) -> subprocess.CompletedProcess:
    arguments = {
        "codes_dir": workplace / "codes",
        "vq": workplace / "vq",
        "model_config": workplace / "model.json",
        "output_dir": workplace / output,
        "num_frames": 4,
        "train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_warmup_steps": 2,
        "ema_decay": 0.9,
        "max_train_steps": 6,
        "checkpointing_steps": 3,
        "validation_steps": 6,
        "num_validation_clips": 3,
        "num_validation_videos": 2,
        "num_validation_frames": 2,
    }
    flags = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    environment = os.environ | {
        "HF_HOME": str(workplace / "huggingface"),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [sys.executable, *ACCELERATE, str(SCRIPT), *flags, "--use_ema", *more]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def scalar_curve(output_dir: Path, name: str) -> dict[int, float]:
    """A logged value by step, over all launches of a run."""
    curve = {}
    for path in sorted(output_dir.rglob("events*")):
        events = EventAccumulator(str(path)).Reload()
        if name in events.Tags()["scalars"]:
            curve |= {event.step: event.value for event in events.Scalars(name)}
    return curve


@pytest.fixture(scope="module")
def trained(workplace) -> Path:
    """A finished run, never interrupted."""
    result = train(workplace, "straight")
    assert result.returncode == 0, result.stderr
    return workplace / "straight"


def test_a_dry_run_prints_the_cost_and_leaves_nothing(workplace):
    flags = ("--checkpointing_steps", "1", "--validation_steps", "1", "--mixed_precision", "auto")
    result = train(workplace, "dry", "--dry_run", *flags)
    assert result.returncode == 0, result.stderr
    assert "--mixed_precision auto is " in result.stderr
    assert "24 tokens per clip of 4 frames\n" in result.stdout and "s per step of 4 clips\n" in result.stdout
    assert "hours for --max_train_steps 6" in result.stdout and not (workplace / "dry").exists()


def test_a_run_leaves_a_model_with_averaged_weights_that_generates_and_its_vq(workplace, trained):
    model = AutoModel.from_pretrained(trained)
    assert type(model) is TokenARForVideo
    config = model.config
    assert (config.num_codes, config.tokens_per_frame, config.num_actions, config.trained_frames) == (16, 6, 3, 4)
    assert model.generate_frames(
        torch.zeros(1, 2, 6, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)
    ).shape == (1, 1, 6)
    ema = load_file(trained / "checkpoint-6" / "ema.safetensors")
    for index, parameter in enumerate(model.parameters()):
        assert torch.equal(parameter, ema[f"state.shadow_params.{index}"])
    assert len(ema) == index + 1
    assert vae_hash(VQModel.from_pretrained(trained, subfolder="vq")) == vae_hash(tiny_vq())


def test_a_run_logs_every_step_and_validates(trained):
    losses = scalar_curve(trained, "train/loss")
    assert list(losses) == [1, 2, 3, 4, 5, 6] and losses[6] < losses[1]
    for name in ("loss", "psnr", "psnr_of_frame_1", "psnr_of_frame_2"):
        assert list(scalar_curve(trained, f"validation/{name}")) == [6]


def test_a_resumed_run_ends_bit_equal_to_an_uninterrupted_one(workplace, trained):
    resumed = workplace / "resumed"
    shutil.copytree(trained / "checkpoint-3", resumed / "checkpoint-3")
    result = train(workplace, "resumed", "--resume_from_checkpoint", "latest")
    assert result.returncode == 0, result.stderr
    for name in ("model.safetensors", "checkpoint-6/model.safetensors"):
        torch.testing.assert_close(load_file(resumed / name), load_file(trained / name), rtol=0, atol=0)
    for name in ("ema.safetensors", "lr_scheduler.safetensors"):
        assert (resumed / "checkpoint-6" / name).read_bytes() == (trained / "checkpoint-6" / name).read_bytes()
    states = [
        torch.load(folder / "checkpoint-6" / "optimizer.bin", weights_only=True) for folder in (resumed, trained)
    ]
    assert str(states[0]) == str(states[1])
    losses = scalar_curve(trained, "train/loss")
    assert scalar_curve(resumed, "train/loss") == {step: losses[step] for step in (4, 5, 6)}


def test_accumulated_batches_learn_what_one_batch_learns_without_dropout(workplace):
    model = {"decoder": MODEL["decoder"] | {"attention_dropout": 0.0}}
    (workplace / "no-dropout.json").write_text(json.dumps(model))
    curves = []
    for name, more in (
        ("one", ()),
        ("accumulated", ("--train_batch_size", "2", "--gradient_accumulation_steps", "2")),
    ):
        result = train(workplace, name, "--model_config", str(workplace / "no-dropout.json"), *more)
        assert result.returncode == 0, result.stderr
        curves.append(scalar_curve(workplace / name, "train/loss"))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


@pytest.mark.parametrize(
    "output, more, message",
    [
        ("straight", ("--resume_from_checkpoint", "latest", "--num_frames", "3"), "`num_frames` was 4 and is 3"),
        ("refused", ("--codes_dir", "{workplace}/latents"), "holds latents of type torch.float32.*`VQModel`"),
    ],
    ids=["changed run", "latents"],
)
def test_a_changed_run_and_latents_are_refused(workplace, trained, output, more, message):
    result = train(workplace, output, *(argument.format(workplace=workplace) for argument in more))
    assert result.returncode != 0
    assert re.search(message, result.stderr), result.stderr
