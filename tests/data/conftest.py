import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from diffusers import AutoencoderDC


LENGTHS = (5, 3, 4, 6, 2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


@pytest.fixture
def videos() -> list[np.ndarray]:
    """Trajectories of different lengths, (F, 16, 16, 3) uint8, no two frames alike."""
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (length, 16, 16, 3), dtype=np.uint8) for length in LENGTHS]


@pytest.fixture
def trajectories(videos) -> Dataset:
    features = Features({"video": List(Image()), "actions": List(Value("int64")), "seed": Value("int64")})
    columns = {
        "video": [list(video) for video in videos],
        "actions": [list(range(10 * row, 10 * row + len(video))) for row, video in enumerate(videos)],
        "seed": list(range(100, 100 + len(videos))),
    }
    return Dataset.from_dict(columns, features=features)


@pytest.fixture
def vae() -> AutoencoderDC:
    torch.manual_seed(0)
    shared = {"block_out_channels": (8, 8, 16), "layers_per_block": (0, 1, 1), "qkv_multiscales": ((), (), ())}
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in shared.items()}
    return AutoencoderDC(latent_channels=4, scaling_factor=0.5, **sides)
