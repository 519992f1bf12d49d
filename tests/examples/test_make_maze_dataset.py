"""The maze data set: what its plan, its looks, its walks and its files promise."""

import io
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


pytest.importorskip("vizdoom")
datasets = pytest.importorskip("datasets")

# Scripts run by path find their siblings beside them; so do the processes that they start.
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import make_maze_dataset  # noqa: E402
from make_maze_dataset import Shard, plan_shards, split_seeds, write_shard_in_child  # noqa: E402
from maze_world.layout import passage, random_maze  # noqa: E402
from maze_world.level import CELL_WIDTH, WALL_WIDTH, cell_centre, random_level, write_map_file  # noqa: E402
from maze_world.looks import DOOM_FLATS, DOOM_POSTERS, DOOM_WALLS, LOOKS, plain_look  # noqa: E402
from maze_world.recording import MazeSettings  # noqa: E402
from maze_world.walker import FORWARD, LEFT, RIGHT, TURN_DEGREES, Walker  # noqa: E402


SMALL = {"cells": 3, "num_frames": 40}


def cell_at(x, y):
    return tuple(int(position - WALL_WIDTH / 2) // (CELL_WIDTH + WALL_WIDTH) for position in (x, y))


def record(path, seeds, settings):
    """The rows of the mazes of `seeds`, recorded by one child process and read back undecoded."""
    write_shard_in_child(Shard(path, seeds, settings))
    rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(path.parent / "cache"))
    return list(rows.cast_column("video", datasets.List(datasets.Image(decode=False))))


def turn_between(heading, next_heading):
    """Degrees in [-180, 180), counter-clockwise."""
    return (next_heading - heading + 180) % 360 - 180


# The plan


@pytest.mark.parametrize("num_cells", [2, 5, 7])
@pytest.mark.parametrize("seed", range(5))
def test_every_cell_of_a_maze_can_be_reached(num_cells, seed):
    maze = random_maze(np.random.default_rng(seed), num_cells, loop_share=0)
    cells = [(column, row) for column in range(num_cells) for row in range(num_cells)]
    assert len(maze.passages) == num_cells**2 - 1  # a spanning tree
    assert all(maze.shortest_path((0, 0), cell)[-1:] == [cell] for cell in cells if cell != (0, 0))


def test_shortest_path_goes_through_passages_and_is_as_long_in_both_directions():
    maze = random_maze(np.random.default_rng(0), 7)
    path = [(0, 0), *maze.shortest_path((0, 0), (6, 6))]
    assert all(passage(cell, after) in maze.passages for cell, after in zip(path, path[1:]))
    assert len(maze.shortest_path((6, 6), (0, 0))) == len(path) - 1
    assert maze.shortest_path((2, 3), (2, 3)) == []


def test_mazes_of_different_seeds_differ_and_of_one_seed_agree():
    first, again, other = (random_level(np.random.default_rng(seed), 5, plain_look()) for seed in (0, 0, 1))
    assert first == again
    assert first.text != other.text


# The look


def test_plain_textures_are_smooth_and_of_few_colours():
    look = plain_look()
    assert set(look.textures) == {*look.walls, *look.posters, *look.floors, *look.ceilings}
    for png in look.textures.values():
        image = Image.open(io.BytesIO(png))
        assert image.size == (64, 64)
        assert len(image.getcolors()) <= 2


@pytest.mark.parametrize("look", LOOKS)
def test_texture_names_are_unlike_and_fit_a_map_file(look):
    look = LOOKS[look]()
    for names in (look.walls, look.posters, look.floors, look.ceilings):
        assert len(set(names)) == len(names)
        assert all(1 <= len(name) <= 8 for name in names)


def test_doom_look_has_no_animated_texture():
    # What the engine's table of animations names, of the textures that Freedoom brings along.
    animated = r"(NUKAGE|FWATER|SWATER|LAVA|BLOOD|SLADRIP|BLODGR|GSTFONT|FIRE\w+|ROCKRED|DBRAIN|[BSW]FALL)\d?"
    animated += r"|RROCK0[5-8]|SLIME(0[1-9]|1[0-2])"
    names = [*DOOM_WALLS.split(), *DOOM_POSTERS.split(), *DOOM_FLATS.split()]
    assert [name for name in names if re.fullmatch(animated, name)] == []


