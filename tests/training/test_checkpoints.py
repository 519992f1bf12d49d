import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file

from diffusers_far.training import checkpoints
from diffusers_far.training.checkpoints import (
    checkpoint_states,
    describe_changes,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)


IDENTITY = {"learning_rate": 1e-3, "dataset": "abc"}


@pytest.fixture
def run():
    return start()


def start(**states):
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    checkpoint_states(accelerator, **states)
    return accelerator, model, optimizer


def take_a_step(model, optimizer):
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def test_a_saved_run_loads_bit_equal(run, tmp_path):
    accelerator, model, optimizer = run
    take_a_step(model, optimizer)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    save_checkpoint(accelerator, tmp_path, 7, IDENTITY, None)
    torch.nn.init.zeros_(model.weight)
    assert load_checkpoint(accelerator, find_checkpoint(tmp_path, "latest"), IDENTITY) == 7
    torch.testing.assert_close(dict(model.state_dict()), expected, rtol=0, atol=0)


def test_a_checkpoint_that_was_being_written_is_never_found(run, tmp_path, monkeypatch):
    accelerator, *_ = run
    save_checkpoint(accelerator, tmp_path, 1, IDENTITY, None)

    def killed(path, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "flush_to_disk", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(accelerator, tmp_path, 2, IDENTITY, 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-1"


def test_what_a_killed_save_left_does_not_hinder_the_next(run, tmp_path):
    accelerator, *_ = run
    (tmp_path / "unfinished-checkpoint-2").mkdir()
    (tmp_path / "unfinished-checkpoint-2" / "rubbish").write_text("half")
    checkpoint = save_checkpoint(accelerator, tmp_path, 2, IDENTITY, None)
    assert not (checkpoint / "rubbish").exists()
    assert not (tmp_path / "unfinished-checkpoint-2").exists()


def test_the_newest_checkpoints_by_number_are_kept(run, tmp_path):
    accelerator, *_ = run
    for step in (9, 10, 100):
        save_checkpoint(accelerator, tmp_path, step, IDENTITY, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]


def test_a_folder_in_use_is_refused_unless_resumed(tmp_path):
    (tmp_path / "precious.txt").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        find_checkpoint(tmp_path, None)
    assert find_checkpoint(tmp_path, "latest") is None


def test_an_unknown_checkpoint_is_refused_and_the_known_ones_are_named(run, tmp_path):
    save_checkpoint(run[0], tmp_path, 3, IDENTITY, None)
    with pytest.raises(ValueError, match="checkpoint-3"):
        find_checkpoint(tmp_path, "checkpoint-4")


def test_a_changed_run_is_refused_with_the_difference_named(run, tmp_path):
    checkpoint = save_checkpoint(run[0], tmp_path, 3, IDENTITY, None)
    changed = IDENTITY | {"dataset": "xyz"}
    with pytest.raises(ValueError, match="`dataset` was 'abc' and is 'xyz'"):
        load_checkpoint(run[0], checkpoint, changed)
    assert load_checkpoint(run[0], checkpoint, changed, allow_changes=True) == 3


def test_changes_name_what_was_added_and_removed():
    assert describe_changes({"a": 1}, {"b": 2}) == ["`a` was 1 and is None", "`b` was None and is 2"]
    assert describe_changes(IDENTITY, json.loads(json.dumps(IDENTITY))) == []


class Kept:
    """What a run keeps beside its model."""

    def __init__(self, **state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_states_are_kept_to_the_bit_without_a_pickle(tmp_path):
    model = torch.nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.3)

    def states():
        return {
            "ema": EMAModel(model.parameters(), decay=0.5),
            "lr_scheduler": get_scheduler("cosine", optimizer, num_warmup_steps=3, num_training_steps=7),
            "kept": Kept(nested=[{"share": 0.1, "none": None}, torch.tensor([2**60 + 1])]),
            "absent": None,
        }

    saved, fresh = states(), states()
    with torch.no_grad():
        model.weight.mul_(3)
    saved["ema"].step(model.parameters())
    optimizer.step()
    saved["lr_scheduler"].step()
    accelerator, trained, trained_optimizer = start(**saved)
    take_a_step(trained, trained_optimizer)
    checkpoint = save_checkpoint(accelerator, tmp_path, 1, IDENTITY, None)
    files = {"ema.safetensors", "kept.safetensors", "lr_scheduler.safetensors", "model.safetensors", "optimizer.bin"}
    assert {path.name for path in checkpoint.iterdir()} == files | {"run.json"}

    accelerator, *_ = start(**fresh)
    load_checkpoint(accelerator, checkpoint, IDENTITY)
    for name in ("ema", "lr_scheduler", "kept"):
        torch.testing.assert_close(fresh[name].state_dict(), saved[name].state_dict(), rtol=0, atol=0)


class Crafted:
    """A pickle of it runs code where it is loaded."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


def as_of_format_1(checkpoint):
    """A checkpoint as earlier versions wrote it: no checksums, states and random numbers pickled by Accelerate."""
    run = json.loads((checkpoint / "run.json").read_text())
    (checkpoint / "run.json").write_text(json.dumps({name: run[name] for name in ("step", "identity")}))
    return checkpoint


def test_a_checkpoint_of_an_earlier_version_loads(tmp_path):
    accelerator, *_ = start()
    checkpoint = as_of_format_1(save_checkpoint(accelerator, tmp_path, 1, IDENTITY, None))
    torch.save({"value": torch.ones(2), "steps": 3}, checkpoint / "custom_checkpoint_0.pkl")
    torch.save({"python": [1, 2]}, checkpoint / "random_states_0.pkl")
    kept = Kept(value=torch.zeros(2), steps=0)
    assert load_checkpoint(start(kept=kept)[0], checkpoint, IDENTITY) == 1
    assert kept.state["steps"] == 3 and kept.state["value"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "name",
    [
        "custom_checkpoint_0.pkl",
        "optimizer.bin",
        "random_states_0.pkl",
        "scheduler.bin",
        "sampler.bin",
        "pytorch_model.bin",
        "scaler.pt",
        "dl_state_dict.bin",
    ],
)
def test_no_file_of_a_foreign_checkpoint_runs_code(tmp_path, name):
    accelerator, *_ = start()
    checkpoint = as_of_format_1(save_checkpoint(accelerator, tmp_path / "run", 1, IDENTITY, None))
    torch.save(Crafted(tmp_path / "trace"), checkpoint / name)
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    accelerator, *_ = start(**({"kept": Kept()} if name.startswith("custom") else {}))
    if name in ("custom_checkpoint_0.pkl", "optimizer.bin", "pytorch_model.bin"):
        with pytest.raises(ValueError, match="checkpoint-1' cannot be"):
            load_checkpoint(accelerator, checkpoint, IDENTITY)
    else:
        load_checkpoint(accelerator, checkpoint, IDENTITY)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "shape, message",
    [(None, "holds no `kept`"), ((3,), "`kept` has other tensors: state.value .3,., in this run .2,.")],
)
def test_a_state_that_is_missing_or_does_not_fit_is_named(tmp_path, shape, message):
    states = {} if shape is None else {"kept": Kept(value=torch.zeros(shape))}
    checkpoint = save_checkpoint(start(**states)[0], tmp_path, 1, IDENTITY, None)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(start(kept=Kept(value=torch.zeros(2)))[0], checkpoint, IDENTITY)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def write_garbage(path):
    path.write_bytes(b"garbage")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "kept.safetensors", "run.json"])
@pytest.mark.parametrize("damage", [flip_a_bit, write_garbage, os.unlink, lambda path: os.truncate(path, 0)])
@pytest.mark.parametrize("has_checksums", [True, False])
def test_a_damaged_checkpoint_is_named_with_the_intact_older_one_and_its_flag(tmp_path, name, damage, has_checksums):
    accelerator, model, optimizer = start(kept=Kept(value=torch.zeros(2)))
    take_a_step(model, optimizer)
    for step in (1, 2, 3):
        checkpoint = save_checkpoint(accelerator, tmp_path, step, IDENTITY, None)
    flip_a_bit(tmp_path / "checkpoint-2" / "model.safetensors")
    if not has_checksums:
        as_of_format_1(checkpoint)
        if damage is flip_a_bit and name != "run.json":
            return  # is what checksums are for
    damage(checkpoint / name)
    if (damage, name) == (os.unlink, "run.json"):
        assert find_checkpoint(tmp_path, "latest").name == "checkpoint-2"
        return
    with pytest.raises(ValueError, match="checkpoint-3' cannot be ") as refusal:
        load_checkpoint(accelerator, find_checkpoint(tmp_path, "latest"), IDENTITY)
    message = str(refusal.value)
    assert name in message or not has_checksums
    if has_checksums or name in ("run.json", "optimizer.bin"):
        assert f"'checkpoint-1' is intact: `--resume_from_checkpoint {tmp_path / 'checkpoint-1'}` takes it" in message


@pytest.mark.parametrize(
    "run", ["[]", "null", '{"step": "7"}', '{"step": 1, "identity": {}, "format": 9}', "[" * 10**5]
)
def test_a_run_json_that_is_none_is_refused_by_name(tmp_path, run):
    accelerator, *_ = start()
    checkpoint = save_checkpoint(accelerator, tmp_path, 1, IDENTITY, None)
    (checkpoint / "run.json").write_text(run)
    with pytest.raises(
        ValueError, match="checkpoint-1' cannot be resumed: its 'run.json'.* holds no intact checkpoint"
    ):
        load_checkpoint(accelerator, checkpoint, IDENTITY)


@pytest.mark.parametrize("where", ["model", "optimizer", "state"])
def test_values_that_are_not_finite_never_become_a_checkpoint(tmp_path, where):
    kept = Kept(value=torch.zeros(2))
    accelerator, model, optimizer = start(kept=kept)
    take_a_step(model, optimizer)
    save_checkpoint(accelerator, tmp_path, 1, IDENTITY, 1)
    tensors = {
        "model": model.bias.data,
        "state": kept.state["value"],
        "optimizer": optimizer.state[model.bias]["exp_avg"],
    }
    tensors[where][0] = float("inf")
    with pytest.raises(RuntimeError, match="After step 2 .* is not finite.* 'checkpoint-1' is intact"):
        save_checkpoint(accelerator, tmp_path, 2, IDENTITY, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_checkpoint_that_is_not_finite_is_not_resumed(run, tmp_path):
    accelerator, model, _ = run
    checkpoint = as_of_format_1(save_checkpoint(accelerator, tmp_path, 1, IDENTITY, None))
    save_file({"weight": torch.full((2, 3), float("nan")), "bias": torch.zeros(2)}, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match="'weight' in 'model.safetensors' is not finite.* holds no intact checkpoint"):
        load_checkpoint(accelerator, checkpoint, IDENTITY)


def test_a_checkpoint_is_moved_aside_before_its_place_is_taken(run, tmp_path, monkeypatch):
    accelerator, *_ = run
    save_checkpoint(accelerator, tmp_path, 1, IDENTITY, None)
    rename = Path.rename

    def killed(path, target):
        if path.name.startswith("unfinished-"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(accelerator, tmp_path, 1, IDENTITY, None)
    found = find_checkpoint(tmp_path, "latest")
    assert load_checkpoint(accelerator, found, IDENTITY) == 1


def test_a_run_that_goes_back_keeps_its_new_checkpoints_and_moves_the_later_ones_aside(run, tmp_path):
    accelerator, *_ = run
    for step in (2, 4, 6):
        save_checkpoint(accelerator, tmp_path, step, IDENTITY, None)
    (tmp_path / "checkpoint-4" / "mark").write_text("")
    for step in (4, 6, 3):
        save_checkpoint(accelerator, tmp_path, step, IDENTITY, 2)
    kept = ["checkpoint-3"]
    replaced = [f"replaced-checkpoint-{name}" for name in ("4", "4-again", "6", "6-again")]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept + replaced
    assert (tmp_path / "replaced-checkpoint-4" / "mark").exists()
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-3"


def test_latest_tells_of_what_was_never_finished_before_it_begins_at_step_0(tmp_path, caplog):
    (tmp_path / "unfinished-checkpoint-2").mkdir()
    assert find_checkpoint(tmp_path, "latest") is None
    assert "unfinished-checkpoint-2 was never finished" in caplog.text and "begins at step 0" in caplog.text


@pytest.mark.full
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    try:
        accelerator = Accelerator(cpu=True)
        model = accelerator.prepare(torch.nn.Linear(256, 512))  # half a MiB
        first = save_checkpoint(accelerator, disk, 1, IDENTITY, 1)
        expected = {path.name: path.read_bytes() for path in first.iterdir()}
        with pytest.raises(RuntimeError, match="step 2 could not be written .* 'checkpoint-1' is intact.* Make room"):
            save_checkpoint(accelerator, disk, 2, IDENTITY, 1)
        assert {path.name: path.read_bytes() for path in first.iterdir()} == expected
        assert [path.name for path in disk.iterdir()] == ["checkpoint-1"]
        assert load_checkpoint(accelerator, first, IDENTITY) == 1
        assert model.weight.isfinite().all()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
