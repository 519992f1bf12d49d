"""Tiles: what is read from frames, what a model could know of them, and what following a made-up world finds."""

from pathlib import Path

import numpy as np
import pytest

from diffusers_far.evaluation.tiles import (
    ACTION_NAMES,
    COLUMNS,
    DO,
    MATERIALS,
    PLAYER,
    ROWS,
    WALKABLE,
    follow_world,
    label_tiles,
    load_textures,
    read_tiles,
)


LEFT, RIGHT, UP, DOWN = range(4)
MOVES = {LEFT: (-1, 0), RIGHT: (1, 0), UP: (0, -1), DOWN: (0, 1), DO: (0, 0)}
WATER, GRASS, STONE, SAND = (MATERIALS.index(name) for name in ("water", "grass", "stone", "sand"))


def columns_of_land(width=60, height=30):
    """A world whose columns are grass, sand, grass, sand: every tile differs from those to its left and right."""
    return np.where(np.arange(width)[:, None] % 2, SAND, GRASS) * np.ones((1, height), int)


def walk_through(land, start, actions):
    """Positions, tiles in view and actions of a walk over land (columns, rows) that is all walkable."""
    positions = np.cumsum([start, *(MOVES[action] for action in actions)], axis=0)
    tiles = [
        land[x - PLAYER[0] :, y - PLAYER[1] :][:COLUMNS, :ROWS] for x, y in positions
    ]  # fails to stack if the window leaves the land
    return positions, np.stack(tiles), np.array(actions)


# Reading


def draw(tiles, textures):
    """Frames (F, 64, 64, 3) that show the tiles (F, 8, 6) above a black inventory."""
    frames = np.zeros((len(tiles), 64, 64, 3), np.uint8)
    in_map = textures[tiles].transpose(0, 2, 3, 1, 4, 5)  # (F, rows, 8, columns, 8, 3)
    frames[:, :48] = in_map.reshape(-1, 48, 64, 3)
    return frames


def test_tiles_are_read_by_the_nearest_texture():
    rng = np.random.default_rng(0)
    textures = rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    tiles = rng.integers(0, 12, (3, COLUMNS, ROWS))
    frames = draw(tiles, textures)
    read, distance = read_tiles(frames, textures)
    assert np.array_equal(read, tiles) and not distance.any()

    one_off = np.where(frames > 127, frames - 1, frames + 1)  # one level, every pixel
    read, distance = read_tiles(one_off, textures)
    assert np.array_equal(read, tiles) and np.allclose(distance, 1)


def test_frames_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"`frames` have shape \(2, 32, 32, 3\); give \(F, 64, 64, 3\)"):
        read_tiles(np.zeros((2, 32, 32, 3), np.uint8), np.zeros((12, 8, 8, 3), np.uint8))


def test_textures_are_those_of_crafter():
    crafter = pytest.importorskip("crafter")
    textures = crafter.engine.Textures(crafter.constants.root / "assets")
    theirs = [textures.get(name, (8, 8))[..., :3].swapaxes(0, 1) for name in MATERIALS]
    assert np.array_equal(load_textures(), theirs)


# Labels


def test_tiles_of_a_way_back_are_in_view_or_back_and_the_player_is_not_scored():
    positions, tiles, actions = walk_through(columns_of_land(), (20, 10), [RIGHT] * 8 + [LEFT] * 8)
    labels = label_tiles(positions, tiles, actions, 9)
    assert labels.shape == (8, COLUMNS, ROWS)
    assert (labels[:, PLAYER[0], PLAYER[1]] == "-").all()
    assert (labels[:, 0] == "back").all()  # the column that comes in differs from the one beside it
    rest = labels[:, 1:].copy()
    rest[:, PLAYER[0] - 1, PLAYER[1]] = "in view"
    assert (rest == "in view").all()


def test_what_equals_the_tile_beside_it_is_easy():
    land = np.full((60, 30), GRASS)
    land[::, 12] = SAND  # a road along the walk
    land[17, 9] = STONE  # and one stone beside it, which comes in at the seventh step back
    positions, tiles, actions = walk_through(land, (20, 10), [RIGHT] * 8 + [LEFT] * 8)
    labels = label_tiles(positions, tiles, actions, 9)
    hard = [(int(frame), int(row)) for frame, row in zip(*np.nonzero(labels[:, 0] == "back"))]
    # Frame f of the way back sees columns from 23 - f. The stone is in row 9 - (10 - 3) = 2 of the window. The tile that
    # comes in after it differs from it.
    assert hard == [(6, 2), (7, 2)]
    assert (labels[:, 0] == "back, easy").sum() == labels[:, 0].size - 2


def test_what_the_context_never_showed_is_new_until_a_move_depends_on_it():
    positions, tiles, actions = walk_through(columns_of_land(), (20, 10), [DO] + [RIGHT] * 8)
    labels = label_tiles(positions, tiles, actions, 2)
    # The context shows 3 tiles to the right of the player. The fourth step goes onto one that it does not show.
    assert (labels[:3, -1] == "new").all()
    assert (labels[1, -2] == "-").all()  # came in after the context
    assert (labels[:3, 0] == "in view").all()
    assert (labels[3:] == "-").all()


def test_new_tiles_can_be_easy_and_those_beyond_the_world_are_not_scored():
    land = np.full((60, 30), GRASS)
    land[:, 10:] = -1
    positions, tiles, actions = walk_through(land, (20, 10), [DO, RIGHT])
    labels = label_tiles(positions, tiles, actions, 2)
    assert (labels[0, -1, :3] == "new, easy").all()
    assert (labels[0, :, 3:] == "-").all()


