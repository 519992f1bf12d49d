"""Latents that were encoded once: shards on disk, and clips cut from them without copying more than the clip. The codes
of a VQ autoencoder are latents of one channel, whole numbers instead of scaled ones.

A cached split is a folder of Arrow files that `datasets` opens too. Each file carries, in its schema's metadata, which
VAE and which dataset it was made of, so that a shard that was copied elsewhere still says what it is.
"""

# F frames, C latent channels, H/W latent height/width

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, List, Value

from .actions import clip_actions, count_actions
from .fingerprint import vae_hash


METADATA_KEY = b"diffusers_far"


@dataclass(frozen=True)
class LatentSource:
    """What a cached split was made of; the same in all of its shards."""

    vae_hash: str
    scaling_factor: float
    dataset_fingerprint: str
    num_trajectories: int
    trajectories_per_shard: int

    @property
    def num_shards(self) -> int:
        return -(-self.num_trajectories // self.trajectories_per_shard)

    def shard_rows(self, shard: int) -> range:
        """The trajectories of shard number `shard`."""
        first = shard * self.trajectories_per_shard
        return range(first, min(first + self.trajectories_per_shard, self.num_trajectories))

    def shard_path(self, folder: str | Path, shard: int) -> Path:
        return Path(folder) / f"latents-{shard:05d}-of-{self.num_shards:05d}.arrow"


@dataclass(frozen=True)
class LatentClip:
    """Consecutive frames of one trajectory.

    Attributes:
        latents (`torch.Tensor` of shape `(F, C, H, W)`): float32, already multiplied by the scaling factor; or codes
            (F, 1, H, W), int64.
        actions (`torch.Tensor` of shape `(F,)`, int64, or `(F, A)`, float32): The action taken at each frame, which
            leads to the next one; `None` if the dataset has none.
        label (`int`): The trajectory's class; `None` if the dataset has none.
    """

    latents: torch.Tensor
    actions: torch.Tensor | None
    label: int | None


def write_shard(
    path: Path, latents: list[np.ndarray], carried: pa.Table, features: Features, source: LatentSource
) -> None:
    """Write one shard; it appears whole or not at all.

    Args:
        path (`Path`): Where it goes.
        latents (list of `np.ndarray` of shape `(F, C, H, W)`): Scaled latents, one array per trajectory, which become
            float16; or codes (F, 1, H, W), unsigned integers, which keep their type.
        carried (`pa.Table`): The other columns of the same trajectories.
        features (`datasets.Features`): Features of `carried`.
        source (`LatentSource`): Goes into the file's metadata.
    """
    channels, height, width = latents[0].shape[1:]
    frames = np.concatenate(latents)
    frames = frames if frames.dtype.kind == "u" else frames.astype(np.float16)
    values = pa.array(frames.reshape(-1))
    for size in (width, height, channels):
        values = pa.FixedSizeListArray.from_arrays(values, size)
    offsets = np.cumsum([0] + [len(array) for array in latents]).astype(np.int32)
    features = Features({"latents": _latents_feature(channels, height, width, frames.dtype)} | dict(features))
    table = pa.table([pa.ListArray.from_arrays(offsets, values), *carried.columns], ["latents", *carried.column_names])
    schema = features.arrow_schema
    table = table.cast(schema).replace_schema_metadata(
        {**schema.metadata, METADATA_KEY: json.dumps(asdict(source)).encode()}
    )
    unfinished = path.with_name("unfinished-" + path.name)
    with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    unfinished.rename(path)


def read_source(path: Path) -> LatentSource:
    """What the shard at `path` was made of.

    Raises:
        ValueError: If it is not a whole Arrow file written by `write_shard`.
    """
    try:
        with pa.memory_map(str(path)) as file:
            metadata = pa.ipc.open_stream(file).schema.metadata or {}
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read ({error}); delete it and run cache_latents.py again."
        ) from error
    if METADATA_KEY not in metadata:
        raise ValueError(f"{str(path)!r} holds no cached latents; pass a folder that cache_latents.py wrote.")
    return LatentSource(**json.loads(metadata[METADATA_KEY]))


