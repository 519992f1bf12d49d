"""The plan of a maze: which neighbouring cells are joined, and the shortest way from one cell to another."""

import collections
from dataclasses import dataclass


@dataclass(frozen=True)
class Maze:
    """A square of cells, some neighbours joined by a passage.

    Args:
        num_cells (`int`): Cells along each side. A cell is `(column, row)`, each from 0 to `num_cells - 1`.
        passages (`frozenset`): Pairs of joined cells, the smaller cell first.
    """

    num_cells: int
    passages: frozenset

    def joined(self, cell):
        """The cells that a passage leads to from `cell`."""
        return [other for other in neighbours(cell, self.num_cells) if passage(cell, other) in self.passages]

    def shortest_path(self, start, goal):
        """The cells after `start` up to and with `goal`; empty when they are the same."""
        came_from = {start: None}
        queue = collections.deque([start])
        while goal not in came_from:
            cell = queue.popleft()
            for other in self.joined(cell):
                if other not in came_from:
                    came_from[other] = cell
                    queue.append(other)
        path = []
        cell = goal
        while cell != start:
            path.append(cell)
            cell = came_from[cell]
        return path[::-1]


def neighbours(cell, num_cells):
    """The cells beside `cell` inside the square, joined or not."""
    column, row = cell
    beside = [(column + 1, row), (column - 1, row), (column, row + 1), (column, row - 1)]
    return [(x, y) for x, y in beside if 0 <= x < num_cells and 0 <= y < num_cells]


def passage(cell, other):
    """The pair of two cells, in the order in which `Maze.passages` holds it."""
    return (min(cell, other), max(cell, other))


def random_cell(rng, num_cells):
    return int(rng.integers(num_cells)), int(rng.integers(num_cells))


def random_maze(rng, num_cells, loop_share=0.25):
    """A maze in which every cell can be reached, with some loops.

    Args:
        rng (`numpy.random.Generator`): Decides the plan.
        num_cells (`int`): Cells along each side.
        loop_share (`float` in [0, 1]): Share of the walls left by the spanning tree that open after all. Loops let a
            walk come back to a place by another way, which is what a world model has to remember.
    """
    start = random_cell(rng, num_cells)
    visited, trail, passages = {start}, [start], set()
    while trail:
        unvisited = [cell for cell in neighbours(trail[-1], num_cells) if cell not in visited]
        if not unvisited:
            trail.pop()
            continue
        cell = unvisited[rng.integers(len(unvisited))]
        passages.add(passage(trail[-1], cell))
        visited.add(cell)
        trail.append(cell)

    cells = [(column, row) for column in range(num_cells) for row in range(num_cells)]
    for cell in cells:
        for other in neighbours(cell, num_cells):
            if cell < other and passage(cell, other) not in passages and rng.random() < loop_share:
                passages.add(passage(cell, other))
    return Maze(num_cells, frozenset(passages))
