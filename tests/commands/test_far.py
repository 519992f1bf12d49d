"""The program `far`: how it answers what goes wrong. Each command has tests of its own."""

import sys

import pytest

from diffusers_far.commands import EXTRAS, main
from diffusers_far.commands.arguments import PARSERS


PLAY = ["play", "--model", "far-maze"]


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for module in ("play", "app.ui"):
        monkeypatch.delitem(sys.modules, f"diffusers_far.commands.{module}", raising=False)
    assert main(PLAY) == 2
    said = capsys.readouterr().err
    assert said == (
        'error: `far play` needs gradio, which is not installed; `pip install "diffusers-far[app]"` brings it.\n'
    )


def test_every_command_names_an_extra():
    assert EXTRAS.keys() == PARSERS.keys()


def test_a_video_that_nothing_could_write_is_refused_before_a_model_is_loaded(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("diffusers_far.evaluation.media.find_spec", lambda name: None)
    assert main(["generate", "--model", "nowhere", "--output", str(tmp_path / "new.mp4")]) == 2
    assert 'needs av, which is not installed; `pip install "diffusers-far[data]"`' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (ValueError("`--model` is\n  wrong"), 2, "error: `--model` is wrong\n"),
        (FileNotFoundError(2, "No such file", "clip.mp4"), 2, "error: [Errno 2] No such file: 'clip.mp4'\n"),
        (MemoryError(), 2, "error: MemoryError\n"),
        (KeyboardInterrupt(), 130, "error: interrupted; nothing was left half written.\n"),
    ],
)
def test_what_the_user_can_mend_is_one_line(monkeypatch, capsys, fault, code, said):
    def fail(args):
        raise fault

    pytest.importorskip("gradio")
    monkeypatch.setattr("diffusers_far.commands.play.main", fail)
    assert main(PLAY) == code
    assert capsys.readouterr().err == said


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    def fail(args):
        raise ModuleNotFoundError("no module", name="diffusers_far.nothing")

    pytest.importorskip("gradio")
    monkeypatch.setattr("diffusers_far.commands.play.main", fail)
    with pytest.raises(ModuleNotFoundError):
        main(PLAY)
