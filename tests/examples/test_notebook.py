"""The notebook, run from the first cell to the last with few frames."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


NOTEBOOK = Path(__file__).parents[2] / "examples" / "far_quickstart.ipynb"


def read_cells(kind: str) -> list[str]:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def test_the_notebook_is_kept_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if "outputs" in cell)


@pytest.mark.full
def test_every_cell_runs_and_the_pictures_have_their_frames(tmp_path):
    # The notebook's folder is where Jupyter starts it. The last expression of a cell is what Jupyter shows.
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join(read_cells("code")) + "\n\nprint(strip(look).size, strip(upwards).size)\n")
    result = subprocess.run(
        [sys.executable, str(script)],
        cwd=NOTEBOOK.parent,
        env={**os.environ, "FAR_QUICKSTART_FRAMES": "4"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "['move_left', 'move_right', 'move_up', 'move_down', 'do'] " in result.stdout
    assert result.stdout.count("dB if nothing changed") == 4
    assert "(512, 128) (512, 128)" in result.stdout
