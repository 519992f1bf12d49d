"""Training scripts that are killed, interrupted, started twice or fed numbers that are none.

Each run is a process that is forked from one which has imported everything already, so that it starts in a moment.
"""

import json
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Features, List, Value
from safetensors.torch import load_file

from benchmarks.studies.scripts import command_line, load_script
from diffusers_far.data.latents import LatentSource, write_shard
from diffusers_far.models.identity import vae_hash
from diffusers_far.training.checkpoints import list_checkpoints
from diffusers_far.training.launch import INTERRUPTED, LOCK_FILE


pytestmark = pytest.mark.full

TRANSFORMER = {
    "num_layers": 1,
    "num_attention_heads": 1,
    "attention_head_dim": 16,
    "axes_dims_rope": [4, 6, 6],
    "patch_size": 2,
    "short_window": 3,
    "num_actions": 3,
    "action_shift": 1,
}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
NUM_KILLS = 20


def write_latents(folder: Path, vae, split: str, faulty: int | None = None) -> None:
    generator = np.random.default_rng(0)
    source = LatentSource(vae_hash(vae), vae.config.scaling_factor, "dataset", 6, 6)
    (folder / split).mkdir(parents=True)
    latents = [generator.standard_normal((8, 4, 4, 4)) for _ in range(6)]
    if faulty is not None:
        latents[faulty][2:6] = np.nan
    actions = pa.table({"actions": [generator.integers(0, 3, 8).tolist() for _ in range(6)]})
    write_shard(
        source.shard_path(folder / split, 0), latents, actions, Features({"actions": List(Value("int64"))}), source
    )


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    from tiny_models import tiny_dc  # here: each run imports this module as well

    folder = tmp_path_factory.mktemp("workplace")
    vae = tiny_dc()
    vae.save_pretrained(folder / "vae")
    for split in ("train", "validation"):
        write_latents(folder / "latents", vae, split)
    write_latents(folder / "faulty-latents", vae, "train", faulty=4)
    (folder / "transformer.json").write_text(json.dumps(TRANSFORMER))
    return folder


def run_far(arguments: dict, log: Path, environment: dict[str, str]) -> None:
    """`train_far.py`, in this process, which becomes the leader of a group as a shell makes one."""
    os.setsid()
    # As in a terminal: tests that are started in the background hand down that it is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["train_far.py"]
    script = load_script("train_far")
    script.main(script.parse_args(command_line(arguments)))


@pytest.fixture(scope="module")
def start(workplace) -> Callable:
    """Starts a run in `output` of the workplace."""
    context = multiprocessing.get_context("forkserver")
    load_script("train_far")
    libraries = ("accelerate", "datasets", "diffusers", "diffusers_far", "peft")
    context.set_forkserver_preload([name for name in sys.modules if name.split(".")[0] in libraries])

    def started(output: str, environment: dict[str, str] | None = None, **changes):
        arguments = {
            "latents_dir": workplace / "latents",
            "vae": workplace / "vae",
            "transformer_config": workplace / "transformer.json",
            "output_dir": workplace / output,
            "num_frames": 6,
            "train_batch_size": 2,
            "learning_rate": 1e-2,
            "lr_warmup_steps": 3,
            "use_ema": True,
            "ema_decay": 0.9,
            "max_train_steps": 40,
            "checkpointing_steps": 2,
            "validation_steps": 1000,
            "num_validation_clips": 2,
            "num_validation_videos": 1,
            "num_validation_frames": 2,
            "num_validation_inference_steps": 1,
            "report_to": "none",
            "resume_from_checkpoint": "latest",
            **changes,
        }
        process = context.Process(target=run_far, args=(arguments, workplace / f"{output}.log", environment or {}))
        process.start()
        return process

    return started


def log_of(workplace: Path, output: str) -> str:
    log = workplace / f"{output}.log"
    return log.read_text() if log.exists() else ""


def wait_for(process, condition: Callable[[], bool]) -> None:
    while not condition():
        assert process.is_alive()
        time.sleep(0.01)


def ended(process) -> int:
    process.join(300)
    return process.exitcode


