"""`train_vae.py` and `cache_latents.py`, run as a user runs them."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from diffusers import AutoencoderDC, VQModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_far.data.latents import LatentDataset
from diffusers_far.data.loading import load_split
from diffusers_far.data.video_clips import FrameDataset
from diffusers_far.models.codec import encode_codes, encode_video


pytestmark = pytest.mark.full

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_script(name: str, *arguments: str, home: Path, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "HF_HOME": str(home / "huggingface"),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [sys.executable, *launcher, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A dataset of two splits, with configs of a tiny AutoencoderDC and AutoencoderKL beside it."""
    folder = tmp_path_factory.mktemp("workplace")
    random = np.random.default_rng(0)
    features = Features({"video": List(Image()), "actions": List(Value("int64"))})
    (folder / "dataset").mkdir()
    for split, num_rows in (("train", 5), ("validation", 1)):
        ramps = np.linspace(0, 1, 16)[:, None, None] * random.integers(0, 256, (num_rows, 6, 1, 1, 3))
        videos = np.broadcast_to(ramps, (num_rows, 6, 16, 16, 3)).astype(np.uint8)
        rows = {"video": [list(video) for video in videos], "actions": [[0, 1, 2, 0, 1, 2]] * num_rows}
        path = folder / "dataset" / f"{split}-00000-of-00001.parquet"
        Dataset.from_dict(rows, features=features).to_parquet(path)
    shared = {"block_out_channels": [8, 8, 16], "layers_per_block": [0, 1, 1], "qkv_multiscales": [[], [], []]}
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in shared.items()}
    dc = {"_class_name": "AutoencoderDC", "latent_channels": 4, **sides}
    kl = {
        "_class_name": "AutoencoderKL",
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [8, 16],
        "norm_num_groups": 4,
        "layers_per_block": 1,
    }
    vq = {name: value for name, value in kl.items() if name != "_class_name"} | {
        "_class_name": "VQModel",
        "num_vq_embeddings": 300,
        "mid_block_add_attention": False,
    }
    (folder / "vq.json").write_text(json.dumps(vq))
    (folder / "dc.json").write_text(json.dumps(dc))
    (folder / "kl.json").write_text(json.dumps(kl))
    return folder


def train(workplace: Path, output: str, *more: str, config: str = "dc.json", launcher: tuple[str, ...] = ()):
    return run_script(
        "train_vae.py",
        *("--dataset_name", str(workplace / "dataset"), "--vae_config", str(workplace / config)),
        *("--output_dir", str(workplace / output), "--max_train_steps", "8", "--train_batch_size", "4"),
        *("--lr_warmup_steps", "2", "--checkpointing_steps", "3", "--validation_steps", "4", "--latent_noise", "0.1"),
        *more,
        home=workplace,
        launcher=launcher,
    )


@pytest.fixture(scope="module")
def trained(workplace) -> Path:
    """A finished run."""
    result = train(workplace, "vae")
    assert result.returncode == 0, result.stderr
    assert "without LPIPS" in result.stderr
    return workplace / "vae"


