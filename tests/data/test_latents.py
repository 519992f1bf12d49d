import errno
import json
import logging
import pickle

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Features, Value, load_dataset

from diffusers_far.data.latents import LatentDataset, LatentSource, read_source, require_intact, write_shard
from diffusers_far.models.identity import vae_hash


@pytest.fixture
def arrays() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.standard_normal((length, 4, 2, 3)).astype(np.float16) for length in (5, 3, 4, 6, 2)]


@pytest.fixture
def latents_dir(arrays, trajectories, vae, tmp_path):
    source = LatentSource(vae_hash(vae), 0.5, "dataset", num_trajectories=5, trajectories_per_shard=2)
    (tmp_path / "latents" / "train").mkdir(parents=True)
    carried = trajectories.remove_columns("video")
    for shard in range(source.num_shards):
        rows = source.shard_rows(shard)
        write_shard(
            source.shard_path(tmp_path / "latents" / "train", shard),
            [arrays[row] for row in rows],
            carried.select(rows).with_format("arrow")[:],
            carried.features,
            source,
        )
    return tmp_path / "latents"


def test_every_clip_is_the_slice_of_what_was_written(latents_dir, arrays):
    latents = LatentDataset(latents_dir)
    assert len(latents) == 5 and latents.latent_shape == (4, 2, 3)
    assert latents.num_frames.tolist() == [5, 3, 4, 6, 2]
    for row, array in enumerate(arrays):
        for start in range(len(array)):
            for length in range(1, len(array) - start + 1):
                clip = latents.clip(row, start, length)
                assert clip.latents.dtype == torch.float32
                assert np.array_equal(clip.latents.numpy(), array[start : start + length])
                assert clip.actions.tolist() == list(range(10 * row + start, 10 * row + start + length))


def test_an_interval_skips_frames_and_combines_all_their_actions(latents_dir, arrays):
    latents = LatentDataset(latents_dir, combine_actions=lambda actions: actions.sum(1))
    clip = latents.clip(3, 1, 2, interval=3)
    assert np.array_equal(clip.latents.numpy(), arrays[3][1:5:3])
    # Frames 1 and 4: actions 31 + 32 + 33, then 34 + 35 and the last one again, as the trajectory ends.
    assert clip.actions.tolist() == [96, 104]


def test_an_interval_that_would_lose_actions_is_refused(latents_dir):
    with pytest.raises(ValueError, match="combine_actions"):
        LatentDataset(latents_dir).clip(3, 0, 2, interval=3)


@pytest.mark.parametrize("place", [(1, 0, 4), (1, 2, 2), (1, -1, 1), (1, 0, 0), (5, 0, 1), (-1, 0, 1)])
def test_a_clip_outside_its_trajectory_is_refused(latents_dir, place):
    with pytest.raises(ValueError, match="trajectory"):
        LatentDataset(latents_dir).clip(*place)


def test_datasets_opens_the_same_folder(latents_dir, arrays):
    rows = load_dataset(str(latents_dir), split="train").with_format("numpy")
    assert rows.column_names == ["latents", "actions", "seed"]
    assert np.array_equal(rows[2]["latents"], arrays[2])
    assert rows[2]["seed"] == 102


def test_latents_of_another_vae_are_refused_with_both_hashes_and_the_cure(latents_dir, vae):
    latents = LatentDataset(latents_dir)
    latents.require_vae(vae)
    made_with = vae_hash(vae)
    vae.register_to_config(scaling_factor=0.25)
    with pytest.raises(ValueError, match=f"{made_with}.*{vae_hash(vae)}.*cache_latents"):
        latents.require_vae(vae)


def test_missing_shards_are_named(latents_dir):
    (latents_dir / "train" / "latents-00001-of-00003.arrow").unlink()
    with pytest.raises(ValueError, match="lacks 1 of 3.*latents-00001-of-00003"):
        LatentDataset(latents_dir)


def test_a_missing_split_is_refused(latents_dir):
    with pytest.raises(ValueError, match="cache_latents"):
        LatentDataset(latents_dir, "validation")


def test_shards_of_different_sources_are_refused(latents_dir, arrays, trajectories):
    path = latents_dir / "train" / "latents-00002-of-00003.arrow"
    source = read_source(path)
    other = LatentSource("another", *list(vars(source).values())[1:])
    carried = trajectories.remove_columns("video").select([4])
    write_shard(path, arrays[4:], carried.with_format("arrow")[:], carried.features, other)
    with pytest.raises(ValueError, match="different sources"):
        LatentDataset(latents_dir)


@pytest.mark.parametrize("kept", [0, 100, 0.9])
def test_a_truncated_shard_is_named(latents_dir, kept):
    path = latents_dir / "train" / "latents-00001-of-00003.arrow"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match="latents-00001-of-00003"):
        LatentDataset(latents_dir)


