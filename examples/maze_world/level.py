"""A maze as a level of the engine: walls with textures, floors, light and a start, in one map file (a WAD).

The plan becomes a grid of `2 * num_cells + 1` blocks a side: odd blocks are cells, even ones the thin walls and the
passages between them. The text format of the levels is UDMF, in its `zdoom` dialect.
"""

import struct
from dataclasses import dataclass

import numpy as np

from maze_world.layout import Maze, random_cell, random_maze


# Map units. The player is 32 wide and walks about 30 in one action.
CELL_WIDTH = 96
WALL_WIDTH = 16
CEILING_HEIGHT = 96

NUM_WALL_KINDS = 4
NUM_FLOOR_KINDS = 3
MAX_LEVELS = 99  # MAP01 to MAP99


@dataclass(frozen=True)
class Level:
    """One maze and how it looks.

    Args:
        maze (`Maze`): Its plan.
        start (`tuple[int, int]`): The cell in which the player wakes.
        text (`str`): The level in UDMF.
    """

    maze: Maze
    start: tuple
    text: str


class Scenery:
    """The textures of one maze.

    The blocks are divided into patches around random centres, a few per maze: a patch has one floor and, mostly, one
    kind of wall, so that places can be told apart.

    Args:
        rng (`numpy.random.Generator`): Decides every texture.
        look (`Look`): What to choose from.
        num_blocks (`int`): Blocks along each side of the maze.
    """

    def __init__(self, rng, look, num_blocks):
        self.rng = rng
        self.look = look
        self.walls = rng.choice(look.walls, NUM_WALL_KINDS, replace=False)
        self.floors = rng.choice(look.floors, NUM_FLOOR_KINDS, replace=False)
        self.ceiling = rng.choice(look.ceilings)
        self.light = int(rng.integers(176, 240))  # of 255
        self.patch_centres = rng.random((2 * NUM_FLOOR_KINDS, 2)) * num_blocks

    def patch(self, block):
        return int(np.argmin(((self.patch_centres - block) ** 2).sum(axis=1)))

    def floor(self, block):
        """Index into `floors`; also the sector of the block, as sectors differ in their floor alone."""
        return self.patch(block) % NUM_FLOOR_KINDS

    def random_wall(self, block):
        """A texture name for one wall face seen from `block`: now and then a landmark or a neighbouring kind."""
        if self.rng.random() < self.look.poster_share:
            return self.rng.choice(self.look.posters)
        strays = self.rng.random() < 0.25
        return self.walls[(self.patch(block) + strays) % NUM_WALL_KINDS]


class LevelText:
    """Collects the parts of a level and writes them as UDMF, in which parts are numbered by their order."""

    def __init__(self):
        self.things, self.vertices, self.lines, self.sides, self.sectors = [], {}, [], [], []

    def add_start(self, x, y, heading):
        always = "".join(f"skill{skill}=true;" for skill in range(1, 6)) + "single=true;"
        self.things.append(f"thing{{x={x};y={y};angle={heading};type=1;{always}}}")

    def add_sector(self, floor, ceiling, light):
        self.sectors.append(
            f'sector{{heightfloor=0;heightceiling={CEILING_HEIGHT};texturefloor="{floor}";'
            f'textureceiling="{ceiling}";lightlevel={light};}}'
        )

    def add_wall(self, start, end, sector, texture):
        """A solid line between two grid points, seen from its right."""
        front = self._side(f'sector={sector};texturemiddle="{texture}";')
        self.lines.append(f"linedef{{{self._ends(start, end)}sidefront={front};blocking=true;}}")

    def add_border(self, start, end, front_sector, back_sector):
        """An open line between two grid points where the floor changes."""
        front, back = self._side(f"sector={front_sector};"), self._side(f"sector={back_sector};")
        self.lines.append(f"linedef{{{self._ends(start, end)}sidefront={front};sideback={back};twosided=true;}}")

    def _side(self, fields):
        self.sides.append(f"sidedef{{{fields}}}")
        return len(self.sides) - 1

    def _ends(self, start, end):
        v1, v2 = (self.vertices.setdefault(point, len(self.vertices)) for point in (start, end))
        return f"v1={v1};v2={v2};"

    def __str__(self):
        vertices = [f"vertex{{x={grid_line(i)};y={grid_line(j)};}}" for i, j in self.vertices]
        return "\n".join(['namespace="zdoom";', *self.things, *vertices, *self.lines, *self.sides, *self.sectors])


def grid_line(index):
    """Map units of the grid line before block `index`."""
    num_walls, num_cells = (index + 1) // 2, index // 2
    return num_walls * WALL_WIDTH + num_cells * CELL_WIDTH


def cell_centre(cell):
    """`(x, y)` of the middle of a cell, in map units."""
    return tuple(grid_line(2 * index + 1) + CELL_WIDTH / 2 for index in cell)


def open_blocks(maze):
    """Where a player can stand: bool array of shape `(2 * num_cells + 1, 2 * num_cells + 1)`."""
    num_blocks = 2 * maze.num_cells + 1
    is_open = np.zeros((num_blocks, num_blocks), bool)
    is_open[1::2, 1::2] = True
    for (column, row), (other_column, other_row) in maze.passages:
        is_open[column + other_column + 1, row + other_row + 1] = True
    return is_open


def random_level(rng, num_cells, look):
    """The level that `rng` decides: plan, textures, light and start."""
    maze = random_maze(rng, num_cells)
    is_open = open_blocks(maze)
    scenery = Scenery(rng, look, len(is_open))
    start = random_cell(rng, num_cells)

    text = LevelText()
    text.add_start(*cell_centre(start), heading=90 * rng.integers(4))
    for floor in scenery.floors:
        text.add_sector(floor, scenery.ceiling, scenery.light)
    for block in np.argwhere(is_open).tolist():
        add_block_edges(text, scenery, is_open, block)
    return Level(maze, start, str(text))


def add_block_edges(text, scenery, is_open, block):
    """Draw the four edges of an open block clockwise, so that the block lies on the right of each."""
    i, j = block
    edges = [
        ((i, j), (i, j + 1), (i - 1, j)),
        ((i, j + 1), (i + 1, j + 1), (i, j + 1)),
        ((i + 1, j + 1), (i + 1, j), (i + 1, j)),
        ((i + 1, j), (i, j), (i, j - 1)),
    ]
    floor = scenery.floor(block)
    for start, end, beyond in edges:
        if not is_open[beyond]:
            text.add_wall(start, end, floor, scenery.random_wall(block))
        # Two open blocks share one line: the first of them draws it.
        elif beyond > (i, j) and scenery.floor(beyond) != floor:
            text.add_border(start, end, floor, scenery.floor(beyond))


def level_name(index):
    return f"MAP{index + 1:02d}"


def write_map_file(path, levels, textures):
    """Write levels, at most `MAX_LEVELS`, and PNG textures as one WAD: header, contents, directory."""
    lumps = []
    for index, level in enumerate(levels):
        lumps += [(level_name(index), b""), ("TEXTMAP", level.text.encode()), ("ENDMAP", b"")]
    # What lies between the two marks serves as texture for walls, floors and ceilings alike.
    lumps += [("TX_START", b""), *textures.items(), ("TX_END", b"")]

    header_size = 12
    contents, directory = b"".join(content for _, content in lumps), b""
    offset = header_size
    for name, content in lumps:
        directory += struct.pack("<ii8s", offset, len(content), name.encode())
        offset += len(content)
    with open(path, "wb") as file:
        file.write(struct.pack("<4sii", b"PWAD", len(lumps), offset) + contents + directory)
