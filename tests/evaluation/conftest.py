from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_models import tiny_taesd, tiny_transformer

from diffusers_far.evaluation.protocols import McvdProtocol
from diffusers_far.evaluation.results import ResultFolder
from diffusers_far.evaluation.rollouts import MetricNetworks, TrueVideos, run_cases


NUM_VIDEOS, NUM_FRAMES, SIDE = 3, 8, 16


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


@pytest.fixture
def videos() -> np.ndarray:
    """Videos of noise, (NUM_VIDEOS, NUM_FRAMES, SIDE, SIDE, 3) uint8, no two frames alike."""
    shape = (NUM_VIDEOS, NUM_FRAMES, SIDE, SIDE, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def dataset(videos) -> Dataset:
    """With poses of one place, where the walker turns by 20 degrees at each frame."""
    features = Features(
        {
            "video": List(Image()),
            "actions": List(Value("int64")),
            "label": Value("int64"),
            "pose": List(List(Value("float32"))),
        }
    )
    columns = {
        "video": [list(video) for video in videos],
        "actions": [[frame % 3 for frame in range(NUM_FRAMES)] for _ in videos],
        "label": [2, 0, 1],
        "pose": [[[0.0, 0.0, 20.0 * frame] for frame in range(NUM_FRAMES)] for _ in videos],
    }
    return Dataset.from_dict(columns, features=features)


class FakePipeline:
    """Has the parts that identify a pipeline, and in place of a model a function from the arguments of a call to frames."""

    def __init__(self, make_frames, **transformer_config) -> None:
        self.transformer = tiny_transformer(**transformer_config)
        self.vae = tiny_taesd()
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.config = SimpleNamespace(fps=None, flex_rope=None)
        self.make_frames = make_frames
        self.calls = []

    def __call__(self, **arguments):
        self.calls.append(arguments)
        return SimpleNamespace(frames=self.make_frames(**arguments))


def make_noise(*, generator, num_frames, height, width, **arguments) -> torch.Tensor:
    """From each case's own generator."""
    shape = (num_frames, 3, height, width)
    return torch.stack([torch.rand(shape, generator=each) for each in generator])


def make_truth(videos: np.ndarray):
    """Frames of the video whose first frames the context shows."""
    truth = torch.from_numpy(videos).movedim(-1, -3).float() / 255

    def make_frames(*, video, num_frames, **arguments):
        num_context = video.shape[1]
        found = [next(v for v in truth if torch.equal(v[:num_context], context)) for context in video]
        return torch.stack([v[num_context : num_context + num_frames] for v in found])

    return make_frames


class MeanColours(torch.nn.Module):
    """Stands for a network of features: the mean of each channel, (B, 3, h, w) -> (B, 3)."""

    name = "mean colours"

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3)) * self.scale


@pytest.fixture
def truth_pipeline(videos) -> FakePipeline:
    return FakePipeline(make_truth(videos))


@pytest.fixture
def noise_pipeline() -> FakePipeline:
    return FakePipeline(make_noise)


@pytest.fixture
def fake_pipeline():
    return FakePipeline


@pytest.fixture
def networks() -> MetricNetworks:
    return MetricNetworks(image_features=MeanColours())


@pytest.fixture
def protocol() -> McvdProtocol:
    return McvdProtocol(
        num_videos=NUM_VIDEOS,
        num_context_frames=2,
        num_frames=5,
        num_trajectories=2,
        num_feature_frames=4,
        batch_size=4,
        min_revisit_age=3,
        max_recent_age=1,
    )


@pytest.fixture
def evaluate(dataset, networks, tmp_path):
    """Runs all cases of a protocol into a folder, by default a new one."""

    def run(pipe, protocol, networks=networks, folder="results", **arguments) -> ResultFolder:
        results = ResultFolder(tmp_path / folder, {"protocol": protocol.name})
        true_videos = TrueVideos(dataset, protocol, pipe.transformer.config)
        run_cases(pipe, true_videos, protocol, networks, results, **arguments)
        return results

    return run
