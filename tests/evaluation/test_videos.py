from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Video
from video_files import frame_numbers, gray_frames, write_video

from diffusers_far.evaluation.protocols import LatteProtocol, McvdProtocol
from diffusers_far.evaluation.rollouts import TrueVideos


def conditions(**given) -> SimpleNamespace:
    return SimpleNamespace(**({"num_actions": None, "action_dim": None, "num_classes": None} | given))


@pytest.fixture
def short() -> McvdProtocol:
    return McvdProtocol(num_videos=3, num_context_frames=2, num_frames=3, first_context_frame=1)


def test_a_clip_has_the_frames_and_conditions_from_its_start_on(dataset, videos, short):
    clip = TrueVideos(dataset, short, conditions(num_actions=3, num_classes=3)).clip(1, 5)
    torch.testing.assert_close(clip.video * 255, torch.from_numpy(videos[1, 1:6]).movedim(-1, 1).float())
    assert clip.actions.tolist() == [1, 2, 0, 1, 2] and clip.actions.dtype == torch.int64
    assert clip.label == 0 and clip.pose[:, 2].tolist() == [20, 40, 60, 80, 100]


def test_what_the_model_does_not_take_is_not_given(dataset, short):
    clip = TrueVideos(dataset, short, conditions()).clip(0, 5)
    assert clip.actions is None and clip.label is None
    free = LatteProtocol(num_videos=2, num_frames=4, condition="free")
    assert TrueVideos(dataset, free, conditions(num_classes=3)).clip(0, 4).label is None


def test_continuous_actions_are_floats(videos):
    rows = {"video": [list(videos[0])], "actions": [np.linspace(0, 1, 16).reshape(8, 2).tolist()]}
    dataset = Dataset.from_dict(rows).cast_column("video", _images())
    protocol = McvdProtocol(num_videos=1, num_context_frames=1, num_frames=2)
    actions = TrueVideos(dataset, protocol, conditions(action_dim=2)).clip(0, 3).actions
    assert actions.shape == (3, 2) and actions.dtype == torch.float32


def test_video_files_serve_as_images_do_and_an_interval_leaves_frames_out(tmp_path):
    path = write_video(tmp_path / "a.mp4", gray_frames(12))
    dataset = Dataset.from_dict({"video": [str(path)]}).cast_column("video", Video(decode=False))
    protocol = McvdProtocol(num_videos=1, num_context_frames=1, num_frames=2, first_context_frame=1, frame_interval=3)
    frames = TrueVideos(dataset, protocol, conditions()).clip(0, 3).frames
    assert frame_numbers(frames.movedim(1, -1).numpy()) == [1, 4, 7]


def test_videos_that_are_too_short_are_passed_over_and_counted(videos):
    rows = {"video": [list(videos[0][:length]) for length in (8, 2, 8, 8, 4)]}
    dataset = Dataset.from_dict(rows).cast_column("video", _images())
    protocol = McvdProtocol(num_videos=2, num_context_frames=2, num_frames=3)
    true_videos = TrueVideos(dataset, protocol, conditions())
    assert true_videos.rows == [0, 3] and true_videos.num_too_short == 2
    with pytest.raises(ValueError, match="3 of 5 videos have the 5 frames"):
        TrueVideos(dataset, McvdProtocol(num_videos=4, num_context_frames=2, num_frames=3), conditions())


@pytest.mark.parametrize(
    ("settings", "config", "column", "message"),
    [
        ({}, {"num_actions": 3}, "actions", "takes actions"),
        ({}, {"num_classes": 3}, "label", "takes label"),
        ({"frame_interval": 2}, {"num_actions": 3}, None, "combine_actions"),
    ],
)
def test_what_the_model_needs_and_the_dataset_lacks_is_named(dataset, settings, config, column, message):
    protocol = McvdProtocol(num_videos=1, num_context_frames=1, num_frames=1, **settings)
    dataset = dataset.remove_columns([column]) if column else dataset
    with pytest.raises(ValueError, match=message):
        TrueVideos(dataset, protocol, conditions(**config))


def test_a_model_without_classes_generates_freely_or_not_at_all(dataset):
    with pytest.raises(ValueError, match="--condition free"):
        TrueVideos(dataset, LatteProtocol(num_videos=1, num_frames=2), conditions())


def _images():
    from datasets import Image, List

    return List(Image())
