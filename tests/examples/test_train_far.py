"""`train_far.py`, run as a user runs it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Features, List, Value
from diffusers import AutoencoderDC, DiffusionPipeline
from local_hub import LocalHub, run_python
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import tiny_dc
from video_files import write_video

from diffusers_far import FARPipeline, FARTransformer3DModel, SCDTransformer3DModel, VideoDiTPipeline
from diffusers_far.data.latents import LatentSource, write_shard
from diffusers_far.models.identity import vae_hash


pytestmark = pytest.mark.full

SCRIPT = Path(__file__).parents[2] / "examples" / "train_far.py"
ACCELERATE = ("-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu")
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


def write_latents(folder: Path, vae: AutoencoderDC, split: str, num_trajectories: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    source = LatentSource(vae_hash(vae), vae.config.scaling_factor, f"dataset {seed}", num_trajectories, 4)
    (folder / split).mkdir(parents=True)
    for shard in range(source.num_shards):
        lengths = [10 + row for row in source.shard_rows(shard)]
        actions = pa.table({"actions": [random.integers(0, 3, length).tolist() for length in lengths]})
        latents = [random.standard_normal((length, 4, 4, 4)) for length in lengths]
        features = Features({"actions": List(Value("int64"))})
        write_shard(source.shard_path(folder / split, shard), latents, actions, features, source)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """Cached latents, the VAE that they are of, and a tiny transformer's config."""
    folder = tmp_path_factory.mktemp("workplace")
    vae = tiny_dc()
    vae.save_pretrained(folder / "vae")
    write_latents(folder / "latents", vae, "train", 10, seed=0)
    write_latents(folder / "latents", vae, "validation", 3, seed=1)
    write_latents(folder / "other-latents", vae, "train", 10, seed=2)
    (folder / "transformer.json").write_text(json.dumps(TRANSFORMER))
    return folder


def command(workplace: Path, output: str, *more: str, launcher: tuple[str, ...] = ACCELERATE) -> list[str]:
    arguments = {
        "latents_dir": workplace / "latents",
        "vae": workplace / "vae",
        "transformer_config": workplace / "transformer.json",
        "output_dir": workplace / output,
        "num_frames": 8,
        "train_batch_size": 4,
        "clean_prefix_ratio": 0.5,
        "learning_rate": 1e-2,
        "lr_warmup_steps": 3,
        "ema_decay": 0.9,
        "max_train_steps": 9,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 3,
        "validation_steps": 9,
        "num_validation_clips": 3,
        "num_validation_videos": 2,
        "num_validation_frames": 2,
        "num_validation_inference_steps": 2,
    }
    flags = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    return [sys.executable, *launcher, str(SCRIPT), *flags, "--use_ema", *more]


def environment(workplace: Path) -> dict[str, str]:
    return os.environ | {
        "HF_HOME": str(workplace / "huggingface"),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }


def train(workplace: Path, output: str, *more: str, **launch) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(workplace, output, *more, **launch), env=environment(workplace), capture_output=True, text=True
    )


def two_processes() -> tuple[str, ...]:
    """A launcher on a free port; `accelerate launch --cpu --num_processes 2` starts one process only."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    rendezvous = ("--master_addr", "127.0.0.1", "--master_port", port)
    return ("-m", "torch.distributed.run", "--nproc_per_node", "2", *rendezvous)


def train_and_kill(workplace: Path, output: str, awaited: str, *more: str) -> None:
    """Kill the run, launcher and all, at the moment when `awaited` appears in its folder."""
    process = subprocess.Popen(
        command(workplace, output, *more),
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


def assert_same_tensors(saved, expected) -> None:
    """Bit-equality of nested states."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(saved, expected)
    elif isinstance(expected, dict):
        assert saved.keys() == expected.keys()
        for name in expected:
            assert_same_tensors(saved[name], expected[name])
    elif isinstance(expected, (list, tuple)):
        assert len(saved) == len(expected)
        for saved_item, expected_item in zip(saved, expected):
            assert_same_tensors(saved_item, expected_item)
    else:
        assert saved == expected


def assert_same_checkpoints(saved: Path, expected: Path) -> None:
    """Bit-equality of all that a run goes on from."""
    for name in ("model.safetensors", "ema.safetensors"):
        assert_same_tensors(load_file(saved / name), load_file(expected / name))
    assert (saved / "lr_scheduler.safetensors").read_bytes() == (expected / "lr_scheduler.safetensors").read_bytes()
    assert_same_tensors(*(torch.load(folder / "optimizer.bin", weights_only=True) for folder in (saved, expected)))


@pytest.fixture(scope="module")
def trained(workplace) -> Path:
    """A finished run, never interrupted."""
    result = train(workplace, "straight")
    assert result.returncode == 0, result.stderr
    return workplace / "straight"


