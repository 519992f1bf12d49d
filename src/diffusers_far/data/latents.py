"""Clips of latents that were encoded once and lie on the disk.

A cached split is a folder of Arrow files that `datasets` opens too; clips are cut from it without copying more than the
clip. Each file carries, in its schema's metadata, which VAE and which dataset it was made of, so that a shard that was
copied elsewhere still says what it is, and the sha256 of its own content, so that damage is found. The codes
of a VQ autoencoder are latents of one channel, whole numbers instead of scaled ones.

F frames, C latent channels, H/W latent height/width; h/w pixels.
"""

import hashlib
import json
import logging
import mmap
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, List, Value

from ..files import written_whole
from ..models.identity import vae_hash
from .clips import Clip
from .rows import SOURCE_COLUMN, check_conditions, clip_actions, count_actions, row_name


logger = logging.getLogger(__name__)

METADATA_KEY = b"diffusers_far"
# A shard holds its own sha256, which is computed with these zeros in its place.
NO_SHA256 = "0" * 64


@dataclass(frozen=True)
class LatentSource:
    """What a cached split was made of; the same in all of its shards."""

    vae_hash: str
    scaling_factor: float
    dataset_fingerprint: str
    num_trajectories: int
    trajectories_per_shard: int

    def __post_init__(self) -> None:
        for name in ("num_trajectories", "trajectories_per_shard"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be a whole number of at least 1.")

    @property
    def num_shards(self) -> int:
        return -(-self.num_trajectories // self.trajectories_per_shard)

    def shard_rows(self, shard: int) -> range:
        """The trajectories of shard number `shard`."""
        first = shard * self.trajectories_per_shard
        return range(first, min(first + self.trajectories_per_shard, self.num_trajectories))

    def shard_path(self, folder: str | Path, shard: int) -> Path:
        return Path(folder) / f"latents-{shard:05d}-of-{self.num_shards:05d}.arrow"


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
    description = json.dumps(asdict(source) | {"sha256": NO_SHA256}).encode()
    table = table.cast(schema).replace_schema_metadata({**schema.metadata, METADATA_KEY: description})
    with written_whole(path) as unfinished:
        with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table.combine_chunks())
        with open(unfinished, "r+b") as file, mmap.mmap(file.fileno(), 0) as content:
            place = content.find(NO_SHA256.encode())
            content[place : place + len(NO_SHA256)] = hashlib.sha256(content).hexdigest().encode()


def read_source(path: Path) -> LatentSource:
    """What the shard at `path` was made of.

    Raises:
        ValueError: If it is not an Arrow file written by `write_shard`, or its beginning is damaged.
    """
    return _read_header(path)[0]


def _read_header(path: Path) -> tuple[LatentSource, str | None]:
    """What a shard was made of, and the sha256 of its content; older shards have none."""
    try:
        with pa.memory_map(str(path)) as file:
            metadata = pa.ipc.open_stream(file).schema.metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error
    if METADATA_KEY not in metadata:
        raise ValueError(f"{str(path)!r} holds no cached latents; pass a folder that cache_latents.py wrote.")
    try:
        description = json.loads(metadata[METADATA_KEY])
        sha256 = description.pop("sha256", None)
        return LatentSource(**description), sha256
    except (ValueError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error


def require_intact(path: Path) -> None:
    """Read a shard from end to end, and compare its content with the sha256 that it carries. Of a shard that carries none,
    as older versions wrote them, only its form is checked.

    Raises:
        ValueError: If it is damaged; the message names it.
    """
    sha256 = _read_header(path)[1]
    if sha256 is None:
        _open_shard(path)
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        place = content.find(str(sha256).encode())
        with memoryview(content) as view:
            digest = hashlib.sha256(view[:place])
            digest.update(NO_SHA256.encode())
            digest.update(view[place + len(NO_SHA256) :])
    if digest.hexdigest() != sha256:
        raise _damaged(path, "its sha256 is not the one that it was written with")


def _damaged(path: Path, reason: object) -> ValueError:
    return ValueError(f"{str(path)!r} is damaged ({reason}); delete it and run cache_latents.py again.")


class LatentDataset:
    """Clips of a cached split.

    Opening it reads the beginnings of the shards. The sha256 of a shard is compared when the first clip is cut from it, in
    each process that cuts one: then the shard is read whole, once.

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
        headers = [_read_header(path) for path in paths]
        self.source = headers[0][0]
        missing = {self.source.shard_path(folder, shard) for shard in range(self.source.num_shards)} - set(paths)
        if missing:
            raise ValueError(
                f"{str(folder)!r} lacks {len(missing)} of {self.source.num_shards} shards, {min(missing).name!r} "
                "among them; run cache_latents.py again to make them."
            )
        for path, (source, _) in zip(paths, headers):
            if source != self.source:
                raise ValueError(
                    f"{path.name!r} and {paths[0].name!r} are of different sources; cache the split anew."
                )
        num_without_sum = sum(sha256 is None for _, sha256 in headers)
        if num_without_sum:
            logger.info(
                f"{num_without_sum} of {len(paths)} shards in {str(folder)!r} carry no sha256, as older versions wrote them: "
                "damaged numbers in them are not found. cache_latents.py writes them anew into another folder."
            )

        shards = [_open_shard(path) for path in paths]
        for shard, path in zip(shards, paths):
            if shard.features != shards[0].features:
                raise ValueError(
                    f"{str(path)!r} has the columns {shard.features}, but {paths[0].name!r} has {shards[0].features}; all "
                    "frames and actions must be alike: prepare the dataset with `far prepare` and `--size`."
                )
        self._unchecked = dict(enumerate(paths))  # shards whose sums are not compared yet
        self.table = datasets.concatenate_datasets(shards)
        self._views = [_frames_of(shard) for shard in shards]  # per shard: (all frames, C, H, W)
        lengths = [shard.data.column("latents").chunk(0).value_lengths().to_numpy() for shard in shards]
        self._shard = np.repeat(np.arange(len(shards)), [len(each) for each in lengths])
        if len(self._shard) != self.source.num_trajectories:
            raise ValueError(
                f"{str(folder)!r} has {len(self._shard)} trajectories, but its shards say {self.source.num_trajectories}; "
                "cache the split anew."
            )
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

    def check_rows(self, num_actions: int | None = None, num_classes: int | None = None) -> None:
        """As `VideoClips.check_rows`; frames are all of one size here."""

        def name(trajectory: int) -> str:
            known = SOURCE_COLUMN in self.table.column_names
            return row_name(trajectory, self.table.data.column(SOURCE_COLUMN)[trajectory] if known else None)

        columns = (self._actions, self._labels)
        check_conditions(*columns, self.num_frames, name, self.combine_actions, num_actions, num_classes)

    def require_vae(self, vae: torch.nn.Module) -> None:
        """Raise a `ValueError` unless these latents were made with `vae`."""
        given = vae_hash(vae)
        if given != self.source.vae_hash:
            raise ValueError(
                f"The latents in {str(self.latents_dir)!r} were made with the VAE {self.source.vae_hash}, but `vae` "
                f"is {given}. Pass the VAE that they were made with, or run cache_latents.py with this one into a "
                "new folder."
            )

    def clip(self, trajectory: int, start: int, length: int, interval: int = 1) -> Clip:
        """Cut `length` frames, `interval` apart, from frame `start` on.

        Args:
            trajectory (`int`): From 0.
            start (`int`): First frame.
            length (`int`): Number of frames, at least 1.
            interval (`int`): Distance between them in frames, at least 1.

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
        shard = int(self._shard[trajectory])
        if shard in self._unchecked:
            require_intact(self._unchecked[shard])
            del self._unchecked[shard]
        first = self._first_frame[trajectory] + start
        frames = self._views[shard][first : first + span : interval]
        actions = None
        if self._actions is not None:
            stored = self._actions[trajectory].values
            # The last frame's may be missing: the one before stands in.
            stored = stored.slice(min(start, len(stored) - 1), length * interval)
            actions = np.asarray(stored.to_pylist())
            if actions.ndim == 1:
                actions = actions.astype(np.int64)  # whole numbers are discrete, whatever type they are stored in
            actions = torch.from_numpy(clip_actions(actions, length, interval, self.combine_actions))
        return Clip(
            latents=torch.from_numpy(frames.astype(np.float32 if frames.dtype.kind == "f" else np.int64)),
            actions=actions,
            label=None if self._labels is None else self._labels[trajectory].as_py(),
        )


def _latents_feature(channels: int, height: int, width: int, dtype: np.dtype) -> List:
    """Sizes that never vary are part of the type, so that a shard is one block of numbers without offsets."""
    return List(List(List(List(Value(dtype.name), length=width), length=height), length=channels))


def _open_shard(path: Path) -> Dataset:
    try:
        return Dataset.from_file(str(path))
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(path, error) from error


def _frames_of(shard: Dataset) -> np.ndarray:
    """A view of a shard's file: (frames of all its trajectories, C, H, W), as they were written."""
    values, shape = shard.data.column("latents").chunk(0).values, []
    while pa.types.is_fixed_size_list(values.type):
        shape.append(values.type.list_size)
        values = values.values
    return values.to_numpy(zero_copy_only=True).reshape(-1, *shape)
