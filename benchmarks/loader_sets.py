"""Small data sets of one content in every form that a training reads, for `benchmarks.loader`.

F frames, h/w pixels.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffusers_far.data.loading import load_split
from diffusers_far.data.preparation import Preparation
from diffusers_far.data.sources import SOURCES


ROOT = Path(__file__).parents[1]
FRAMES_PER_SECOND = 25
UCF_SIZE = (240, 320)
CAMERA = "observation.image"


@dataclass(frozen=True)
class DataSets:
    """Folders of data sets.

    Args:
        images, videos (`Path`, *optional*): What `load_dataset` opens: PNG images in parquet files; video files with a
            `metadata.jsonl`.
        latents (`Path`, *optional*): What `cache_latents.py` wrote.
        sources (`dict`): Folders for `prepare_dataset.py`, by the name of their layout.
    """

    images: Path | None = None
    videos: Path | None = None
    latents: Path | None = None
    sources: dict[str, Path] = field(default_factory=dict)


def make_sets(folder: Path, num_trajectories: int, num_frames: int, vae: Path) -> DataSets:
    """Draw walks through mazes and write them in every form.

    Args:
        folder (`Path`): Empty.
        num_trajectories, num_frames (`int`): Walks, and frames of each.
        vae (`Path`): Encodes the latents.
    """
    images, latents = folder / "images", folder / "latents"
    sizes = {"num_train": num_trajectories, "num_validation": 0, "num_test": 0, "num_frames": num_frames}
    run_example("make_maze_dataset.py", {"output_dir": images, "look": "plain", "cells": 5, **sizes}, folder)
    run_example("cache_latents.py", {"dataset_name": images, "vae": vae, "output_dir": latents}, folder)
    walks = [
        (np.stack([np.asarray(image) for image in row["video"]]), np.array(row["actions"]))
        for row in load_split(str(images), "train").select_columns(["video", "actions"])
    ]
    sources = {name: folder / name for name in SOURCES}
    write_npz(sources["npz"], walks)
    write_class_folder(sources["classfolder"], walks)
    write_video_folder(sources["videofolder"], walks)
    write_lerobot(sources["lerobot"], walks)
    return DataSets(images, sources["videofolder"], latents, sources)


def run_example(name: str, arguments: dict, cache: Path) -> None:
    flags = [str(text) for argument, value in arguments.items() for text in (f"--{argument}", value)]
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache / "cache")}
    subprocess.run([sys.executable, str(ROOT / "examples" / name), *flags], check=True, env=environment)


Walks = list[tuple[np.ndarray, np.ndarray]]  # frames (F, h, w, 3), uint8, and actions (F,) of each


def write_npz(folder: Path, walks: Walks) -> None:
    folder.mkdir()
    for number, (frames, actions) in enumerate(walks):
        np.savez_compressed(folder / f"{number}.npz", video=frames, actions=actions)


def write_class_folder(folder: Path, walks: Walks) -> None:
    """As UCF-101: avi of 320x240 in two classes."""
    for number, (frames, _) in enumerate(walks):
        large = np.stack([np.asarray(Image.fromarray(frame).resize(UCF_SIZE[::-1])) for frame in frames])
        write_video(folder / "ab"[number % 2] / f"{number}.avi", large)


def write_video_folder(folder: Path, walks: Walks) -> None:
    lines = []
    for number, (frames, actions) in enumerate(walks):
        write_video(folder / f"{number}.mp4", frames)
        lines.append(json.dumps({"file_name": f"{number}.mp4", "actions": actions.tolist()}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def write_lerobot(folder: Path, walks: Walks) -> None:
    """As version 2: a file per episode; the actions are made continuous."""
    description = {
        "codebase_version": "v2.1",
        "chunks_size": len(walks),
        "data_path": "data/{episode_index}.parquet",
        "video_path": "videos/{episode_index}.mp4",
        "features": {"action": {"dtype": "float32"}, CAMERA: {"dtype": "video"}},
    }
    for name in ("meta", "data"):
        (folder / name).mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(description))
    lines = [{"episode_index": number, "length": len(frames)} for number, (frames, _) in enumerate(walks)]
    (folder / "meta" / "episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for number, (frames, actions) in enumerate(walks):
        write_video(folder / "videos" / f"{number}.mp4", frames)
        columns = {
            "action": np.eye(int(actions.max()) + 1)[actions].tolist(),
            "episode_index": [number] * len(actions),
        }
        pq.write_table(pa.table(columns), folder / "data" / f"{number}.parquet")


def write_video(path: Path, frames: np.ndarray) -> None:
    """H.264 as FFmpeg's defaults make it: a key frame every 250 frames or where the picture changes all at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def prepare(layout: str, folder: Path, size: tuple[int, int] | None = None) -> int:
    """Prepare every trajectory of a folder as `prepare_dataset.py` does; returns the number of frames."""
    source, preparation = SOURCES[layout](folder), Preparation(size=size)
    return sum(len(preparation(source[index]).frames) for index in range(len(source.names)))