def test_a_run_leaves_a_pipeline_that_generates(workplace, trained):
    pipe = FARPipeline.from_pretrained(trained)
    assert pipe.transformer.config.trained_frames == 8
    assert pipe.transformer.config.condition_dropout == 0.1
    assert (pipe.config.height, pipe.config.width) == (16, 16)
    frames = pipe(
        video=torch.rand(1, 4, 3, 16, 16), actions=[[0] * 6], num_frames=2, num_inference_steps=2, output_type="pt"
    ).frames
    assert frames.shape == (1, 2, 3, 16, 16)
    ema = load_file(trained / "checkpoint-9" / "ema.safetensors")
    for index, parameter in enumerate(pipe.transformer.parameters()):
        assert torch.equal(parameter, ema[f"state.shadow_params.{index}"])
    assert len(ema) == index + 1


def test_a_new_pipeline_makes_frames_as_they_were_measured(trained):
    assert FARPipeline.from_pretrained(trained).default_inference_steps == 2


def test_what_accelerate_launch_was_told_holds_in_a_script_that_is_not_told(workplace):
    launcher = (*ACCELERATE, "--mixed_precision", "bf16")
    result = train(workplace, "told", "--max_train_steps", "1", launcher=launcher)
    assert result.returncode == 0, result.stderr
    assert "1 process on cpu, mixed precision bf16, global batch 4 = 1 x 4 x 1" in result.stderr
    run = json.loads((workplace / "told" / "checkpoint-1" / "run.json").read_text())
    assert run["identity"]["mixed_precision"] == "bf16" and run["identity"]["gradient_accumulation_steps"] == 1


def test_a_run_logs_every_step_and_validates(trained):
    assert list(scalar_curve(trained, "train/loss")) == list(range(1, 10))
    assert list(scalar_curve(trained, "validation/loss_at_500")) == [9]
    assert list(scalar_curve(trained, "validation/psnr_of_frame_2")) == [9]
    assert sorted(path.name for path in trained.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (6, 8, 9)]


def test_a_run_killed_twice_ends_bit_equal_to_an_uninterrupted_one(workplace, trained):
    train_and_kill(workplace, "killed", "checkpoint-2")
    train_and_kill(workplace, "killed", "unfinished-checkpoint-6", "--resume_from_checkpoint", "latest")
    assert not (workplace / "killed" / "checkpoint-6").exists()
    result = train(workplace, "killed", "--resume_from_checkpoint", "latest")
    assert result.returncode == 0, result.stderr

    killed = workplace / "killed"
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert_same_tensors(load_file(killed / weights), load_file(trained / weights))
    assert_same_checkpoints(killed / "checkpoint-9", trained / "checkpoint-9")
    assert scalar_curve(killed, "train/loss") == scalar_curve(trained, "train/loss")


def test_two_processes_learn_what_one_learns_from_the_same_clips(workplace, trained):
    result = train(workplace, "two", "--train_batch_size", "2", launcher=two_processes())
    assert result.returncode == 0, result.stderr
    run = json.loads((workplace / "two" / "checkpoint-9" / "run.json").read_text())
    assert run["identity"]["num_processes"] == 2
    losses, expected = (scalar_curve(workplace / name, "train/loss") for name in ("two", "straight"))
    assert losses == pytest.approx(expected, rel=1e-4)


def test_accumulated_batches_learn_what_one_batch_learns(workplace, trained):
    result = train(workplace, "accumulated", "--train_batch_size", "1", "--gradient_accumulation_steps", "4")
    assert result.returncode == 0, result.stderr
    losses, expected = (scalar_curve(workplace / name, "train/loss") for name in ("accumulated", "straight"))
    assert losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "changed, message",
    [
        (("--learning_rate", "0.5"), "`learning_rate` was 0.01 and is 0.5"),
        (("--latents_dir", "other-latents"), "`dataset` was 'dataset 0' and is 'dataset 2'"),
    ],
    ids=["learning rate", "dataset"],
)
def test_a_changed_run_is_not_resumed(workplace, trained, changed, message):
    name, value = changed
    value = str(workplace / value) if name == "--latents_dir" else value
    result = train(workplace, "straight", "--resume_from_checkpoint", "latest", name, value)
    assert result.returncode != 0
    assert message in result.stderr


def test_latents_of_another_vae_are_refused(workplace):
    vae = tiny_dc()
    vae.register_to_config(scaling_factor=0.25)
    vae.save_pretrained(workplace / "other-vae")
    result = train(workplace, "refused", "--vae", str(workplace / "other-vae"))
    assert result.returncode != 0
    assert "were made with the VAE" in result.stderr


