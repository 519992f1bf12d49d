"""A browser for tests of pages; they are skipped where there is none."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
PATIENCE = 60_000  # milliseconds; machines that run tests may be busy


@contextmanager
def chromium() -> Iterator:
    """Playwright's browser, closed at the end."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("There is no Chromium; on Debian `apt-get install chromium`")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()


def wait_for_frames(page, num_new_frames: int) -> None:
    """Wait until the app's walk has so many new frames and stays there: Playwright looks twice a second, and what comes
    and goes between two looks is never seen."""
    page.wait_for_selector(f'.far-scene[data-new-frames="{num_new_frames}"]')
