"""Whatever `far generate` is given that it cannot use, it answers with one readable line; nothing is lost or written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from generate_calls import NAMES, STEERED, error_of, files_of, lay_out, run, use_pipeline
from hypothesis import given
from hypothesis import strategies as st
from malformed_media import MALFORMED_MEDIA
from PIL import Image
from tiny_models import property_test, tiny_pipeline, tiny_transformer
from video_files import gray_frames, write_video
from written_paths import watched_writes

from diffusers_far.data.media_files import read_clip


LONGEST_MESSAGE = 600  # characters, but for the names of files
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def pipe(monkeypatch):
    return use_pipeline(monkeypatch, NAMES, **STEERED)


@pytest.fixture
def folder(tmp_path) -> Path:
    return lay_out(tmp_path)


def actions_file(content: bytes) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        (folder / "walk.json").write_bytes(content)
        return ["--actions", folder / "walk.json"]

    return make


ACTION_FILES = {
    "an empty file": b"",
    "no JSON": b"forward, left",
    "half a list": b"[0, 1,",
    "not UTF-8": b'["\xff\xfe"]',
    "UTF-16": '["forward"]'.encode("utf-16"),
    "a list in itself, deeply": b"[" * 100_000,
    "null": b"null",
    "a number": b"3",
    "an object": b'{"actions": [0, 1]}',
    "a string": b'"FLR"',
    "no actions": b"[]",
    "lists of actions": b"[[0, 1, 2]]",
    "null among actions": b"[0, null, 1]",
    "truth values": b"[true, false]",
    "a fraction": b"[0, 1.5]",
    "NaN": b"[0, NaN]",
    "infinity": b"[0, Infinity]",
    "an action too many": b"[0, 3]",
    "a negative action": b"[0, -1]",
    "an endless number": b"[" + b"9" * 5000 + b"]",
    "an unknown name": b'["forward", "jump"]',
    "control characters": json.dumps(["\x1b[31mred\n"]).encode(),
    "half a surrogate": b'["\\ud800"]',
}


def folder_for_actions(folder: Path) -> list[str]:
    (folder / "walk.json").mkdir()
    return ["--actions", folder / "walk.json"]


def pipe_for_actions(folder: Path) -> list[str]:
    os.mkfifo(folder / "walk.json")
    return ["--actions", folder / "walk.json"]


WRONG_ACTIONS: dict[str, Callable[[Path], list]] = {
    **{f"actions in a file: {name}": actions_file(content) for name, content in ACTION_FILES.items()},
    "actions in a file that is not there": lambda folder: ["--actions", folder / "nowhere.json"],
    "actions in a folder": folder_for_actions,
    "actions in a pipe that nobody writes to": pipe_for_actions,
    "actions in a file that a user may not mean": lambda folder: ["--actions", "../../etc/passwd"],
    "actions in a picture": lambda folder: ["--actions", folder / "view.png"],
    "more actions than frames are made": lambda folder: ["--actions", "F" * 100_001],
    "actions of other scripts": lambda folder: ["--actions", "前左右"],
    "actions that turn the text around": lambda folder: ["--actions", "F\u202eL"],
    "actions with control characters": lambda folder: ["--actions", "F\x1b[31m"],
    "actions with half a character": lambda folder: ["--actions", "F\udcff"],
    "no action": lambda folder: ["--actions"],
}


def numbers(option: str, *values: object) -> dict[str, Callable[[Path], list]]:
    return {f"{option} {value}": lambda folder, value=value: [f"--{option}={value}"] for value in values}


WRONG_NUMBERS: dict[str, Callable[[Path], list]] = {
    **numbers("num_frames", "", 0, -1, 2.5, "1e3", "0x10", 100_001, 10**30, "٣", "all"),
    **numbers("num_context_frames", 0, 2, 10**6),
    **numbers("num_inference_steps", 0, 1001, "five"),
    **numbers("guidance_scale", -0.1, "nan", "inf", "1e999", "strong"),
    **numbers("seed", -1, 2**63, 0.5),
    **numbers("fps", 0, -8, "nan", 1000),
    **numbers("scale", 0, 65, 1.5),
    **numbers("flex_rope_slope", -1, "nan", 0.1),
    **numbers("short_cache", "", "exactly", 0, -3, 64),
    **numbers("max_long_frames", 0, 8, "all"),
    **numbers("class_label", 0, -1, 2**31),
}


def write_to(output: str) -> Callable[[Path], list]:
    return lambda folder: ["--output", folder / output if output else ""]


def overwrite(prepare: Callable[[Path], object]) -> Callable[[Path], list]:
    """Ask for what is in the way to be replaced; it is nothing that may be."""

    def make(folder: Path) -> list:
        prepare(folder / "out" / "new")
        return ["--output", folder / "out" / "new", "--overwrite"]

    return make


def folder_with_notes(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("mine")


def linked_frames(path: Path) -> None:
    (path.parent / "frames").mkdir()
    (path.parent / "frames" / "frame_00000.png").write_bytes(b"mine")
    path.symlink_to("frames")


def folder_named_mp4(folder: Path) -> list:
    (folder / "out" / "new.mp4").mkdir()
    return ["--output", folder / "out" / "new.mp4", "--overwrite"]


def link_that_dangles(folder: Path) -> list:
    (folder / "out" / "new.mp4").symlink_to("nowhere.mp4")
    return ["--output", folder / "out" / "new.mp4"]


WRONG_OUTPUTS: dict[str, Callable[[Path], list]] = {
    "no output": write_to(""),
    "an output of another kind": write_to("out/new.avi"),
    "an output that is a suffix": write_to("out/.webp"),
    "an output in a folder that is not there": write_to("nowhere/new.mp4"),
    "an output out of a folder that is not there": write_to("nowhere/../new.mp4"),
    "an output in a file": write_to("view.png/new.mp4"),
    "an output over the context": write_to("clip.mp4"),
    "an output that is its own folder": write_to("out/."),
    "an output that is the folder above": write_to("out/.."),
    "an output that is the root": lambda folder: ["--output", "/", "--overwrite"],
    "an output that is a device": lambda folder: ["--output", "/dev/null", "--overwrite"],
    "an output of too long a name": write_to("out/" + "a" * 300 + ".mp4"),
    "an output of too long a folder's name": write_to("out/" + "a" * 300),
    "an output whose name has a zero": write_to("out/a\0b.mp4"),
    "an output in a home that was not looked up": lambda folder: ["--output", "~nobody/new.mp4"],
    "an output that would replace a file that is no frame": overwrite(lambda path: path.write_text("mine")),
    "an output that would replace other things than frames": overwrite(folder_with_notes),
    "an output that would replace a link to frames": overwrite(linked_frames),
    "an output that would replace a pipe": overwrite(os.mkfifo),
    "an output that is a folder named mp4": folder_named_mp4,
    "an output that is a link to nothing": link_that_dangles,
    "a gif that is too fast": lambda folder: ["--output", folder / "out" / "new.gif", "--fps", 51],
}

WRONG_WORDS: dict[str, Callable[[Path], list]] = {
    "an option that is not there": lambda folder: ["--resolution", 64],
    "half an option": lambda folder: ["--num_fra", 3],
    "a word without an option": lambda folder: ["forward"],
    "an option of one dash": lambda folder: ["-o"],
    "context actions of another length": lambda folder: ["--context_actions", "FFF"],
}

WRONG_CALLS = {**WRONG_ACTIONS, **WRONG_NUMBERS, **WRONG_OUTPUTS, **WRONG_WORDS}


def test_more_than_a_hundred_malformed_inputs_are_tried():
    assert len(MALFORMED_MEDIA) + len(WRONG_CALLS) > 100


@pytest.mark.parametrize("fault", MALFORMED_MEDIA)
def test_media_that_are_none_are_refused(pipe, folder, capsys, fault):
    (folder / "media").mkdir()
    path = MALFORMED_MEDIA[fault](folder / "media")
    message = error_of(capsys, folder, video=path.relative_to(folder))
    assert path.name in message and length_without(path, message) < LONGEST_MESSAGE


@pytest.mark.parametrize("fault", WRONG_CALLS)
def test_calls_that_are_wrong_are_refused(pipe, folder, capsys, fault):
    """The message names an option that was given."""
    arguments = [str(argument) for argument in WRONG_CALLS[fault](folder)]
    message = error_of(capsys, folder, *arguments)
    named = [argument.partition("=")[0].lstrip("-") for argument in arguments]
    assert any(option in message for option in named) and length_without(folder, message) < LONGEST_MESSAGE


PARTS = ["model_index.json", "scheduler/scheduler_config.json"]
PARTS += [f"{part}/{file}" for part in ("transformer", "vae") for file in ("config.json", WEIGHTS)]


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline(tiny_transformer(**STEERED), height=8, width=12).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("damage", ["is missing", "is empty", "is cut", "is noise", "is of another kind"])
@pytest.mark.parametrize("part", PARTS)
def test_models_with_a_damaged_file_are_refused(saved_model, folder, capsys, part, damage):
    shutil.copytree(saved_model, folder / "model")
    path = folder / "model" / part
    content = path.read_bytes()
    path.unlink()
    if damage != "is missing":
        path.write_bytes(
            {"is empty": b"", "is cut": content[:-9], "is noise": content[::-1], "is of another kind": b"[1, 2]"}[
                damage
            ]
        )
    message = error_of(capsys, folder, "--model", folder / "model")
    assert "`--model`" in message and length_without(folder, message) < LONGEST_MESSAGE


def test_too_little_memory_is_explained(pipe, folder, capsys, monkeypatch):
    def stream(**arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9000000000000 bytes.")

    monkeypatch.setattr(pipe, "stream", stream)
    assert "make fewer frames" in error_of(capsys, folder)


READ_ALL = """
import resource, sys, tempfile
from pathlib import Path
from malformed_media import MALFORMED_MEDIA
from diffusers_far.data.media_files import read_clip

