"""A rollout of many frames at a small size, a call of the pipeline: without a cache, with a plain cache (base model), with a
multi-level cache (long model).

Without a cache it takes minutes, and is timed in the one run that its output is needed for.
"""

from collections.abc import Iterator
from functools import partial

import torch

from diffusers_far import FARPipeline, FARTransformer3DModel

from ..checks import require_close
from ..limit import BarePass, Limit, denoising_pass, writing_pass
from ..measurement import Row, compared
from ..models import SMALL, SMALL_LONG, BenchmarkModel, Clip, latent_pipeline
from ..naive import NaiveFAR, denoise
from ..timing import MAX_LONG_ROUNDS, time_in_turn, timed


NUM_FRAMES = 256
NUM_STEPS = 2
CACHES = ("plain cache", "multi-level cache")


def run(
    num_rounds: int,
    models: tuple[BenchmarkModel, BenchmarkModel] = (SMALL, SMALL_LONG),
    num_frames: int = NUM_FRAMES,
    num_steps: int = NUM_STEPS,
) -> Iterator[Row]:
    """Yield a row for each cache of the base and the long model, with the time without a cache beside it.

    All rollouts start from one frame.
    """
    num_rounds = min(num_rounds, MAX_LONG_ROUNDS)
    for cache, model in zip(CACHES, models):
        transformer, clip = model.build(), model.clip(num_frames)
        pipe = latent_pipeline(transformer)
        rivals = {
            "FAR": partial(far_rollout, pipe, clip, num_steps, use_cache=True),
            "limit": Limit(transformer, list(bare_rollout(transformer, num_frames, num_steps, model.latent_size))),
            "naive": partial(naive_rollout, NaiveFAR(transformer), clip, num_steps),
        }
        made = {name: rival() for name, rival in rivals.items()}
        uncached, uncached_seconds = timed(partial(far_rollout, pipe, clip, num_steps, use_cache=False))
        what = f"a rollout of {model.name} over {num_frames} frames"
        require_close(uncached, made["naive"], f"{what} without a cache")
        difference = require_close(made["FAR"], made["naive"], what)
        timings = time_in_turn(rivals, num_rounds, is_warm=True)
        yield Row(
            case="rollout",
            settings={"model": model.name, "cache": cache, "frames": num_frames, "steps": num_steps},
            measurements={
                **compared(timings),
                "no cache, once": uncached_seconds,
                "no cache / FAR": uncached_seconds.per_median(timings["FAR"]),
                "difference": difference,
            },
        )


def far_rollout(pipe: FARPipeline, clip: Clip, num_steps: int, *, use_cache: bool) -> torch.Tensor:
    """A call of the pipeline that goes on from the first frame of a clip: latents, `(1, F - 1, C, H, W)`."""
    return pipe(
        video_latents=clip.latents[:, :1],
        actions=clip.actions,
        num_frames=clip.latents.shape[1] - 1,
        latents=clip.noise[:, 1:],
        num_inference_steps=num_steps,
        use_cache=use_cache,
        output_type="latent",
    ).frames


@torch.no_grad()
def naive_rollout(naive: NaiveFAR, clip: Clip, num_steps: int) -> torch.Tensor:
    """The same as the pipeline's call, with the naive cache."""
    frame, cache, made = clip.latents[:, :1], None, []
    for number in range(1, clip.latents.shape[1]):
        cache = naive.write(frame, clip.fed_actions[:, number - 1 : number], cache)
        step = partial(naive.step, actions=clip.fed_actions[:, number : number + 1], cache=cache)
        frame = denoise(step, clip.noise[:, number : number + 1], num_steps)
        made.append(frame)
    return torch.cat(made, dim=1)


def bare_rollout(transformer: FARTransformer3DModel, num_frames: int, num_steps: int, size: int) -> Iterator[BarePass]:
    """The passes of a rollout with a cache."""
    for number in range(1, num_frames):
        yield writing_pass(transformer, number - 1, number, size)
        yield from [denoising_pass(transformer, number + 1, size)] * num_steps
