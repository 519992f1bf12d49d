"""What a model makes of a world of tiles: which it draws, which it could know, and whether its world holds together.

A frame of Crafter at 64 x 64 pixels is a window of 8 columns and 6 rows of tiles, the player in column 4 and row 3,
above two rows of inventory. Tiles are held as material numbers, indices of `MATERIALS`, in arrays of shape `(F, 8, 6)`:
by frame, column and row. -1 is beyond the world. An action moves the window by one tile at most. All is known but the
tiles that come in, and those too where they were in view before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image


MATERIALS = (
    "water",
    "grass",
    "stone",
    "path",
    "sand",
    "tree",
    "lava",
    "coal",
    "iron",
    "diamond",
    "table",
    "furnace",
)
SAFE_TO_WALK = ("grass", "sand", "path")
WALKABLE = tuple(MATERIALS.index(name) for name in (*SAFE_TO_WALK, "lava"))  # the player walks into lava too

ACTION_NAMES = ("move_left", "move_right", "move_up", "move_down", "do")
STEPS = (
    (-1, 0),
    (1, 0),
    (0, -1),
    (0, 1),
    (0, 0),
)  # what each action adds to the player's (x, y) if nothing is in the way
DO = ACTION_NAMES.index("do")
OPPOSITE = tuple(STEPS.index((-x, -y)) for x, y in STEPS)  # the action that leads back
MOVES = tuple(action for action, step in enumerate(STEPS) if step != (0, 0))

COLUMNS, ROWS, TILE_SIZE = 8, 6, 8  # a tile has 8 x 8 pixels
PLAYER = (4, 3)  # column and row; the tile there cannot be seen

# What `label_tiles` calls a tile.
IN_VIEW, BACK, BACK_EASY, NEW, NEW_EASY, NOT_SCORED = "in view", "back", "back, easy", "new", "new, easy", "-"

# A tile that returns counts if it was last in view more frames ago than this.
MIN_AGE = 16

# How recorded walks wander, and those through made-up worlds.
TURN_SHARE = 0.12  # of the frames: a new direction is drawn
AVOID_SHARE = 0.7  # of the frames before an obstacle: a new direction is drawn; else the walker runs into it
CHOP_SHARE = 0.2  # of the frames before a tree: it is felled, and grass is left


def load_textures() -> np.ndarray:
    """How each of `MATERIALS` looks: uint8 of shape `(12, 8, 8, 3)`.

    Crafter's own textures at this size (MIT licence, see NOTICE), side by side in a file of this package, so that worlds
    are read where Crafter is not installed.
    """
    with Image.open(Path(__file__).with_name("crafter_tiles.png")) as picture:
        return np.stack(np.split(np.asarray(picture.convert("RGB")), len(MATERIALS), axis=1))


def read_tiles(frames: np.ndarray, textures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which material each tile shows, by the nearest texture.

    Args:
        frames (`np.ndarray` of shape `(F, 64, 64, 3)`): In [0, 255].
        textures (`np.ndarray` of shape `(M, 8, 8, 3)`): In [0, 255]; see [`load_textures`].

    Returns:
        Material numbers, int64 of shape `(F, 8, 6)`, and the mean squared difference to the nearest texture, float32 of
        the same shape: 0 where the texture is drawn exactly, large where the picture is broken.
    """
    return nearest_material(cut_tiles(frames)[:, :, :ROWS], textures)


