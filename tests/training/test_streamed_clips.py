"""The batches of a training on a stream: what they hold, and that a resumed run sees those of an uninterrupted one."""

import json
import pickle
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, Image, List, Value
from tiny_models import tiny_dc
from video_files import frame_numbers, gray_frames, write_video

from diffusers_far.data.loading import stream_split
from diffusers_far.data.rows import ActionCombiner, BadExampleError
from diffusers_far.data.video_clips import StreamedClips
from diffusers_far.models.codec import encode_video
from diffusers_far.training.clips import encode_batches
from diffusers_far.training.objective import TrainingObjective
from diffusers_far.training.streaming import StreamedBatches


SIZES = {"num_frames": 6, "short_window": 2, "interval": 1, "batch_size": 2, "num_accumulated": 1, "seed": 0}
NUM_TRAJECTORIES = 12


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four parquet files of three trajectories of 8 to 10 frames; each frame tells its number, its action and its place."""
    folder, features = (
        tmp_path_factory.mktemp("stream"),
        Features({"video": List(Image()), "actions": List(Value("int64"))}),
    )
    for shard in range(4):
        rows = {"video": [], "actions": []}
        for number in range(3 * shard, 3 * shard + 3):
            frames = np.arange(8 + number % 3, dtype=np.uint8)
            rows["video"].append([np.full((8, 8, 3), 20 * number + frame, np.uint8) for frame in frames])
            rows["actions"].append((frames % 3).tolist())
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"train-{shard}-of-4.parquet")
    return folder


@pytest.fixture(scope="module")
def clips(folder) -> StreamedClips:
    return StreamedClips(stream_split(str(folder), "train"), tiny_dc(), num_actions=3)


def batches_of(clips: StreamedClips, **changes) -> StreamedBatches:
    return StreamedBatches(clips, TrainingObjective(), **({"block_size": 4} | SIZES | changes))


def assert_same_batches(batches, expected) -> None:
    assert len(batches) == len(expected)
    for (clips, draw), (expected_clips, expected_draw) in zip(batches, expected):
        assert torch.equal(clips.frames, expected_clips.frames)
        assert torch.equal(clips.actions, expected_clips.actions)
        assert torch.equal(draw.noise, expected_draw.noise) and torch.equal(draw.timestep, expected_draw.timestep)


def test_a_clip_is_a_run_of_frames_with_the_actions_that_were_taken_there(clips):
    for batch, _ in batches_of(clips).load(0, 20):
        values = batch.frames[:, :, 0, 0, 0].long()
        places = values % 20
        assert (places.diff(dim=1) == 1).all() and torch.equal(batch.actions, places % 3)
        assert (values // 20 == values[:, :1] // 20).all()


def test_every_trajectory_is_drawn_once_an_epoch_as_often_as_is_asked_for(clips):
    for clips_per_trajectory in (1, 2):
        loaded = batches_of(clips, clips_per_trajectory=clips_per_trajectory).load(0, 6 * clips_per_trajectory)
        seen = torch.cat([batch.frames[:, 0, 0, 0, 0] // 20 for batch, _ in loaded]).tolist()
        assert sorted(seen) == sorted(list(range(NUM_TRAJECTORIES)) * clips_per_trajectory)


def test_batches_have_the_lengths_that_the_steps_of_any_run_have(clips):
    batches = batches_of(clips)
    lengths = [batch.frames.shape[1] for batch, _ in batches.load(0, 20)]
    assert lengths == [batches.clip_length(step) for step in range(20)] and set(lengths) == {2, 3, 4, 5, 6}
    assert {batch.frames.shape[1] for batch, _ in batches.longest.load(0, 4)} == {6}


def test_frames_lie_an_interval_apart_and_their_actions_are_combined(folder):
    combined = StreamedClips(stream_split(str(folder), "train"), tiny_dc(), ActionCombiner("last"), num_actions=3)
    batch, _ = next(batches_of(combined, num_frames=3, interval=3).load(0, 1))
    values = batch.frames[:, :, 0, 0, 0].long() % 20
    assert (values.diff(dim=1) == 3).all()
    assert torch.equal(batch.actions[:, :-1], (values[:, :-1] + 2) % 3)


def test_videos_are_encoded_clip_by_clip(clips):
    vae = tiny_dc()
    (videos, _), (encoded, _) = (
        next(batches_of(clips).load(0, 1)),
        next(encode_batches(batches_of(clips).load(0, 1), vae)),
    )
    assert torch.equal(encoded.latents, torch.stack([encode_video(vae, frames) for frames in videos.frames]))
    assert encoded.latents.shape[2:] == clips.latent_shape


@pytest.mark.parametrize("num_accumulated", [1, 2])
def test_a_resumed_run_sees_what_the_uninterrupted_one_saw(clips, num_accumulated, tmp_path):
    expected = list(batches_of(clips, num_accumulated=num_accumulated).load(0, 15))
    accelerator, interrupted = Accelerator(cpu=True), batches_of(clips, num_accumulated=num_accumulated)
    interrupted.save_with(accelerator)
    seen = list(islice(interrupted.load(0, 15), 7 * num_accumulated))
    accelerator.save_state(str(tmp_path / "checkpoint"))

    accelerator, resumed = Accelerator(cpu=True), batches_of(clips, num_accumulated=num_accumulated)
    resumed.save_with(accelerator)
    accelerator.load_state(str(tmp_path / "checkpoint"))
    assert_same_batches(seen + list(resumed.load(7, 15)), expected)


def test_a_checkpoint_of_another_stream_is_begun_anew_and_says_so(clips, tmp_path, caplog):
    accelerator, first = Accelerator(cpu=True), batches_of(clips)
    first.save_with(accelerator)
    list(first.load(0, 3))
    accelerator.save_state(str(tmp_path / "checkpoint"))
    accelerator, other = Accelerator(cpu=True), batches_of(clips, seed=1)
    other.save_with(accelerator)
    accelerator.load_state(str(tmp_path / "checkpoint"))
    assert other.position == other.stream.start
    assert "it begins anew" in caplog.text


def test_each_process_saves_its_own_position(clips, tmp_path):
    accelerator = Accelerator(cpu=True)
    for index in range(2):
        batches = batches_of(clips, process_index=index, num_processes=2)
        batches.save_with(accelerator)
        list(batches.load(0, 1 + index))
    accelerator.save_state(str(tmp_path / "checkpoint"))
    saved = [json.loads((tmp_path / "checkpoint" / f"stream-{index}.json").read_text()) for index in range(2)]
    assert saved[0]["lanes"] != saved[1]["lanes"] and [each["num_served"] for each in saved] == [2, 4]


def test_what_is_sent_to_a_process_loads_the_same_and_has_no_vae(clips):
    sent = pickle.loads(pickle.dumps(batches_of(clips)))
    assert "_first" not in vars(sent.clips)
    assert_same_batches(list(sent.load(0, 5)), list(batches_of(clips).load(0, 5)))


@pytest.mark.full
def test_the_number_of_worker_processes_changes_nothing_not_even_when_a_run_is_resumed_with_another(clips):
    expected = list(batches_of(clips).load(0, 12))
    for num_workers in (1, 3):
        assert_same_batches(list(batches_of(clips).load(0, 12, num_workers)), expected)
    batches = batches_of(clips)
    seen = list(islice(batches.load(0, 12, num_workers=2), 5))  # what was read ahead is forgotten
    assert_same_batches(seen + list(batches.load(5, 12)), expected)


@pytest.mark.full
def test_a_damaged_file_stops_the_run_with_its_name_also_from_another_process(tmp_path):
    write_video(tmp_path / "clips" / "good.mp4", gray_frames(8))
    write_video(tmp_path / "clips" / "bad.mp4", gray_frames(8))
    lines = [json.dumps({"file_name": name, "label": 0}) for name in ("good.mp4", "bad.mp4")]
    (tmp_path / "clips" / "metadata.jsonl").write_text("\n".join(lines))
    clips = StreamedClips(stream_split(str(tmp_path / "clips"), "train"), tiny_dc())
    batch, _ = next(batches_of(clips, num_frames=4, short_window=None).load(0, 1))
    assert all((np.diff(frame_numbers(frames)) == 1).all() for frames in batch.frames.permute(0, 1, 3, 4, 2))
    (tmp_path / "clips" / "bad.mp4").write_bytes(b"nothing")
    for num_workers in (0, 1):
        with pytest.raises(ValueError, match="bad.mp4"):
            list(batches_of(clips).load(0, 4, num_workers))


def test_actions_that_were_not_announced_are_refused(folder):
    split = stream_split(str(folder), "train")
    with pytest.raises(ValueError, match="`--num_actions` is missing"):
        StreamedClips(split, tiny_dc())
    with pytest.raises(ValueError, match="has the action 2, but `--num_actions` is 2"):
        list(batches_of(StreamedClips(split, tiny_dc(), num_actions=2)).load(0, 1))


def test_wrong_sizes_are_refused(clips):
    with pytest.raises(ValueError, match="`clips_per_trajectory` is 0"):
        batches_of(clips, clips_per_trajectory=0)
    with pytest.raises(ValueError, match="No trajectory of the stream has 11 frames"):
        list(batches_of(clips, num_frames=11).load(0, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"actions": [0, -1, *[0] * 7]}, r"`actions\[1\]` is -1"),
        ({"actions": [0] * 4}, "`actions` has 4 for 9 frames"),
        ({"label": 2}, "has the label 2, but there are 2 classes"),
        ({"label": -1}, "has the label -1"),
        ({"video": [np.zeros((8, 12, 3), np.uint8)] * 9}, r"has frames of \(8, 12\)"),
        ({"video": [np.zeros((8, 8 + frame % 2, 3), np.uint8) for frame in range(9)]}, "cannot be read"),
    ],
)
def test_a_row_of_a_stream_is_looked_at_as_it_comes_and_named(tmp_path, change, message):
    types = {
        "video": List(Image()),
        "actions": List(Value("int64")),
        "label": Value("int64"),
        "source": Value("string"),
    }
    good = {"video": [np.zeros((8, 8, 3), np.uint8)] * 9, "actions": [0] * 9, "label": 1, "source": "a.npz"}
    rows = [good, good | change | {"source": "b.npz"}]
    Dataset.from_list(rows, features=Features(types)).to_parquet(tmp_path / "train.parquet")
    clips = StreamedClips(stream_split(str(tmp_path), "train"), tiny_dc(), num_actions=2)
    clips.check_rows(num_actions=2, num_classes=2)
    with pytest.raises(BadExampleError, match=f"b.npz.*{message}"):
        for _ in batches_of(clips).load(0, 4):
            pass
