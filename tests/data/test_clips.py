"""A clip, and a batch of clips."""

import pytest
import torch
from datasets import List, Value

from diffusers_far.data.clips import Clip, ClipBatch, StoredTrajectory
from diffusers_far.data.rows import BadExampleError
from diffusers_far.data.video_clips import VideoClips
from diffusers_far.models.codec import encode_video


def test_poses_come_with_the_frames_that_were_seen_from_there(trajectories):
    poses = [[[float(frame), 0.0, 10.0 * row] for frame in range(n)] for row, n in enumerate((5, 3, 4, 6, 2))]
    rows = trajectories.add_column("pose", poses, feature=List(List(Value("float64"))))
    clip = VideoClips(rows, conditions=("pose",)).clip(3, 1, 2, interval=3)
    assert clip.pose.tolist() == [[1, 0, 30], [4, 0, 30]] and clip.pose.dtype == torch.float32
    assert clip.actions is None and clip.name == "Trajectory 3"
    assert VideoClips(rows).clip(3, 1, 2).pose is None  # not read where nobody asks


def test_poses_that_do_not_fit_the_frames_are_named():
    trajectory = StoredTrajectory("'a.npz'", [None] * 2, 2, pose=[[0.0, 0.0]] * 2)
    with pytest.raises(BadExampleError, match=r"'a.npz': `pose` has shape \(2, 2\), not \(2, 3\)"):
        trajectory.clip(0, 1)


def test_a_batch_holds_what_its_clips_hold_in_their_order():
    clips = [
        Clip(torch.full((2, 1, 4, 4), float(n)), torch.tensor([n, n]), n, name=f"trajectory {n}") for n in range(3)
    ]
    batch = ClipBatch.stack(clips)
    assert len(batch) == 3 and batch.num_frames == 2 and batch.frames is None and batch.pose is None
    part = batch[1:]
    assert part.labels.tolist() == [1, 2] and part.names == ("trajectory 1", "trajectory 2")
    assert torch.equal(part.latents, batch.latents[1:]) and torch.equal(part.actions, batch.actions[1:])


def test_frames_become_latents_clip_by_clip_and_latents_are_left_alone(vae):
    frames = torch.randint(0, 256, (2, 3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = ClipBatch(frames=frames, actions=torch.zeros(2, 3))
    encoded = batch.encode(vae)
    assert torch.equal(encoded.latents, torch.stack([encode_video(vae, clip) for clip in frames]))
    assert encoded.frames is None and encoded.encode(None) is encoded
    assert torch.equal(batch.video * 255, frames.float())
