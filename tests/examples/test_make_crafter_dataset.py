"""The Crafter data set: what its worlds, its walks and its files promise."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


pytest.importorskip("crafter")
datasets = pytest.importorskip("datasets")

# Scripts run by path find their siblings beside them; so do the processes that they start.
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import make_crafter_dataset  # noqa: E402
from crafter_world.game import CrafterWorld  # noqa: E402
from crafter_world.recording import record_walk  # noqa: E402
from crafter_world.settings import WALKS, CrafterSettings  # noqa: E402
from crafter_world.walkers import action_along, shortest_way  # noqa: E402

from diffusers_far.evaluation.tiles import DO, MATERIALS, PLAYER, STEPS, WALKABLE  # noqa: E402


GRASS = MATERIALS.index("grass")
SMALL = "--num_frames 12 --num_train 2 --num_validation 1 --num_test 1 --num_workers 1"


def make(folder, arguments=SMALL):
    make_crafter_dataset.main(make_crafter_dataset.parse_args(["--output_dir", str(folder), *arguments.split()]))


def same_recordings(one, other):
    columns = ("video", "actions", "pose", "tiles")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in columns)


# The world


@pytest.mark.parametrize("walk", WALKS)
def test_an_action_leads_to_the_next_frame_as_the_rule_of_the_world_says(walk):
    recording = record_walk(1, CrafterSettings(num_frames=96, walk=walk))
    assert recording.video.shape == (96, 64, 64, 3) and recording.video.dtype == np.uint8
    for t, action in enumerate(recording.actions):
        step = np.array(STEPS[action])
        ahead = recording.tiles[t][tuple(PLAYER + step)]
        expected = step if ahead in WALKABLE else 0 * step
        assert np.array_equal(recording.pose[t + 1, :2] - recording.pose[t, :2], expected)


def test_a_still_world_has_light_and_full_health_and_nobody_else_in_it():
    world = CrafterWorld(seed=0, area=32)
    world.start()
    for _ in range(400):
        world.act(DO if world.material(np.add(world.position, world.facing)) != "grass" else 0)
        assert world._world.daylight == 1 and world._world.objects == [world._player]
        assert {world._player.inventory[name] for name in ("health", "food", "drink", "energy")} == {9}


def test_creatures_and_night_are_there_when_asked_for():
    world = CrafterWorld(seed=0, area=32, creatures=True, night=True)
    world.start()
    light = []
    for _ in range(300):
        world.act(0)
        light.append(world._world.daylight)
    assert len(world._world.objects) > 1
    assert min(light) < 0.1 and max(light) > 0.9


def test_two_seeds_give_two_worlds_and_one_seed_gives_one():
    settings = CrafterSettings(num_frames=24, creatures=True, night=True)
    first, again, other = (record_walk(seed, settings) for seed in (0, 0, 1))
    assert same_recordings(first, again) and not same_recordings(first, other)


@pytest.mark.parametrize("walk", ["wander", "round_trip"])
def test_a_longer_walk_begins_as_a_shorter_one(walk):
    short, long = (record_walk(2, CrafterSettings(num_frames=count, walk=walk)) for count in (20, 40))
    assert np.array_equal(short.video, long.video[:20]) and np.array_equal(short.actions, long.actions[:19])


def test_walks_that_begin_anywhere_show_more_rare_tiles_and_follow_from_their_seed():
    def walks(start):
        return [record_walk(seed, CrafterSettings(num_frames=16, start=start)) for seed in range(6)]

    middle, anywhere = walks("middle"), walks("anywhere")
    assert all(map(same_recordings, anywhere, walks("anywhere")))
    rare = [
        np.mean([np.isin(each.tiles, [MATERIALS.index("path"), MATERIALS.index("coal")]) for each in walks])
        for walks in (middle, anywhere)
    ]
    assert rare[1] > 2 * rare[0]


# The walks


@pytest.mark.parametrize("creatures", [False, True])
def test_a_walk_out_and_back_goes_back_over_its_own_steps(creatures):
    settings = CrafterSettings(num_frames=80, walk="out_and_back", creatures=creatures)
    for seed in range(3):
        places = [tuple(place) for place in record_walk(seed, settings).pose[:, :2]]
        way_out = [place for place, before in zip(places[:40], [None, *places]) if place != before]
        way_back = [place for place, before in zip(places[39:], [None, *places[39:]]) if place != before]
        length = min(len(way_out), len(way_back))
        if creatures:
            length = min(length, len(way_back) - 1)
        assert way_back[:length] == way_out[::-1][:length]


def test_round_trips_come_home_again_and_again():
    places = record_walk(0, CrafterSettings(num_frames=256, walk="round_trip")).pose
    at_home = (places == places[0]).all(1)
    assert (np.diff(at_home.astype(int)) == 1).sum() >= 4  # trips of at most 32 frames out and as many home


def test_walkers_of_mixed_walks_take_turns():
    walkers = [type(CrafterSettings(walk="mixed").walker(seed)).__name__ for seed in range(6)]
    assert walkers == ["Wanderer", "OutAndBack", "RoundTrips"] * 2


def test_walkers_never_step_into_lava():
    class BesideLava:
        """Grass in the middle of lava."""

        position, facing = (5, 5), (0, 1)

        def material(self, place):
            return "grass" if tuple(place) == (5, 4) else "lava"

    for seed in range(3):
        walker, world = CrafterSettings(walk="wander").walker(seed), BesideLava()
        assert {walker.next_action(world) for _ in range(20)} == {2}


def test_the_shortest_way_goes_around_water():
    class Land:
        """Two strips of grass that meet at the top."""

        def material(self, place):
            x, y = place
            return "grass" if x in (0, 2) and 0 <= y < 5 or (x, y) == (1, 0) else "water"

    way = shortest_way(Land(), (0, 2), (2, 2))
    assert way == [(0, 1), (0, 0), (1, 0), (2, 0), (2, 1), (2, 2)]
    assert shortest_way(Land(), (0, 2), (0, 2)) == []
    assert action_along(way, (0, 1)) == 2 and way[0] == (0, 0)
    assert action_along([], (0, 1)) is None


# Bad input


@pytest.mark.parametrize(
    ("setting", "value"), [("num_frames", 1), ("area", 7), ("area", 257), ("walk", "fly"), ("walk", None)]
)
def test_a_wrong_setting_is_named_with_its_value(setting, value):
    with pytest.raises(ValueError, match=f"`{setting}` is {value!r}.*choose"):
        CrafterSettings(**{setting: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num_train -1", "`--num_train` is -1; it must be 0 to 1,000,000"),
        ("--num_test 1000001", "`--num_test` is 1000001"),
        ("--num_train 0 --num_validation 0 --num_test 0", "are all 0; ask for at least 1 walk"),
        ("--num_workers 0", "`--num_workers` is 0 but"),
        ("--area 3", "`area` is 3"),
    ],
)
def test_a_wrong_argument_is_an_error_before_any_work(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "walks", arguments)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_files_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="nothing is overwritten"):
        make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


# The files


def test_the_dataset_loads_and_its_rows_are_the_walks_of_their_seeds(tmp_path):
    make(tmp_path / "walks", SMALL + " --walk wander --creatures")
    splits = datasets.load_dataset(str(tmp_path / "walks"), cache_dir=str(tmp_path / "cache"))
    assert {split: list(rows["seed"]) for split, rows in splits.items()} == {
        "train": [0, 1],
        "validation": [1_000_000],
        "test": [2_000_000],
    }
    row = splits["test"][0]
    recording = record_walk(2_000_000, CrafterSettings(12, walk="wander", creatures=True))
    assert np.array_equal(np.stack([np.asarray(frame) for frame in row["video"]]), recording.video)
    assert row["actions"] == [*recording.actions, recording.actions[-1]]
    assert np.array_equal(row["pose"], recording.pose) and np.array_equal(row["tiles"], recording.tiles)

    card = (tmp_path / "walks" / "README.md").read_text()
    assert "license: mit" in card and "Danijar Hafner" in card
    assert "--walk wander --creatures --num_train 2 --num_validation 1 --num_test 1" in card


def test_clips_are_cut_from_it_with_poses(tmp_path):
    from diffusers_far.data.video_clips import VideoClips

    make(tmp_path / "walks")
    rows = datasets.load_dataset(str(tmp_path / "walks"), split="train", cache_dir=str(tmp_path / "cache"))
    clip = VideoClips(rows, conditions=("actions", "pose")).clip(trajectory=0, start=2, length=8)
    assert clip.frames.shape == (8, 3, 64, 64) and clip.actions.shape == (8,) and clip.pose.shape == (8, 3)


@pytest.mark.full
def test_files_are_the_same_bytes_for_any_number_of_workers_and_in_any_process(tmp_path, monkeypatch):
    arguments = "--num_frames 200 --num_train 60 --num_validation 1 --num_test 0 --creatures --night".split()
    for num_workers in ("1", "2"):
        command = [sys.executable, make_crafter_dataset.__file__, "--output_dir", tmp_path / num_workers, *arguments]
        subprocess.run([*command, "--num_workers", num_workers], check=True)
    files = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*") if path.is_file())
    assert len(files) == 4  # three shards and the card
    for file in files:
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()
