"""Latents whose actions are where the camera stands, for models that need not count their steps to know it.

F frames.
"""

from pathlib import Path

import numpy as np
from datasets import Dataset, List, Value

from diffusers_far.data.latents import LatentDataset, write_shard


# Map units. The longest is more than twice a maze of 5 cells, so that no two places in one are alike.
WAVELENGTHS = (1536, 768, 384, 192)
TURNS = (1, 2, 4)  # of the heading's angle


def pose_actions(pose: np.ndarray) -> np.ndarray:
    """Sines and cosines of a pose: near where poses are near, and far apart where they are not.

    Args:
        pose (`np.ndarray` of shape `(F, 3)`): x and y in map units, heading in degrees.

    Returns:
        `np.ndarray` of shape `(F, 22)`, float32: continuous actions, each that of the frame's own pose.
    """
    pose = np.asarray(pose, dtype=np.float64)
    phases = [2 * np.pi * pose[:, axis] / wavelength for axis in (0, 1) for wavelength in WAVELENGTHS]
    phases += [turns * np.radians(pose[:, 2]) for turns in TURNS]
    angles = np.stack(phases, axis=1)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def write_poses(latents_dir: Path, split: str, folder: Path) -> None:
    """Copy a cached split, with poses for actions; shards that are there are kept.

    Args:
        latents_dir (`Path`): Of walks that have the column `pose`.
        split (`str`): Which.
        folder (`Path`): Gets a folder of this name.
    """
    dataset = LatentDataset(latents_dir, split)
    (folder / split).mkdir(parents=True, exist_ok=True)
    for shard in range(dataset.source.num_shards):
        path = dataset.source.shard_path(folder / split, shard)
        if path.is_file():
            continue
        walks = dataset.source.shard_rows(shard)
        latents = [dataset.clip(walk, 0, int(dataset.num_frames[walk])).latents.numpy() for walk in walks]
        carried = with_pose_actions(dataset.table.select(walks).remove_columns("latents"))
        write_shard(path, latents, carried.with_format("arrow")[:], carried.features, dataset.source)


def with_pose_actions(walks: Dataset) -> Dataset:
    actions = [pose_actions(pose).tolist() for pose in walks["pose"]]
    return walks.remove_columns("actions").add_column("actions", actions, feature=List(List(Value("float32"))))
