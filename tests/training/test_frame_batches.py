import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, Image, List, Value
from video_files import gray_frames, write_video

from diffusers_far.data.loading import load_split, stream_split
from diffusers_far.data.rows import BadExampleError
from diffusers_far.training.vae import FrameBatches, StreamedFrames


LENGTHS = (5, 3, 4, 6, 2, 4)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> str:
    """Six trajectories in three files; the 24 frames tell their number."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    numbers = iter(range(24))
    videos = [[np.full((4, 4, 3), next(numbers), np.uint8) for _ in range(length)] for length in LENGTHS]
    (tmp_path / "frames").mkdir()
    for shard in range(3):
        rows = {"video": videos[2 * shard : 2 * shard + 2]}
        Dataset.from_dict(rows, features=Features({"video": List(Image())})).to_parquet(
            tmp_path / "frames" / f"train-{shard}.parquet"
        )
    return str(tmp_path / "frames")


def streamed(folder: str, **changes) -> StreamedFrames:
    arguments = {"batch_size": 4, "block_size": 2, "seed": 0}
    return StreamedFrames(stream_split(folder, "train"), **(arguments | changes))


def numbers(batches) -> list[int]:
    return [number for batch in batches for number in batch[:, 0, 0, 0].tolist()]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_epoch_shows_each_frame_once(folder, is_streamed):
    dataset = load_split(folder, "train")
    frames = streamed(folder) if is_streamed else FrameBatches(dataset, batch_size=4, seed=0)
    batches = list(frames.load(0, 12))
    assert all(batch.shape == (4, 3, 4, 4) and batch.dtype == torch.uint8 for batch in batches)
    epochs = numbers(batches[:6]), numbers(batches[6:])
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(24))
    assert epochs[0] != epochs[1] and epochs[0] != list(range(24))


def test_a_resumed_stream_shows_what_the_uninterrupted_one_did(folder, tmp_path):
    expected = numbers(streamed(folder).load(0, 11))
    accelerator, interrupted = Accelerator(cpu=True), streamed(folder)
    interrupted.save_with(accelerator)
    seen = numbers(interrupted.load(0, 5))
    accelerator.save_state(str(tmp_path / "checkpoint"))
    accelerator, resumed = Accelerator(cpu=True), streamed(folder)
    resumed.save_with(accelerator)
    accelerator.load_state(str(tmp_path / "checkpoint"))
    assert seen + numbers(resumed.load(5, 11)) == expected


def batches_of(folder: str, **changes) -> FrameBatches:
    return FrameBatches(load_split(folder, "train"), **({"batch_size": 6, "seed": 5} | changes))


def test_a_run_that_starts_late_shows_what_the_uninterrupted_one_did(folder):
    whole = numbers(batches_of(folder).load(0, 9))
    assert numbers(batches_of(folder).load(4, 9)) == whole[4 * 6 :]


def test_processes_share_one_global_batch(folder):
    single = [numbers([batch]) for batch in batches_of(folder).load(0, 9)]
    shares = [batches_of(folder, batch_size=3, process_index=index, num_processes=2).load(0, 9) for index in range(2)]
    assert [numbers([first]) + numbers([second]) for first, second in zip(*shares, strict=True)] == single


def test_frames_to_measure_come_from_the_first_trajectories(folder, monkeypatch):
    monkeypatch.setattr("diffusers_far.training.vae.SAMPLED_TRAJECTORIES", 2)
    assert len(streamed(folder).sample) == 8


def test_video_files_are_refused_with_the_cure(tmp_path):
    write_video(tmp_path / "clips" / "a.mp4", gray_frames(3))
    (tmp_path / "clips" / "metadata.jsonl").write_text('{"file_name": "a.mp4"}')
    with pytest.raises(ValueError, match="which holds video files.*far prepare"):
        streamed(str(tmp_path / "clips"))


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_frame_of_another_size_is_named(tmp_path, monkeypatch, is_streamed):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    sizes = [[(8, 8)] * 3, [(8, 8), (8, 8), (8, 12)]]
    rows = {"video": [[np.zeros((*size, 3), np.uint8) for size in video] for video in sizes], "source": ["a", "b.npz"]}
    features = Features({"video": List(Image()), "source": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "frames" / "train.parquet")
    folder = str(tmp_path / "frames")
    with pytest.raises(BadExampleError, match="b.npz"):
        frames = streamed(folder) if is_streamed else FrameBatches(load_split(folder, "train"), batch_size=4, seed=0)
        list(frames.load(0, 9))
