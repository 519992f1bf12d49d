import copy
import errno
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_pipeline, tiny_transformer

from diffusers_far.evaluation.protocols import Case
from diffusers_far.evaluation.results import IDENTITY_FILE, ResultFolder, evaluation_identity
from diffusers_far.models.identity import model_identity


CASE = Case("task", 0, 1, 2)


def test_what_is_added_comes_back_and_nothing_unfinished_stays(tmp_path):
    folder = ResultFolder(tmp_path / "results", {"model": "a"})
    assert not folder.has(CASE)
    folder.add(CASE, {"psnr": torch.arange(3.0), "unseen": torch.tensor([True, False])})
    again = ResultFolder(tmp_path / "results", {"model": "a"})
    assert again.has(CASE) and again.read(CASE)["unseen"].tolist() == [True, False]
    assert [path.name for path in (tmp_path / "results" / "cases").iterdir()] == [f"{CASE.name}.safetensors"]


def test_results_of_another_identity_are_not_continued(tmp_path):
    ResultFolder(tmp_path / "results", {"protocol": {"seeds": (0, 1)}, "model": {"transformer": "a"}})
    ResultFolder(tmp_path / "results", {"protocol": {"seeds": (0, 1)}, "model": {"transformer": "a"}})
    with pytest.raises(ValueError, match=r"`model.transformer` was 'a' and is 'b'"):
        ResultFolder(tmp_path / "results", {"protocol": {"seeds": (0, 1)}, "model": {"transformer": "b"}})
    with pytest.raises(ValueError, match=r"`protocol.seeds` was \[0, 1\] and is \[0\]"):
        ResultFolder(tmp_path / "results", {"protocol": {"seeds": (0,)}, "model": {"transformer": "a"}})


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="other things"):
        ResultFolder(tmp_path, {})
    with pytest.raises(ValueError, match="is a file"):
        ResultFolder(tmp_path / "photo.jpg", {})
    assert not (tmp_path / IDENTITY_FILE).exists()


def test_a_damaged_result_says_what_to_do(tmp_path):
    folder = ResultFolder(tmp_path / "results", {})
    (tmp_path / "results" / "cases" / f"{CASE.name}.safetensors").write_bytes(b"1234")
    with pytest.raises(ValueError, match="delete it"):
        folder.read(CASE)


def test_the_identity_sees_the_smallest_change_of_weights_and_not_the_batch_size(dataset):
    pipe = tiny_pipeline()
    settings = {"num_videos": 2, "batch_size": 3}
    first = evaluation_identity(pipe, dataset, settings, {"lpips": None})
    assert first == evaluation_identity(pipe, dataset, settings | {"batch_size": 1}, {"lpips": None})
    changed = copy.deepcopy(pipe.transformer)
    with torch.no_grad():
        weight = next(changed.parameters()).view(-1)
        weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    assert model_identity(changed) != first["model"]["transformer"] == model_identity(pipe.transformer)
    assert model_identity(tiny_transformer().bfloat16()) != model_identity(tiny_transformer())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_identity_is_named(tmp_path, content):
    ResultFolder(tmp_path / "results", {"model": "a"})
    (tmp_path / "results" / IDENTITY_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=f"{IDENTITY_FILE}' is damaged"):
        ResultFolder(tmp_path / "results", {"model": "a"})


def test_a_result_that_the_disk_has_no_room_for_is_told_with_its_file_and_leaves_nothing(tmp_path, monkeypatch):
    folder = ResultFolder(tmp_path / "results", {})

    def fill_the_disk(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(OSError, match=rf"{CASE.name}.*was not written.*MiB are free"):
        folder.add(CASE, {"psnr": torch.zeros(3)})
    assert not folder.has(CASE) and list((tmp_path / "results" / "cases").iterdir()) == []
