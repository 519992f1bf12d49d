"""The app's page, used in Chromium as a visitor uses it."""

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_models import tiny_pipeline, tiny_transformer

from diffusers_far.data.media_files import read_clip


pytestmark = pytest.mark.full

gradio = pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("There is no Chromium; on Debian `apt-get install chromium`", allow_module_level=True)

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from app_world import RecordedWalks, WorldLimits, WorldModel  # noqa: E402
from app_world.ui import AppParts, build_app, launch_options  # noqa: E402


QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
PATIENCE = 60_000  # milliseconds; machines that run tests may be busy


@pytest.fixture(scope="module")
def address():
    transformer = tiny_transformer(num_actions=3, action_shift=1, long_patch_size=2, trained_frames=40)
    model = WorldModel(tiny_pipeline(transformer, height=16, width=16, action_names=["forward", "left", "right"]))
    limits = WorldLimits(max_new_frames=12)
    app = build_app(AppParts(model, RecordedWalks(str(EXAMPLES / "mazes"), model.size, limits), limits))
    _, local, _ = app.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **launch_options(limits))
    yield local
    app.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address):
    """A visitor's page with the first walk on it; nothing may be loaded from anywhere else."""
    elsewhere = []
    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.on("request", lambda request: elsewhere.append(request.url) if is_elsewhere(request.url, address) else None)
    page.goto(address)
    wait_for_frames(page, 0)
    yield page
    context.close()
    assert elsewhere == []


def is_elsewhere(url: str, address: str) -> bool:
    return not url.startswith((address, "data:", "blob:"))


def wait_for_frames(page, num_new_frames: int) -> None:
    page.wait_for_selector(f'.far-scene[data-new-frames="{num_new_frames}"]')


def last_frame(page) -> str:
    return page.locator(".far-pair img").first.get_attribute("src")


def test_keys_and_buttons_make_the_next_frame(page):
    page.keyboard.press("ArrowUp")
    wait_for_frames(page, 1)
    page.click("#action-1")
    wait_for_frames(page, 2)
    page.keyboard.press("ArrowRight")
    wait_for_frames(page, 3)


def test_keys_in_a_field_are_left_to_the_field(page):
    page.locator("#steps input[type=number]").focus()
    page.keyboard.press("ArrowUp")
    page.click("#action-0")
    wait_for_frames(page, 1)
    assert page.locator("#steps input[type=number]").input_value() == "13"


def test_a_visitor_goes_back_forks_and_returns(page):
    page.click("#action-0")
    wait_for_frames(page, 1)
    first = last_frame(page)
    page.click("#fork")
    page.wait_for_selector("text=branch 2 of 2")
    page.click("#action-1")
    wait_for_frames(page, 2)
    page.click("#back-1")
    wait_for_frames(page, 1)
    assert last_frame(page) == first
    page.click("#action-1")
    wait_for_frames(page, 2)
    page.locator("#branch input").first.check()
    wait_for_frames(page, 1)
    assert last_frame(page) == first


def test_autoplay_follows_the_record_and_stops_at_the_end_of_the_walk(page):
    page.locator("#autoplay input").check()
    wait_for_frames(page, 3)
    assert "Recorded frame" in page.inner_text(".far-scene")
    wait_for_frames(page, 12)
    page.wait_for_selector("text=which is all it may have")
    page.wait_for_function("!document.querySelector('#autoplay input').checked")


def test_the_walk_is_downloaded_as_mp4(page, tmp_path):
    page.click("#action-0")
    wait_for_frames(page, 1)
    page.click("#save")
    with page.expect_download() as download:
        page.locator("#download a").first.click()
    download.value.save_as(tmp_path / "walk.mp4")
    assert read_clip(tmp_path / "walk.mp4").frames.shape == (33, 256, 256, 3)


def test_an_upload_that_cannot_be_read_is_explained_and_the_app_goes_on(page):
    garbage = {"name": "clip.mp4", "mimeType": "video/mp4", "buffer": b"\0\0\0\x18ftypisom" + bytes(100)}
    page.locator("#upload input[type=file]").set_input_files(garbage)
    message = page.wait_for_selector("text=/clip.mp4.*(encode|copy) it again/").inner_text()
    assert tempfile.gettempdir() not in message, "the page shows where uploads lie"
    page.click("#action-0")
    wait_for_frames(page, 1)


def test_an_uploaded_image_is_a_start(page, tmp_path):
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / "view.png")
    page.locator("#upload input[type=file]").set_input_files(tmp_path / "view.png")
    page.wait_for_selector("text=Your image")
    assert "resized from 60x40 to 16x16" in page.inner_text(".far-status")
    page.click("#action-2")
    wait_for_frames(page, 1)


def test_visitors_have_walks_of_their_own(page, browser, address):
    page.click("#action-0")
    wait_for_frames(page, 1)
    other = browser.new_context().new_page()
    other.goto(address)
    other.wait_for_selector('.far-scene[data-new-frames="0"]', timeout=PATIENCE)
    other.context.close()
    page.click("#action-0")
    wait_for_frames(page, 2)
