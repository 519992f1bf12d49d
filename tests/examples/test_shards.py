"""`train_far.py` and `train_far_lora.py` with the model in shards over two processes.

Accelerate shards on accelerators only. Here its state says that it does so on the CPU as well; all else is as on GPUs.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import launched
import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Features, List, Value
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from benchmarks.studies.scripts import command_line, load_script
from diffusers_far import FARPipeline
from diffusers_far.data.latents import LatentSource, write_shard
from diffusers_far.models.identity import vae_hash
from diffusers_far.training.checkpoints import list_checkpoints
from diffusers_far.training.run import TrainingRun


pytestmark = pytest.mark.full

NUM_STEPS, SAVED_STEP = 6, 3
TOLERANCE = {"rtol": 0, "atol": 1e-6}
TRANSFORMER = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": [4, 6, 6],
    "patch_size": 1,
    "long_patch_size": 2,
    "short_window": 3,
    "num_actions": 3,
    "action_shift": 1,
}
SETTINGS = {
    "num_frames": 7,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 2,
    "max_train_steps": NUM_STEPS,
    "checkpointing_steps": SAVED_STEP,
    "validation_steps": 2,
    "num_validation_clips": 2,
    "num_validation_videos": 1,
    "num_validation_frames": 2,
    "num_validation_inference_steps": 1,
    "report_to": "none",
}
OF_A_SCRIPT = {
    "train_far": {"use_ema": True, "ema_decay": 0.9, "gradient_accumulation_steps": 2},
    "train_far_lora": {"rank": 2, "target_modules": "attention"},
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    from tiny_models import tiny_dc, tiny_pipeline, tiny_transformer  # here: each run imports this module as well

    folder, vae = tmp_path_factory.mktemp("workplace"), tiny_dc()
    vae.save_pretrained(folder / "vae")
    (folder / "transformer.json").write_text(json.dumps(TRANSFORMER))
    base = tiny_transformer(num_actions=3, action_shift=1, long_patch_size=2, trained_frames=7)
    tiny_pipeline(base, vae, fps=5, height=16, width=16).save_pretrained(folder / "base")
    generator = np.random.default_rng(0)
    source = LatentSource(vae_hash(vae), vae.config.scaling_factor, "dataset", 8, 8)
    latents = [generator.standard_normal((9, 4, 4, 4)) for _ in range(8)]
    actions = pa.table({"actions": [generator.integers(0, 3, 9).tolist() for _ in range(8)]})
    for split in ("train", "validation"):
        (folder / "latents" / split).mkdir(parents=True)
        shard = source.shard_path(folder / "latents" / split, 0)
        write_shard(shard, latents, actions, Features({"actions": List(Value("int64"))}), source)
    return folder


def shard_on_cpu() -> None:
    start = AcceleratorState.__init__

    def started(state, *args, **kwargs):
        start(state, *args, **kwargs)
        if "fsdp_plugin" not in state.__dict__:
            plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
            if state.mixed_precision != "no":
                plugin.set_mixed_precision(state.mixed_precision)
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = started


def train(name: str, arguments: dict, is_sharded: bool) -> None:
    """A training script in this process; the loss of each step goes to a file beside its output."""
    output, log = Path(arguments["output_dir"]), TrainingRun.log

    def logged(run, outcome, **figures):
        log(run, outcome, **figures)
        assert all(isinstance(each, DTensor) == is_sharded for each in run.network.parameters())
        if run.is_main:
            with open(output.with_suffix(".losses"), "a") as file:
                file.write(json.dumps([run.finished, outcome.loss, float(run.gradient_norm)]) + "\n")

    TrainingRun.log = logged
    if is_sharded:
        shard_on_cpu()
    sys.argv = [f"{name}.py"]
    script = load_script(name)
    script.main(script.parse_args(command_line(arguments)))


@pytest.fixture(scope="module")
def start(workplace) -> Callable:
    """Starts a run in `output` of the workplace; gives its processes."""
    for name in OF_A_SCRIPT:
        load_script(name)  # imports what each process needs

    def started(output: str, num_processes: int = 2, is_sharded: bool = False, name: str = "train_far", **changes):
        is_lora = name == "train_far_lora"
        models = {"vae": workplace / "vae", "transformer_config": workplace / "transformer.json"}
        arguments = {
            **({"pretrained_model_name_or_path": workplace / "base"} if is_lora else models),
            "latents_dir": workplace / "latents",
            "output_dir": workplace / output,
            "train_batch_size": 4 // num_processes,
            **SETTINGS,
            **OF_A_SCRIPT[name],
            **changes,
        }
        return launched.start(num_processes, train, log_file(workplace / output), name, arguments, is_sharded)

    return started


@pytest.fixture(scope="module")
def finish(start, workplace) -> Callable:
    """Runs to the end; gives the folder."""

    def finished(output: str, *args, **kwargs) -> Path:
        launched.wait_for(start(output, *args, **kwargs), log_file(workplace / output))
        return workplace / output

    return finished


def log_file(folder: Path) -> Path:
    return folder.with_suffix(".log")


def log_of(folder: Path) -> str:
    return log_file(folder).read_text()


def losses_of(folder: Path) -> torch.Tensor:
    """`(steps, 3)`: step, loss and norm of the gradient, of the last time that the step was done."""
    rows = {row[0]: row for row in map(json.loads, folder.with_suffix(".losses").read_text().splitlines())}
    return torch.tensor([rows[step] for step in sorted(rows)])


def tables_of(folder: Path) -> list[str]:
    """The rows of all tables of held-out figures."""
    rows = ("  noise level ", "  loss ", "  predicted frame ", "  PSNR, dB: model ", "    repeating the last frame ")
    return [line for line in log_of(folder).splitlines() if line.startswith(rows)]


def assert_same_state(folder: Path, expected: Path, **tolerance) -> None:
    """The last checkpoints hold the same weights, averages and optimizer's figures, in the same files."""
    last, wanted = (list_checkpoints(path)[-1] for path in (folder, expected))
    assert last.name == wanted.name
    assert {path.name for path in last.iterdir()} == {path.name for path in wanted.iterdir()}
    for path in wanted.glob("*.safetensors"):
        torch.testing.assert_close(load_file(last / path.name), load_file(path), **tolerance)
    states = [torch.load(path / "optimizer.bin", weights_only=True) for path in (last, wanted)]
    torch.testing.assert_close(states[0], states[1], **tolerance)