def test_a_worker_process_gets_the_path_and_not_the_latents(latents_dir):
    latents = LatentDataset(latents_dir)
    pickled = pickle.dumps(latents)
    assert len(pickled) < 1000
    assert torch.equal(pickle.loads(pickled).clip(0, 0, 2).latents, latents.clip(0, 0, 2).latents)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_codes_come_back_as_whole_numbers(dtype, tmp_path):
    largest = np.iinfo(dtype).max  # of 16 bits: more than a float16 could keep
    codes = [
        np.array([largest, 0, largest - 1, 1], dtype=dtype).reshape(2, 1, 1, 2),
        np.ones((1, 1, 1, 2), dtype=dtype),
    ]
    source = LatentSource("vq", 1.0, "dataset", num_trajectories=2, trajectories_per_shard=2)
    (tmp_path / "train").mkdir()
    path = source.shard_path(tmp_path / "train", 0)
    write_shard(path, codes, pa.table({"label": [3, 4]}), Features({"label": Value("int64")}), source)
    dataset = LatentDataset(tmp_path)
    assert dataset.latent_shape == (1, 1, 2)
    clip = dataset.clip(0, 0, 2)
    assert clip.latents.dtype == torch.int64
    assert clip.latents.flatten().tolist() == [largest, 0, largest - 1, 1]
    assert np.array_equal(load_dataset(str(tmp_path), split="train").with_format("numpy")[1]["latents"], codes[1])


@pytest.mark.parametrize("place", [300, 0.5, 0.8, -1])
def test_a_flipped_bit_is_told_with_the_shards_name_before_a_clip_of_it_is_given(latents_dir, place):
    path = latents_dir / "train" / "latents-00001-of-00003.arrow"
    content = bytearray(path.read_bytes())
    content[int(place * len(content)) if isinstance(place, float) else place] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match="latents-00001-of-00003.arrow' is damaged.*cache_latents.py"):
        latents = LatentDataset(latents_dir)
        latents.clip(0, 0, 2)  # the other shards are as they were
        latents.clip(2, 0, 2)


def test_a_shard_that_lost_its_last_bytes_is_not_intact(latents_dir):
    path = latents_dir / "train" / "latents-00001-of-00003.arrow"
    require_intact(path)
    path.write_bytes(path.read_bytes()[:-8])  # the mark of its end, without which it can be read
    with pytest.raises(ValueError, match="latents-00001-of-00003.arrow' is damaged"):
        require_intact(path)


def test_a_shard_is_read_whole_once_and_not_when_the_split_is_opened(latents_dir, monkeypatch):
    checked = []
    monkeypatch.setattr("diffusers_far.data.latents.require_intact", lambda path: checked.append(path.name))
    latents = LatentDataset(latents_dir)
    assert checked == []
    for _ in range(2):
        latents.clip(3, 0, 2)
        latents.clip(2, 0, 2)
    assert checked == ["latents-00001-of-00003.arrow"]


def write_without_sum(path) -> None:
    """As older versions wrote it."""
    table = pa.ipc.open_stream(path.read_bytes()).read_all()
    description = json.loads(table.schema.metadata[b"diffusers_far"])
    del description["sha256"]
    table = table.replace_schema_metadata(table.schema.metadata | {b"diffusers_far": json.dumps(description).encode()})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def test_shards_of_older_versions_are_read_with_a_note_that_they_carry_no_sum(latents_dir, arrays, caplog):
    write_without_sum(latents_dir / "train" / "latents-00001-of-00003.arrow")
    with caplog.at_level(logging.INFO):
        latents = LatentDataset(latents_dir)
    assert "1 of 3 shards" in caplog.text and "no sha256" in caplog.text
    assert np.array_equal(latents.clip(2, 0, 4).latents, arrays[2].astype(np.float32))


def test_a_full_disk_leaves_no_shard_and_is_told_with_the_shards_name(latents_dir, arrays, trajectories, monkeypatch):
    path = latents_dir / "train" / "latents-00002-of-00003.arrow"
    source, carried = read_source(path), trajectories.remove_columns("video").select([4])
    before = path.read_bytes()

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pa.ipc, "new_stream", fail)
    with pytest.raises(OSError, match="latents-00002-of-00003.arrow' was not written.*MiB are free"):
        write_shard(path, arrays[4:], carried.with_format("arrow")[:], carried.features, source)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 3


@pytest.mark.parametrize("wrong", ['{"num_trajectories": 0}', "[]", "null", "{", '{"sha512": "0"}'])
def test_a_crafted_description_is_refused_by_name(latents_dir, wrong):
    path = latents_dir / "train" / "latents-00000-of-00003.arrow"
    table = pa.ipc.open_stream(path.read_bytes()).read_all()
    table = table.replace_schema_metadata({b"diffusers_far": wrong.encode()})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match="latents-00000-of-00003.arrow' is damaged"):
        LatentDataset(latents_dir)


def test_shards_of_frames_of_another_size_are_named(latents_dir, arrays, trajectories):
    path = latents_dir / "train" / "latents-00002-of-00003.arrow"
    source, carried = read_source(path), trajectories.remove_columns("video").select([4])
    smaller = [arrays[4][:, :, :, :2]]
    write_shard(path, smaller, carried.with_format("arrow")[:], carried.features, source)
    with pytest.raises(ValueError, match="latents-00002-of-00003.arrow' has the columns"):
        LatentDataset(latents_dir)