def test_a_dry_run_prints_the_cost_and_leaves_nothing(workplace):
    result = train(workplace, "dry", "--dry_run", "--mixed_precision", "auto")
    assert result.returncode == 0, result.stderr
    assert "--mixed_precision auto is " in result.stderr
    assert "17 tokens per clip of 8 frames, 5 of them long" in result.stdout
    assert "s per step of 4 clips" in result.stdout and "hours for --max_train_steps 9" in result.stdout
    assert not (workplace / "dry").exists()


def test_a_run_out_of_time_stops_with_a_checkpoint_and_a_pipeline(workplace):
    result = train(
        workplace, "timed", "--max_train_hours", "0", "--objective", "video_dit", "--gradient_checkpointing"
    )
    assert result.returncode == 0, result.stderr
    assert (workplace / "timed" / "checkpoint-1").is_dir()
    config = json.loads((workplace / "timed" / "transformer" / "config.json").read_text())
    assert config["frame_causal"] is False and config["long_patch_size"] is None


def test_a_run_leaves_what_it_predicted_for_people_to_look_at(trained):
    assert (trained / "validation" / "step-0000009.mp4").stat().st_size > 0
    assert (trained / "sample.mp4").stat().st_size > 0
    card = (trained / "README.md").read_text()
    assert "PSNR of the first predicted frame" in card and 'src="sample.mp4"' in card
    assert "9 of 4 clips per process" in card
    images = [
        events.Tags()["images"]
        for events in (EventAccumulator(str(path)).Reload() for path in trained.rglob("events*"))
    ]
    assert ["validation/truth_above_prediction"] in images


def test_a_loss_that_is_not_finite_stops_the_run_with_its_checkpoints_intact(workplace):
    result = train(
        workplace, "diverged", "--learning_rate", "1e30", "--lr_warmup_steps", "0", "--max_grad_norm", "1e30"
    )
    assert result.returncode != 0
    assert "holds no intact checkpoint" in result.stderr and "Lower `--learning_rate`" in result.stderr
    assert not (workplace / "diverged" / "model_index.json").exists()


def test_a_pretrained_model_with_fewer_actions_gets_a_new_table(workplace, trained):
    config = TRANSFORMER | {"num_actions": 2}
    FARTransformer3DModel(**config).save_pretrained(workplace / "two-actions")
    result = train(
        workplace,
        "three-actions",
        *("--pretrained_model_name_or_path", str(workplace / "two-actions"), "--max_train_steps", "1"),
    )
    assert result.returncode == 0, result.stderr
    assert "`num_actions` was 2 and is 3" in result.stderr
    assert FARPipeline.from_pretrained(workplace / "three-actions").transformer.config.num_actions == 3


@pytest.mark.parametrize("clean_prefix_ratio, context_mode", [("0", "noised"), ("0.5", "clean")])
def test_a_video_dit_is_saved_as_what_makes_whole_clips(workplace, clean_prefix_ratio, context_mode):
    output = f"video-dit-{context_mode}"
    changes = ("--objective", "video_dit", "--clean_prefix_ratio", clean_prefix_ratio, "--max_train_steps", "2")
    result = train(workplace, output, *changes)
    assert result.returncode == 0, result.stderr
    pipe = DiffusionPipeline.from_pretrained(workplace / output)
    assert type(pipe) is VideoDiTPipeline and pipe.config.context_mode == context_mode
    card = (workplace / output / "README.md").read_text()
    assert "all new frames at once" in card and "| PSNR, mean of the predicted frames, dB |" in card
    usage = card.partition("```python")[2].partition("```")[0]
    assert f'VideoDiTPipeline.from_pretrained("{output}")' in usage
    assert "import VideoDiTPipeline" in (workplace / output / "pipeline.py").read_text()


