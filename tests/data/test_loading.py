import pytest

from diffusers_far.data.loading import has_split, load_split, locate_dataset


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        load_split(str(tmp_path / "nowhere"), "train")


def test_an_unknown_split_is_refused_and_the_splits_are_named(trajectories, tmp_path):
    (tmp_path / "dataset").mkdir()
    trajectories.to_parquet(tmp_path / "dataset" / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"'dev'.*\['train'\]"):
        load_split(str(tmp_path / "dataset"), "dev")


def test_a_revision_belongs_to_a_hub_id_and_not_to_a_folder(tmp_path, monkeypatch):
    assert locate_dataset("org/walks@v1") == ("org/walks", "v1")
    assert locate_dataset("org/walks") == ("org/walks", None)
    (tmp_path / "walks@home").mkdir()
    assert locate_dataset(str(tmp_path / "walks@home")) == (str(tmp_path / "walks@home"), None)
    monkeypatch.chdir(tmp_path)
    assert locate_dataset("walks@home") == ("walks@home", None)


def test_a_split_is_there_or_not_and_a_slice_of_it_too(trajectories, tmp_path):
    (tmp_path / "dataset").mkdir()
    trajectories.to_parquet(tmp_path / "dataset" / "train-00000-of-00001.parquet")
    assert has_split(str(tmp_path / "dataset"), "train[:2]") and not has_split(str(tmp_path / "dataset"), "validation")
