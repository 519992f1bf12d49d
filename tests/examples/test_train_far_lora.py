"""`train_far_lora.py`, run as a user runs it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Features, List, Value
from local_hub import run_python
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import tiny_dc, tiny_pipeline, tiny_transformer

from diffusers_far import FARPipeline
from diffusers_far.data.latents import LatentDataset, LatentSource, write_shard
from diffusers_far.models.identity import model_identity, vae_hash
from diffusers_far.pipelines.model_card import is_unedited
from diffusers_far.training.validation import held_out_losses, validation_clips


pytestmark = pytest.mark.full

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "train_far_lora.py"
ACCELERATE = ("-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu")
WEIGHTS = "pytorch_lora_weights.safetensors"


def write_latents(folder: Path, vae, split: str, num_trajectories: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    source = LatentSource(
        vae_hash(vae), vae.config.scaling_factor, f"dataset {seed}", num_trajectories, num_trajectories
    )
    (folder / split).mkdir(parents=True)
    lengths = [10 + row for row in range(num_trajectories)]
    actions = pa.table({"actions": [random.integers(0, 3, length).tolist() for length in lengths]})
    latents = [random.standard_normal((length, 4, 4, 4)) for length in lengths]
    features = Features({"actions": List(Value("int64"))})
    write_shard(source.shard_path(folder / split, 0), latents, actions, features, source)


def base_pipeline(seed: int = 0) -> FARPipeline:
    transformer = tiny_transformer(seed, num_actions=3, action_shift=1, long_patch_size=2, trained_frames=8)
    return tiny_pipeline(transformer, tiny_dc(), fps=5, height=16, width=16)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A tiny pipeline to adapt, and latents of its VAE."""
    folder = tmp_path_factory.mktemp("workplace")
    for seed, name in enumerate(("base", "other-base")):
        base_pipeline(seed).save_pretrained(folder / name)
    write_latents(folder / "latents", tiny_dc(), "train", 10, seed=0)
    write_latents(folder / "latents", tiny_dc(), "validation", 3, seed=1)
    return folder


def arguments(workplace: Path, output: str, *more: str) -> list[str]:
    values = {
        "pretrained_model_name_or_path": workplace / "base",
        "latents_dir": workplace / "latents",
        "output_dir": workplace / output,
        "rank": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.1,
        "train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_warmup_steps": 3,
        "max_train_steps": 7,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 3,
        "validation_steps": 4,
        "num_validation_clips": 3,
        "num_validation_videos": 2,
        "num_validation_frames": 2,
        "num_validation_inference_steps": 2,
    }
    flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    return [str(SCRIPT), *flags, "--teacher_forcing", *more]


def environment(workplace: Path) -> dict[str, str]:
    return os.environ | {"HF_HOME": str(workplace / "huggingface"), "OMP_NUM_THREADS": "1"}


def train(workplace: Path, output: str, *more: str, launcher: tuple[str, ...] = ACCELERATE):
    return subprocess.run(
        [sys.executable, *launcher, *arguments(workplace, output, *more)],
        env=environment(workplace),
        capture_output=True,
        text=True,
    )


