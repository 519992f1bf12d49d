"""One whole frame: the frame before it is written to the cache, then it is denoised in some steps, the scheduler included.

FAR is a session of the pipeline, which goes back one frame before each run. The naive reference, whose frame takes minutes, is
timed in the one run that it is needed for.
"""

from collections.abc import Iterator
from functools import partial

import torch

from diffusers_far import FARSession, FARTransformer3DModel

from ..checks import require_close
from ..limit import Limit, denoising_pass, writing_pass
from ..measurement import Row, compared
from ..models import BenchmarkModel, Clip, latent_pipeline
from ..naive import NaiveCache, NaiveFAR, denoise
from ..timing import time_in_turn, timed
from .step import PLACES


STEP_COUNTS = (50, 4)
MAX_ROUNDS = 3  # of up to half a minute


def run(
    num_rounds: int,
    places: tuple[tuple[BenchmarkModel, tuple[int, ...]], ...] = PLACES,
    step_counts: tuple[int, ...] = STEP_COUNTS,
) -> Iterator[Row]:
    """Yield a row for each model, number of frames (the one that is made included; 3 at least) and number of steps."""
    num_rounds = min(num_rounds, MAX_ROUNDS)
    for model, frame_counts in places:
        transformer = model.build()
        for num_frames in frame_counts:
            yield from measure(model, transformer, num_frames, step_counts, num_rounds)


def measure(
    model: BenchmarkModel,
    transformer: FARTransformer3DModel,
    num_frames: int,
    step_counts: tuple[int, ...],
    num_rounds: int,
) -> Iterator[Row]:
    """The last of `num_frames` frames, in each number of steps."""
    clip, size = model.clip(num_frames), model.latent_size
    session = start_session(transformer, clip)
    naive = NaiveFAR(transformer)
    naive_cache = naive.write(clip.latents[:, :-2], clip.fed_actions[:, :-2])
    write = writing_pass(transformer, num_frames - 2, num_frames - 1, size)
    step = denoising_pass(transformer, num_frames, size)
    for num_steps in step_counts:
        session.set_config(num_inference_steps=num_steps)
        far_frame = partial(session.advance, clip.actions[:, -2], noise=clip.noise[:, -1:])
        naive_frame = partial(make_naive_frame, naive, naive_cache, clip, num_steps)
        what = f"a frame of {model.name} at {num_frames} frames in {num_steps} steps"
        naive_made, naive_seconds = timed(naive_frame)
        difference = require_close(far_frame(), naive_made[:, 0], what)
        rivals = {"FAR": far_frame, "limit": Limit(transformer, [write] + [step] * num_steps)}
        timings = time_in_turn(rivals, num_rounds, prepare={"FAR": partial(session.rewind, 1)})
        session.rewind(1)
        yield Row(
            case="frame",
            settings={"model": model.name, "frames": num_frames, "steps": num_steps},
            measurements={
                **compared(timings),
                "naive, once": naive_seconds,
                "naive / FAR": naive_seconds.per_median(timings["FAR"]),
                "difference": difference,
            },
        )


def start_session(transformer: FARTransformer3DModel, clip: Clip) -> FARSession:
    """A session in which all frames of a clip but the last are made, and all but the last two are written."""
    session = latent_pipeline(transformer).start_session(
        video_latents=clip.latents[:, :-2], actions=clip.actions[:, :-3], num_inference_steps=1, output_type="latent"
    )
    session.advance(clip.actions[:, -3], on_frame_end=lambda made: clip.latents[:, -2:-1])
    return session


@torch.no_grad()
def make_naive_frame(naive: NaiveFAR, cache: NaiveCache, clip: Clip, num_steps: int) -> torch.Tensor:
    """The last frame of a clip, from a cache of all but the last two."""
    cache = naive.write(clip.latents[:, -2:-1], clip.fed_actions[:, -2:-1], cache)
    return denoise(partial(naive.step, actions=clip.fed_actions[:, -1:], cache=cache), clip.noise[:, -1:], num_steps)
