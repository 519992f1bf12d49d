"""The page of `make web`, built for the shipped world and played in Chromium as a visitor plays it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from chromium import PATIENCE, chromium
from PIL import Image

from benchmarks.web import open_world, served
from diffusers_far import FARPipeline


ROOT = Path(__file__).parents[2]
MODEL = ROOT / "checkpoints" / "far-crafter"
SCRIPT = ROOT / "examples" / "export_web.py"
ACTIONS = [0, 0, 3, 3, 1, 4, 1, 1, 2, 0]
NUM_CONTEXT_FRAMES = 44  # the window of 48 is full after three frames more: then frames turn long

PLAY_TEN = """async (actions) => {
    const {world, here} = globalThis.far;
    let moment = here();
    const frames = [];
    for (const action of actions) {
        const noise = world.noise(7, moment.number);
        moment = await world.step(moment, action, noise);
        frames.push({noise: [...noise], picture: [...moment.last.picture]});
    }
    return frames;
}"""


@pytest.mark.full
def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    command = [sys.executable, str(SCRIPT), "--output_dir", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and "holds something else" in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The page, built as `make web` builds it."""
    pytest.importorskip("onnxruntime", reason="the extra `web` is not installed")
    pytest.importorskip("gradio", reason="the extra `app` is not installed")
    if shutil.which("npm") is None:
        pytest.skip("There is no npm to take ONNX Runtime from: `apt-get install npm` on Debian")
    folder = tmp_path_factory.mktemp("web") / "page"
    command = [sys.executable, str(SCRIPT), "--output_dir", str(folder), "--num_starts", "1"]
    subprocess.run([*command, "--num_context_frames", str(NUM_CONTEXT_FRAMES)], check=True)
    return folder


@pytest.fixture(scope="module")
def new_page(folder):
    """Opens pages; nothing may be loaded from anywhere else."""
    elsewhere = []
    with chromium() as browser, served(folder) as address:

        def open_page(**choices):
            page = browser.new_page()
            is_ours = ("data:", "blob:", address)
            page.on("request", lambda request: request.url.startswith(is_ours) or elsewhere.append(request.url))
            open_world(page, address, **({"provider": "wasm", "threads": 1} | choices))
            page.set_default_timeout(PATIENCE)
            return page

        yield open_page
    assert not elsewhere


@pytest.mark.full
@pytest.mark.parametrize("precision, most, mean", [("float32", 1e-3, 1e-5), ("int8", 1.0, 0.02)])
def test_ten_frames_of_the_page_are_the_pipelines(folder, new_page, precision, most, mean):
    form = json.loads((folder / "form.json").read_text())
    (start,) = form["starts"]
    made = new_page(precision=precision).evaluate(PLAY_TEN, ACTIONS)

    pipe = FARPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    strip = np.asarray(Image.open(folder / start["file"])).reshape(1, -1, form["height"], form["width"], 3)
    video = torch.from_numpy(strip / 255).float().permute(0, 1, 4, 2, 3)
    assert video.shape[1] == NUM_CONTEXT_FRAMES
    session = pipe.start_session(video=video, actions=torch.tensor([start["actions"]]), output_type="pt")
    for action, frame in zip(ACTIONS, made, strict=True):
        noise = torch.tensor(frame["noise"]).view(1, 1, *form["latent_shape"])
        latents = session.advance(torch.tensor([action]), noise=noise)
        error = (torch.tensor(frame["picture"]).view(1, 3, 64, 64) - session.decode(latents, "pt")).abs()
        assert error.max() <= most and error.mean() < mean


@pytest.mark.full
def test_the_pages_noise_is_normal(new_page):
    draws = new_page().evaluate(
        "() => [0, 1].map((seed) => [0, 1, 2, 3].map((n) => [...globalThis.far.world.noise(seed, n)]))"
    )
    draws = torch.tensor(draws, dtype=torch.float64).flatten(0, 1)
    assert abs(draws.mean()) < 0.05 and abs(draws.std() - 1) < 0.05
    assert abs((draws**4).mean() - 3) < 0.5  # of a normal distribution
    assert torch.corrcoef(draws).fill_diagonal_(0).abs().max() < 0.2


@pytest.mark.full
def test_keys_play_go_back_and_fork(new_page):
    page = new_page()
    number = int(page.get_attribute("body", "data-number"))

    def picture() -> str:
        return page.evaluate("() => document.getElementById('picture').toDataURL()")

    def press(key: str, expected: int) -> str:
        page.keyboard.press(key)
        page.wait_for_selector(f"body[data-number='{expected}']")
        return picture()

    before = picture()
    left = press("ArrowLeft", number + 1)
    assert left != before
    assert press("Backspace", number) == before
    assert press("a", number + 1) == left  # the same action makes the same frame
    page.click("#fork")
    assert page.locator("#walks button").count() == 2
    ahead = press(" ", number + 2)
    page.click("#walks button >> nth=0")
    page.wait_for_selector(f"body[data-number='{number + 1}']")
    assert picture() == left
    assert press(" ", number + 2) == ahead  # a fork draws the same noise
    page.click("#another")
    page.wait_for_selector(f"body[data-number='{number + 1}']")
    assert press(" ", number + 2) != ahead
