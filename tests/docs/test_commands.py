"""Commands on the pages that no test runs name what exists: scripts, flags, make targets, extras."""

from pathlib import Path

import pytest
from docs_site.pages import CodeBlock, code_blocks
from page_commands import check_command, recorded_commands


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PARSED = [block for page in PAGES for block in code_blocks(page) if block.mark == "parsed"]


def shell_block(code: str) -> CodeBlock:
    return CodeBlock(Path("page.md"), 1, "bash", code, "parsed", "a test")


@pytest.mark.parametrize("block", PARSED, ids=lambda block: str(block).removeprefix(f"{ROOT}/"))
def test_commands_are_accepted(block, tmp_path, monkeypatch):
    commands = recorded_commands(block, tmp_path / "shell")
    (tmp_path / "empty").mkdir()
    for folder in ("examples", "checkpoints"):  # where a command names a recipe or a shipped model
        (tmp_path / "empty" / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path / "empty")
    for command in commands:
        check_command(command)


def test_loops_and_quotes_mean_what_they_mean(tmp_path):
    block = shell_block(
        'for split in train test; do\n    python examples/demo.py --name "a $split" \\\n        --x\ndone\n'
    )
    assert recorded_commands(block, tmp_path) == [
        ["python", "examples/demo.py", "--name", "a train", "--x"],
        ["python", "examples/demo.py", "--name", "a test", "--x"],
    ]


@pytest.mark.parametrize(
    "command",
    [
        "python examples/generate.py --no_such_flag 1",
        "python examples/no_such_script.py",
        "accelerate launch examples/train_far.py --latents_dir latents",
        "far generate --no_such_flag 1",
        "make no_such_target",
        'pip install -e ".[no_such_extra]"',
    ],
)
def test_what_does_not_exist_is_refused(command, tmp_path):
    (called,) = recorded_commands(shell_block(command), tmp_path)
    with pytest.raises(AssertionError):
        check_command(called)


def test_a_program_without_a_check_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="not found"):
        recorded_commands(shell_block("some_program --flag"), tmp_path)