for fault, make in MALFORMED_MEDIA.items():
    with tempfile.TemporaryDirectory() as folder:
        path = make(Path(folder))
        before = resource.getrusage(resource.RUSAGE_SELF)
        try:
            read_clip(path, 4, (8, 12))
        except ValueError:
            pass
        after = resource.getrusage(resource.RUSAGE_SELF)
        seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        print(f"{fault}\t{(after.ru_maxrss - before.ru_maxrss) / 1024}\t{seconds}")
"""


@pytest.mark.full
def test_no_file_takes_much_memory_or_time():
    """Each is small; what it claims to hold is not. A process of its own, as a peak is never forgotten."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(
        [sys.executable, "-c", READ_ALL], env=environment, capture_output=True, text=True, check=True, timeout=600
    )
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert len(rows) == len(MALFORMED_MEDIA)
    assert [fault for fault, mebibytes, seconds in rows if float(mebibytes) > 256 or float(seconds) > 10] == []


def length_without(path: Path, message: str) -> int:
    return len(message.replace(str(path), ""))


def test_frames_of_several_sizes_are_refused_where_the_model_has_no_size(pipe, folder, capsys):
    pipe.register_to_config(height=None, width=None)
    (folder / "frames").mkdir()
    for name, size in (("1.png", (12, 8)), ("2.png", (8, 12))):
        Image.new("RGB", size).save(folder / "frames" / name)
    assert "make them one size" in error_of(capsys, folder, video="frames")


