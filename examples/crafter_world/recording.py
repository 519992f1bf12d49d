"""Records the walk of a seed: frames, actions, positions, and the tiles in view."""

from dataclasses import dataclass

import numpy as np

from crafter_world.game import CrafterWorld


@dataclass(frozen=True)
class Recording:
    """One walk through one world. F frames.

    Args:
        seed (`int`): What world and walk follow from.
        video (`np.ndarray` of shape `(F, 64, 64, 3)`, uint8): What the player sees.
        actions (`np.ndarray` of shape `(F - 1,)`, int64): `actions[t]` leads from frame `t` to frame `t + 1`.
        pose (`np.ndarray` of shape `(F, 3)`, float32): x and y in tiles from the upper left, and 0, as no view turns.
        tiles (`np.ndarray` of shape `(F, 8, 6)`, int64): Material numbers by column and row; -1 beyond the world.
    """

    seed: int
    video: np.ndarray
    actions: np.ndarray
    pose: np.ndarray
    tiles: np.ndarray


def record_walk(seed, settings):
    """The `Recording` of a seed. It depends on the seed and the `CrafterSettings` alone."""
    world = CrafterWorld(seed, settings.area, settings.creatures, settings.night)
    walker = settings.walker(seed)
    video, actions = [world.start(settings.start_rng(seed))], []
    pose, tiles = [(*world.position, 0)], [world.tiles()]
    while len(video) < settings.num_frames:
        actions.append(walker.next_action(world))
        video.append(world.act(actions[-1]))
        pose.append((*world.position, 0))
        tiles.append(world.tiles())
    return Recording(seed, np.stack(video), np.array(actions), np.array(pose, np.float32), np.stack(tiles))