def test_a_run_leaves_a_vae_whose_latents_have_unit_variance(workplace, trained):
    vae = AutoencoderDC.from_pretrained(trained)
    frames = FrameDataset(load_split(str(workplace / "dataset"), "train"))
    latents = encode_video(vae, torch.stack([frames[index] for index in range(len(frames))]))
    assert latents.std().item() == pytest.approx(1, rel=1e-2)
    assert sorted(path.name for path in trained.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    assert len(list((trained / "samples").glob("*.png"))) == 2
    assert list((trained / "logs").rglob("events*"))
    (known,) = (trained / "logs").rglob("hparams.yml")
    assert "latent_noise: 0.1" in known.read_text() and "vae.latent_channels: 4" in known.read_text()


def test_a_log_that_goes_to_a_file_has_lines_and_no_bar(workplace):
    result = train(workplace, "lines", "--checkpointing_steps", "3")
    assert result.returncode == 0, result.stderr
    assert "\r" not in result.stderr and "it/s" not in result.stderr
    assert "1 process on cpu, mixed precision no, global batch 4 = 1 x 4 x 1" in result.stderr
    assert re.search(
        r"step 8 of 8: loss [\d.]+, learning rate [\d.e-]+, frames per second [\d.e+]+, [\d.]+ s per step, 0 s left",
        result.stderr,
    )
    saved = [line for line in result.stderr.splitlines() if "aved" in line and "checkpoint-3" in line]
    assert len(saved) == 1 and "Saved" in saved[0]
    assert re.search(r"step 8, held out: psnr .* worst 8x8 patch [\d.]+ dB, at row \d+, column \d+", result.stderr)


def test_a_dry_run_prints_the_cost_with_the_gan_and_leaves_nothing(workplace):
    gan = ("--disc_start", "6", "--disc_channels", "8", "--disc_layers", "1")
    flags = ("--checkpointing_steps", "1", "--validation_steps", "1", "--mixed_precision", "auto")
    result = train(workplace, "dry", "--dry_run", *flags, *gan)
    assert result.returncode == 0, result.stderr
    assert re.search(r"--mixed_precision auto is (no|bf16): .*bfloat16 .* gradient [\d.]+", result.stderr)
    assert "s per step of 4 frames, with the GAN\n" in result.stdout
    assert "hours for --max_train_steps 8" in result.stdout and not (workplace / "dry").exists()


def test_a_run_out_of_time_stops_with_a_checkpoint_and_a_vae(workplace):
    result = train(workplace, "timed", "--max_train_hours", "0")
    assert result.returncode == 0, result.stderr
    assert (workplace / "timed" / "checkpoint-1").is_dir()
    assert AutoencoderDC.from_pretrained(workplace / "timed").config.scaling_factor != 1


def test_a_tracker_that_is_not_installed_stops_the_run_before_it_starts(workplace):
    result = train(workplace, "untracked", "--report_to", "tensorboard,dvclive")
    assert result.returncode != 0 and not (workplace / "untracked").exists()
    assert "asks for 'dvclive', which is not installed" in result.stderr


def test_a_resumed_run_ends_bit_equal_to_an_uninterrupted_one(workplace, trained):
    # Not a shorter run: the schedule depends on the number of steps. So the later checkpoint is taken away.
    copied = workplace / "resumed"
    (copied / "checkpoint-6").mkdir(parents=True)
    for path in (trained / "checkpoint-6").iterdir():
        (copied / "checkpoint-6" / path.name).write_bytes(path.read_bytes())
    result = train(workplace, "resumed", "--resume_from_checkpoint", "latest")
    assert result.returncode == 0, result.stderr
    for name in ("diffusion_pytorch_model.safetensors", "checkpoint-8/model.safetensors"):
        torch.testing.assert_close(load_file(copied / name), load_file(trained / name), rtol=0, atol=0)
    assert (copied / "config.json").read_text() == (trained / "config.json").read_text()


def test_a_folder_in_use_and_a_changed_run_are_refused(workplace, trained):
    assert "not empty" in train(workplace, "vae").stderr
    result = train(workplace, "vae", "--resume_from_checkpoint", "latest", "--learning_rate", "0.5")
    assert result.returncode != 0
    assert "`learning_rate` was 0.001 and is 0.5" in result.stderr


def test_a_kl_autoencoder_trains_with_a_gan_in_two_processes(workplace):
    # `accelerate launch --cpu --num_processes 2` starts one process only.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    address = ("--master_addr", "127.0.0.1", "--master_port", port)
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", *address)
    gan = ("--disc_start", "2", "--disc_channels", "8", "--disc_layers", "1")
    result = train(workplace, "kl", *gan, config="kl.json", launcher=launcher)
    assert result.returncode == 0, result.stderr
    run = json.loads((workplace / "kl" / "checkpoint-8" / "run.json").read_text())
    assert run["identity"]["num_processes"] == 2
    assert (workplace / "kl" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.fixture(scope="module")
def trained_vq(workplace) -> Path:
    """A finished run of a VQ autoencoder."""
    result = train(workplace, "vq", "--idle_steps_to_restart", "2", config="vq.json")
    assert result.returncode == 0, result.stderr
    assert "codes_used" in result.stderr and "perplexity" in result.stderr
    return workplace / "vq"


def test_a_resumed_vq_restarts_the_codes_that_an_uninterrupted_one_restarts(workplace, trained_vq):
    shutil.copytree(trained_vq / "checkpoint-6", workplace / "resumed-vq" / "checkpoint-6")
    more = ("--idle_steps_to_restart", "2", "--resume_from_checkpoint", "latest")
    result = train(workplace, "resumed-vq", *more, config="vq.json")
    assert result.returncode == 0, result.stderr
    for name in ("diffusion_pytorch_model.safetensors", "checkpoint-8/model.safetensors"):
        weights = [load_file(folder / name) for folder in (workplace / "resumed-vq", trained_vq)]
        torch.testing.assert_close(*weights, rtol=0, atol=0)
    assert scalar(trained_vq, "train/restarted_codes") > 0


def scalar(output_dir: Path, name: str) -> float:
    """The last logged value."""
    (path,) = (output_dir / "logs" / "train_vae").glob("events*")
    return EventAccumulator(str(path)).Reload().Scalars(name)[-1].value


def cache(workplace: Path, vae: Path, *more: str) -> subprocess.CompletedProcess:
    return run_script(
        "cache_latents.py",
        *("--dataset_name", str(workplace / "dataset"), "--vae", str(vae), "--output_dir", str(workplace / "latents")),
        *("--trajectories_per_shard", "2", "--device", "cpu", *more),
        home=workplace,
    )


def test_cached_latents_are_the_encoded_frames_and_only_missing_shards_are_made(workplace, trained):
    result = cache(workplace, trained, "--num_processes", "2")
    assert result.returncode == 0, result.stderr
    latents = LatentDataset(workplace / "latents", "train")
    vae = AutoencoderDC.from_pretrained(trained)
    latents.require_vae(vae)
    frames = FrameDataset(load_split(str(workplace / "dataset"), "train"))
    expected = encode_video(vae, torch.stack([frames[index] for index in range(18, 24)]))
    clip = latents.clip(3, 0, 6)
    torch.testing.assert_close(clip.latents, expected.half().float(), rtol=1e-3, atol=1e-3)
    assert clip.actions.tolist() == [0, 1, 2, 0, 1, 2]

    shards = sorted((workplace / "latents" / "train").iterdir())
    content = [path.read_bytes() for path in shards]
    shards[1].unlink()
    written = [path.stat().st_mtime_ns for path in (shards[0], shards[2])]
    assert cache(workplace, trained).returncode == 0
    assert [path.read_bytes() for path in shards] == content
    assert [path.stat().st_mtime_ns for path in (shards[0], shards[2])] == written


def test_cached_codes_are_those_of_the_frames(workplace, trained_vq):
    result = cache(workplace, trained_vq, "--output_dir", str(workplace / "codes"))
    assert result.returncode == 0, result.stderr
    codes = LatentDataset(workplace / "codes", "train")
    vq = VQModel.from_pretrained(trained_vq)
    codes.require_vae(vq)
    frames = FrameDataset(load_split(str(workplace / "dataset"), "train"))
    expected = encode_codes(vq, torch.stack([frames[index] for index in range(18, 24)]))
    clip = codes.clip(3, 0, 6)
    assert clip.latents.dtype == torch.int64 and torch.equal(clip.latents[:, 0], expected)
    assert clip.actions.tolist() == [0, 1, 2, 0, 1, 2]


def test_latents_of_two_vaes_never_share_a_folder(workplace, trained):
    assert cache(workplace, trained).returncode == 0
    other = AutoencoderDC.from_pretrained(trained)
    other.register_to_config(scaling_factor=0.123)
    other.save_pretrained(workplace / "other-vae")
    result = cache(workplace, workplace / "other-vae")
    assert result.returncode != 0
    assert "another `--output_dir`" in result.stderr
