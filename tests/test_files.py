import hashlib

import pytest
import torch

from diffusers_far.files import file_sha256, tensors_sha256, written_whole


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(OSError, match=r"result\.json' was not written .*MiB are free"):
        with written_whole(path) as unfinished:
            unfinished.write_text("half")
            raise OSError(28, "No space left on device")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_never_seen_before_it_is_whole(tmp_path):
    path = tmp_path / "clip.mp4"
    with written_whole(path) as unfinished:
        unfinished.write_text("half")
        assert not path.exists()
        assert unfinished.suffix == ".mp4" and unfinished.parent == tmp_path
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_must_be_new_is_refused_before_and_after_it_is_written(tmp_path):
    path = tmp_path / "walk.safetensors"
    with pytest.raises(ValueError, match="exists and would be overwritten"):
        with written_whole(path, overwrite=False) as unfinished:
            unfinished.write_text("mine")
            path.write_text("another process's")
    assert path.read_text() == "another process's"
    with pytest.raises(ValueError, match="exists and would be overwritten"):
        with written_whole(path, overwrite=False):
            pytest.fail("the work was begun")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder; create it first"):
        with written_whole(tmp_path / "absent" / "walk.safetensors"):
            pytest.fail("the work was begun")


def test_sums_tell_one_flipped_bit(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"\x00" * 3_000_000)
    assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    tensors = {"a": torch.zeros(3, dtype=torch.bfloat16), "b": torch.tensor(1)}
    flipped = {"a": torch.zeros(3, dtype=torch.bfloat16), "b": torch.tensor(0)}
    assert tensors_sha256(tensors) == tensors_sha256(dict(reversed(tensors.items()))) != tensors_sha256(flipped)
    assert tensors_sha256({"a": torch.zeros(3).bool()}) != tensors_sha256({"a": torch.zeros(3, dtype=torch.int8)})


def test_the_sum_of_a_single_element_does_not_depend_on_its_stride():
    strided = torch.arange(15).view(1, 15)[:, 4]
    assert strided.stride() == (15,) and strided.is_contiguous()
    assert tensors_sha256({"a": strided}) == tensors_sha256({"a": torch.tensor([4])})
    assert tensors_sha256({"a": strided[None]}) == tensors_sha256({"a": torch.tensor([[4]])})
