"""A browser for tests of pages. They are skipped where there is none, unless `REQUIRE_CHROMIUM` is set."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest


QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
PATIENCE = 60_000  # milliseconds; machines that run tests may be busy


@contextmanager
def chromium() -> Iterator:
    """Playwright's browser, closed at the end."""
    path = shutil.which("chromium")
    if path is None or find_spec("playwright") is None:
        stop = pytest.fail if os.environ.get("REQUIRE_CHROMIUM") else pytest.skip
        stop("There is no Chromium with Playwright: `apt-get install chromium` on Debian, `pip install playwright`")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()


def wait_for_frames(page, num_new_frames: int) -> None:
    """Wait until the app's walk has so many new frames and stays there: Playwright looks twice a second, and what comes
    and goes between two looks is never seen."""
    page.wait_for_selector(f'.far-scene[data-new-frames="{num_new_frames}"]')
