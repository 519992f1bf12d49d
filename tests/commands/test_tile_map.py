"""The map of a world of tiles, on recorded walks, where all is known."""

from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from tiny_models import tiny_pipeline, tiny_transformer

from diffusers_far.commands.app import Settings, World, WorldModel
from diffusers_far.commands.app.starts import Start, new_world
from diffusers_far.commands.app.tile_map import TileMap
from diffusers_far.evaluation.tiles import (
    ACTION_NAMES,
    COLUMNS,
    PLAYER,
    ROWS,
    TILE_SIZE,
    load_textures,
    nearest_material,
)


WALKS = Path(__file__).parents[2] / "examples" / "crafter_walks"
QUICK = Settings(num_inference_steps=1)


@pytest.fixture(scope="module")
def walk() -> dict:
    row = load_dataset(str(WALKS), split="test")[0]
    arrays = {name: np.array(row[name]) for name in ("actions", "pose", "tiles")}
    return arrays | {"frames": np.stack([np.asarray(frame.convert("RGB")) for frame in row["video"]])}


@pytest.fixture(scope="module")
def world_of_tiles() -> WorldModel:
    transformer = tiny_transformer(num_actions=5, action_shift=1)
    return WorldModel(tiny_pipeline(transformer, height=64, width=64, action_names=list(ACTION_NAMES)))


def mapped(frames: np.ndarray, actions: np.ndarray) -> TileMap:
    tile_map = TileMap(load_textures())
    for frame, action in zip(frames, [0, *actions]):
        tile_map.show(frame, action)
    return tile_map


def test_the_player_is_followed_through_true_frames(walk):
    tile_map = TileMap(load_textures())
    for frame, action, pose in zip(walk["frames"], [0, *walk["actions"]], walk["pose"]):
        tile_map.show(frame, action)
        assert tile_map.place == tuple((pose - walk["pose"][0])[:2])


@pytest.mark.parametrize("num_frames", [1, 40, 100])
def test_the_map_shows_every_tile_that_was_in_view_as_it_was_last(walk, num_frames):
    frames, pose, tiles = (walk[name][:num_frames] for name in ("frames", "pose", "tiles"))
    textures = load_textures()
    drawn = mapped(frames, walk["actions"][: num_frames - 1]).draw()
    material, distance = nearest_material(
        drawn.reshape(len(drawn) // TILE_SIZE, TILE_SIZE, -1, TILE_SIZE, 3).swapaxes(1, 2), textures
    )

    last = {}
    for place, view in zip(pose[:, :2].astype(int), tiles):
        for column, row in np.ndindex(COLUMNS, ROWS):
            if (column, row) != PLAYER and view[column, row] >= 0:
                last[place[0] + column - PLAYER[0], place[1] + row - PLAYER[1]] = view[column, row]
    player = tuple(pose[-1, :2].astype(int))
    # The map's corner is the corner of what was in view, beyond the world too.
    left, top = pose[:, :2].min(axis=0).astype(int) - PLAYER
    for (x, y), expected in last.items():
        if (x, y) != player:
            assert material[y - top, x - left] == expected and distance[y - top, x - left] < 1


def test_a_world_of_tiles_has_a_map_and_another_world_has_none(walk, world_of_tiles):
    start = Start("Recording", walk["frames"][:5], walk["actions"][:4].tolist(), walk["frames"][5:], (0,))
    world = World(world_of_tiles, start, QUICK)
    assert world.tile_map.draw().shape[:2] >= (ROWS * TILE_SIZE, COLUMNS * TILE_SIZE)

    another = tiny_pipeline(tiny_transformer(num_actions=5, action_shift=1), height=64, width=64)
    assert World(WorldModel(another), start, QUICK).tile_map is None


def test_the_map_goes_back_with_the_walk_and_is_a_forks_own(walk, world_of_tiles):
    frames, actions = walk["frames"], walk["actions"].tolist()
    start = Start("Recording", frames[:5], actions[:4], frames[5:], tuple(actions[4:-1]))
    world = World(world_of_tiles, start, QUICK)
    maps = []
    for action in (3, 1, 1):
        maps.append(world.tile_map.draw())
        world.step(action)
        assert np.array_equal(world.tile_map.draw(), mapped(world.frames, actions[:4] + world.actions).draw())
    other = world.fork()
    other.rewind(2)
    assert np.array_equal(other.tile_map.draw(), maps[1])
    world.rewind(3)
    assert np.array_equal(world.tile_map.draw(), maps[0])


def test_a_new_world_begins_with_a_frame_that_the_model_made(world_of_tiles):
    world = World(world_of_tiles, new_world(world_of_tiles.size), QUICK)
    assert world.frames.shape == (1, 64, 64, 3) and world.num_new_frames == 0
    world.step(1)
    world.rewind(1)
    assert len(world.frames) == 1 and not world.follows_record
