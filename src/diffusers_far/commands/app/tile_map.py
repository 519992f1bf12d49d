"""The map of a world of tiles, drawn from the frames that a model made of it: whether the world holds is seen at a glance."""

import numpy as np

from ...evaluation.tiles import COLUMNS, PLAYER, ROWS, TILE_SIZE, cut_tiles, read_tiles, where_it_leads


REACH = 24  # tiles around the player that are drawn
NOT_SHOWN = 24  # gray level of what no frame showed


class TileMap:
    """What frames showed of a world, each place as it was drawn last, and the player where it is now.

    Args:
        textures (`np.ndarray` of shape `(M, 8, 8, 3)`): See [`~evaluation.tiles.load_textures`].

    Attributes:
        place (`tuple` of 2 `int`): Of the player: x and y in tiles, from where it was at the first frame.
    """

    def __init__(self, textures: np.ndarray):
        self.textures = textures
        self.place = (0, 0)
        self._view = np.full((COLUMNS, ROWS), -1)  # beyond the world: no action leads from there to the first frame
        self._land: dict[tuple[int, int], np.ndarray] = {}  # pixels by place
        self._player: np.ndarray | None = None  # pixels; it hides the land under it

    def show(self, frame: np.ndarray, action: int) -> None:
        """Add a frame.

        Args:
            frame (`np.ndarray` of shape `(64, 64, 3)`): uint8.
            action (`int`): The one that leads to it; to the first frame none does, whatever it is.
        """
        x, y = self.place = tuple(np.add(self.place, where_it_leads(self._view, action)).tolist())
        (self._view,), _ = read_tiles(frame[None], self.textures)
        (tiles,) = cut_tiles(frame[None])
        for column, row in np.ndindex(COLUMNS, ROWS):
            if (column, row) != PLAYER:
                self._land[x + column - PLAYER[0], y + row - PLAYER[1]] = tiles[column, row]
        self._player = tiles[PLAYER]

    def draw(self) -> np.ndarray:
        """`(h, w, 3)`, uint8: `TILE_SIZE` pixels a tile, up to `REACH` tiles around the player."""
        drawn = {**self._land, self.place: self._player}
        places = np.array(list(drawn))
        near = places[np.abs(places - self.place).max(axis=1) <= REACH]
        left, top = near.min(axis=0)
        width, height = near.max(axis=0) - (left, top) + 1
        canvas = np.full((height, width, TILE_SIZE, TILE_SIZE, 3), NOT_SHOWN, np.uint8)
        for x, y in near:
            canvas[y - top, x - left] = drawn[x, y]
        return canvas.swapaxes(1, 2).reshape(height * TILE_SIZE, width * TILE_SIZE, 3)
