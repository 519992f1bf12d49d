import numpy as np
import pytest
import torch

from diffusers_far.data.frames import FrameDataset, evenly_spaced


def test_the_flat_frames_are_those_of_the_trajectories_in_order(trajectories, videos):
    frames = torch.stack([FrameDataset(trajectories)[index] for index in range(20)])
    assert np.array_equal(frames.permute(0, 2, 3, 1).numpy(), np.concatenate(videos))


def test_a_selection_of_rows_is_respected(trajectories, videos):
    frames = FrameDataset(trajectories.select([3, 0]))
    assert len(frames) == 11
    assert frames.locate(6) == (1, 0)
    assert np.array_equal(frames[6].permute(1, 2, 0).numpy(), videos[0][0])


def test_frames_survive_parquet_and_back(trajectories, videos, tmp_path):
    from diffusers_far.data.loading import load_split

    (tmp_path / "dataset" / "data").mkdir(parents=True)
    trajectories.to_parquet(tmp_path / "dataset" / "data" / "train-00000-of-00001.parquet")
    frames = FrameDataset(load_split(str(tmp_path / "dataset"), "train"))
    assert np.array_equal(frames[7].permute(1, 2, 0).numpy(), videos[1][2])


def test_a_missing_column_is_refused_and_the_columns_are_named(trajectories):
    with pytest.raises(ValueError, match="'pictures'.*'video'"):
        FrameDataset(trajectories, "pictures")


def test_a_dataset_without_frames_is_refused(trajectories):
    with pytest.raises(ValueError, match="no frames"):
        FrameDataset(trajectories.select([]))


def test_evenly_spaced_covers_both_ends_without_repeats():
    assert evenly_spaced(10, 4) == [0, 3, 6, 9]
    assert evenly_spaced(3, 100) == [0, 1, 2]