@property_test
@given(name=st.sampled_from(["clip.mp4", "clip.gif", "clip.webp", "clip.mkv", "view.png"]), data=st.data())
def test_files_with_bytes_changed_are_read_or_refused(pipe, folder, capsys, name, data):
    """Whatever is read of a damaged file: no traceback, and nothing written but the output."""
    intact = intact_file(folder, name)
    content = bytearray(intact)
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=20)):
        content[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    (folder / name).write_bytes(content[:cut] if data.draw(st.booleans()) else content)
    output = folder / "out" / "new"
    with watched_writes() as written:
        code = run(folder, "--overwrite", video=name, actions="F", output="out/new", steps=1)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == (2 if errors else 0) and len(errors) <= 1
    assert all(path.is_relative_to(folder / "out") for path in written)
    assert not errors or (name in errors[0] and errors[0].isprintable())
    assert errors or output.is_dir()


def intact_file(folder: Path, name: str) -> bytes:
    """A clip of 6 frames, or one picture, in the form that the name says."""
    path = folder / f"intact_{name}"
    if not path.exists():
        frames = [Image.fromarray(np.ascontiguousarray(frame)) for frame in gray_frames(6)]
        if path.suffix in (".mp4", ".mkv"):
            write_video(path, gray_frames(6))
        else:
            frames[0].save(path, save_all=path.suffix != ".png", append_images=frames[1:])
    return path.read_bytes()


@pytest.mark.parametrize("output", ["out/../out/new", "out//new", "./out/new", "link/new", "out/new/"])
def test_ways_around_lead_to_the_output_alone(pipe, folder, output):
    (folder / "link").symlink_to("out")
    before = files_of(folder)
    with watched_writes() as written:
        assert run(folder, output=output) == 0
    new = {path: content for path, content in files_of(folder).items() if path not in before}
    assert [path.relative_to(folder).parts[0] for path in new] == ["out"] * 4
    assert all(path.resolve().is_relative_to(folder / "out") for path in written)


def test_a_link_is_replaced_and_what_it_leads_to_is_kept(pipe, folder):
    (folder / "out" / "new.mp4").symlink_to(folder / "clip.mp4")
    before = (folder / "clip.mp4").read_bytes()
    assert run(folder, "--overwrite") == 0
    assert (folder / "clip.mp4").read_bytes() == before and not (folder / "out" / "new.mp4").is_symlink()


def test_a_context_may_be_replaced_by_what_continues_it(pipe, folder):
    assert run(folder, "--overwrite", video="clip.mp4", output="clip.mp4") == 0
    assert read_clip(folder / "clip.mp4").num_frames_in_file == 3


@pytest.mark.parametrize("video", ["view.png", "clip.mp4"])
def test_names_that_are_no_text_are_used_and_shown(pipe, folder, capsys, video):
    """Bytes that are not UTF-8 arrive as surrogates, which no terminal prints."""
    odd = f"\udcff{video}"
    (folder / video).rename(folder / odd)
    assert run(folder, video=odd, output="out/\udcffnew.mp4") == 0
    assert (folder / "out" / "\udcffnew.mp4").is_file()
    said = capsys.readouterr().out
    assert said.isascii() and said.count("\\udcff") == 2
