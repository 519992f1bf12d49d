"""LeRobot datasets: parquet and mp4, an episode per file (v2) or many (v3)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..faults import BadExampleError
from ..video import iter_video
from .trajectory import Trajectory


@dataclass(frozen=True)
class Episode:
    """Where an episode lies.

    Args:
        index (`int`): Its `episode_index`.
        num_frames (`int`): Frames that it has by the dataset's metadata.
        data_path (`Path`): The parquet file of its actions; other episodes may be in it.
        video_path (`Path`): The mp4 file of its frames.
        start_time (`float`, *optional*): Seconds into the mp4 file that it shares; `None`: the file is its own.
    """

    index: int
    num_frames: int
    data_path: Path
    video_path: Path
    start_time: float | None = None


class LeRobotSource:
    """The episodes of a LeRobot dataset of version 2 or 3, seen by one of its cameras, with its column `action`.

    Args:
        folder (`str` or `Path`): Holds `meta/info.json`.
        video_key (`str`, *optional*): The camera, such as `"observation.images.top"`; needed if there are several.

    Raises:
        ValueError: If the folder is no such dataset, or the camera is not clear.
    """

    class_names = None

    def __init__(self, folder: str | Path, video_key: str | None = None) -> None:
        self.folder = Path(folder)
        path = self.folder / "meta" / "info.json"
        if not path.is_file():
            raise ValueError(f"`folder` {str(folder)!r} has no `meta/info.json`; name a LeRobot dataset's folder.")
        description = json.loads(path.read_text())
        self.video_key = _choose_video_key(description, video_key)
        version = description.get("codebase_version", "")
        readers = {"v2": _episodes_of_version_2, "v3": _episodes_of_version_3}
        if version[:2] not in readers:
            raise ValueError(
                f"{str(path)!r} has `codebase_version` {version!r}; convert the dataset to version 2 or 3 with LeRobot."
            )
        try:
            self.episodes = readers[version[:2]](self.folder, description, self.video_key)
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(
                f"{str(path.parent)!r} is incomplete ({type(error).__name__}: {error}); copy the dataset again."
            ) from error
        if not self.episodes:
            raise ValueError(f"`folder` {str(folder)!r} lists no episodes in `meta`; copy it again.")
        self.names = [f"episode_{episode.index:06d}" for episode in self.episodes]

    def __getitem__(self, index: int) -> Trajectory:
        episode = self.episodes[index]
        actions = _read_actions(episode)
        if len(actions) != episode.num_frames:
            raise BadExampleError(
                f"{str(episode.data_path)!r} has {len(actions)} actions of episode {episode.index}, but `meta` says "
                f"{episode.num_frames}; copy the dataset again."
            )
        frames = iter_video(episode.video_path, start_time=episode.start_time)
        if episode.start_time is not None:
            frames = islice(frames, episode.num_frames)
        return Trajectory(self.names[index], frames, actions)


def _choose_video_key(description: dict, video_key: str | None) -> str:
    features = description.get("features", {})
    available = [name for name, feature in features.items() if feature.get("dtype") == "video"]
    if "action" not in features:
        raise ValueError(f"The dataset has no column `action`, only {sorted(features)}; its actions are needed.")
    if video_key is None and len(available) == 1:
        return available[0]
    if video_key not in available:
        raise ValueError(
            f"`video_key` is {video_key!r}, but the dataset's videos are {available}; choose one of these."
        )
    return video_key


def _episodes_of_version_2(folder: Path, description: dict, video_key: str) -> list[Episode]:
    episodes = []
    for line in (folder / "meta" / "episodes.jsonl").read_text().splitlines():
        row = json.loads(line)
        place = {
            "episode_index": row["episode_index"],
            "episode_chunk": row["episode_index"] // description["chunks_size"],
            "video_key": video_key,
        }
        data_path = folder / description["data_path"].format(**place)
        video_path = folder / description["video_path"].format(**place)
        episodes.append(Episode(row["episode_index"], row["length"], data_path, video_path))
    return episodes


def _episodes_of_version_3(folder: Path, description: dict, video_key: str) -> list[Episode]:
    video = f"videos/{video_key}"
    columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    columns += [f"{video}/chunk_index", f"{video}/file_index", f"{video}/from_timestamp"]
    episodes = []
    for path in sorted((folder / "meta" / "episodes").rglob("*.parquet")):
        for row in pq.read_table(path, columns=columns).to_pylist():
            data, frames = (
                {"chunk_index": row[f"{part}/chunk_index"], "file_index": row[f"{part}/file_index"]}
                for part in ("data", video)
            )
            data_path = folder / description["data_path"].format(**data)
            video_path = folder / description["video_path"].format(video_key=video_key, **frames)
            start_time = row[f"{video}/from_timestamp"]
            episodes.append(Episode(row["episode_index"], row["length"], data_path, video_path, start_time))
    return episodes


def _read_actions(episode: Episode) -> np.ndarray | Sequence:
    try:
        table = pq.read_table(
            episode.data_path, columns=["action"], filters=[("episode_index", "=", episode.index)], partitioning=None
        )
    except (pa.ArrowInvalid, OSError) as error:
        raise BadExampleError(f"{str(episode.data_path)!r} cannot be read ({error}); copy it again.") from error
    actions = table.column("action")
    if pa.types.is_floating(actions.type):  # LeRobot stores a single channel as plain numbers.
        return actions.to_numpy()[:, None]
    return actions.to_pylist()
