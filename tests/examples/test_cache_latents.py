"""`cache_latents.py`, run in this process."""

import logging
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from launched import finish, in_threads, kill_when, start
from tiny_models import tiny_dc


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from cache_latents import main, parse_args  # noqa: E402

from diffusers_far.data.latents import LatentDataset  # noqa: E402
from diffusers_far.data.rows import BadExampleError  # noqa: E402


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A dataset of five trajectories, and a VAE."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    write_dataset(tmp_path / "walks", [[0, 1, 2]] * 5)
    tiny_dc().save_pretrained(tmp_path / "vae")
    return tmp_path


def write_dataset(folder: Path, actions: list, size: tuple[int, int] = (8, 8)) -> None:
    random = np.random.default_rng(0)
    videos = [list(random.integers(0, 256, (3, *size, 3), dtype=np.uint8)) for _ in actions]
    names = [f"{row}.npz" for row in range(len(actions))]
    features = Features({"video": List(Image()), "actions": List(Value("int64")), "source": Value("string")})
    rows = {"video": videos, "actions": actions, "source": names}
    Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")


def cache(workplace: Path, *arguments: str, dataset: str = "walks") -> list[Path]:
    """The shards, after a run."""
    folders = {"dataset_name": workplace / dataset, "vae": workplace / "vae", "output_dir": workplace / "latents"}
    flags = [str(text) for name, value in folders.items() for text in (f"--{name}", value)]
    main(parse_args([*flags, "--trajectories_per_shard", "2", "--device", "cpu", *arguments]))
    return sorted((workplace / "latents" / "train").iterdir())


@pytest.mark.parametrize("streaming", [(), ("--streaming",)])
def test_a_damaged_shard_is_named_and_encoded_again_and_no_other(workplace, caplog, streaming):
    caplog.set_level(logging.INFO)
    shards = cache(workplace, *streaming)
    assert "trajectory 5 of 5" in caplog.messages[-1]
    assert LatentDataset(workplace / "latents").table["source"][4] == "4.npz"
    content = [path.read_bytes() for path in shards]
    flipped = bytearray(content[0])
    flipped[-40] ^= 1
    shards[0].write_bytes(flipped)
    shards[1].write_bytes(content[1][:-8])  # as a full disk leaves it
    (shards[0].parent / "unfinished-7-latents-00002-of-00003.arrow").touch()  # as a kill does
    written = shards[2].stat().st_mtime_ns
    caplog.clear()
    assert cache(workplace, *streaming) == shards
    assert [path.read_bytes() for path in shards] == content and shards[2].stat().st_mtime_ns == written
    for name in ("00000", "00001"):
        assert f"latents-{name}-of-00003.arrow' is damaged" in caplog.text
    assert "latents-00002" not in caplog.text and "4 of 5 trajectories are to be encoded" in caplog.text


@pytest.mark.parametrize("streaming", [(), ("--streaming",)])
@pytest.mark.parametrize("actions", [[0, 1, -1], [0], [0, 1, 2, 1]])
def test_a_row_that_cannot_be_trained_on_is_named_before_it_is_encoded(workplace, streaming, actions):
    write_dataset(workplace / "wrong", [[0, 1, 2]] * 2 + [[0, 1, 2], actions])
    with pytest.raises(BadExampleError, match="3.npz.*`actions"):
        cache(workplace, *streaming, dataset="wrong")
    assert len(list((workplace / "latents" / "train").iterdir())) == (1 if streaming else 0)


@pytest.mark.parametrize("streaming", [(), ("--streaming",)])
def test_several_processes_write_the_shards_of_one(workplace, streaming, monkeypatch, caplog):
    shards = cache(workplace, *streaming)
    content = [path.read_bytes() for path in shards]
    for missing in ([0, 2], [0, 1, 2]):  # of an interrupted run, and all
        for shard in missing:
            shards[shard].unlink()
        caplog.clear()
        in_threads(2, lambda share: cache(workplace, *streaming), monkeypatch)
        assert [path.read_bytes() for path in sorted(shards[0].parent.iterdir())] == content
        assert sum("are to be encoded" in message for message in caplog.messages) == 1


@pytest.mark.full
@pytest.mark.parametrize("streaming", [(), ("--streaming",)])
def test_launched_processes_that_are_killed_and_started_again_write_the_shards_of_one(workplace, streaming):
    write_dataset(workplace / "many", [[0, 1, 2]] * 80)
    content = [path.read_bytes() for path in cache(workplace, *streaming, dataset="many")]
    folder, log = workplace / "latents" / "train", workplace / "log"
    shutil.rmtree(folder)
    processes = start(2, _cache_as_launched, log, workplace, streaming)
    kill_when(lambda: any(folder.glob("latents-*")), processes, log)
    num_left = len(list(folder.glob("latents-*")))
    assert num_left < len(content)
    finish(3, _cache_as_launched, log, workplace, streaming)
    assert [path.read_bytes() for path in sorted(folder.iterdir())] == content


def _cache_as_launched(workplace: Path, streaming: tuple[str, ...]) -> None:
    datasets.config.HF_DATASETS_CACHE = workplace / "datasets-cache"
    cache(workplace, *streaming, dataset="many")
