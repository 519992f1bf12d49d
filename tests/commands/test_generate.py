"""`far generate`, run in this process on a tiny pipeline."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from generate_calls import NAMES, STEERED, error_of, lay_out, run, use_pipeline
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from tiny_models import property_test
from video_files import gray_frames, truncate

from diffusers_far.commands.arguments import parse_generate
from diffusers_far.commands.inputs import ActionSpace
from diffusers_far.data.media_files import read_clip


ROOT = Path(__file__).parents[2]


@pytest.fixture
def pipe(monkeypatch):
    """A tiny pipeline of three actions, whatever `--model` says."""
    return use_pipeline(monkeypatch, NAMES, **STEERED)


@pytest.fixture
def folder(tmp_path) -> Path:
    return lay_out(tmp_path)


@pytest.mark.parametrize("output", ["new.mp4", "new.gif", "new.webp", "new"])
def test_new_frames_are_written_in_each_form(pipe, folder, capsys, output):
    assert run(folder, output=f"out/{output}") == 0
    clip = read_clip(folder / "out" / output)
    assert clip.frames.shape == (3, 8, 12, 3)
    assert sorted(path.name for path in (folder / "out").iterdir()) == [output]
    assert "wrote 3 frames at 5 a second" in capsys.readouterr().out


def test_frames_are_those_of_the_pipeline(pipe, folder):
    assert run(folder, "--seed", 7, output="out/new") == 0
    expected = pipe(
        video=read_clip(folder / "view.png", size=(8, 12)).frames,
        actions=[[0, 1, 2]],
        num_frames=3,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(7),
    ).frames[0]
    assert np.array_equal(
        read_clip(folder / "out" / "new").frames, np.stack([np.asarray(image) for image in expected])
    )


@pytest.mark.parametrize("video", ["clip.mp4", "clip.gif", "clip.webp", "clip"])
def test_every_kind_of_context_is_read(pipe, folder, video, capsys):
    frames = [Image.fromarray(np.ascontiguousarray(frame)) for frame in gray_frames(6)]
    frames[0].save(folder / "clip.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "clip.webp", save_all=True, append_images=frames[1:], lossless=True)
    (folder / "clip").mkdir()
    for number, frame in enumerate(frames):
        frame.save(folder / "clip" / f"{number}.png")
    assert run(folder, "--with_context", "--num_context_frames", 4, video=video, output="out/new") == 0
    written = read_clip(folder / "out" / "new").frames
    assert np.round(written[:4].mean(axis=(1, 2, 3)) / 10).tolist() == [2, 3, 4, 5]
    assert len(written) == 7
    said = capsys.readouterr().out
    assert "the last 4 of 6 frames" in said and "resized from 48x32 to 12x8 pixels" in said


@pytest.mark.parametrize("actions", ["FLR", "flr", "012", "0,1,2", "forward, L 2", "F L,right"])
def test_the_forms_of_actions_mean_the_same(pipe, actions):
    assert ActionSpace.of(pipe).read("--actions", actions) == [0, 1, 2]


def test_a_name_alone_is_one_action(pipe):
    assert ActionSpace.of(pipe).read("--actions", "Left") == [1]


@pytest.mark.parametrize("listed", [[0, 1, 2], ["forward", "left", "right"], ["F", "1", 2]])
def test_json_holds_numbers_or_names(pipe, tmp_path, listed):
    (tmp_path / "walk.json").write_text(json.dumps(listed))
    assert ActionSpace.of(pipe).read("--actions", str(tmp_path / "walk.json")) == [0, 1, 2]


def test_letters_that_begin_several_names_are_refused(monkeypatch):
    pipe = use_pipeline(monkeypatch, ["left", "look up", "go"], **STEERED)
    with pytest.raises(ValueError, match="several begin so"):
        ActionSpace.of(pipe).read("--actions", "GL")
    assert ActionSpace.of(pipe).read("--actions", "g,left,look up".replace("look up", "1")) == [2, 0, 1]


def test_continuous_actions_come_from_json(monkeypatch, folder):
    use_pipeline(monkeypatch, action_dim=2, action_shift=1)
    (folder / "walk.json").write_text("[[0.5, -1], [0, 2]]")
    assert run(folder, actions=str(folder / "walk.json"), output="out/new") == 0
    assert len(read_clip(folder / "out" / "new").frames) == 2


@pytest.mark.parametrize("value", ["[[1]]", "[[1, NaN]]", "[[1, true]]", '["F"]', "[[1, 1e99]]", "[1, 2]"])
def test_wrong_continuous_actions_are_refused(monkeypatch, folder, capsys, value):
    use_pipeline(monkeypatch, action_dim=2, action_shift=1)
    (folder / "walk.json").write_text(value)
    assert "lists of 2 finite numbers" in error_of(capsys, folder, actions=str(folder / "walk.json"))


def test_actions_of_the_context_are_assumed_aloud_and_only_where_needed(pipe, folder, capsys):
    assert run(folder, video="clip.mp4", output="out/assumed") == 0
    assert "assumed: 'forward' as each of the 5 actions" in capsys.readouterr().out
    assert run(folder, "--context_actions", "FFFFF", video="clip.mp4", output="out/given") == 0
    assert run(folder, "--context_actions", "LLLLL", video="clip.mp4", output="out/other") == 0
    assert run(folder, "--num_context_frames", 1, video="clip.mp4", output="out/one") == 0
    assert "assumed" not in capsys.readouterr().out
    assumed, given_, other = (read_clip(folder / "out" / name).frames for name in ("assumed", "given", "other"))
    assert np.array_equal(assumed, given_) and not np.array_equal(given_, other)


def test_context_actions_may_be_those_of_the_whole_clip(pipe, folder):
    for name, actions in (("whole", "RRRLF"), ("own", "LF")):
        arguments = ("--num_context_frames", 3, "--context_actions", actions)
        assert run(folder, *arguments, video="clip.mp4", output=f"out/{name}") == 0
    assert np.array_equal(read_clip(folder / "out/whole").frames, read_clip(folder / "out/own").frames)


def test_models_that_are_fed_the_action_of_the_frame_itself_are_given_one(monkeypatch, folder, capsys):
    use_pipeline(monkeypatch, NAMES, num_actions=3, action_shift=0)
    assert run(folder) == 0
    assert "the last action once more" in capsys.readouterr().out


def test_without_context_nothing_leads_to_the_first_frame(pipe, folder, capsys):
    assert run(folder, video=None, output="out/new") == 0
    assert len(read_clip(folder / "out" / "new").frames) == 4
    assert run(folder, "--num_frames", 1, video=None, actions=None, output="out/one") == 0
    assert "needs 4" in error_of(capsys, folder, "--num_frames", 5, video=None)


def test_models_without_actions_go_on_without(monkeypatch, folder, capsys):
    use_pipeline(monkeypatch)
    assert run(folder, "--num_frames", 2, video="clip.mp4", actions=None) == 0
    assert "takes no actions" in error_of(capsys, folder, output="out/other.mp4")


def test_the_options_of_the_cache_and_flex_rope_reach_the_pipeline(monkeypatch, folder):
    pipe = use_pipeline(monkeypatch, NAMES, long_patch_size=2, trained_frames=2, **STEERED)
    arguments = ("--flex_rope_slope", 0.2, "--max_long_frames", 2, "--short_cache", "rolling", "--guidance_scale", 2)
    assert run(folder, *arguments, actions="FLRFLR") == 0
    assert pipe.config.flex_rope["slope"] == 0.2


def test_an_existing_output_is_kept_unless_told(pipe, folder, capsys):
    assert run(folder) == 0
    before = (folder / "out/new.mp4").read_bytes()
    assert "exists" in error_of(capsys, folder, "--seed", 1)
    assert run(folder, "--seed", 1, "--overwrite") == 0
    assert (folder / "out/new.mp4").read_bytes() != before


def test_a_folder_is_replaced_only_if_it_holds_frames_alone(pipe, folder, capsys):
    assert run(folder, output="out/new") == 0
    assert run(folder, "--overwrite", actions="F", output="out/new") == 0
    assert [path.name for path in (folder / "out/new").iterdir()] == ["frame_00000.png"]
    (folder / "out/new/notes.txt").write_text("mine")
    assert "other things than frames" in error_of(capsys, folder, "--overwrite", output="out/new")
    assert "other things than frames" in error_of(capsys, folder, "--overwrite", output="out")


def test_nothing_is_left_of_a_run_that_is_interrupted(pipe, folder, monkeypatch, capsys):
    def interrupted(**arguments):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(pipe, "stream", interrupted)
    assert run(folder) == 130
    assert not list((folder / "out").iterdir())


def test_nothing_is_left_of_an_output_that_cannot_be_written(pipe, folder, monkeypatch, capsys):
    def full_disk(path, frames, fps):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffusers_far.evaluation.media._write_mp4", full_disk)
    message = error_of(capsys, folder, tidies_up_in=folder / "out")
    assert re.search("`--output`: .*new.mp4' was not written .*No space left on device.*MiB are free in ", message)


@pytest.mark.parametrize(
    ("arguments", "named", "message"),
    [
        ((), {"video": "none.mp4"}, "`--video` .*none.mp4' does not exist; name a video"),
        ((), {"video": "out"}, "has no images"),
        ((), {"output": "out/new.xyz"}, "new.xyz'; end it in .mp4"),
        ((), {"output": "out/.mp4"}, "end it in .mp4"),
        ((), {"output": "nowhere/new.mp4"}, "no folder .*nowhere'; make it"),
        ((), {"output": "view.png/new.mp4"}, "no folder .*view.png'"),
        ((), {"actions": "FXR"}, r"`--actions\[1\]` is 'X', but this model's actions are 0 forward, 1 left, 2 right"),
        ((), {"actions": "013"}, r"`--actions\[2\]` is '3'"),
        ((), {"actions": "F,backward"}, r"`--actions\[1\]` is 'backward'"),
        ((), {"actions": ""}, "holds no actions"),
        ((), {"actions": "walk.json"}, "is not a JSON file that can be read: No such file"),
        ((), {"actions": None}, "`--actions` is missing"),
        (("--num_frames", 64), {}, "`--actions` has 3, but `--num_frames` 64 needs 64.* leave `--num_frames` out"),
        (("--num_frames", 0), {}, "argument --num_frames: '0' is not a whole number from 1"),
        (("--num_frames", -3), {}, "--num_frames"),
        (("--num_frames", "many"), {}, "--num_frames: 'many'"),
        (("--num_inference_steps", 0), {}, "--num_inference_steps: '0'"),
        (("--guidance_scale", "nan"), {}, "--guidance_scale: 'nan'"),
        (("--fps", 0), {}, "--fps: '0'"),
        (("--fps", 60), {"output": "out/new.gif"}, "gif has at most 50"),
        (("--scale", 0), {}, "--scale: '0'"),
        (("--seed", -1), {}, "--seed: '-1'"),
        (("--short_cache", "never"), {}, "--short_cache: 'never'"),
        (("--short_cache", 9), {}, "`short_cache` is 9"),
        (("--max_long_frames", 4), {}, "this model has no long frames"),
        (("--flex_rope_slope", -1), {}, "--flex_rope_slope: '-1'"),
        (("--flex_rope_slope", 0.1), {}, "neither the config nor the model has `trained_frames`"),
        (("--class_label", 1), {}, "takes no classes"),
        (("--num_context_frames", 7), {"video": "clip.mp4"}, "has 6 frames; ask for fewer"),
        (("--num_context_frames", 2), {"video": None}, "without `--video`"),
        (("--context_actions", "FF"), {"video": "clip.mp4"}, "`--context_actions` has 2; give 5 for the 6 frames"),
        (("--context_actions", "F"), {"video": None}, "without `--video`"),
        (("--colour", "red"), {}, "unrecognized arguments: --colour red"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(pipe, folder, capsys, arguments, named, message):
    assert re.search(message, error_of(capsys, folder, *arguments, **named))


def test_arguments_that_are_missing_are_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_generate([])
    assert capsys.readouterr().err == ("error: the following arguments are required: --model, --output; see --help.\n")


@pytest.mark.parametrize("model", ["./nowhere", "tests/examples", "checkpoints/none", "/dev/null"])
def test_a_model_that_is_not_there_is_not_looked_for_on_the_hub(model, folder, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert "no pipeline's folder" in error_of(capsys, folder, "--model", model)


@pytest.mark.parametrize("index", ["", "{", "{}", "[]", '{"_class_name": "FARPipeline", "vae": ["diffusers", "No"]}'])
def test_a_damaged_model_is_refused(folder, capsys, index):
    (folder / "model").mkdir()
    (folder / "model" / "model_index.json").write_text(index)
    assert "cannot be loaded" in error_of(capsys, folder, "--model", folder / "model")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_clip_is_refused(pipe, folder, capsys, share):
    truncate(folder / "clip.mp4", share)
    assert "clip.mp4" in error_of(capsys, folder, video="clip.mp4")


STARTS = [
    b"",
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff\xe0",
    b"GIF89a",
    b"RIFF\x40\0\0\0WEBP",
    b"\0\0\0\x18ftypisom",
    b"BM",
]
STARTS += [b"\x1a\x45\xdf\xa3", b"RIFF\x40\0\0\0AVI ", b"#EXTM3U\n", b"ffconcat version 1.0\n"]


@property_test
@given(
    start=st.sampled_from(STARTS), rest=st.binary(max_size=200), name=st.sampled_from(["bad.mp4", "bad.gif", "bad"])
)
def test_garbage_is_refused_whatever_it_claims_to_be(pipe, folder, capsys, start, rest, name):
    (folder / name).write_bytes(start + rest)
    assert name in error_of(capsys, folder, video=name)


@property_test
@given(text=st.text(max_size=30).filter(lambda text: set(text.upper()) - set("FLR012, \t\n") and "\0" not in text))
@example("F\ud800")
@example("../../etc")
@example("--help")
@example("F" * 100 + "\u202e")
def test_actions_in_other_words_are_refused(pipe, folder, capsys, text):
    message = error_of(capsys, folder, f"--actions={text}", actions=None)
    assert "--actions" in message and len(message) < 400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


def names_actions(value) -> bool:
    if not isinstance(value, list) or not value:
        return False
    known = (0, 1, 2, "0", "1", "2", "f", "l", "r", *NAMES)
    return all(
        type(item) in (int, str) and (item.lower() if isinstance(item, str) else item) in known for item in value
    )


@property_test
@given(value=json_values.filter(lambda value: not names_actions(value)))
@example([True, False])
@example([0, 10**400])
@example([0.0])
def test_json_that_names_no_actions_is_refused(pipe, folder, capsys, value):
    (folder / "walk.json").write_text(json.dumps(value))
    assert "--actions" in error_of(capsys, folder, actions=str(folder / "walk.json"))


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b"[1,", b"[" + b"9" * 5000 + b"]", b""])
def test_broken_json_is_refused(pipe, folder, capsys, content):
    (folder / "walk.json").write_bytes(content)
    assert "--actions" in error_of(capsys, folder, actions=str(folder / "walk.json"))


NUMBERS = ("num_frames", "num_context_frames", "num_inference_steps", "guidance_scale", "seed", "fps", "scale")


@property_test
@given(name=st.sampled_from(NUMBERS), text=st.text(max_size=8).filter(lambda text: not re.search(r"\d|\0", text)))
@example("fps", "infinity")
@example("seed", "9" * 40)
@example("num_frames", "1_0")
def test_numbers_that_are_none_are_refused(pipe, folder, capsys, name, text):
    assert f"--{name}" in error_of(capsys, folder, f"--{name}={text}")


@pytest.mark.full
def test_a_wrong_call_ends_with_one_line_and_code_2(folder):
    command = [
        sys.executable,
        str(ROOT / "examples" / "generate.py"),
        "--model",
        str(ROOT / "checkpoints" / "far-maze"),
    ]
    command += ["--video", str(folder / "view.png"), "--actions", "FXR", "--output", str(folder / "out" / "new.mp4")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and not list((folder / "out").iterdir())
    assert [line for line in result.stderr.splitlines() if "rror" in line] == [
        "error: `--actions[1]` is 'X', but this model's actions are 0 forward, 1 left, 2 right; give their numbers, names "
        "or first letters."
    ]
