import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Video
from video_files import frame_numbers, gray_frames, write_video

from diffusers_far.data import clips as clips_module
from diffusers_far.data import video_clips as video_clips_module
from diffusers_far.data.clips import evenly_spaced
from diffusers_far.data.loading import dataset_fingerprint, load_split
from diffusers_far.data.video_clips import FrameDataset, VideoClips


def test_the_flat_frames_are_those_of_the_trajectories_in_order(trajectories, videos):
    frames = torch.stack([FrameDataset(trajectories)[index] for index in range(20)])
    assert np.array_equal(frames.permute(0, 2, 3, 1).numpy(), np.concatenate(videos))


def test_a_selection_of_rows_is_respected(trajectories, videos):
    frames = FrameDataset(trajectories.select([3, 0]))
    assert len(frames) == 11
    assert frames.locate(6) == (1, 0)
    assert np.array_equal(frames[6].permute(1, 2, 0).numpy(), videos[0][0])


def test_frames_survive_parquet_and_back(trajectories, videos, tmp_path):
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


# Runs of frames


@pytest.fixture
def video_folder(tmp_path):
    """Two mp4 files of 12 and 9 frames, with actions: a `videofolder`."""
    lines = []
    for name, num_frames in (("a.mp4", 12), ("b.mp4", 9)):
        write_video(tmp_path / "videos" / name, gray_frames(num_frames))
        lines.append(json.dumps({"file_name": name, "actions": [frame % 3 for frame in range(num_frames)]}))
    (tmp_path / "videos" / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path / "videos"


@pytest.mark.parametrize("interval", [1, 2])
def test_a_run_of_images_is_cut_from_its_trajectory(trajectories, videos, interval):
    frames = VideoClips(trajectories)
    assert frames.num_frames.tolist() == [5, 3, 4, 6, 2]
    clip = frames.frames(3, 1, 2, interval)
    assert np.array_equal(clip.permute(0, 2, 3, 1).numpy(), videos[3][1 : 2 + interval : interval])


@pytest.mark.parametrize("embedded", [False, True], ids=["files", "bytes in the dataset"])
def test_a_run_is_decoded_from_video_files_wherever_they_are(video_folder, embedded):
    dataset = load_split(str(video_folder), "train")
    if embedded:
        table = [{"path": None, "bytes": Path(row["video"]["path"]).read_bytes()} for row in dataset]
        dataset = Dataset.from_dict({"video": table}, features=Features({"video": Video(decode=False)}))
    frames = VideoClips(dataset)
    assert frames.num_frames.tolist() == [12, 9]
    assert frame_numbers(frames.frames(0, 3, 4, 2).permute(0, 2, 3, 1).numpy()) == [3, 5, 7, 9]


def test_the_fingerprint_of_video_files_is_of_their_content(video_folder, tmp_path):
    expected = dataset_fingerprint(load_split(str(video_folder), "train"))
    shutil.copytree(video_folder, tmp_path / "moved")
    assert dataset_fingerprint(load_split(str(tmp_path / "moved"), "train")) == expected
    write_video(tmp_path / "moved" / "b.mp4", gray_frames(9)[::-1])
    assert dataset_fingerprint(load_split(str(tmp_path / "moved"), "train")) != expected


def test_a_column_of_another_type_is_refused(trajectories):
    with pytest.raises(ValueError, match="`column` is 'actions'"):
        VideoClips(trajectories, "actions")


def test_single_frames_of_video_files_are_refused_with_the_cure(video_folder):
    with pytest.raises(ValueError, match="`column` is 'video', which holds video files.*far prepare"):
        FrameDataset(load_split(str(video_folder), "train"))


# What a clip costs


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """How often an image was decoded, and a video file searched for its key frames."""
    calls = {"images": 0, "searches": 0}
    decode, search = clips_module.IMAGE_DECODER.decode_example, clips_module.read_frame_times

    class CountingDecoder:
        def decode_example(self, image):
            calls["images"] += 1
            return decode(image)

    def counted_search(file):
        calls["searches"] += 1
        return search(file)

    monkeypatch.setattr(clips_module, "IMAGE_DECODER", CountingDecoder())
    for module in (clips_module, video_clips_module):
        monkeypatch.setattr(module, "read_frame_times", counted_search)
    return calls


def test_a_clip_decodes_as_many_images_as_it_has_frames(trajectories, calls):
    frames = VideoClips(trajectories)
    assert calls["images"] == 0
    frames.frames(3, 1, 2)
    assert calls["images"] == 2
    frames.frames(3, 0, 3, 2)
    assert calls["images"] == 5
    FrameDataset(trajectories)[7]
    assert calls["images"] == 6


def test_a_video_file_is_searched_for_its_key_frames_once(video_folder, calls):
    frames = VideoClips(load_split(str(video_folder), "train"))
    frames.frames(0, 0, 3)
    assert calls["searches"] == 0  # nothing comes before the first frame
    clips = [frames.frames(0, start, 2).permute(0, 2, 3, 1).numpy() for start in (5, 7)]
    assert calls["searches"] == 1
    assert [frame_numbers(clip) for clip in clips] == [[5, 6], [7, 8]]