def train_and_kill(workplace: Path, output: str, awaited: str, *more: str) -> None:
    """Kill the run, launcher and all, at the moment when `awaited` appears in its folder."""
    process = subprocess.Popen(
        [sys.executable, *ACCELERATE, *arguments(workplace, output, *more)],
        env=environment(workplace),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not (workplace / output / awaited).exists():
        assert process.poll() is None, f"the run ended before {awaited} appeared"
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def scalar_curve(output_dir: Path, name: str) -> dict[int, float]:
    """A logged value by step. What two launches logged for one step must agree."""
    curve = {}
    for path in sorted(output_dir.rglob("events*")):
        events = EventAccumulator(str(path)).Reload()
        if name in events.Tags()["scalars"]:
            for event in events.Scalars(name):
                assert curve.setdefault(event.step, event.value) == event.value
    return curve


def rollout(pipe: FARPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(1, 4, 4, 4, 4, generator=generator)
    return pipe(
        video_latents=context,
        actions=[[0, 1, 2, 0, 1, 2]],
        num_frames=2,
        num_inference_steps=2,
        generator=generator,
        output_type="latent",
    ).frames


@pytest.fixture(scope="module")
def trained(workplace) -> Path:
    """A finished run, never interrupted."""
    result = train(workplace, "straight")
    assert result.returncode == 0, result.stderr
    return workplace / "straight"


def test_a_run_leaves_a_small_file_that_changes_what_the_pipeline_makes(trained):
    assert (trained / WEIGHTS).stat().st_size < 100_000
    pipe = base_pipeline()
    plain = rollout(pipe)
    pipe.load_lora_weights(trained)
    assert pipe.transformer.peft_config["default_0"].lora_alpha == 4
    assert (rollout(pipe) - plain).abs().max() > 1e-3
    pipe.unload_lora_weights()
    assert torch.equal(rollout(pipe), plain)


def test_the_default_targets_are_all_attention_projections_and_nothing_else(trained):
    layers = {re.search(r"attn\.(.+)\.lora_[AB]", key)[1] for key in load_file(trained / WEIGHTS)}
    short = {"to_q", "to_k", "to_v", "to_out.0"}
    assert layers == short | {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}


def test_the_base_beneath_the_adapter_is_unchanged_to_the_bit(workplace, trained):
    """The saved base, and the one in the run's memory: base and adapter as saved give the loss that the run logged."""
    pipe = FARPipeline.from_pretrained(workplace / "base")
    assert model_identity(pipe.transformer) == model_identity(base_pipeline().transformer)
    clips = validation_clips(LatentDataset(workplace / "latents", "validation"), 3, 8)
    for step, load in ((0, False), (7, True)):
        if load:
            pipe.load_lora_weights(trained)
        losses = held_out_losses(pipe.transformer, clips, batch_size=2)
        for level, loss in losses.items():
            assert scalar_curve(trained, f"validation/loss_at_{level}")[step] == pytest.approx(loss, rel=1e-6)


def test_a_run_logs_every_step_and_measures_before_the_first_and_after_the_last(trained):
    assert list(scalar_curve(trained, "train/loss")) == list(range(1, 8))
    for name in ("loss", "psnr_of_frame_2", "psnr"):
        assert list(scalar_curve(trained, f"validation/{name}")) == [0, 4, 7]
    assert sorted(path.name for path in trained.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (4, 6, 7)]


def test_checkpoints_hold_the_adapter_without_the_base(trained):
    files = {path.name for path in (trained / "checkpoint-7").iterdir()}
    assert "adapter.safetensors" in files and not any(name.startswith("model") for name in files)


def test_the_card_tells_how_to_load_it_what_it_was_trained_on_and_how_well(workplace, trained):
    card = (trained / "README.md").read_text()
    before, after = (scalar_curve(trained, "validation/psnr")[step] for step in (0, 7))
    num_trained = sum(tensor.numel() for tensor in load_file(trained / WEIGHTS).values())
    for fact in (
        "- lora\n",
        "- world-model\n",
        'pipe = FARPipeline.from_pretrained("base")\npipe.load_lora_weights("straight")',
        f"{num_trained:,} trained parameters",
        "- Data: latents, split train",
        "- Steps: 7 of 2 clips per process",
        "- Clips: up to 8 frames",
        "- Adapter: rank 2, alpha 4, dropout 0.1, add_k_proj",
        f"- Base model: weights {model_identity(base_pipeline().transformer, torch.float32)[:16]}",
        f"PSNR, mean of the predicted frames, dB | {before:.4g} | {after:.4g} |",
        'src="sample.mp4"',
    ):
        assert fact in card, fact
    assert str(workplace) not in card and is_unedited(card)
    with av.open(str(trained / "sample.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 2 and frames[0].shape == (2 * 2 * 20, 2 * 2 * 20, 3)


def test_a_run_killed_twice_ends_bit_equal_to_an_uninterrupted_one(workplace, trained):
    train_and_kill(workplace, "killed", "checkpoint-2")
    train_and_kill(workplace, "killed", "unfinished-checkpoint-6", "--resume_from_checkpoint", "latest")
    assert not (workplace / "killed" / "checkpoint-6").exists()
    # Worker processes and another pace of measuring draw numbers, but none that the run depends on.
    more = ("--dataloader_num_workers", "1", "--validation_steps", "2")
    result = train(workplace, "killed", "--resume_from_checkpoint", "latest", *more)
    assert result.returncode == 0, result.stderr
    killed = workplace / "killed"
    for name in (WEIGHTS, "checkpoint-7/adapter.safetensors"):
        torch.testing.assert_close(load_file(killed / name), load_file(trained / name), rtol=0, atol=0)
    states = [torch.load(folder / "checkpoint-7" / "optimizer.bin", weights_only=True) for folder in (killed, trained)]
    torch.testing.assert_close(states[0]["state"], states[1]["state"], rtol=0, atol=0)
    assert scalar_curve(killed, "train/loss") == scalar_curve(trained, "train/loss")
    assert scalar_curve(killed, "validation/loss")[0] == scalar_curve(trained, "validation/loss")[0]


def test_a_run_with_another_adapter_or_base_is_not_resumed(workplace, trained):
    changed = ("--rank", "3", "--lora_alpha", "2", "--lora_dropout", "0", "--target_modules", "to_q")
    base = ("--pretrained_model_name_or_path", str(workplace / "other-base"))
    result = train(workplace, "straight", "--resume_from_checkpoint", "latest", *changed, *base)
    assert result.returncode != 0
    for message in (
        "`rank` was 2 and is 3",
        "`lora_alpha` was 4.0 and is 2.0",
        "`lora_dropout` was 0.1 and is 0.0",
        "`target_modules` was ['add_k_proj',",
        f"`base_model` was {model_identity(base_pipeline(0).transformer, torch.float32)!r}",
    ):
        assert message in result.stderr


def test_a_dry_run_prints_the_cost_and_how_little_is_trained_and_leaves_nothing(workplace):
    result = train(workplace, "dry", "--dry_run", "--mixed_precision", "auto")
    assert result.returncode == 0, result.stderr
    assert "--mixed_precision auto is " in result.stderr
    assert " M of them trained" in result.stdout and "s per step of 2 clips" in result.stdout
    assert not (workplace / "dry").exists()


def test_latents_of_another_vae_are_refused(workplace):
    vae = tiny_dc()
    vae.register_to_config(scaling_factor=0.25)
    write_latents(workplace / "foreign", vae, "train", 3, seed=0)
    result = train(workplace, "refused", "--latents_dir", str(workplace / "foreign"))
    assert result.returncode != 0
    assert "were made with the VAE" in result.stderr
    assert not (workplace / "refused").exists()


def test_two_processes_of_the_cpu_config_learn_what_one_learns_from_the_same_clips(workplace):
    """Without dropout, which each process draws for its own clips."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    config = str(EXAMPLES / "configs" / "accelerate" / "cpu.yaml")
    two = ("-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", port)
    plain = ("--lora_dropout", "0", "--target_modules", "attention", "mlp")
    for output, batch_size, launcher in (("one", "2", ACCELERATE), ("two", "1", two)):
        result = train(workplace, output, *plain, "--train_batch_size", batch_size, launcher=launcher)
        assert result.returncode == 0, result.stderr
    run = json.loads((workplace / "two" / "checkpoint-7" / "run.json").read_text())
    assert run["identity"]["num_processes"] == 2
    assert "mlp.net.2" in run["identity"]["target_modules"]
    losses, expected = (scalar_curve(workplace / name, "train/loss") for name in ("two", "one"))
    assert losses == pytest.approx(expected, rel=1e-4)


def test_half_precision_and_recomputed_activations_train_float32_layers(workplace):
    result = train(
        workplace, "half", "--mixed_precision", "bf16", "--gradient_checkpointing", "--max_train_steps", "2"
    )
    assert result.returncode == 0, result.stderr
    layers = load_file(workplace / "half" / WEIGHTS)
    assert all(tensor.dtype == torch.float32 for tensor in layers.values())
    assert any(tensor.any() for key, tensor in layers.items() if "lora_B" in key)


PUSH_BASE = """
    import sys
    from diffusers_far import FARPipeline

    FARPipeline.from_pretrained(sys.argv[1]).push_to_hub("org/base")
"""
LOAD_ADAPTER = """
    import sys, torch
    from diffusers_far import FARPipeline

    torch.set_num_threads(1)
    video_latents, layers = torch.load(sys.argv[1])
    pipe = FARPipeline.from_pretrained("org/base")
    pipe.set_progress_bar_config(disable=True)

    def rollout():
        return pipe(
            video_latents=video_latents, actions=[[0, 1, 2, 0, 1, 2]], num_frames=2, num_inference_steps=2,
            generator=torch.Generator().manual_seed(0), output_type="latent",
        ).frames

    plain = rollout()
    pipe.load_lora_weights("org/lora", adapter_name="pulled")
    assert (rollout() - plain).abs().max() > 1e-3
    state_dict = FARPipeline.lora_state_dict("org/lora")
    assert state_dict.keys() == layers.keys() and all(torch.equal(state_dict[key], layers[key]) for key in layers)
"""


def test_a_pushed_adapter_loads_in_a_fresh_pipeline(hub, workplace, tmp_path):
    run_python(PUSH_BASE, hub, workplace / "base")
    more = ("--pretrained_model_name_or_path", "org/base", "--push_to_hub", "--hub_model_id", "org/lora")
    run_python(SCRIPT, hub, *arguments(workplace, "pushed", *more)[1:])

    repo = hub.repos["models/org/lora"]
    assert sorted(repo.find().files) == [".gitattributes", "README.md", WEIGHTS, "sample.mp4"]
    card = repo.find().files["README.md"].content.decode()
    for fact in (
        "base_model: org/base\n",
        "base_model_relation: adapter\n",
        'pipe = FARPipeline.from_pretrained("org/base")\npipe.load_lora_weights("org/lora")',
        "- Steps: 7 of 2 clips",
    ):
        assert fact in card, fact
    layers = load_file(workplace / "pushed" / WEIGHTS)
    torch.save((torch.randn(1, 4, 4, 4, 4), layers), tmp_path / "expected.pt")
    run_python(LOAD_ADAPTER, hub, tmp_path / "expected.pt")
    usage = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    run_python(usage + "assert len(frames) == 8 and pipe.get_active_adapters() == ['default_0']", hub)
