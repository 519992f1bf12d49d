"""Calls of `far generate` in this process, on a tiny pipeline; shared by its tests."""

from pathlib import Path

import numpy as np
from PIL import Image
from tiny_models import tiny_pipeline, tiny_transformer
from video_files import gray_frames, write_video
from written_paths import watched_writes

from diffusers_far import FARPipeline
from diffusers_far.commands import generate
from diffusers_far.commands import main as far


NAMES = ["forward", "left", "right"]
STEERED = {"num_actions": 3, "action_shift": 1}


def use_pipeline(monkeypatch, action_names=None, **config) -> FARPipeline:
    """Let every call have a tiny pipeline of frames of 8x12 pixels, whatever `--model` says."""
    pipe = tiny_pipeline(tiny_transformer(**config), height=8, width=12, fps=5.0, action_names=action_names)
    monkeypatch.setattr(generate, "load_pipeline", lambda model: pipe)
    return pipe


def lay_out(folder: Path) -> Path:
    """Put a clip of 6 frames, an image and an empty folder for outputs there."""
    write_video(folder / "clip.mp4", gray_frames(6))
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / "view.png")
    (folder / "out").mkdir()
    return folder


def run(folder: Path, *more, video="view.png", actions: str | None = "FLR", output="out/new.mp4", steps=2) -> int:
    """The exit code of a call that continues a file of `folder`."""
    arguments = ["--model", "any", "--output", folder / output, "--num_inference_steps", steps]
    arguments += [] if video is None else ["--video", folder / video]
    arguments += [] if actions is None else ["--actions", actions]
    try:
        return far(["generate", *(str(argument) for argument in (*arguments, *more))])
    except SystemExit as stop:
        return stop.code


def error_of(capsys, folder: Path, *arguments, tidies_up_in: Path | None = None, **named) -> str:
    """The line that a call ends with which is refused. Nothing may have been written, here or elsewhere, or nothing
    outside of `tidies_up_in` and nothing left there."""
    before = files_of(folder)
    with watched_writes() as written:
        assert run(folder, *arguments, **named) == 2
    assert [path for path in written if tidies_up_in is None or not path.is_relative_to(tidies_up_in)] == []
    assert files_of(folder) == before
    lines = capsys.readouterr().err.splitlines()
    message = lines[-1]
    assert [line for line in lines if line.startswith("error: ")] == [message], lines
    assert message.isprintable() and "Traceback" not in message
    return message


def files_of(folder: Path) -> dict[Path, bytes | None]:
    """Everything below a folder, with what a file holds."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
