"""The app of a Hugging Face Space, see README.md; in a clone of the library it runs from where it lies.

A Space sets the address that it serves; elsewhere that is this machine only.
"""

import os
import sys
from pathlib import Path

import torch


HERE = Path(__file__).resolve().parent
EXAMPLES = HERE if (HERE / "app_world").is_dir() else HERE.parent  # beside this file in a Space
CHECKPOINTS = EXAMPLES if EXAMPLES == HERE else EXAMPLES.parent / "checkpoints"
sys.path[:0] = [str(EXAMPLES), str(HERE)]

from app_world import RecordedWalks, WorldLimits, WorldModel  # noqa: E402
from app_world.ui import AppParts, build_app, launch_options  # noqa: E402

from diffusers_far import FARPipeline  # noqa: E402


def main() -> None:
    model_name = os.environ.get("FAR_MODEL", str(CHECKPOINTS / "far-maze"))
    pipe = FARPipeline.from_pretrained(model_name).to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    model, limits = WorldModel(pipe), WorldLimits()
    mazes = EXAMPLES / "mazes"
    walks = RecordedWalks(str(mazes), model.size, limits) if mazes.is_dir() else None
    build_app(AppParts(model, walks, limits)).launch(**launch_options(limits))


if __name__ == "__main__":
    main()
