"""Crafter as a world in which the next frame can be known: what is left to counters and chance is switched off."""

import crafter
import numpy as np

from diffusers_far.evaluation.tiles import ACTION_NAMES, COLUMNS, MATERIALS, PLAYER, ROWS, SAFE_TO_WALK, TILE_SIZE


ACTION_NUMBERS = [crafter.constants.actions.index(name) for name in ACTION_NAMES]  # of ours among Crafter's
VITALS = ("health", "food", "drink", "energy")


class CrafterWorld(crafter.Env):
    """A world of Crafter, seen through a window of 8 x 6 tiles above 8 x 2 tiles of inventory, 64 x 64 pixels.

    Health, food, drink and energy stay full: they fall by counters that no frame shows.

    Args:
        seed (`int`): What the world follows from, and the creatures in it.
        area (`int`): Tiles along each side of the world.
        creatures (`bool`): Cows, zombies and skeletons, which move at random.
        night (`bool`): The light changes with a period of 300 frames, and the dark is noisy.
    """

    def __init__(self, seed, area, creatures=False, night=False):
        size = COLUMNS * TILE_SIZE
        super().__init__((area, area), (COLUMNS, COLUMNS), (size, size), length=None, seed=seed)
        self.has_creatures, self.has_night = creatures, night

    @property
    def position(self):
        """Where the player stands, `(x, y)`: tiles from the left and from the top of the world."""
        return tuple(int(number) for number in self._player.pos)

    @property
    def facing(self):
        """The step, `(x, y)`, to the tile before the player, on which "do" acts."""
        return tuple(self._player.facing)

    def material(self, place):
        """Name of the material at a place `(x, y)`, under any creature there. `None` beyond the world."""
        return self._world[place][0]

    def tiles(self):
        """What is in view: material numbers of shape `(8, 6)`, int64, by column and row; -1 beyond the world."""
        left, top = np.array(self.position) - PLAYER
        names = [[self.material((left + x, top + y)) for y in range(ROWS)] for x in range(COLUMNS)]
        return np.array([[-1 if name is None else MATERIALS.index(name) for name in column] for column in names])

    def start(self, rng=None):
        """Make the world. Returns the first frame, uint8 of shape `(64, 64, 3)`.

        The player begins in the middle, in Crafter's meadow; with a random generator of NumPy, at a place that it draws. Each
        kind of ground is then as likely as another, so caves, which are rare, are shown as often as meadows.
        """
        frame = self.reset()
        if self.has_creatures and rng is None:
            return frame  # to draw it once more would draw the noise of the night once more
        if not self.has_creatures:
            for each in self._world.objects:
                if each is not self._player:
                    self._world.remove(each)
        if rng is not None:
            grounds = [places for name in SAFE_TO_WALK if (places := self._free_places(name))]
            places = grounds[rng.integers(len(grounds))]
            self._world.move(self._player, places[rng.integers(len(places))])
        return self.render()

    def _free_places(self, material):
        """Where nobody stands on such ground, in order."""
        places = np.ndindex(*self._area)
        return [place for place in places if self._world[place] == (material, None)]

    def act(self, action):
        """Take one of `ACTION_NAMES`, by its number. Returns the next frame."""
        return self.step(ACTION_NUMBERS[action])[0]

    # What Crafter asks of its environment

    def _obs(self):
        self._player.inventory |= dict.fromkeys(VITALS, 9)
        return super()._obs()

    def _update_time(self):
        super()._update_time()
        if not self.has_night:
            self._world.daylight = 1.0

    def _balance_chunk(self, chunk, objects):
        """Let creatures come and go."""
        if self.has_creatures:
            # Crafter keeps them in a set, whose order differs between processes, and picks one by its place in it.
            super()._balance_chunk(chunk, [each for each in self._world.objects if each in objects])
