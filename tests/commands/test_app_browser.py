"""The app's page, used in Chromium as a visitor uses it."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from chromium import PATIENCE, chromium, wait_for_frames
from PIL import Image
from tiny_models import tiny_pipeline, tiny_transformer

from diffusers_far.data.media_files import read_clip


pytestmark = pytest.mark.full

gradio = pytest.importorskip("gradio")

from diffusers_far.commands.app import RecordedWalks, WorldLimits, WorldModel  # noqa: E402
from diffusers_far.commands.app.ui import AppParts, serve  # noqa: E402


EXAMPLES = Path(__file__).parents[2] / "examples"

MAX_NEW_FRAMES = 12


@pytest.fixture(scope="module")
def address():
    transformer = tiny_transformer(num_actions=4, action_shift=1, long_patch_size=2, trained_frames=40)
    names = ["forward", "left", "right", "do"]
    own = {"num_inference_steps": 2, "guidance_scale": 1.4}
    model = WorldModel(tiny_pipeline(transformer, height=16, width=16, action_names=names, **own))
    limits = WorldLimits(max_new_frames=MAX_NEW_FRAMES)
    walks = RecordedWalks(str(EXAMPLES / "mazes"), model.size, limits, num_actions=4)
    app = serve(AppParts(model, walks, limits), server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield app.local_url
    app.close()


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def new_page(browser, address):
    """Opens pages, each of a visitor of its own with the first walk on it; nothing may be loaded from anywhere else."""
    elsewhere, contexts = [], []

    def look(request) -> None:
        if is_elsewhere(request.url, address):
            elsewhere.append(request.url)

    def open_page():
        context = browser.new_context()
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on("request", look)
        page.goto(address)
        wait_for_frames(page, 0)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert elsewhere == []


@pytest.fixture
def page(new_page):
    return new_page()


def is_elsewhere(url: str, address: str) -> bool:
    return not url.startswith((address, "data:", "blob:"))


def last_frame(page) -> str:
    return page.locator(".far-pair img").first.get_attribute("src")


def test_keys_and_buttons_make_the_next_frame(page):
    page.keyboard.press("ArrowUp")
    wait_for_frames(page, 1)
    page.click("#action-1")
    wait_for_frames(page, 2)
    page.keyboard.press("ArrowRight")
    wait_for_frames(page, 3)


def test_the_space_bar_presses_its_own_button_and_not_the_one_in_focus(page):
    page.click("#action-0")
    wait_for_frames(page, 1)
    page.keyboard.press(" ")
    wait_for_frames(page, 2)
    page.wait_for_timeout(500)
    assert page.locator('.far-scene[data-new-frames="2"]').count() == 1


def test_a_new_world_begins_from_nothing(page):
    before = last_frame(page)
    page.click("#new-world")
    page.wait_for_selector("text=A new world · 0 new frames after 1 of context")
    assert last_frame(page) != before
    page.keyboard.press("ArrowUp")
    wait_for_frames(page, 1)


def test_keys_in_a_field_are_left_to_the_field(page):
    page.locator("#steps input[type=number]").focus()
    page.keyboard.press("ArrowUp")
    page.click("#action-0")
    wait_for_frames(page, 1)
    assert page.locator("#steps input[type=number]").input_value() == "3"


def test_settings_start_at_those_of_the_pipeline(page):
    shown = [page.locator(f"#{name} input[type=number]").input_value() for name in ("steps", "guidance", "slope")]
    assert shown == ["2", "1.4", "0"]


def test_a_number_that_cannot_be_used_is_explained_and_the_walk_goes_on(page):
    page.locator("#steps input[type=number]").fill("2.5")
    page.click("#action-0")
    page.wait_for_selector("text=Steps must be a whole number from 1 to 100, not '2.5'")
    page.locator("#steps input[type=number]").fill("7000")  # the page makes this the largest that there is
    page.click("#action-0")
    wait_for_frames(page, 1)


def test_autoplay_stops_where_a_number_is_being_changed(page):
    """The timer does not wait until an emptied field has a number again."""
    page.locator("#steps input[type=number]").fill("")
    page.locator("#autoplay input").evaluate("box => box.click()")  # leaves the field as it is, as a shortcut would
    page.wait_for_selector("text=Steps must be a whole number from 1 to 100, not nothing")
    page.wait_for_function("!document.querySelector('#autoplay input').checked")


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
    wait_for_frames(page, MAX_NEW_FRAMES)
    assert "Recorded frame" in page.inner_text(".far-scene"), "another way than the recorded one was taken"
    page.wait_for_selector("text=which is all there may be")
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


def test_visitors_have_walks_of_their_own(new_page):
    page = new_page()
    page.click("#action-0")
    wait_for_frames(page, 1)
    other = new_page()
    other.click("#action-1")
    wait_for_frames(other, 1)
    page.click("#action-0")
    wait_for_frames(page, 2)
