"""Chooses the actions of a walk: from one random cell to the next, each time on a shortest path."""

import math

from maze_world.layout import random_cell
from maze_world.level import cell_centre


FORWARD, LEFT, RIGHT = range(3)
ACTION_NAMES = ("forward", "left", "right")
TURN_DEGREES = 22.5

ARRIVAL_DISTANCE = 20  # map units from a cell's centre at which the walk turns to the next cell
STUCK_DISTANCE = 6  # map units that three free forward actions always exceed


class Walker:
    """Walks through a maze without end.

    Args:
        maze (`Maze`): Where to walk.
        start (`tuple[int, int]`): The cell in which the walk begins.
        rng (`numpy.random.Generator`): Chooses the goals.
    """

    def __init__(self, maze, start, rng):
        self.maze = maze
        self.cell = start
        self.rng = rng
        self.path = []
        self.forward_steps = []  # positions before each of the latest forward actions in a row

    def next_action(self, x, y, heading):
        """The action to take at a position (map units) and heading (degrees, counted counter-clockwise)."""
        if self.path and math.dist((x, y), cell_centre(self.path[0])) < ARRIVAL_DISTANCE:
            self.cell = self.path.pop(0)
        if self._is_stuck(x, y):
            self.path.insert(0, self.cell)  # off the corner, back to the middle of the last cell
            self.forward_steps.clear()
        while not self.path:
            self.path = self.maze.shortest_path(self.cell, random_cell(self.rng, self.maze.num_cells))

        target_x, target_y = cell_centre(self.path[0])
        error = math.degrees(math.atan2(target_y - y, target_x - x)) - heading
        error = (error + 180) % 360 - 180
        if abs(error) > TURN_DEGREES / 2 + 1:
            self.forward_steps.clear()
            return LEFT if error > 0 else RIGHT
        self.forward_steps.append((x, y))
        return FORWARD

    def _is_stuck(self, x, y):
        return len(self.forward_steps) >= 3 and math.dist((x, y), self.forward_steps[-3]) < STUCK_DISTANCE
