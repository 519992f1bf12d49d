"""LeRobot datasets: parquet, with the frames in it or in mp4 files; an episode per file (v2) or many (v3)."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..rows import BadExampleError
from ..video import iter_video
from .trajectory import Trajectory, choose_columns, path_inside, read_json_lines


@dataclass(frozen=True)
class Episode:
    """Where an episode lies.

    Args:
        index (`int`): Its `episode_index`.
        num_frames (`int`): Frames that it has by the dataset's metadata.
        data_path (`Path`): The parquet file of its actions; other episodes may be in it.
        video_path (`Path`, *optional*): The mp4 file of its frames; `None`: they are images in the parquet file.
        start_time (`float`, *optional*): Seconds into the mp4 file that it shares; `None`: the file is its own.
    """

    index: int
    num_frames: int
    data_path: Path
    video_path: Path | None
    start_time: float | None = None


class LeRobotSource:
    """The episodes of a LeRobot dataset of version 2 or 3, seen by one of its cameras, with one of its columns as action.

    Args:
        folder (`str` or `Path`): Holds `meta/info.json`.
        video_key (`str`, *optional*): The camera, such as `"observation.images.top"`; needed if there are several.
        action_key (`str`): The column of the actions.
        keep_columns (sequence of `str`): Other columns that are kept, such as `"observation.state"`.

    Raises:
        ValueError: If the folder is no such dataset, or the camera is not clear.
    """

    class_names = splits = None

    def __init__(
        self,
        folder: str | Path,
        video_key: str | None = None,
        action_key: str = "action",
        keep_columns: Sequence[str] = (),
    ) -> None:
        self.folder, self.action_key, self.keep_columns = Path(folder), action_key, keep_columns
        path = self.folder / "meta" / "info.json"
        if not path.is_file():
            raise ValueError(f"`folder` {str(folder)!r} has no `meta/info.json`; name a LeRobot dataset's folder.")
        description = _read_description(path)
        self.video_key, holds_images = _choose_camera(description["features"], video_key, action_key)
        version = str(description.get("codebase_version", ""))
        readers = {"v2": _episodes_of_version_2, "v3": _episodes_of_version_3}
        if version[:2] not in readers:
            raise ValueError(
                f"{str(path)!r} has `codebase_version` {version!r}; convert the dataset to version 2 or 3 with LeRobot."
            )
        try:
            camera = None if holds_images else self.video_key
            episodes = list(readers[version[:2]](self.folder, description, camera))
        except (
            OSError,
            LookupError,
            ValueError,
            TypeError,
            AttributeError,
            ArithmeticError,
            pa.ArrowException,
        ) as error:
            raise ValueError(
                f"{str(path.parent)!r} is incomplete ({type(error).__name__}: {error}); copy the dataset again."
            ) from error
        self.episodes = sorted(episodes, key=lambda episode: episode.index)
        indices = [episode.index for episode in self.episodes]
        if not indices or len(set(indices)) < len(indices):
            raise ValueError(f"`folder` {str(folder)!r} lists no episodes in `meta`, or one twice; copy it again.")
        self.names = [f"episode_{index:06d}" for index in indices]

    def __getitem__(self, index: int) -> Trajectory:
        episode = self.episodes[index]
        try:
            available = pq.read_schema(episode.data_path).names
            where = f"{str(episode.data_path)!r}"
            used = (self.action_key, self.video_key, "episode_index", "frame_index")
            kept, left_out = choose_columns(available, self.keep_columns, used, where)
            wanted = [name for name in (*used, *kept) if name in available]
            of_episode = [("episode_index", "=", episode.index)]
            table = pq.read_table(episode.data_path, columns=wanted, filters=of_episode, partitioning=None)
            table = _in_order(table, episode)
            actions = table.column(self.action_key)
            images = None if episode.video_path is not None else table.column(self.video_key)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise BadExampleError(f"{str(episode.data_path)!r} cannot be read ({error}); copy it again.") from error
        return Trajectory(
            self.names[index],
            _frames(episode) if images is None else _decode(images, where),
            # LeRobot stores a single channel as plain numbers.
            actions.to_numpy()[:, None] if pa.types.is_floating(actions.type) else actions.to_pylist(),
            columns={name: _to_array(table.column(name)) for name in kept},
            left_out=left_out,
        )


def _read_description(path: Path) -> dict:
    try:
        description = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}; copy the dataset again.") from error
    if not isinstance(description, dict) or not isinstance(description.get("features"), dict):
        raise ValueError(f"{str(path)!r} has no `features`; name a LeRobot dataset's folder, or copy it again.")
    return description


def _choose_camera(features: dict, video_key: str | None, action_key: str) -> tuple[str, bool]:
    """The camera, and whether its frames are images in the parquet files."""
    kinds = {name: feature.get("dtype") for name, feature in features.items() if isinstance(feature, dict)}
    available = [name for name, kind in kinds.items() if kind in ("video", "image")]
    if action_key not in features:
        raise ValueError(
            f"The dataset has no column {action_key!r}, only {sorted(features)}; its actions are needed. Say what they are "
            "called with `action_key`."
        )
    if video_key is None and len(available) == 1:
        video_key = available[0]
    if video_key not in available:
        raise ValueError(
            f"`video_key` is {video_key!r}, but the dataset's videos are {available}; choose one of these."
        )
    return video_key, kinds[video_key] == "image"


def _episodes_of_version_2(folder: Path, description: dict, camera: str | None) -> Iterator[Episode]:
    for _, row in read_json_lines(folder / "meta" / "episodes.jsonl"):
        place = {
            "episode_index": row["episode_index"],
            "episode_chunk": row["episode_index"] // description["chunks_size"],
            "total_episodes": description.get("total_episodes"),
            "video_key": camera,
        }
        data_path = path_inside(folder, description["data_path"].format(**place))
        video_path = None if camera is None else path_inside(folder, description["video_path"].format(**place))
        yield Episode(row["episode_index"], row["length"], data_path, video_path)


def _episodes_of_version_3(folder: Path, description: dict, camera: str | None) -> Iterator[Episode]:
    video = f"videos/{camera}"
    columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    if camera is not None:
        columns += [f"{video}/chunk_index", f"{video}/file_index", f"{video}/from_timestamp"]
    for path in sorted((folder / "meta" / "episodes").rglob("*.parquet")):
        for row in pq.read_table(path, columns=columns, partitioning=None).to_pylist():

            def file(template: str, part: str) -> Path:
                place = {"chunk_index": row[f"{part}/chunk_index"], "file_index": row[f"{part}/file_index"]}
                return path_inside(folder, description[template].format(video_key=camera, **place))

            place = (row["episode_index"], row["length"], file("data_path", "data"))
            if camera is None:
                yield Episode(*place, video_path=None)
            else:
                yield Episode(*place, file("video_path", video), row[f"{video}/from_timestamp"])


def _in_order(table: pa.Table, episode: Episode) -> pa.Table:
    """An episode's rows by their `frame_index`, whatever order they were written in."""
    where = f"{str(episode.data_path)!r} has {len(table)} actions of episode {episode.index}"
    if len(table) != episode.num_frames:
        raise BadExampleError(f"{where}, but `meta` says {episode.num_frames}; copy the dataset again.")
    if "frame_index" not in table.column_names:
        return table
    table = table.sort_by("frame_index")
    indices = table.column("frame_index").to_numpy()
    if not np.array_equal(indices, np.arange(len(indices))):
        raise BadExampleError(f"{where}, whose `frame_index` skips or repeats a frame; copy the dataset again.")
    return table


