"""Environments for the tests of `record_gym.py`, which names them with this module."""

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, MultiDiscrete


SPACES = {
    "discrete": Discrete(3, start=5),
    "box": Box(-1, 1, (2, 1), np.float32),
    "several": MultiDiscrete([2, 3]),
}


class TinyGame(gymnasium.Env):
    """A point of light that a number of steps moves; an episode ends after `length` steps."""

    metadata = {"render_modes": ["rgb_array", "ansi"], "render_fps": 4}

    def __init__(self, render_mode=None, actions="discrete", length=6, forgets=False, floats=False):
        self.render_mode, self.action_space, self.observation_space = render_mode, SPACES[actions], Discrete(1)
        self.length, self.forgets, self.floats = length, forgets, floats
        self.picture = np.zeros((12, 16, 3), np.uint8)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.level, self.num_steps = int(self.np_random.integers(100)), 0
        return 0, self.facts()

    def step(self, action):
        self.num_steps += 1
        self.level += 1
        return 0, 1.0, self.num_steps == self.length, False, {} if self.forgets else self.facts()

    def facts(self):
        return {"level": self.level, "place": np.array([self.level, 0.5])}

    def render(self):
        self.picture[:] = self.level  # the same memory every time
        return self.picture / 255 if self.floats else self.picture


gymnasium.register("TinyGame-v0", TinyGame, disable_env_checker=True)
