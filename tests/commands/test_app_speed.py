"""The shipped model answers a press before a visitor grows impatient."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffusers_far import FARPipeline


pytestmark = pytest.mark.full

pytest.importorskip("gradio")

from diffusers_far.commands.app import RecordedWalks, WorldLimits, WorldModel  # noqa: E402
from diffusers_far.commands.app.ui import AppParts, Handlers  # noqa: E402


EXAMPLES = Path(__file__).parents[2] / "examples"

VISITOR = SimpleNamespace(session_hash="ann")
NUM_FRAMES = 12


def test_a_frame_takes_less_than_a_second():
    """From the press to the page that is sent back; the quickest one, since the machine may be busy."""
    pipe = FARPipeline.from_pretrained(EXAMPLES.parent / "checkpoints" / "far-crafter")
    pipe.set_progress_bar_config(disable=True)
    model, limits = WorldModel(pipe), WorldLimits()
    own = model.default_settings
    settings = (own.num_inference_steps, own.guidance_scale, own.flex_rope_slope, own.short_cache, 0)
    walks = RecordedWalks(str(EXAMPLES / "crafter_walks"), model.size, limits, num_actions=5)
    handlers = Handlers(AppParts(model, walks, limits))
    handlers.begin_recorded(VISITOR, 0, 100, 32, *settings)
    seconds = []
    for _ in range(NUM_FRAMES):
        start = time.perf_counter()
        handlers.step(VISITOR, 0, *settings)
        seconds.append(time.perf_counter() - start)
    handlers.files.cleanup()
    assert min(seconds) < 1, f"frames took {', '.join(f'{each:.2f}' for each in seconds)} s"
