"""Take the picture of the app that the pages show: a few steps of the shipped model along a recorded walk.

    python scripts/photograph_app.py --output docs/images/app.png

Serves the app on this machine alone for as long as it takes, and needs Playwright and a Chromium. A start draws new noise, so
that no two pictures are quite alike.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from diffusers_far.command_line import HelpWithDefaults


ROOT = Path(__file__).resolve().parent.parent


FIRST_WALK, FIRST_FRAME = 0, 100  # where the page starts
PATIENCE = 120_000  # milliseconds
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    parser.add_argument(
        "--model", default=str(ROOT / "checkpoints" / "far-crafter"), help="Pipeline folder or Hub id."
    )
    walks = str(ROOT / "examples" / "crafter_walks")
    parser.add_argument("--dataset_name", default=walks, help="Recorded walks to start from.")
    parser.add_argument("--num_steps", type=int, default=4, help="Along the recorded walk.")
    parser.add_argument("--size", type=int, nargs=2, default=[1120, 860], help="Width and height in pixels.")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="Playwright's own by default.")
    parser.add_argument("--output", type=Path, required=True, help="A .png; replaced.")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    args = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

from playwright.sync_api import Page, sync_playwright

from diffusers_far import FARPipeline
from diffusers_far.commands.app import RecordedWalks, WorldLimits, WorldModel
from diffusers_far.commands.app.ui import AppParts, serve


def walk_along(page: Page, actions: Sequence[int]) -> None:
    """Press the buttons of these actions, each when the frame before is there."""
    for num_new_frames, action in enumerate(actions, start=1):
        page.click(f"#action-{action}")
        page.wait_for_selector(f'.far-scene[data-new-frames="{num_new_frames}"]')


def main(args: argparse.Namespace) -> None:
    limits = WorldLimits()
    model = WorldModel(FARPipeline.from_pretrained(args.model))
    model.pipe.set_progress_bar_config(disable=True)
    walks = RecordedWalks(args.dataset_name, model.size, limits, num_actions=len(model.action_names))
    actions = walks.start(FIRST_WALK, FIRST_FRAME, num_context_frames=1).true_actions[: args.num_steps]
    app = serve(AppParts(model, walks, limits), server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=args.chromium, args=QUIET)
            width, height = args.size
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(PATIENCE)
            page.goto(app.local_url)
            page.wait_for_selector('.far-scene[data-new-frames="0"]')
            walk_along(page, actions)
            page.mouse.move(0, 0)
            page.evaluate("scrollTo(0, 0)")
            page.wait_for_timeout(1000)  # the last button fades
            args.output.parent.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=args.output)
            browser.close()
    finally:
        app.close()
    print(f"{args.output}: {width}x{height}, {args.output.stat().st_size} bytes")


if __name__ == "__main__":
    main(args)