def assert_same_run(folder: Path, expected: Path) -> None:
    """All that a run leaves is the same to the bit."""
    assert [path.name for path in list_checkpoints(folder)] == [path.name for path in list_checkpoints(expected)]
    last = list_checkpoints(expected)[-1].name
    for name in (WEIGHTS, f"{last}/model.safetensors", f"{last}/ema.safetensors", f"{last}/lr_scheduler.safetensors"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    states = [torch.load(path / last / "optimizer.bin", weights_only=True) for path in (folder, expected)]
    torch.testing.assert_close(states[0]["state"], states[1]["state"], rtol=0, atol=0)


@pytest.fixture(scope="module")
def straight(workplace, start) -> tuple[Path, float]:
    """A run that nothing interrupted, and the seconds that it took."""
    assert ended(start("warm-up", max_train_steps=1)) == 0, log_of(workplace, "warm-up")
    start_time = time.perf_counter()
    assert ended(start("straight")) == 0, log_of(workplace, "straight")
    return workplace / "straight", time.perf_counter() - start_time


def test_runs_that_are_killed_twenty_times_end_as_if_nothing_had_happened(workplace, start, straight):
    expected, seconds = straight
    chance, num_kills, num_runs, steps = random.Random(0), 0, 0, set()
    while num_kills < NUM_KILLS:
        output = f"killed-{num_runs}"
        folder = workplace / output
        before, process = list_checkpoints(folder), start(output)
        if chance.random() < 0.2:
            process.join(chance.uniform(0, seconds / 4))
        else:  # later than its first save, which may be the last of the run
            while process.is_alive() and list_checkpoints(folder)[-1:] == before[-1:]:
                time.sleep(0.005)
            process.join(chance.uniform(0, 0.4))
        if process.is_alive():
            process.kill()
            process.join()
            num_kills += 1
            steps |= {path.name for path in list_checkpoints(workplace / output)}
        else:
            assert process.exitcode == 0, log_of(workplace, output)
            assert_same_run(workplace / output, expected)
            num_runs += 1
    output = f"killed-{num_runs}"
    assert ended(start(output)) == 0, log_of(workplace, output)
    assert_same_run(workplace / output, expected)
    assert (
        not list((workplace / output).glob("unfinished-checkpoint-*"))
        and not (workplace / output / LOCK_FILE).exists()
    )
    assert len(steps) > 3, steps


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_signal_to_all_processes_of_a_run_saves_it_and_it_goes_on_from_there(
    workplace, start, straight, number, num_workers
):
    output = f"{number.name}-{num_workers}"
    process = start(output, max_train_steps=10**6, checkpointing_steps=3, dataloader_num_workers=num_workers)
    wait_for(process, lambda: list_checkpoints(workplace / output))
    os.killpg(process.pid, number)
    assert ended(process) == INTERRUPTED
    log = log_of(workplace, output)
    assert f"{number.name} came" in log and "Traceback" not in log and "KeyboardInterrupt" not in log
    step = int(re.search(r"Stopped after step (\d+)", log)[1])
    assert list_checkpoints(workplace / output)[-1].name == f"checkpoint-{step}"
    assert not (workplace / output / "model_index.json").exists()
    if step < 40:
        assert ended(start(output)) == 0, log_of(workplace, output)
        weights = [load_file(folder / WEIGHTS) for folder in (workplace / output, straight[0])]
        torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_a_signal_to_one_process_of_two_ends_both_with_one_checkpoint(workplace, start):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    processes = [
        start(
            "both",
            address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            max_train_steps=10**6,
            checkpointing_steps=3,
        )
        for rank in range(2)
    ]
    wait_for(processes[0], lambda: list_checkpoints(workplace / "both"))
    os.kill(processes[1].pid, signal.SIGTERM)
    assert [ended(process) for process in processes] == [INTERRUPTED, INTERRUPTED], log_of(workplace, "both")
    assert "a signal came to another process" in log_of(workplace, "both")
    checkpoint = list_checkpoints(workplace / "both")[-1]
    assert f"Stopped after step {checkpoint.name.partition('-')[2]}:" in log_of(workplace, "both")
    assert json.loads((checkpoint / "run.json").read_text())["identity"]["num_processes"] == 2


def test_a_second_start_in_a_folder_is_refused_from_the_first_moment_on(workplace, start):
    first = start("twice", max_train_steps=10**6)
    wait_for(first, (workplace / "twice" / LOCK_FILE).exists)
    second = start("twice", max_train_steps=10**6)
    assert ended(second) == 1 and first.is_alive()
    assert f"is in use by process {first.pid} on " in log_of(workplace, "twice")
    first.kill()
    first.join()
    assert ended(start("twice", max_train_steps=1)) == 0, log_of(workplace, "twice")


def test_resuming_a_finished_run_leaves_its_checkpoint_as_it_is(workplace, start):
    assert ended(start("finished", max_train_steps=2)) == 0
    (checkpoint,) = list_checkpoints(workplace / "finished")
    written = {path.name: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    assert ended(start("finished", max_train_steps=2)) == 0
    assert {path.name: path.stat().st_mtime_ns for path in checkpoint.iterdir()} == written


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"learning_rate": 1e20, "max_train_steps": 1},
            "The validation after step 1 gave .*nan.* holds no other intact checkpoint",
        ),
        ({"latents_dir": "faulty-latents"}, "The data are not finite: NaN or infinite values in trajectory 4"),
    ],
    ids=["validation", "data"],
)
def test_a_run_whose_numbers_are_none_fails_and_leaves_no_pipeline(workplace, start, changes, message):
    output = f"numbers-{'-'.join(changes)}-{changes.get('learning_rate')}"
    if "latents_dir" in changes:
        changes = {"latents_dir": workplace / changes["latents_dir"]}
    process = start(output, lr_warmup_steps=0, max_grad_norm=1e30, **changes)
    assert ended(process) == 1
    log = log_of(workplace, output)
    assert re.search(message, log), log
    assert not (workplace / output / "model_index.json").exists() and not (workplace / output / "README.md").exists()
