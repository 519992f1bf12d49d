"""Poses as actions: near where the camera is near, and copied to the latents of the same frames."""

import numpy as np
import pytest

from benchmarks.studies.poses import pose_actions


def distance(first: tuple, second: tuple) -> float:
    one, other = pose_actions(np.array([first, second]))
    return float(np.linalg.norm(one - other))


def test_a_full_turn_is_no_turn():
    assert distance((100, 200, 0), (100, 200, 360)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_nearer_poses_have_nearer_actions(axis):
    steps = np.array([0, 10, 20, 40])  # map units, or degrees
    poses = np.tile((300.0, 300.0, 90.0), (4, 1))
    poses[:, axis] += steps
    actions = pose_actions(poses)
    distances = np.linalg.norm(actions - actions[0], axis=1)
    assert actions.shape == (4, 22) and actions.dtype == np.float32
    assert np.all(np.diff(distances) > 0)


def test_no_two_places_of_a_maze_are_alike():
    grid = np.array([(x, y, 0) for x in range(0, 577, 48) for y in range(0, 577, 48)])
    actions = pose_actions(grid)
    distances = np.linalg.norm(actions[:, None] - actions[None], axis=2) + 100 * np.eye(len(grid))
    assert distances.min() > 0.5
