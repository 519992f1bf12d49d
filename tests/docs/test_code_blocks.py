"""The code on the pages works as it stands there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from docs_site.pages import CodeBlock, code_blocks
from local_hub import run_python
from page_stand_ins import lay_out


pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = {page: code_blocks(page) for page in PAGES}


def blocks_to_run(page: Path, language: str) -> list[CodeBlock]:
    return [block for block in BLOCKS[page] if block.language == language and block.mark is None]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def python_of(page: Path) -> str:
    """The page's Python as one script, each line where it stands on the page."""
    lines = [""] * len(page.read_text().splitlines())
    for block in blocks_to_run(page, "python"):
        code = block.code.splitlines()
        lines[block.line - 1 : block.line - 1 + len(code)] = code
    return "\n".join(lines) + "\n"


# The program that an installation puts beside Python, of this checkout whatever is installed.
FAR = 'far() { python -m diffusers_far.commands "$@"; }\n'


def run_shell(block: CodeBlock, folder: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        ["bash", "-e", "-c", FAR + block.code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, f"{block}\n{result.stdout}\n{result.stderr}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(blocks_to_run(page, name) for name in ("python", "bash"))], ids=name_of
)
def test_blocks_of_a_page_run(page, hub, tmp_path):
    """Python first, in one process; then the shell."""
    folder = tmp_path / "work"
    folder.mkdir()
    lay_out(page, folder, hub)
    if blocks_to_run(page, "python"):
        script = tmp_path / f"{page.stem}_page.py"
        script.write_text(python_of(page))
        run_python(script, hub, cwd=folder, timeout=600)
    for block in blocks_to_run(page, "bash"):
        run_shell(block, folder)
