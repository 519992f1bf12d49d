"""The drawings in the documentation are what the library computes."""

import importlib.util
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "draw_concepts.py"
specification = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
draw_concepts = importlib.util.module_from_spec(specification)
specification.loader.exec_module(draw_concepts)


@pytest.mark.parametrize("name", draw_concepts.DRAWINGS)
def test_a_drawing_is_as_the_script_draws_it(name, tmp_path):
    draw_concepts.DRAWINGS[name]().save(tmp_path / "drawing.svg")
    committed = ROOT / "docs" / "images" / f"{name}.svg"
    assert (tmp_path / "drawing.svg").read_bytes() == committed.read_bytes(), (
        "run scripts/draw_concepts.py, and see whether docs/concepts.md still says what the drawing shows"
    )
