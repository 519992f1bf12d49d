"""Frames a second of the page that `make web` makes, in headless Chromium on one thread.

python -m benchmarks.web outputs/web --num_frames 60
"""

import argparse
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlencode

from diffusers_far.command_line import HelpWithDefaults, whole_number


PATIENCE = 600_000  # milliseconds

# Plays frames in a row from where the page starts, or from nothing, and returns their seconds.
TIMED_WALK = """async ({numFrames}) => {
    const {world, NOTHING, form} = globalThis.far;
    let moment = NOTHING;
    const seconds = [];
    for (let number = 0; number < numFrames; number++) {
        const began = performance.now();
        moment = await world.step(moment, number ? number % form.actions.length : null, world.noise(0, number));
        seconds.push((performance.now() - began) / 1000);
    }
    return seconds;
}"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    parser.add_argument("folder", type=Path, help="Made by `make web`.")
    parser.add_argument("--precision", choices=["int8", "float32"], default="float32")
    parser.add_argument("--provider", choices=["wasm", "webgpu"], default="wasm")
    parser.add_argument("--threads", type=whole_number(1, 64), default=1)
    parser.add_argument("--num_frames", type=whole_number(11, 10_000), default=60, help="From nothing, in a row.")
    args = parser.parse_args()
    if not (args.folder / "form.json").exists():
        parser.error(f"{args.folder} is no page with a form.json; `make web` makes one.")
    return args


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files, with the headers that let a page use several threads."""

    def log_message(self, *arguments) -> None:
        pass

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder, while it is served to this machine alone."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()


def open_world(page, address: str, **choices) -> None:
    """Open the page and wait until its world is ready; `choices` are those of its address."""
    page.set_default_timeout(PATIENCE)
    page.goto(f"{address}?{urlencode(choices)}")
    page.wait_for_selector("body[data-ready], body[data-failed]")
    failure = page.get_attribute("body", "data-failed")
    if failure is not None:
        raise RuntimeError(f"The page cannot run the model: {failure}")


def main(args: argparse.Namespace) -> None:
    from playwright.sync_api import sync_playwright

    choices = {"precision": args.precision, "provider": args.provider, "threads": args.threads, "start": -1}
    flags = ["--headless", "--no-sandbox"]
    flags += ["--disable-gpu"] if args.provider == "wasm" else ["--enable-unsafe-webgpu", "--enable-features=Vulkan"]
    with served(args.folder) as address, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        page = browser.new_page()
        open_world(page, address, **choices)
        seconds = page.evaluate(TIMED_WALK, {"numFrames": args.num_frames})
        browser.close()
    first, last = seconds[1:11], seconds[-10:]
    rates = {"first_10_frames_per_second": 10 / sum(first), "last_10_frames_per_second": 10 / sum(last)}
    print(
        json.dumps(
            {**choices, "num_frames": args.num_frames, **{name: round(each, 2) for name, each in rates.items()}}
        )
    )


if __name__ == "__main__":
    main(parse_args())
