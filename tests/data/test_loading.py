import pytest

from diffusers_far.data.loading import load_split


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        load_split(str(tmp_path / "nowhere"), "train")


def test_an_unknown_split_is_refused_and_the_splits_are_named(trajectories, tmp_path):
    (tmp_path / "dataset").mkdir()
    trajectories.to_parquet(tmp_path / "dataset" / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"'dev'.*\['train'\]"):
        load_split(str(tmp_path / "dataset"), "dev")