@pytest.fixture(scope="module")
def sharded(finish) -> Path:
    return finish("sharded", is_sharded=True)


def test_shards_train_and_average_as_whole_models_and_as_one_process(finish, sharded):
    whole, alone = finish("whole"), finish("alone", num_processes=1)
    assert len(losses_of(sharded)) == NUM_STEPS
    for expected in (whole, alone):
        torch.testing.assert_close(losses_of(sharded), losses_of(expected), rtol=1e-6, atol=0)
        assert_same_state(sharded, expected, **TOLERANCE)
    assert "2 processes on cpu, the model in shards (FSDP 2), mixed precision no, global batch 8" in log_of(sharded)
    measured = [tables_of(folder) for folder in (sharded, whole, alone)]
    assert len(measured[0]) == 3 * 5 and measured[0] == measured[1] == measured[2]


def test_the_pipeline_of_shards_is_whole_and_has_the_averaged_weights(sharded):
    pipe = FARPipeline.from_pretrained(sharded)
    assert type(pipe.transformer).__name__ == "FARTransformer3DModel"
    assert json.loads((sharded / "transformer/config.json").read_text())["condition_dropout"] == 0.1
    averages = load_file(list_checkpoints(sharded)[-1] / "ema.safetensors")
    averages = [averages[f"state.shadow_params.{number}"] for number in range(len(averages))]
    torch.testing.assert_close([*pipe.transformer.parameters()], averages, rtol=0, atol=0, check_stride=False)
    assert (sharded / "sample.mp4").is_file() and "PSNR" in (sharded / "README.md").read_text()


def test_shards_that_are_killed_and_started_again_end_as_if_nothing_had_happened(start, finish, sharded, workplace):
    killed = workplace / "killed"
    processes = start("killed", is_sharded=True)
    launched.kill_when(lambda: list_checkpoints(killed), processes, log_file(killed))
    finish("killed", is_sharded=True, resume_from_checkpoint="latest")
    assert_same_state(workplace / "killed", sharded, rtol=0, atol=0)


@pytest.mark.parametrize("begun, gone_on", [("sharded", "alone"), ("alone", "sharded")])
def test_a_run_goes_on_with_another_number_of_processes_in_shards_or_not(
    finish, sharded, workplace, begun, gone_on, tmp_path
):
    if not (workplace / "alone").is_dir():
        finish("alone", num_processes=1)
    shutil.copytree(workplace / begun / f"checkpoint-{SAVED_STEP}", tmp_path / f"checkpoint-{SAVED_STEP}")
    num_processes = {"sharded": 2, "alone": 1}[gone_on]
    folder = finish(
        f"{begun}-then-{gone_on}",
        num_processes,
        gone_on == "sharded",
        resume_from_checkpoint=tmp_path / f"checkpoint-{SAVED_STEP}",
        allow_changed_run=True,
    )
    assert len(losses_of(folder)) == NUM_STEPS - SAVED_STEP
    torch.testing.assert_close(losses_of(folder), losses_of(sharded)[SAVED_STEP:], rtol=1e-6, atol=0)
    assert_same_state(folder, sharded, **TOLERANCE)


def test_half_precision_is_that_of_whole_models(finish):
    folders = [
        finish(f"half-{is_sharded}", is_sharded=is_sharded, mixed_precision="bf16") for is_sharded in (True, False)
    ]
    losses = [losses_of(folder) for folder in folders]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)


def test_an_adapter_learns_in_shards_what_it_learns_beside_a_whole_model(finish):
    folders = [
        finish(f"adapter-{is_sharded}", is_sharded=is_sharded, name="train_far_lora") for is_sharded in (True, False)
    ]
    torch.testing.assert_close(*map(losses_of, folders), rtol=1e-6, atol=0)
    assert_same_state(*folders, **TOLERANCE)
    adapters = [load_file(folder / "pytorch_lora_weights.safetensors") for folder in folders]
    torch.testing.assert_close(*adapters, **TOLERANCE)