class LatentDataset:
    """Clips of a cached split.

    Args:
        latents_dir (`str` or `Path`): Folder that `cache_latents.py` wrote.
        split (`str`): Its subfolder.
        combine_actions (callable, *optional*): Such as an [`ActionCombiner`]: what becomes of the actions between two
            frames of a clip whose frames lie more than one apart.

    Attributes:
        source (`LatentSource`): What it was made of.
        num_frames (`np.ndarray` of shape `(num_trajectories,)`, int64): Frames of each trajectory.
        latent_shape (`tuple`): `(C, H, W)`.
        table (`datasets.Dataset`): All columns, memory-mapped.

    Raises:
        ValueError: If the folder is missing, incomplete, mixed or damaged.
    """

    def __init__(
        self,
        latents_dir: str | Path,
        split: str = "train",
        combine_actions: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.latents_dir, self.split, self.combine_actions = latents_dir, split, combine_actions
        folder = Path(latents_dir) / split
        paths = sorted(folder.glob("latents-*-of-*.arrow"))
        if not paths:
            raise ValueError(
                f"`latents_dir` has no cached latents in {str(folder)!r}; write them with cache_latents.py."
            )
        self.source = read_source(paths[0])
        missing = {self.source.shard_path(folder, shard) for shard in range(self.source.num_shards)} - set(paths)
        if missing:
            raise ValueError(
                f"{str(folder)!r} lacks {len(missing)} of {self.source.num_shards} shards, {min(missing).name!r} "
                "among them; run cache_latents.py again to make them."
            )
        for path in paths:
            if read_source(path) != self.source:
                raise ValueError(
                    f"{path.name!r} and {paths[0].name!r} are of different sources; cache the split anew."
                )

        shards = [_open_shard(path) for path in paths]
        self.table = datasets.concatenate_datasets(shards)
        self._views = [_frames_of(shard) for shard in shards]  # per shard: (all frames, C, H, W)
        lengths = [shard.data.column("latents").chunk(0).value_lengths().to_numpy() for shard in shards]
        self._shard = np.repeat(np.arange(len(shards)), [len(each) for each in lengths])
        self._first_frame = np.concatenate([np.cumsum(each) - each for each in lengths])
        self.num_frames = np.concatenate(lengths).astype(np.int64)
        self.latent_shape = self._views[0].shape[1:]
        columns = self.table.column_names
        self._actions = self.table.data.column("actions") if "actions" in columns else None
        self._labels = self.table.data.column("label") if "label" in columns else None

    def __len__(self) -> int:
        return len(self.num_frames)

    def __reduce__(self):
        # Worker processes open the files again instead of being sent what is mapped.
        return type(self), (self.latents_dir, self.split, self.combine_actions)

    @property
    def dataset_fingerprint(self) -> str:
        return self.source.dataset_fingerprint

    @property
    def vae_hash(self) -> str:
        return self.source.vae_hash

    @property
    def num_actions(self) -> int | None:
        """One above the highest discrete action in the data; `None` without discrete actions."""
        return count_actions(self._actions)

    def require_vae(self, vae: torch.nn.Module) -> None:
        """Raise a `ValueError` unless these latents were made with `vae`."""
        given = vae_hash(vae)
        if given != self.source.vae_hash:
            raise ValueError(
                f"The latents in {str(self.latents_dir)!r} were made with the VAE {self.source.vae_hash}, but `vae` "
                f"is {given}. Pass the VAE that they were made with, or run cache_latents.py with this one into a "
                "new folder."
            )

    def clip(
        self,
        trajectory: int,
        start: int,
        length: int,
        interval: int = 1,
        combine_actions: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> LatentClip:
        """Cut `length` frames, `interval` apart, from frame `start` on.

        Args:
            trajectory (`int`): From 0.
            start (`int`): First frame.
            length (`int`): Number of frames, at least 1.
            interval (`int`): Distance between them in frames, at least 1.
            combine_actions (callable, *optional*): Actions (length, interval) or (length, interval, A) to (length,) or
                (length, A): what becomes of the actions between two kept frames; the dataset's own by default. Needed
                when `interval` is above 1 and the dataset has actions.

        Raises:
            ValueError: If the trajectory is shorter than that, or actions would be lost.
        """
        if not 0 <= trajectory < len(self):
            raise ValueError(f"`trajectory` is {trajectory}, but there are {len(self)}; count from 0.")
        span = (length - 1) * interval + 1
        if length < 1 or interval < 1 or start < 0 or start + span > self.num_frames[trajectory]:
            raise ValueError(
                f"`start` {start}, `length` {length} and `interval` {interval} do not fit trajectory {trajectory}, "
                f"which has {self.num_frames[trajectory]} frames; they need `start >= 0` and {span} frames from there."
            )
        first = self._first_frame[trajectory] + start
        frames = self._views[self._shard[trajectory]][first : first + span : interval]
        return LatentClip(
            latents=torch.from_numpy(frames.astype(np.float32 if frames.dtype.kind == "f" else np.int64)),
            actions=self._clip_actions(trajectory, start, length, interval, combine_actions or self.combine_actions),
            label=None if self._labels is None else self._labels[trajectory].as_py(),
        )

    def _clip_actions(self, trajectory, start, length, interval, combine_actions) -> torch.Tensor | None:
        if self._actions is None:
            return None
        actions = np.asarray(self._actions[trajectory].values.slice(start, length * interval).to_pylist())
        return torch.from_numpy(clip_actions(actions, length, interval, combine_actions))


def _latents_feature(channels: int, height: int, width: int, dtype: np.dtype) -> List:
    """Sizes that never vary are part of the type, so that a shard is one block of numbers without offsets."""
    return List(List(List(List(Value(dtype.name), length=width), length=height), length=channels))


def _open_shard(path: Path) -> Dataset:
    try:
        return Dataset.from_file(str(path))
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read ({error}); delete it and run cache_latents.py again."
        ) from error


def _frames_of(shard: Dataset) -> np.ndarray:
    """A view of a shard's file: (frames of all its trajectories, C, H, W), as they were written."""
    values, shape = shard.data.column("latents").chunk(0).values, []
    while pa.types.is_fixed_size_list(values.type):
        shape.append(values.type.list_size)
        values = values.values
    return values.to_numpy(zero_copy_only=True).reshape(-1, *shape)