def test_map_file_gives_back_its_levels_and_textures(tmp_path):
    level = random_level(np.random.default_rng(0), 3, plain_look())
    write_map_file(tmp_path / "mazes.wad", [level, level], {"WA000": b"png"})

    wad = (tmp_path / "mazes.wad").read_bytes()
    kind, num_lumps, directory = struct.unpack("<4sii", wad[:12])
    entries = [struct.unpack_from("<ii8s", wad, directory + 16 * index) for index in range(num_lumps)]
    lumps = [(name.rstrip(b"\0").decode(), wad[start : start + size]) for start, size, name in entries]

    assert kind == b"PWAD"
    assert [name for name, _ in lumps] == "MAP01 TEXTMAP ENDMAP MAP02 TEXTMAP ENDMAP TX_START WA000 TX_END".split()
    assert lumps[1][1].decode() == level.text
    assert lumps[7][1] == b"png"


# The walk


def test_walker_goes_from_cell_to_joined_cell_and_comes_to_most():
    maze = random_maze(np.random.default_rng(0), 4)
    walker = Walker(maze, (0, 0), np.random.default_rng(1))
    (x, y), heading, cells = cell_centre((0, 0)), 0.0, [(0, 0)]
    for _ in range(1000):
        action = walker.next_action(x, y, heading)
        heading += {FORWARD: 0, LEFT: TURN_DEGREES, RIGHT: -TURN_DEGREES}[action]
        if action == FORWARD:
            x, y = x + 16 * np.cos(np.radians(heading)), y + 16 * np.sin(np.radians(heading))
        if cell_at(x, y) != cells[-1]:
            cells.append(cell_at(x, y))
    assert all(passage(cell, after) in maze.passages for cell, after in zip(cells, cells[1:]))
    assert len(set(cells)) > 12


def test_walker_that_does_not_move_turns_back():
    maze = random_maze(np.random.default_rng(0), 4)
    walker = Walker(maze, (0, 0), np.random.default_rng(1))
    x, y = cell_centre((0, 0))
    ahead = maze.joined((0, 0))[0]
    walker.path = [ahead]
    heading = np.degrees(np.arctan2(ahead[1], ahead[0]))
    x, y = x + 30 * np.cos(np.radians(heading)), y + 30 * np.sin(np.radians(heading))
    assert [walker.next_action(x, y, heading) for _ in range(3)] == [FORWARD] * 3
    assert walker.next_action(x, y, heading) != FORWARD
    assert walker.path[:2] == [(0, 0), ahead]


# The splits


def test_splits_never_meet_at_their_largest():
    train, validation, test = (
        split_seeds(split, make_maze_dataset.SEEDS_PER_SPLIT) for split in ("train", "validation", "test")
    )
    assert train.stop <= validation.start and validation.stop <= test.start


def test_growing_a_split_keeps_its_first_mazes():
    assert split_seeds("test", 100)[:64] == split_seeds("test", 64)


def test_shards_hold_each_seed_once_and_in_order(tmp_path):
    seeds = {"train": split_seeds("train", 120), "test": split_seeds("test", 7)}
    shards = plan_shards(tmp_path, seeds, MazeSettings())
    assert [seed for shard in shards for seed in shard.seeds] == [*seeds["train"], *seeds["test"]]
    assert [shard.path.name for shard in shards] == [
        "train-00000-of-00003.parquet",
        "train-00001-of-00003.parquet",
        "train-00002-of-00003.parquet",
        "test-00000-of-00001.parquet",
    ]


# Bad input