def _to_array(column: pa.ChunkedArray) -> np.ndarray | list:
    """A column's values in the type that they are stored in; what is no array is left for others to refuse."""
    leaf = column.type
    while pa.types.is_list(leaf) or pa.types.is_fixed_size_list(leaf) or pa.types.is_large_list(leaf):
        leaf = leaf.value_type
    values = column.to_pylist()
    try:
        return np.asarray(values, dtype=leaf.to_pandas_dtype() if pa.types.is_primitive(leaf) else None)
    except (ValueError, TypeError, NotImplementedError):
        return values


def _frames(episode: Episode) -> Iterable[np.ndarray]:
    frames = iter_video(episode.video_path, start_time=episode.start_time)
    return frames if episode.start_time is None else islice(frames, episode.num_frames)


def _decode(images: pa.ChunkedArray, where: str) -> Iterator[np.ndarray]:
    from ..clips import decode_images  # brings torch, which datasets with videos do without

    for frame, image in enumerate(images):
        image = image.as_py()
        try:
            yield decode_images([{"bytes": image["bytes"], "path": None}])[0].permute(1, 2, 0).numpy()
        except Exception as error:  # whatever a damaged image makes its decoder raise
            raise BadExampleError(
                f"{where} has no readable image at frame {frame} ({type(error).__name__}: {error}); the images must be in "
                "the parquet file itself."
            ) from error