@pytest.fixture(scope="module")
def video_folder(tmp_path_factory) -> Path:
    """mp4 files with actions, as `datasets` opens them: a `videofolder`."""
    folder = tmp_path_factory.mktemp("videos")
    random, lines = np.random.default_rng(0), []
    for number in range(4):
        write_video(folder / f"{number}.mp4", random.integers(0, 256, (14, 16, 16, 3), dtype=np.uint8))
        lines.append(json.dumps({"file_name": f"{number}.mp4", "actions": random.integers(0, 3, 14).tolist()}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def video_arguments(workplace: Path, output: Path, dataset: str) -> list[str]:
    arguments = {
        "dataset_name": dataset,
        "vae": workplace / "vae",
        "transformer_config": workplace / "transformer.json",
        "output_dir": output,
        "num_frames": 6,
        "frame_interval": 2,
        "combine_actions": "last",
        "train_batch_size": 2,
        "max_train_steps": 2,
    }
    return [text for name, value in arguments.items() for text in (f"--{name}", str(value))]


def test_videos_train_without_cached_latents(workplace, video_folder):
    result = subprocess.run(
        [
            sys.executable,
            *ACCELERATE,
            str(SCRIPT),
            *video_arguments(workplace, workplace / "videos", str(video_folder)),
        ],
        env=environment(workplace),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert FARPipeline.from_pretrained(workplace / "videos").transformer.config.trained_frames == 6


def test_from_a_dataset_on_the_hub_to_a_model_on_the_hub(workplace, tmp_path):
    push = """
        import sys
        import numpy as np
        from datasets import Dataset, Features, Image, List, Value

        random = np.random.default_rng(0)
        features = Features({"video": List(Image()), "actions": List(Value("int64"))})
        videos = [list(random.integers(0, 256, (14, 16, 16, 3), dtype=np.uint8)) for _ in range(4)]
        rows = {"video": videos, "actions": random.integers(0, 3, (4, 14)).tolist()}
        Dataset.from_dict(rows, features=features).push_to_hub("org/walks")
    """
    generate = """
        import torch
        from diffusers_far import FARPipeline, FARTransformer3DModel

        pipe = FARPipeline.from_pretrained("org/far-walks")
        video, actions = torch.rand(1, 3, 3, 16, 16), [[0, 1, 2, 0, 1]]
        print(pipe(video=video, actions=actions, num_frames=2, num_inference_steps=2, output_type="pt").frames.shape)
    """
    with LocalHub() as hub:
        run_python(push, hub)
        arguments = video_arguments(workplace, tmp_path / "far-walks", "org/walks")
        run_python(SCRIPT, hub, *arguments, "--push_to_hub", "--hub_model_id", "org/far-walks")
        files = hub.repos["models/org/far-walks"].find("main").files
        assert "torch.Size([1, 2, 3, 16, 16])" in run_python(generate, hub)
    assert {"model_index.json", "README.md"} <= files.keys()
    assert not [name for name in files if name.startswith(("checkpoint-", "logs"))]


def test_a_separable_model_is_trained_resumed_to_the_bit_and_saved_as_a_pipeline(workplace):
    config = {name: value for name, value in TRANSFORMER.items() if name != "num_layers"}
    config |= {"_class_name": "SCDTransformer3DModel", "num_encoder_layers": 1, "num_decoder_layers": 1}
    (workplace / "separable.json").write_text(json.dumps(config))
    flags = ("--transformer_config", str(workplace / "separable.json"), "--clean_prefix_ratio", "0")
    for output, more in (
        ("separable", ("--max_train_steps", "4")),
        ("interrupted", ("--max_train_steps", "2")),
        ("interrupted", ("--max_train_steps", "4", "--resume_from_checkpoint", "latest")),
    ):
        result = train(workplace, output, *flags, *more)
        assert result.returncode == 0, result.stderr
    assert_same_checkpoints(*(workplace / output / "checkpoint-4" for output in ("interrupted", "separable")))
    pipe = FARPipeline.from_pretrained(workplace / "separable")
    assert type(pipe.transformer) is SCDTransformer3DModel
    assert pipe.transformer.config.condition_dropout == 0.1 and pipe.transformer.config.trained_frames == 8
    assert "decoder_draws=2" in (workplace / "separable" / "README.md").read_text()
    refused = train(workplace, "refused", *flags, "--clean_context_ratio", "0.3")
    assert refused.returncode != 0 and "`clean_context_ratio` is 0.3, but the context of a separable" in refused.stderr


def test_a_trained_model_becomes_a_flow_map_whose_training_is_resumed_to_the_bit(workplace, trained):
    start = ("--pretrained_model_name_or_path", str(trained), "--flow_map", "--teacher_forcing")
    flags = (*start, "--clean_prefix_ratio", "0", "--flow_map_guidance", "2", "--num_inference_steps", "2")
    for output, more in (
        ("flow-map", ("--max_train_steps", "4")),
        ("interrupted-flow-map", ("--max_train_steps", "2")),
        ("interrupted-flow-map", ("--max_train_steps", "4", "--resume_from_checkpoint", "latest")),
    ):
        result = train(workplace, output, *flags, *more)
        assert result.returncode == 0, result.stderr
    folders = [workplace / output for output in ("interrupted-flow-map", "flow-map")]
    assert_same_checkpoints(*(folder / "checkpoint-4" for folder in folders))
    pipe = FARPipeline.from_pretrained(folders[1])
    assert pipe.transformer.config.flow_map and type(pipe.scheduler).__name__ == "FlowMapEulerDiscreteScheduler"
    assert (pipe.default_inference_steps, pipe.default_guidance_scale) == (2, 1.0)
    assert "flow_map_guidance=2.0" in (folders[1] / "README.md").read_text()