@pytest.mark.parametrize(
    ("setting", "value"), [("look", "quake"), ("cells", 1), ("size", 8), ("size", 481), ("num_frames", 0)]
)
def test_a_wrong_setting_is_named_with_its_value(setting, value):
    with pytest.raises(ValueError, match=f"`{setting}` is {value!r}"):
        MazeSettings(**{setting: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num_train -1", "`num_train` is -1"),
        ("--num_test 1000001", "`num_test` is 1000001"),
        ("--num_train 0 --num_validation 0 --num_test 0", "are all 0"),
        ("--num_workers 0", "`num_workers` is 0"),
    ],
)
def test_a_wrong_argument_is_an_error_before_any_work(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_maze_dataset.main(
            make_maze_dataset.parse_args(["--output_dir", str(tmp_path / "mazes"), *arguments.split()])
        )
    assert not (tmp_path / "mazes").exists()


def test_a_folder_with_files_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty"):
        make_maze_dataset.main(make_maze_dataset.parse_args(["--output_dir", str(tmp_path)]))
    with pytest.raises(ValueError, match="is a file"):
        make_maze_dataset.main(make_maze_dataset.parse_args(["--output_dir", str(tmp_path / "thesis.txt")]))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.full
def test_mazes_that_cannot_be_recorded_are_an_error_that_names_them(tmp_path):
    too_many = Shard(tmp_path / "mazes.parquet", range(1000), MazeSettings())
    with pytest.raises(RuntimeError, match="seeds 0 to 999 could not be recorded in 2 attempts"):
        write_shard_in_child(too_many)


# The files


def test_dataset_loads_as_described_and_actions_lead_to_the_next_frame(tmp_path):
    arguments = (
        f"--output_dir {tmp_path}/mazes --cells 3 --num_frames 40 --num_train 2 --num_validation 0 --num_test 0"
    )
    make_maze_dataset.main(make_maze_dataset.parse_args(arguments.split()))
    mazes = datasets.load_dataset(str(tmp_path / "mazes"), split="train", cache_dir=str(tmp_path / "cache"))

    assert mazes.features == make_maze_dataset.FEATURES
    assert mazes["seed"][:] == [0, 1]
    for maze in mazes:
        assert len(maze["video"]) == len(maze["actions"]) == len(maze["pose"]) == 40
        assert all(frame.size == (64, 64) and frame.mode == "RGB" for frame in maze["video"])
        assert_actions_lead_to_next_pose(maze["actions"], maze["pose"])


def assert_actions_lead_to_next_pose(actions, pose):
    turns = {FORWARD: 0, LEFT: TURN_DEGREES, RIGHT: -TURN_DEGREES}
    ahead = []
    for action, (x, y, heading), (next_x, next_y, next_heading) in zip(actions, pose, pose[1:]):
        assert turn_between(heading, next_heading) == pytest.approx(turns[action], abs=0.01)
        if action == FORWARD:
            direction = np.radians(heading)
            ahead.append((next_x - x) * np.cos(direction) + (next_y - y) * np.sin(direction))
    assert {FORWARD, LEFT, RIGHT} >= set(actions)
    assert np.median(ahead) > 8


@pytest.mark.full
@pytest.mark.parametrize("look", LOOKS)
def test_a_seed_gives_the_same_bytes_alone_and_after_others(tmp_path, look):
    settings = MazeSettings(look, **SMALL)
    among_others = record(tmp_path / "others.parquet", range(5, 12), settings)
    for seed in (5, 11):
        alone = record(tmp_path / f"{seed}.parquet", range(seed, seed + 1), settings)
        assert alone == among_others[seed - 5 : seed - 4]


@pytest.mark.full
def test_files_are_the_same_bytes_for_any_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(make_maze_dataset, "MAZES_PER_SHARD", 2)
    arguments = "--cells 3 --num_frames 40 --num_train 3 --num_validation 1 --num_test 1".split()
    for num_workers in ("1", "3"):
        output_dir = str(tmp_path / num_workers)
        make_maze_dataset.main(
            make_maze_dataset.parse_args([*arguments, "--output_dir", output_dir, "--num_workers", num_workers])
        )

    files = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*") if path.is_file())
    assert len(files) == 5  # four shards and the card
    for file in files:
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "3" / file).read_bytes()


@pytest.mark.full
def test_walks_are_seldom_stuck_and_see_most_of_the_maze(tmp_path):
    rows = record(tmp_path / "mazes.parquet", range(20), MazeSettings(cells=5, num_frames=300))
    steps, shares_seen = [], []
    for row in rows:
        place, actions = np.array(row["pose"])[:, :2], np.array(row["actions"])
        steps.append(np.linalg.norm(np.diff(place, axis=0), axis=1)[actions[:-1] == FORWARD])
        shares_seen.append(len({cell_at(x, y) for x, y in place}) / 25)
    assert (np.concatenate(steps) < 1).mean() < 0.03
    assert np.mean(shares_seen) > 0.5


@pytest.mark.full
def test_a_longer_walk_begins_as_a_shorter_one(tmp_path):
    short = record(tmp_path / "short.parquet", range(1), MazeSettings(cells=3, num_frames=20))[0]
    long = record(tmp_path / "long.parquet", range(1), MazeSettings(cells=3, num_frames=40))[0]
    for column in ("video", "actions", "pose"):
        assert long[column][:20] == short[column]


def running_engines(folder: Path) -> list[Path]:
    """The processes of engines that play a map in `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_engine = b"vizdoom" in (path / "cmdline").read_bytes() and str(folder) in str((path / "cwd").readlink())
        except OSError:
            continue
        if is_engine:
            found.append(path)
    return found


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
def test_no_engine_outlives_a_run_that_is_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the children work
    script = Path(make_maze_dataset.__file__)
    run = subprocess.Popen([sys.executable, script, "--output_dir", tmp_path / "mazes", "--num_workers", "1"])
    while not running_engines(tmp_path) and run.poll() is None:
        time.sleep(0.05)
    assert run.poll() is None
    run.send_signal(signal.SIGKILL)
    run.wait()
    deadline = time.monotonic() + 30
    while running_engines(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not running_engines(tmp_path)
