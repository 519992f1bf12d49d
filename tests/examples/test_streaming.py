"""`--streaming` of the training scripts and of `cache_latents.py`, run as a user runs them."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from local_hub import LocalHub, run_python
from safetensors.numpy import load_file
from tiny_models import tiny_dc, tiny_pipeline, tiny_transformer
from video_files import write_video

from diffusers_far.data.latents import LatentDataset


pytestmark = pytest.mark.full

EXAMPLES = Path(__file__).parents[2] / "examples"
TRANSFORMER = {
    "in_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 1,
    "attention_head_dim": 16,
    "axes_dims_rope": [4, 6, 6],
    "patch_size": 2,
    "long_patch_size": 4,
    "short_window": 3,
    "num_actions": 3,
    "action_shift": 1,
}
STREAM = {"streaming": None, "shuffle_buffer_size": 4}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def write_images(folder: Path, seed: int) -> None:
    """Four files of three trajectories to train on, and one to validate."""
    random, features = np.random.default_rng(seed), Features({"video": List(Image()), "actions": List(Value("int64"))})
    (folder / "data").mkdir(parents=True)
    for name in ("train-0-of-4", "train-1-of-4", "train-2-of-4", "train-3-of-4", "validation-0-of-1"):
        videos = [list(random.integers(0, 256, (10 + row, 16, 16, 3), dtype=np.uint8)) for row in range(3)]
        rows = {"video": videos, "actions": [random.integers(0, 3, len(video)).tolist() for video in videos]}
        Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / f"{name}.parquet")


def write_videos(folder: Path) -> None:
    random, lines = np.random.default_rng(0), []
    for number in range(6):
        write_video(folder / f"{number}.mp4", random.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8))
        lines.append(json.dumps({"file_name": f"{number}.mp4", "actions": random.integers(0, 3, 12).tolist()}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("workplace")
    write_images(folder / "images", seed=0)
    write_images(folder / "other-images", seed=1)
    write_videos(folder / "videos")
    tiny_dc().save_pretrained(folder / "vae")
    (folder / "transformer.json").write_text(json.dumps(TRANSFORMER))
    (folder / "vae.json").write_text(json.dumps({"_class_name": "AutoencoderDC", **tiny_dc().config}))
    return folder


def flags(arguments: dict) -> list:
    """`None`: a flag without a value; `False`: left out."""
    given = {name: value for name, value in arguments.items() if value is not False}
    return [text for name, value in given.items() for text in (f"--{name}", value) if text is not None]


def far_arguments(workplace: Path, output: str, dataset: str = "images", **changes) -> list:
    arguments = {
        "dataset_name": workplace / dataset,
        "vae": workplace / "vae",
        "transformer_config": workplace / "transformer.json",
        "output_dir": workplace / output,
        "num_actions": 3,
        "num_frames": 6,
        "train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_warmup_steps": 2,
        "max_train_steps": 6,
        "num_validation_clips": 2,
        "num_validation_videos": 0,
        "report_to": "none",
    }
    return flags(arguments | STREAM | changes)


def run(script: str, arguments: list, workplace: Path, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "HF_HOME": str(workplace / "huggingface"),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [sys.executable, *launcher, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def train(workplace: Path, output: str, dataset: str = "images", launcher: tuple[str, ...] = (), **changes) -> None:
    result = run("train_far.py", far_arguments(workplace, output, dataset, **changes), workplace, launcher)
    assert result.returncode == 0, result.stderr


def assert_same_weights(folder: Path, expected: Path, file: str = WEIGHTS) -> None:
    weights, expected_weights = load_file(folder / file), load_file(expected / file)
    assert weights.keys() == expected_weights.keys()
    assert all(np.array_equal(weights[name], expected_weights[name]) for name in weights)


@pytest.fixture(scope="module")
def streamed(workplace) -> Path:
    """A finished run on streamed images, never interrupted."""
    train(workplace, "streamed")
    return workplace / "streamed"


def test_a_resumed_run_ends_bit_equal_whatever_the_number_of_worker_processes(workplace, streamed):
    train(workplace, "resumed", max_train_steps=2)
    assert (workplace / "resumed" / "checkpoint-2" / "stream-0.json").is_file()
    train(workplace, "resumed", resume_from_checkpoint="latest", dataloader_num_workers=1)
    assert_same_weights(workplace / "resumed", streamed)


def test_a_resumed_run_on_videos_ends_bit_equal(workplace):
    videos = {"dataset": "videos", "clips_per_trajectory": 2, "frame_interval": 2, "combine_actions": "last"}
    train(workplace, "videos-straight", **videos)
    train(workplace, "videos-resumed", **videos, max_train_steps=4)
    train(workplace, "videos-resumed", **videos, resume_from_checkpoint="latest")
    assert_same_weights(workplace / "videos-resumed", workplace / "videos-straight")


def test_two_processes_resume_each_at_its_own_place(workplace):
    def launcher() -> tuple[str, ...]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        rendezvous = ("--master_addr", "127.0.0.1", "--master_port", port)
        return ("-m", "torch.distributed.run", "--nproc_per_node", "2", *rendezvous)

    train(workplace, "two-straight", launcher=launcher())
    train(workplace, "two-resumed", launcher=launcher(), max_train_steps=3)
    train(workplace, "two-resumed", launcher=launcher(), resume_from_checkpoint="latest")
    assert_same_weights(workplace / "two-resumed", workplace / "two-straight")
    positions = [
        json.loads((workplace / "two-straight" / "checkpoint-6" / f"stream-{index}.json").read_text())
        for index in range(2)
    ]
    assert positions[0]["lanes"] != positions[1]["lanes"]


def test_the_hub_is_streamed_as_a_folder_is(workplace, streamed):
    push = """
        import sys
        from huggingface_hub import HfApi, create_repo

        create_repo("org/images", repo_type="dataset")
        HfApi().upload_folder(folder_path=sys.argv[1], repo_id="org/images", repo_type="dataset")
    """
    push_card = """
        from huggingface_hub import upload_file

        content = b"Another card: another commit, and the same data."
        upload_file(path_or_fileobj=content, path_in_repo="README.md", repo_id="org/images", repo_type="dataset")
    """
    with LocalHub() as hub:
        run_python(push, hub, workplace / "images")
        for changes in ({"max_train_steps": 3}, {"resume_from_checkpoint": "latest"}):
            arguments = far_arguments(workplace, "from-hub", **changes, dataset_name="org/images@main")
            run_python(EXAMPLES / "train_far.py", hub, *arguments)
            run_python(push_card, hub)
    assert_same_weights(workplace / "from-hub", streamed)


def test_a_run_on_other_data_or_in_another_order_is_not_resumed(workplace, streamed):
    for changes, message in (
        ({"dataset": "other-images"}, "`dataset` was"),
        ({"shuffle_buffer_size": 5}, "`shuffle_buffer_size` was 4 and is 5"),
    ):
        arguments = far_arguments(workplace, "streamed", **changes, resume_from_checkpoint="latest")
        result = run("train_far.py", arguments, workplace)
        assert result.returncode != 0 and message in result.stderr


def test_a_dry_run_takes_the_longest_clips_of_the_stream(workplace):
    result = run("train_far.py", far_arguments(workplace, "dry", dry_run=None), workplace)
    assert result.returncode == 0, result.stderr
    assert "tokens per clip of 6 frames" in result.stdout and not (workplace / "dry").exists()


def test_a_lora_is_trained_on_a_stream(workplace):
    config = {name: value for name, value in TRANSFORMER.items() if name != "in_channels"}
    tiny_pipeline(tiny_transformer(**config), tiny_dc()).save_pretrained(workplace / "base")
    changes = {"vae": False, "transformer_config": False, "pretrained_model_name_or_path": workplace / "base"}
    result = run("train_far_lora.py", far_arguments(workplace, "lora", **changes), workplace)
    assert result.returncode == 0, result.stderr
    assert (workplace / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_a_vae_on_a_stream_resumes_bit_equal(workplace):
    arguments = {
        "dataset_name": workplace / "images",
        "vae_config": workplace / "vae.json",
        "max_train_steps": 8,
        "train_batch_size": 4,
        "checkpointing_steps": 3,
        "num_validation_frames": 4,
        "report_to": "none",
    }
    for output in ("vae-straight", "vae-resumed"):
        result = run("train_vae.py", flags(arguments | STREAM | {"output_dir": workplace / output}), workplace)
        assert result.returncode == 0, result.stderr
    resumed = workplace / "vae-resumed"
    shutil.rmtree(resumed / "checkpoint-8")
    (resumed / "diffusion_pytorch_model.safetensors").unlink()
    more = {"output_dir": resumed, "resume_from_checkpoint": "checkpoint-6", "dataloader_num_workers": 1}
    result = run("train_vae.py", flags(arguments | STREAM | more), workplace)
    assert result.returncode == 0, result.stderr
    assert_same_weights(resumed, workplace / "vae-straight", "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("dataset", ["images", "videos"])
def test_cached_latents_are_the_same_when_the_dataset_is_streamed(workplace, dataset):
    arguments = {"dataset_name": workplace / dataset, "vae": workplace / "vae", "trajectories_per_shard": 4}
    for streaming in ({}, {"streaming": None}):
        output = workplace / f"latents-{dataset}-{len(streaming)}"
        result = run("cache_latents.py", flags(arguments | streaming | {"output_dir": output}), workplace)
        assert result.returncode == 0, result.stderr
    if dataset == "images":  # interrupted: the missing shards are made, the others left alone
        missing = sorted((output / "train").iterdir())[1]
        missing.unlink()
        kept = {path: path.stat().st_mtime_ns for path in (output / "train").iterdir()}
        assert (
            run("cache_latents.py", flags(arguments | streaming | {"output_dir": output}), workplace).returncode == 0
        )
        assert missing.is_file() and all(path.stat().st_mtime_ns == time for path, time in kept.items())
    whole, streamed = (LatentDataset(workplace / f"latents-{dataset}-{is_streamed}") for is_streamed in range(2))
    assert len(whole) == len(streamed) and streamed.num_actions == 3
    for trajectory, num_frames in enumerate(whole.num_frames):
        clip, expected = (latents.clip(trajectory, 0, int(num_frames)) for latents in (streamed, whole))
        assert np.array_equal(clip.latents, expected.latents) and np.array_equal(clip.actions, expected.actions)


def test_a_stream_is_not_cached_by_several_processes(workplace):
    arguments = {"dataset_name": "a", "vae": "b", "output_dir": "c", "streaming": None, "num_processes": 2}
    result = run("cache_latents.py", flags(arguments), workplace)
    assert result.returncode == 2 and "a stream is read from its front, by one process" in result.stderr