def nearest_material(drawn: np.ndarray, textures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of the nearest texture, and the mean squared difference to it, of each tile `(..., 8, 8, 3)`."""
    drawn = drawn.astype(np.float32)
    # One texture at a time: all at once would take 1.7 MB a frame.
    distances = [((drawn - texture.astype(np.float32)) ** 2).mean((-1, -2, -3)) for texture in textures]
    distance = np.stack(distances, -1)
    return distance.argmin(-1), distance.min(-1)


def cut_tiles(frames: np.ndarray) -> np.ndarray:
    """The tiles of frames, and the inventory below them: `(F, 64, 64, 3)` -> `(F, 8, 8, 8, 8, 3)`, by column and row."""
    size = COLUMNS * TILE_SIZE
    if frames.ndim != 4 or frames.shape[1:] != (size, size, 3):
        raise ValueError(f"`frames` have shape {frames.shape}; give (F, {size}, {size}, 3), colours last.")
    return frames.reshape(-1, COLUMNS, TILE_SIZE, COLUMNS, TILE_SIZE, 3).transpose(0, 3, 1, 2, 4, 5)


def label_tiles(positions: np.ndarray, tiles: np.ndarray, actions: np.ndarray, num_context_frames: int) -> np.ndarray:
    """What of each frame after the context could be known from it.

    - "in view": the context showed the tile, and it was in view ever since.
    - "back": the context showed it, and it comes in again.
    - "new": it comes in and was never in view: nobody can know it.
    - "-", not scored: the player's own tile, what came in after the context, what is beyond the world; and everything
      from the first move on whose outcome depends on a tile that the context never showed, as even a perfect model may
      then be somewhere else.

    Land is smooth: about 80% of the tiles that come in equal the tile beside them, and a model that only repeats draws
    them right. They are "back, easy" and "new, easy". To draw "back" right a model must remember; how often it draws
    "new" right is the chance level.

    Args:
        positions (`np.ndarray` of shape `(F, 2)`): Of the player: x and y in tiles. Of the true walk, as are the others.
        tiles (`np.ndarray` of shape `(F, 8, 6)`): Material numbers.
        actions (`np.ndarray` of shape `(F,)` or `(F - 1,)`): `actions[t]` leads from frame `t` to frame `t + 1`.
        num_context_frames (`int`): The first frames, which the model was shown. At least 1.

    Returns:
        `np.ndarray` of shape `(F - num_context_frames, 8, 6)` of these texts.
    """
    if not 1 <= num_context_frames < len(tiles):
        raise ValueError(
            f"`num_context_frames` is {num_context_frames} but the walk has {len(tiles)} frames; choose 1 to "
            f"{len(tiles) - 1}, so that both context and frames after it exist."
        )
    positions = np.asarray(positions).astype(int)
    last_in_view: dict[tuple[int, int], int] = {}
    shown: set[tuple[int, int]] = set()
    labels = np.full(tiles.shape, NOT_SCORED, dtype=f"<U{len(BACK_EASY)}")
    is_known = True  # where the player is
    for t, view in enumerate(tiles):
        corner = positions[t] - PLAYER
        step = positions[t] - positions[max(t - 1, 0)]
        if t >= num_context_frames:
            is_known = is_known and _sum(positions[t - 1], STEPS[actions[t - 1]]) in shown
        for column, row in np.ndindex(COLUMNS, ROWS):
            place = _sum(corner, (column, row))
            last_time = last_in_view.get(place)
            last_in_view[place] = t
            if t < num_context_frames:
                shown.add(place)
                continue
            if not is_known or view[column, row] < 0 or (column, row) == PLAYER:
                continue
            if place in shown and last_time == t - 1:
                labels[t, column, row] = IN_VIEW
            elif place in shown or last_time is None:
                is_easy = step.any() and view[column - step[0], row - step[1]] == view[column, row]
                kinds = (BACK, BACK_EASY) if place in shown else (NEW, NEW_EASY)
                labels[t, column, row] = kinds[int(is_easy)]
    return labels[num_context_frames:]


@dataclass(frozen=True)
class WorldConsistency:
    """How well a world holds together. F frames, M materials.

    A true walk has 1 in the first two, but for what the player takes away. So have a world of nothing but grass and a
    player that is walled in: compare the other two with those of true walks.

    Args:
        persistence (`np.ndarray` of shape `(F - 1,)`): Of the tiles that stay in view, the share that is drawn as in
            the frame before.
        returned (`np.ndarray` of shape `(F,)`): Of the tiles that come back after more than `MIN_AGE` frames, the
            share that is drawn as when last seen. Those that equal the tile beside them do not count, as to repeat it
            is enough. NaN without any.
        moved (`float`): The share of moves that led somewhere.
        came_in (`np.ndarray` of shape `(M,)`): How many tiles of each material came in.
    """

    persistence: np.ndarray
    returned: np.ndarray
    moved: float
    came_in: np.ndarray


def where_it_leads(view: np.ndarray, action: int) -> tuple[int, int]:
    """What an action adds to the player's (x, y), by the rule of the world: the player moves if the tile ahead can be walked
    on, and else stands still.

    Args:
        view (`np.ndarray` of shape `(8, 6)`): Material numbers of the frame at which the action is taken.
        action (`int`): Index of `ACTION_NAMES`.
    """
    step = STEPS[action]
    return step if view[_sum(PLAYER, step)] in WALKABLE else (0, 0)


def follow_world(tiles: np.ndarray, actions: Sequence[int] | np.ndarray) -> WorldConsistency:
    """Follow the player through a world that a model makes up, and compare what it draws with what it drew before.

    No truth is needed, as the rule of the world says what each action does, see [`where_it_leads`]; the tile ahead is the
    one that the model drew.

    Args:
        tiles (`np.ndarray` of shape `(F, 8, 6)`): Material numbers, as [`read_tiles`] gives them.
        actions (sequence of `int`): `actions[t]` leads from frame `t` to frame `t + 1`; at least `F - 1`.
    """
    if len(actions) < len(tiles) - 1:
        raise ValueError(
            f"`actions` are {len(actions)} but {len(tiles)} frames need {len(tiles) - 1}; give one for each frame "
            "but the last."
        )
    columns, rows = np.indices((COLUMNS, ROWS))
    place, last_drawn = (0, 0), {}  # of the window's corner; by place: when, and which material
    persistence, returned = [], np.full(len(tiles), np.nan)
    num_moves, num_moved, came_in = 0, 0, np.zeros(len(MATERIALS), int)
    for t, view in enumerate(tiles):
        step = (0, 0)
        if t:
            step = where_it_leads(tiles[t - 1], actions[t - 1])
            num_moves += STEPS[actions[t - 1]] != (0, 0)
            num_moved += step != (0, 0)
            place = _sum(place, step)

            before = columns + step[0], rows + step[1]  # column and row of each tile in the frame before
            was_inside = (before[0] >= 0) & (before[0] < COLUMNS) & (before[1] >= 0) & (before[1] < ROWS)
            entered = view[~was_inside]
            came_in += np.bincount(entered[entered >= 0], minlength=len(MATERIALS))
            stays = was_inside & _is_not_player(columns, rows) & _is_not_player(*before)
            persistence.append((view[stays] == tiles[t - 1][before[0][stays], before[1][stays]]).mean())

        hits = []
        for column, row in np.ndindex(COLUMNS, ROWS):
            if (column, row) == PLAYER:
                continue
            where = _sum(place, (column, row))
            time, material = last_drawn.get(where, (t, None))
            if t - time > MIN_AGE and material != view[column - step[0], row - step[1]]:
                hits.append(material == view[column, row])
            last_drawn[where] = t, view[column, row]
        if hits:
            returned[t] = np.mean(hits)
    return WorldConsistency(np.array(persistence), returned, num_moved / max(num_moves, 1), came_in)


class Wanderer:
    """Walks straight on for a while, then elsewhere; now and then into an obstacle, never into lava.

    Args:
        rng (`numpy.random.Generator`): Decides the way.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.direction = int(rng.integers(len(MOVES)))

    def next_action(self, world) -> int:
        """The action to take in a world as it is now: a [`DrawnWorld`], or another with its attributes and `material`."""
        if all(_ahead(world, move) == "lava" for move in MOVES):
            return DO  # no true world has such a place
        while True:
            if self.rng.random() < TURN_SHARE:
                self._turn()
            ahead = _ahead(world, self.direction)
            is_obstacle = ahead not in SAFE_TO_WALK
            if ahead in (None, "lava") or (is_obstacle and self.rng.random() < AVOID_SHARE):
                self._turn()
            # Only trees are acted on: grass gives a sapling by chance.
            if world.material(_sum(world.position, world.facing)) == "tree" and self.rng.random() < CHOP_SHARE:
                return DO
            if _ahead(world, self.direction) != "lava":
                return self.direction

    def _turn(self) -> None:
        self.direction = int(self.rng.integers(len(MOVES)))


class ThereAndBack:
    """Walks some moves out over what it sees to be walkable, mostly straight on and never straight back, then the same way
    back without looking. Where it cannot go on it stands still for a frame.

    Args:
        rng (`numpy.random.Generator`): Decides the way.
        num_out (`int`): Moves out, and as many back.
    """

    def __init__(self, rng: np.random.Generator, num_out: int) -> None:
        self.rng, self.num_left = rng, num_out
        self.way_back: list[int] = []  # the first move back is the last one

    def next_action(self, world) -> int:
        """The action to take in a world as it is now, as for a [`Wanderer`]."""
        if self.num_left == 0:
            return self.way_back.pop()
        self.num_left -= 1
        came = self.way_back[-1:]
        is_open = [move for move in MOVES if _ahead(world, move) in SAFE_TO_WALK and move not in came]
        action = OPPOSITE[came[0]] if came else DO
        if action not in is_open or self.rng.random() < TURN_SHARE:
            action = int(self.rng.choice(is_open)) if is_open else DO
        self.way_back.append(OPPOSITE[action])
        return action


@dataclass(frozen=True)
class DrawnWorld:
    """A world as far as a frame shows it, for a walker.

    Args:
        tiles (`np.ndarray` of shape `(8, 6)`): Material numbers.
        facing (`tuple` of 2 `int`): The step to the tile before the player.
    """

    tiles: np.ndarray
    facing: tuple[int, int]
    position: ClassVar[tuple[int, int]] = PLAYER

    def material(self, place: tuple[int, int]) -> str:
        """Name of the material at a place in the window."""
        return MATERIALS[self.tiles[place]]


def _ahead(world, move: int) -> str | None:
    """The material that a move leads to; `None` beyond the world."""
    return world.material(_sum(world.position, STEPS[move]))


def _sum(place: Sequence[int], step: Sequence[int]) -> tuple[int, int]:
    return int(place[0] + step[0]), int(place[1] + step[1])


def _is_not_player(columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return (columns != PLAYER[0]) | (rows != PLAYER[1])
