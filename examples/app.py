"""Play a FAR world model in the browser: pick a start, press forward, left or right, see the next frame.

    python examples/app.py --model checkpoints/far-maze

Serves this machine only, at http://127.0.0.1:7860. Needs Gradio: `make app` installs it and starts this script.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from app_world import WorldLimits
from argument_types import whole_number


ROOT = Path(__file__).resolve().parent.parent


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "far-maze"), help="Pipeline folder or Hub id.")
    parser.add_argument(
        "--mazes", default=str(ROOT / "examples" / "mazes"), help="Recorded walks to start from, or ''."
    )
    parser.add_argument("--port", type=whole_number(1, 65535), default=7860)
    parser.add_argument(
        "--max_visitors", type=whole_number(1, 1000), default=WorldLimits().max_visitors, help="At one time."
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    args = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

from app_world import RecordedWalks, WorldModel
from app_world.ui import AppParts, build_app, launch_options
from generate import load_pipeline


def main(args: argparse.Namespace) -> None:
    limits = WorldLimits(max_visitors=args.max_visitors)
    pipe = load_pipeline(args.model)
    pipe.set_progress_bar_config(disable=True)
    model = WorldModel(pipe)
    walks = RecordedWalks(args.mazes, model.size, limits) if args.mazes else None
    app = build_app(AppParts(model, walks, limits))
    app.launch(server_name="127.0.0.1", server_port=args.port, **launch_options(limits))


if __name__ == "__main__":
    try:
        main(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
