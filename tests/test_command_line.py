"""What the scripts share on the command line."""

import argparse
import logging
import re
from pathlib import Path

import pytest

from benchmarks.studies.scripts import load_script
from diffusers_far import command_line
from diffusers_far.command_line import HelpWithDefaults, Progress, in_hours, require_one_process, set_up_logging
from diffusers_far.commands import main as far


ROOT = Path(__file__).parents[1]


def parser_with_every_kind_of_default() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Line one\nline two", formatter_class=HelpWithDefaults)
    parser.add_argument("--rate", type=float, default=0.5, help="Of learning.")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--layers", nargs="+", default=["to_q", "to_k"])
    parser.add_argument("--told", default="x", help="Default: ex.")
    parser.add_argument("--later", type=int)
    parser.add_argument("--absent", help="Nothing.")
    parser.add_argument("--flag", action="store_true", help="On.")
    parser.add_argument("--empty", default="", help="Words.")
    parser.add_argument("--none", nargs="+", default=[], help="Names.")
    parser.set_defaults(later=7)
    return parser


def test_help_says_every_default_that_there_is_and_no_none():
    text = parser_with_every_kind_of_default().format_help()
    assert "Line one\nline two" in text
    for line in (
        r"--rate RATE +Of learning\. \(default: 0\.5\)",
        r"--steps STEPS +\(default: 0\)",
        r"\(default: to_q to_k\)",
        r"--told TOLD +Default: ex\.\n",
        r"--later LATER +\(default: 7\)",
        r"--absent ABSENT +Nothing\.\n",
        r"--flag +On\.\n",
        r"--empty EMPTY +Words\.\n",
        r"--none .*\n? +Names\.\n",
    ):
        assert re.search(line, text), (line, text)
    assert "None" not in text and "False" not in text


@pytest.mark.parametrize("folder", ["examples", "scripts", "benchmarks"])
def test_the_help_of_every_script_says_its_defaults(folder):
    for path in (ROOT / folder).rglob("*.py"):
        # `build_docs.py` runs without the package.
        assert path.name == "build_docs.py" or "HelpFormatter" not in path.read_text(), path


class Terminal:
    """A stderr as a person sees it."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


def progress_over(seconds: list[float], monkeypatch, **options) -> Progress:
    """Of which each update comes so many seconds after the start."""
    clock = iter([0.0, *seconds])
    monkeypatch.setattr(command_line.time, "perf_counter", lambda: next(clock))
    return Progress(options.pop("total", 10), **options)


def test_where_stderr_is_no_terminal_there_are_lines_now_and_then_and_no_bar(monkeypatch, caplog, capsys):
    progress = progress_over([1, 2, 3, 40, 41], monkeypatch, first=5, seconds_between_lines=30.0)
    with caplog.at_level("INFO"):
        for loss in (1.0, 2.0, 3.0, 4.0, 5.0):
            progress.update(loss=loss, learning_rate=1e-3)
    progress.close()
    assert caplog.messages == [
        "step 6 of 10: loss 1, learning rate 0.001, 1 s per step, 4 s left",
        "step 9 of 10: loss 3, learning rate 0.001, 10 s per step, 10 s left",
        "step 10 of 10: loss 5, learning rate 0.001, 8.2 s per step, 0 s left",
    ]
    assert capsys.readouterr().err == ""


def test_the_time_that_is_left_ends_where_the_hours_do(monkeypatch, caplog):
    progress = progress_over([60], monkeypatch, total=1000, max_hours=1.0)
    with caplog.at_level("INFO"):
        progress.update()
    assert caplog.messages == ["step 1 of 1000: 60 s per step, 59 min left"]


def test_on_a_terminal_there_is_a_bar_and_no_lines(monkeypatch, caplog):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    progress = Progress(2)
    with caplog.at_level("INFO"):
        progress.update(loss=1.0)
        progress.update(loss=0.25)
    progress.close()
    assert "2/2" in terminal.text and "loss=0.25" in terminal.text and not caplog.messages


def test_all_processes_but_one_are_silent(monkeypatch, caplog, capsys):
    progress = Progress(1, is_silent=True)
    with caplog.at_level("INFO"):
        progress.update(loss=1.0)
    assert not caplog.messages and capsys.readouterr().err == ""


def test_durations_are_read_in_hours_and_minutes():
    assert [in_hours(seconds) for seconds in (4, 90, 3600, 9300)] == ["4 s", "2 min", "1 h 00 min", "2 h 35 min"]


def test_the_log_holds_what_the_script_and_the_package_say_and_no_lines_of_libraries(monkeypatch, capsys):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])  # as at the start of a script
    loggers = [root, *map(logging.getLogger, ("a_script", "diffusers_far"))]
    levels = [each.level for each in loggers]
    try:
        set_up_logging("a_script")
        for name in ("a_script", "diffusers_far.training.run", "accelerate.checkpointing", "httpx"):
            logging.getLogger(name).info(f"said by {name}")
    finally:
        for each, level in zip(loggers, levels):
            each.setLevel(level)
    said = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert said == ["said by a_script", "said by diffusers_far.training.run"]


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_what_runs_as_one_process_refuses_to_be_launched_as_two(variable, monkeypatch):
    require_one_process("far prepare")
    monkeypatch.setenv(variable, "1")
    require_one_process("far prepare")
    monkeypatch.setenv(variable, "2")
    with pytest.raises(ValueError, match=rf"far prepare was launched as 2 processes \(`{variable}`\)"):
        require_one_process("far prepare")


@pytest.mark.parametrize(
    "command, arguments",
    [
        ("generate", "--model absent --output absent"),
        ("prepare", "--source npz --input absent --output absent"),
    ],
)
def test_commands_that_work_alone_refuse_two_processes_before_they_open_anything(
    command, arguments, monkeypatch, capsys
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert far([command, *arguments.split()]) == 2
    assert "launched as 2 processes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "script", ["train_far", "train_far_lora", "train_token_ar", "train_vae", "generate", "evaluate"]
)
def test_a_script_shows_the_defaults_of_its_flags(script, capsys):
    with pytest.raises(SystemExit):
        load_script(script).parse_args(["--help"])
    text = capsys.readouterr().out
    assert "(default: " in text and "default: None" not in text and "default: False" not in text
