import json
import os
import subprocess

import pytest
import torch
from accelerate import Accelerator

from diffusers_far.training import checkpoints
from diffusers_far.training.checkpoints import (
    describe_changes,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)


IDENTITY = {"learning_rate": 1e-3, "dataset": "abc"}


@pytest.fixture
def run():
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    return accelerator, model, optimizer


def test_a_saved_run_loads_bit_equal(run, tmp_path):
    accelerator, model, optimizer = run
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
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

    monkeypatch.setattr(checkpoints, "_flush_to_disk", killed)
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
        with pytest.raises(RuntimeError, match="step 2 could not be written .* 'checkpoint-1' is intact. Make room"):
            save_checkpoint(accelerator, disk, 2, IDENTITY, 1)
        assert {path.name: path.read_bytes() for path in first.iterdir()} == expected
        assert [path.name for path in disk.iterdir()] == ["checkpoint-1"]
        assert load_checkpoint(accelerator, first, IDENTITY) == 1
        assert model.weight.isfinite().all()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
