"""Choose the actions of a walk: wander, go out and back the same way, or make round trips."""

import collections

from diffusers_far.evaluation.tiles import MOVES, SAFE_TO_WALK, STEPS, Wanderer


TRIP_LENGTHS = range(8, 33)  # frames of a round trip before its way home


class OutAndBack:
    """Wanders, goes back over its own steps to where it began, and wanders on if frames are left.

    Args:
        rng (`numpy.random.Generator`): Decides the way out.
        num_out (`int`): Frames up to the turning point.
    """

    def __init__(self, rng, num_out):
        self.wanderer = Wanderer(rng)
        self.num_out = num_out
        self.places = []  # one for each frame of the way out
        self.way_back = []

    def next_action(self, world):
        """The action to take in a `CrafterWorld` as it is now."""
        if len(self.places) < self.num_out:
            self.places.append(world.position)
            self.way_back = self.places[::-1]
        if len(self.places) < self.num_out:
            return self.wanderer.next_action(world)
        action = action_along(self.way_back, world.position)
        return self.wanderer.next_action(world) if action is None else action


class RoundTrips:
    """Wanders for a while and takes the shortest way to where it began, again and again.

    Args:
        rng (`numpy.random.Generator`): Decides the ways out and their lengths.
    """

    def __init__(self, rng):
        self.rng = rng
        self.wanderer = Wanderer(rng)
        self.home = None
        self.num_left = self._draw_length()
        self.way_home = []

    def next_action(self, world):
        """The action to take in a `CrafterWorld` as it is now."""
        self.home = world.position if self.home is None else self.home
        action = action_along(self.way_home, world.position)
        if action is not None:
            return action
        if self.num_left == 0:
            self.num_left = self._draw_length()
            self.way_home = shortest_way(world, world.position, self.home)
            action = action_along(self.way_home, world.position)
            if action is not None:
                return action
        self.num_left -= 1
        return self.wanderer.next_action(world)

    def _draw_length(self):
        return int(self.rng.integers(TRIP_LENGTHS.start, TRIP_LENGTHS.stop))


def place_after(place, step):
    return place[0] + step[0], place[1] + step[1]


def action_along(way, place):
    """The move from `place` to the next of the places of `way`, or `None` at its end. Those reached are taken off it.

    A creature may stand there; the same move is then tried until it has gone.
    """
    while way and way[0] == place:
        way.pop(0)
    return next(move for move in MOVES if place_after(place, STEPS[move]) == way[0]) if way else None


def shortest_way(world, start, goal):
    """The places after `start` up to and with `goal`, over safe ground. There must be a way; creatures do not count."""
    came_from = {start: None}
    queue = collections.deque([start])
    while goal not in came_from:
        place = queue.popleft()
        for move in MOVES:
            beside = place_after(place, STEPS[move])
            if beside not in came_from and world.material(beside) in SAFE_TO_WALK:
                came_from[beside] = place
                queue.append(beside)
    way = []
    while goal != start:
        way.append(goal)
        goal = came_from[goal]
    return way[::-1]
