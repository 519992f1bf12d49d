"""Which frames revisit a view and which were never seen, on walks made by hand; what a clip of a walk holds."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from datasets import config as datasets_config

from benchmarks.studies.settings import Evaluation, Task
from benchmarks.studies.walks import HeldOutWalks, view_masks
from diffusers_far.data.latents import LatentSource, write_shard


EVALUATION = Evaluation(num_walks=2, num_inference_steps=1, min_revisit_age=5, max_recent_age=2, batch_size=2)
NUM_FRAMES, SIDE = 12, 16


def line(*places: float) -> torch.Tensor:
    """A walk along a line, each place far from every other one."""
    return torch.tensor([[1000.0 * place, 0.0, 0.0] for place in places])


def masks_of(pose: torch.Tensor) -> tuple[list[bool], list[bool]]:
    return tuple(mask.tolist() for mask in view_masks(pose, range(len(pose)), EVALUATION))


def test_a_view_seen_long_ago_and_not_since_is_revisited():
    revisited, unseen = masks_of(line(0, 1, 2, 3, 4, 0, 5, 1))
    assert [frame for frame, is_so in enumerate(revisited) if is_so] == [5, 7]  # 5 and 6 frames later
    assert unseen == [not is_so for is_so in revisited]


def test_a_view_seen_a_while_ago_is_neither():
    revisited, unseen = masks_of(line(0, 1, 2, 3, 0))  # 4 frames later: too young, and too old to have led there
    assert not revisited[4] and not unseen[4]


def test_a_view_seen_long_ago_and_since_is_neither():
    revisited, unseen = masks_of(line(0, 1, 0, 2, 3, 0))
    assert not revisited[5] and not unseen[5]


def test_the_frames_that_led_there_do_not_count():
    revisited, unseen = masks_of(line(0, 1, 2, 3, 9, 9, 9))
    assert unseen[5] and unseen[6]
    revisited, unseen = masks_of(line(0, 1, 2, 3, 9, 8, 0, 0))
    assert revisited[6] and revisited[7]


def test_near_needs_both_place_and_heading():
    pose = torch.tensor([[0.0, 0, 350], [1e4, 0, 0], [2e4, 0, 0], [3e4, 0, 0], [4e4, 0, 0], [39, 0, 4]])
    assert masks_of(pose)[0][5]
    for changed in ([41.0, 0, 4], [39.0, 0, 6]):
        assert not masks_of(torch.cat([pose[:5], torch.tensor([changed])]))[0][5]


@pytest.fixture
def walks(tmp_path, monkeypatch) -> HeldOutWalks:
    """Two walks whose frames, latents and actions all tell where in which walk they are."""
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    poses = [line(*range(NUM_FRAMES)), line(0, 1, 2, 3, 4, 5, 6, 0, 1, 7, 8, 9)]
    shade = np.arange(2 * NUM_FRAMES, dtype=np.uint8).reshape(2, NUM_FRAMES)
    actions = [[frame % 3 for frame in range(NUM_FRAMES)], [0] * NUM_FRAMES]
    rows = {
        "video": [[np.full((SIDE, SIDE, 3), value, np.uint8) for value in walk] for walk in shade],
        "actions": actions,
        "pose": [pose.tolist() for pose in poses],
    }
    features = Features(
        {"video": List(Image()), "actions": List(Value("int64")), "pose": List(List(Value("float32")))}
    )
    (tmp_path / "mazes").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "mazes" / "test-00000-of-00001.parquet")
    source = LatentSource("vae", 1.0, "dataset", 2, 2)
    (tmp_path / "latents" / "test").mkdir(parents=True)
    write_shard(
        source.shard_path(tmp_path / "latents" / "test", 0),
        [np.broadcast_to(walk[:, None, None, None], (NUM_FRAMES, 4, 2, 2)).astype(np.float32) for walk in shade],
        pa.table({"actions": actions}),
        Features({"actions": List(Value("int64"))}),
        source,
    )
    return HeldOutWalks(tmp_path / "mazes", tmp_path / "latents", EVALUATION)


def test_a_clip_has_the_context_the_truth_and_the_actions_of_its_frames(walks):
    clips = walks.clips(Task("half", 3, 2, first_new_frame=6), [0, 1])
    assert clips.latents[:, :, 0, 0, 0].tolist() == [[3, 4, 5, 6, 7], [15, 16, 17, 18, 19]]
    assert clips.actions[0].tolist() == [0, 1, 2, 0, 1]
    assert (clips.truth[:, :, 0, 0, 0] * 255).round().tolist() == [[6, 7], [18, 19]]
    assert (clips.last_shown[:, :, 0, 0, 0] * 255).round().tolist() == [[5], [17]]
    assert clips.revisited.tolist() == [[False, False], [False, True]]
    assert clips.unseen.tolist() == [[True, True], [True, False]]


def test_the_start_that_revisits_most_is_chosen_by_poses_alone(walks):
    task = Task("memory", 3, 2, first_new_frame="most_revisits", history=4)
    assert walks.first_new_frame(task, 0) == 4  # nothing is revisited: the first start
    assert walks.first_new_frame(task, 1) == 7  # both of its frames are
    longer_context = Task("memory", 4, 2, first_new_frame="most_revisits", history=4)
    assert walks.first_new_frame(longer_context, 1) == 7


def test_too_few_walks_are_refused(walks, tmp_path):
    evaluation = Evaluation(num_walks=3, num_inference_steps=1)
    with pytest.raises(ValueError, match="`num_walks` is 3 but .* has 2"):
        HeldOutWalks(Path(tmp_path / "mazes"), tmp_path / "latents", evaluation)
