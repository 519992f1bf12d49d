"""Plays levels in the engine and records what the player sees, does and where it is."""

import contextlib
import os
from dataclasses import dataclass

import numpy as np
import vizdoom
from PIL import Image

from maze_world.level import MAX_LEVELS, level_name, random_level, write_map_file
from maze_world.looks import LOOKS
from maze_world.walker import FORWARD, LEFT, RIGHT, TURN_DEGREES, Walker


# The engine's clock: it counts 35 tics a second, and an action lasts four of them.
TICS_PER_ACTION = 4
FRAMES_PER_SECOND = 35 / TICS_PER_ACTION
FORWARD_PUSH = 40.0  # per tic, in the engine's units of thrust
BUTTONS = [vizdoom.Button.MOVE_FORWARD_BACKWARD_DELTA, vizdoom.Button.TURN_LEFT_RIGHT_DELTA]
BUTTONS_OF_ACTION = {
    FORWARD: [FORWARD_PUSH, 0.0],
    LEFT: [0.0, -TURN_DEGREES / TICS_PER_ACTION],
    RIGHT: [0.0, TURN_DEGREES / TICS_PER_ACTION],
}
POSE_VARIABLES = [
    vizdoom.GameVariable.POSITION_X,
    vizdoom.GameVariable.POSITION_Y,
    vizdoom.GameVariable.ANGLE,
]
# Tics in which the flash at the start of a level fades.
WARM_UP_TICS = 12

SCREENS_BY_HEIGHT = {
    120: vizdoom.ScreenResolution.RES_160X120,
    240: vizdoom.ScreenResolution.RES_320X240,
    480: vizdoom.ScreenResolution.RES_640X480,
}
SIZES = range(16, max(SCREENS_BY_HEIGHT) + 1)
CELLS = range(2, 65)


@dataclass(frozen=True)
class MazeSettings:
    """What is common to all the recordings of a data set.

    Args:
        look (`str`): A key of `LOOKS`.
        cells (`int`): Cells along each side of a maze.
        size (`int`): Height and width of a frame, in pixels.
        num_frames (`int`): Length of a walk.
    """

    look: str = "plain"
    cells: int = 7
    size: int = 64
    num_frames: int = 300

    def __post_init__(self):
        if self.look not in LOOKS:
            raise ValueError(f"`look` is {self.look!r}, which is no look; choose one of {', '.join(LOOKS)}.")
        if self.cells not in CELLS:
            raise ValueError(
                f"`cells` is {self.cells} but a maze has {CELLS[0]} to {CELLS[-1]} cells a side; choose 5 or 7, say."
            )
        if self.size not in SIZES:
            raise ValueError(
                f"`size` is {self.size} but frames are drawn at {SIZES[0]} to {SIZES[-1]} pixels; choose 64, say."
            )
        if self.num_frames < 1:
            raise ValueError(f"`num_frames` is {self.num_frames} but a walk has at least 1 frame; choose 300, say.")


@dataclass(frozen=True)
class Recording:
    """One walk through one maze. F frames, `size` pixels a side.

    Args:
        seed (`int`): What maze and walk follow from.
        video (`np.ndarray` of shape `(F, size, size, 3)`, uint8): What the player sees.
        actions (`np.ndarray` of shape `(F,)`, int64): `actions[t]` leads from frame `t` to frame `t + 1`.
        pose (`np.ndarray` of shape `(F, 3)`, float32): x and y in map units, heading in degrees in [0, 360).
    """

    seed: int
    video: np.ndarray
    actions: np.ndarray
    pose: np.ndarray


def record_mazes(seeds, settings):
    """Record one walk for each seed.

    The engine writes files into the working directory and may crash when its process exits, even after all went well:
    call this in a child process, in a folder of its own.

    Args:
        seeds (sequence of `int`): At most `MAX_LEVELS`.
        settings (`MazeSettings`): Common to all.

    Yields:
        `Recording`: One per seed, in their order; each depends on its seed and the settings alone.
    """
    if len(seeds) > MAX_LEVELS:
        raise ValueError(f"`seeds` are {len(seeds)} but a map file holds {MAX_LEVELS} levels; record them in parts.")
    look = LOOKS[settings.look]()
    # Map and walk draw from generators of their own: a longer walk keeps its maze.
    generators = [np.random.default_rng(seed).spawn(2) for seed in seeds]
    levels = [random_level(map_rng, settings.cells, look) for map_rng, _ in generators]
    write_map_file("mazes.wad", levels, look.textures)

    game = start_engine(os.path.abspath("mazes.wad"), settings.size)
    for index, (seed, level, (_, walk_rng)) in enumerate(zip(seeds, levels, generators)):
        game.set_doom_map(level_name(index).lower())
        game.set_seed(seed)
        game.new_episode()
        game.make_action([0.0, 0.0], WARM_UP_TICS)
        yield record_walk(game, Walker(level.maze, level.start, walk_rng), seed, settings)
    game.close()


def start_engine(map_file, size):
    """A running engine without window, sound, weapon or status bar, on a screen no smaller than the frames."""
    game = vizdoom.DoomGame()
    game.set_doom_game_path(os.path.join(os.path.dirname(vizdoom.__file__), "freedoom2.wad"))
    game.set_doom_scenario_path(map_file)
    game.set_doom_map(level_name(0).lower())
    game.set_mode(vizdoom.Mode.PLAYER)
    game.set_episode_timeout(0)
    game.set_available_buttons(BUTTONS)
    game.set_available_game_variables(POSE_VARIABLES)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_screen_resolution(next(screen for height, screen in SCREENS_BY_HEIGHT.items() if height >= size))
    game.set_window_visible(False)
    game.set_sound_enabled(False)
    game.set_render_hud(False)
    game.set_render_weapon(False)
    game.set_render_crosshair(False)
    game.set_render_messages(False)
    game.add_game_args("+vid_forcesurface 1 +movebob 0 +fov 90")
    # The engine tends to crash when it is closed and says so at length, which would only alarm: all is recorded then.
    with output_to("engine.log"):
        game.init()
    return game


@contextlib.contextmanager
def output_to(path):
    """Send what this process prints, and all that the processes started meanwhile ever print, to a file."""
    descriptors = (1, 2)  # standard output and error, on which the engine writes past Python's objects for them
    kept = [os.dup(descriptor) for descriptor in descriptors]
    with open(path, "wb") as log:
        for descriptor in descriptors:
            os.dup2(log.fileno(), descriptor)
    try:
        yield
    finally:
        for descriptor, copy in zip(descriptors, kept):
            os.dup2(copy, descriptor)
            os.close(copy)


def record_walk(game, walker, seed, settings):
    video = np.empty((settings.num_frames, settings.size, settings.size, 3), np.uint8)
    actions = np.empty(settings.num_frames, np.int64)
    pose = np.empty((settings.num_frames, 3), np.float32)
    for t in range(settings.num_frames):
        state = game.get_state()
        screen = Image.fromarray(state.screen_buffer)
        video[t] = screen.resize((settings.size, settings.size), Image.Resampling.BOX)
        pose[t] = state.game_variables
        actions[t] = walker.next_action(*state.game_variables)
        game.make_action(BUTTONS_OF_ACTION[actions[t]], TICS_PER_ACTION)
    return Recording(seed, video, actions, pose)
