"""The folder that `make space` collects runs by itself, away from the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from chromium import PATIENCE, chromium, wait_for_frames


pytestmark = pytest.mark.full

pytest.importorskip("gradio")
if shutil.which("make") is None:
    pytest.skip("There is no make", allow_module_level=True)

ROOT = Path(__file__).parents[2]
START_TIME = 300  # seconds at most

# Imports as the Space's own process would, and says where from.
WHERE = """
import runpy
runpy.run_path("app.py", run_name="imported")
import diffusers_far.commands.app
print(diffusers_far.__file__, diffusers_far.commands.app.__file__)
"""


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Path:
    """Made by the Makefile, in a tree that leads to this one; then moved away from it."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("Makefile", "checkpoints", "examples", "src"):
        (tree / name).symlink_to(ROOT / name)
    subprocess.run(["make", "space"], cwd=tree, check=True, capture_output=True)
    folder = tmp_path_factory.mktemp("hub") / "space"
    shutil.move(tree / "outputs" / "space", folder)
    shutil.rmtree(tree)
    return folder


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False", "PYTHONPATH": "", **more}


@pytest.fixture(scope="module")
def address(space, tmp_path_factory) -> Iterator[str]:
    """Served at a port that the system chose; the process is stopped at the end."""
    log = tmp_path_factory.mktemp("log") / "space.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-u", "app.py"], cwd=space, env=environment(), stdout=output, stderr=output
        )
        try:
            yield wait_for_address(process, log)
        finally:
            process.terminate()
            process.wait()


def wait_for_address(process: subprocess.Popen, log: Path) -> str:
    end = time.monotonic() + START_TIME
    while time.monotonic() < end and process.poll() is None:
        found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
        if found:
            return found[0]
        time.sleep(0.2)
    raise AssertionError(f"the Space did not start:\n{log.read_text()}")


def test_the_space_holds_no_link_and_nothing_compiled(space):
    assert not [path for path in space.rglob("*") if path.is_symlink() or path.name == "__pycache__"]
    assert {path.name for path in space.iterdir()} == {
        "README.md", "app.py", "crafter_walks", "diffusers_far", "far-crafter", "requirements.txt"
    }  # fmt: skip


def test_the_space_uses_its_own_copy_of_everything(space):
    result = subprocess.run(
        [sys.executable, "-c", WHERE], cwd=space, env=environment(), capture_output=True, text=True, timeout=START_TIME
    )
    assert result.returncode == 0, result.stderr
    assert all(Path(file).is_relative_to(space) for file in result.stdout.split()[-2:])


def test_the_page_is_served(address):
    page = httpx.get(address, timeout=START_TIME)
    assert page.status_code == 200 and "FlexRoPE slope" in page.text
    config = httpx.get(f"{address}/config", timeout=START_TIME).json()
    steps = [part["props"] for part in config["components"] if part["props"].get("elem_id") == "steps"]
    own = json.loads((ROOT / "checkpoints" / "far-crafter" / "model_index.json").read_text())
    assert [slider["value"] for slider in steps] == [own["num_inference_steps"]]


def test_a_visitor_takes_a_step(address):
    with chromium() as browser:
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        wait_for_frames(page, 0)
        page.click("#action-0")
        wait_for_frames(page, 1)