@pytest.mark.parametrize("num_context_frames", [0, 3])
def test_a_context_without_a_frame_before_or_after_it_is_refused(num_context_frames):
    walk = walk_through(columns_of_land(), (20, 10), [RIGHT, RIGHT])
    with pytest.raises(ValueError, match=f"`num_context_frames` is {num_context_frames} .* choose 1 to 2"):
        label_tiles(*walk, num_context_frames)


# Following


def test_a_true_walk_holds_and_returns():
    _, tiles, actions = walk_through(columns_of_land(), (25, 10), [RIGHT] * 20 + [LEFT] * 20)
    world = follow_world(tiles, actions)
    assert world.persistence.shape == (40,) and (world.persistence == 1).all()
    # The first column back is one that left the window 2 frames ago; that after 9 steps back left it 18 frames ago.
    returned = ~np.isnan(world.returned)
    assert not returned[:29].any() and returned[29:].all() and (world.returned[29:] == 1).all()
    assert world.moved == 1
    assert world.came_in.sum() == 40 * ROWS and world.came_in[[GRASS, SAND]].tolist() == [120, 120]


@pytest.mark.parametrize("pause, num_steps_back", [(0, 9), (1, 8), (2, 8)])
def test_a_tile_counts_as_returned_after_more_than_16_frames_out_of_view(pause, num_steps_back):
    actions = [RIGHT] * 20 + [DO] * pause + [LEFT] * 20
    _, tiles, actions = walk_through(columns_of_land(), (25, 10), actions)
    returned = follow_world(tiles, actions).returned
    # The n-th step back brings the column in that was last in view 2 n + pause frames before.
    assert np.flatnonzero(~np.isnan(returned))[0] == 20 + pause + num_steps_back


def test_a_return_that_repeating_the_tile_beside_it_would_draw_does_not_count():
    _, tiles, actions = walk_through(np.full((60, 30), GRASS), (25, 10), [RIGHT] * 20 + [LEFT] * 20)
    assert np.isnan(follow_world(tiles, actions).returned).all()


def test_one_wrong_tile_costs_its_share_twice_and_a_wrong_return_is_seen():
    _, tiles, actions = walk_through(columns_of_land(), (25, 10), [RIGHT] * 20 + [LEFT] * 20)
    tiles = tiles.copy()
    tiles[5, 1, 1] = WATER  # for a frame
    persistence = follow_world(tiles, actions).persistence
    num_compared = (COLUMNS - 1) * ROWS - 2  # without the player's tile, now and before
    assert persistence[[4, 5]] == pytest.approx(1 - 1 / num_compared)
    assert (np.delete(persistence, [4, 5]) == 1).all()

    tiles[-1, 0] = WATER  # the last column that comes back
    world = follow_world(tiles, actions)
    assert world.returned[-1] == 0 and world.returned[-2] == 1


def test_the_player_stands_still_before_what_the_model_drew_as_no_ground():
    land = np.full((60, 30), GRASS)
    land[24] = STONE
    _, tiles, _ = walk_through(land, (23, 10), [DO, DO])
    world = follow_world(tiles, [RIGHT, RIGHT])
    assert world.moved == 0 and (world.persistence == 1).all() and not world.came_in.any()


def test_a_frozen_picture_does_not_hold_and_a_world_of_grass_brings_nothing_but_grass():
    _, tiles, _ = walk_through(columns_of_land(), (25, 10), [DO])
    frozen = np.repeat(tiles[:1], 21, axis=0)
    assert (follow_world(frozen, [RIGHT] * 20).persistence == 0).all()
    grass = follow_world(np.full_like(frozen, GRASS), [RIGHT] * 20)
    assert (grass.persistence == 1).all() and grass.moved == 1
    assert np.flatnonzero(grass.came_in).tolist() == [GRASS]


def test_actions_that_are_too_few_are_refused():
    with pytest.raises(ValueError, match="`actions` are 1 but 3 frames need 2"):
        follow_world(np.full((3, COLUMNS, ROWS), GRASS), [RIGHT])


# Crafter itself


@pytest.fixture
def record_walk(monkeypatch):
    pytest.importorskip("crafter")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    from crafter_world.recording import record_walk

    return record_walk


def test_materials_actions_and_walkable_ground_are_those_of_crafter():
    constants = pytest.importorskip("crafter").constants
    assert list(MATERIALS) == constants.materials
    assert {MATERIALS[number] for number in WALKABLE} == {*constants.walkable, "lava"}
    assert set(ACTION_NAMES) < set(constants.actions)


def test_true_frames_are_read_right_and_true_walks_hold(record_walk):
    from crafter_world.settings import CrafterSettings

    for seed, walk in enumerate(("wander", "out_and_back", "round_trip")):
        recording = record_walk(seed, CrafterSettings(num_frames=96, walk=walk))
        read, distance = read_tiles(recording.video, load_textures())
        can_be_seen = recording.tiles >= 0
        can_be_seen[:, PLAYER[0], PLAYER[1]] = False
        assert (read[can_be_seen] == recording.tiles[can_be_seen]).all() and not distance[can_be_seen].any()
        world = follow_world(read, recording.actions)
        # What the player takes away is gone: a tree leaves grass.
        assert (world.persistence[recording.actions != DO] == 1).all()
        assert np.nanmean(world.returned) == 1


def test_on_a_way_back_everything_that_comes_in_was_seen_before(record_walk):
    from crafter_world.settings import CrafterSettings

    recording = record_walk(0, CrafterSettings(num_frames=96, walk="out_and_back"))
    labels = label_tiles(recording.pose[:, :2], recording.tiles, recording.actions, 48)[:24]
    counts = dict(zip(*np.unique(labels, return_counts=True)))
    assert set(counts) <= {"in view", "back", "back, easy", "-"}
    assert counts["back"] > 0 and counts["back, easy"] > counts["back"]
