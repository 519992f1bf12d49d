"""The map of a world of tiles, drawn from the frames that a model made of it: whether the world holds is seen at a glance."""

from collections.abc import Sequence

import numpy as np

from ...evaluation.tiles import COLUMNS, PLAYER, ROWS, STEPS, TILE_SIZE, WALKABLE, cut_tiles, nearest_material


REACH = 24  # tiles around the player that are drawn
NOT_SHOWN = 24  # gray level of what no frame showed


def follow_player(frames: np.ndarray, actions: Sequence[int], textures: np.ndarray) -> np.ndarray:
    """Where the player is at each frame: one tile on, if the tile ahead, as the frame shows it, can be walked on.

    Args:
        frames (`np.ndarray` of shape `(F, 64, 64, 3)`): uint8.
        actions (sequence of `int`): F - 1; `actions[t]` leads from frame `t` to frame `t + 1`.
        textures (`np.ndarray` of shape `(M, 8, 8, 3)`): See [`~evaluation.tiles.load_textures`].

    Returns:
        `np.ndarray` of shape `(F, 2)`: x and y in tiles, from where it was at the first frame.
    """
    wanted = np.array(STEPS)[np.asarray(actions, dtype=int)]  # (F - 1, 2)
    columns, rows = (wanted + PLAYER).T
    ahead, _ = nearest_material(cut_tiles(frames[:-1])[np.arange(len(wanted)), columns, rows], textures)
    steps = np.where(np.isin(ahead, WALKABLE)[:, None], wanted, 0)
    return np.concatenate([np.zeros((1, 2), int), np.cumsum(steps, axis=0)])


def draw_map(frames: np.ndarray, actions: Sequence[int], textures: np.ndarray) -> np.ndarray:
    """All that frames showed of a world, each place as it was drawn last, and the player where it is now.

    Args:
        As of [`follow_player`].

    Returns:
        `np.ndarray` of shape `(h, w, 3)`, uint8: `TILE_SIZE` pixels a tile, up to `REACH` tiles around the player.
    """
    places = follow_player(frames, actions, textures)
    corners = places - places[-1] + REACH - PLAYER  # of each frame's window, on a canvas with the player in its midst
    side = 2 * REACH + 1
    # With a margin for windows that begin at the edge
    canvas = np.full((side + ROWS, side + COLUMNS, TILE_SIZE, TILE_SIZE, 3), NOT_SHOWN, np.uint8)
    is_shown = np.zeros(canvas.shape[:2], bool)
    is_land = np.ones((ROWS, COLUMNS), bool)
    is_land[PLAYER[1], PLAYER[0]] = False  # the player hides the tile under it
    tiles = cut_tiles(frames)[:, :, :ROWS].swapaxes(1, 2)  # (F, 6, 8, 8, 8, 3), by row and column
    for tile, (left, top) in zip(tiles, corners):
        if 0 <= left <= side and 0 <= top <= side:
            window = np.s_[top : top + ROWS, left : left + COLUMNS]
            canvas[window][is_land] = tile[is_land]
            is_shown[window] |= is_land
    canvas[REACH, REACH] = tiles[-1][PLAYER[1], PLAYER[0]]
    rows, columns = (np.flatnonzero(is_shown[:side, :side].any(axis)) for axis in (1, 0))
    shown = canvas[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = shown.shape[:2]
    return shown.transpose(0, 2, 1, 3, 4).reshape(height * TILE_SIZE, width * TILE_SIZE, 3)
