"""The app of a Hugging Face Space, see README.md; in a clone of the library it runs from where it lies.

A Space sets the address that it serves; elsewhere that is this machine only.
"""

import os
import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent
EXAMPLES = HERE if (HERE / "crafter_walks").is_dir() else HERE.parent  # beside this file in a Space
CHECKPOINTS = EXAMPLES if EXAMPLES == HERE else EXAMPLES.parent / "checkpoints"
sys.path.insert(0, str(HERE))

from diffusers_far.commands.app import RecordedWalks, WorldLimits, WorldModel  # noqa: E402
from diffusers_far.commands.app.door import hosts_of_a_space  # noqa: E402
from diffusers_far.commands.app.ui import AppParts, serve  # noqa: E402
from diffusers_far.commands.inputs import load_pipeline  # noqa: E402


def main() -> None:
    model_name = os.environ.get("FAR_MODEL", str(CHECKPOINTS / "far-crafter"))
    dataset_name = os.environ.get("FAR_DATASET", "" if "FAR_MODEL" in os.environ else str(EXAMPLES / "crafter_walks"))
    allowed_hosts = hosts_of_a_space(os.environ.get("SPACE_HOST")) + os.environ.get("FAR_ALLOWED_HOSTS", "").split()
    model, limits = WorldModel(load_pipeline(model_name)), WorldLimits()
    walks = None
    if dataset_name:
        walks = RecordedWalks(dataset_name, model.size, limits, num_actions=len(model.action_names))
    serve(AppParts(model, walks, limits), allowed_hosts)


if __name__ == "__main__":
    main()
