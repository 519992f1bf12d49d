import numpy as np
import pytest
import torch

from diffusers_far.data.rows import ActionCombiner
from diffusers_far.data.video_clips import EncodedDataset
from diffusers_far.models.codec import encode_video


def test_a_clip_is_what_the_vae_makes_of_its_frames(trajectories, videos, vae):
    dataset = EncodedDataset(trajectories, vae)
    assert dataset.latent_shape == (4, 4, 4) and dataset.num_frames.tolist() == [5, 3, 4, 6, 2]
    clip = dataset.clip(3, 2, 3).encode(vae)
    frames = torch.from_numpy(videos[3][2:5]).permute(0, 3, 1, 2)
    assert torch.equal(clip.latents, encode_video(vae, frames))
    assert clip.actions.tolist() == [32, 33, 34] and clip.label is None


def test_skipped_frames_have_their_actions_combined(trajectories, vae):
    dataset = EncodedDataset(trajectories, vae, combine_actions=ActionCombiner("last"))
    assert dataset.clip(0, 0, 2, interval=2).actions.tolist() == [1, 3]
    with pytest.raises(ValueError, match="actions of skipped frames would be lost"):
        EncodedDataset(trajectories, vae).clip(0, 0, 2, interval=2)


def test_the_number_of_actions_is_read_from_the_data(trajectories, vae):
    assert EncodedDataset(trajectories, vae).num_actions == 42
    assert EncodedDataset(trajectories.remove_columns("actions"), vae).num_actions is None


def test_frames_that_the_vae_cannot_encode_are_refused(trajectories, vae):
    small = trajectories.map(lambda row: {"video": [np.asarray(image)[:15] for image in row["video"]]})
    with pytest.raises(ValueError, match="Frames of 15x16 cannot be encoded: the VAE needs multiples of 4"):
        EncodedDataset(small, vae)
