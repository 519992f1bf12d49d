"""One denoising step with the context cached, at the paper's sizes: 64 tokens a short frame, 4 a long one."""

from collections.abc import Iterator

import torch

from diffusers_far import FARTransformer3DModel, preset_config

from .limit import bare_step
from .naive import NaiveFAR
from .timing import time_in_turn


SIZES = {"far-b": (16, 64, 128), "far-b-long": (64, 256, 1000)}
LATENT_SIZE = 8
TOLERANCE = 1e-4


def run(num_rounds: int) -> Iterator[dict]:
    """Yield a row for each preset and number of frames.

    Raises:
        RuntimeError: The two implementations disagree; a figure must not be bought with a wrong result.
    """
    for preset, frame_counts in SIZES.items():
        torch.manual_seed(0)
        transformer = FARTransformer3DModel(**preset_config(preset, num_actions=4)).eval()
        for parameter in transformer.parameters():  # as initialised, the output would be zero
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        for num_frames in frame_counts:
            yield measure(transformer, preset, num_frames, num_rounds)


@torch.no_grad()
def measure(transformer: FARTransformer3DModel, preset: str, num_frames: int, num_rounds: int) -> dict:
    """One step of the last of `num_frames` frames: FAR, the limit, the naive reference."""
    in_channels = transformer.config.in_channels
    latents = torch.randn(1, num_frames, in_channels, LATENT_SIZE, LATENT_SIZE)
    actions = torch.randint(0, 4, (1, num_frames))
    context, noisy = latents[:, :-1], latents[:, -1:]

    kv_cache = transformer.init_kv_cache(1, LATENT_SIZE, LATENT_SIZE, num_frames)
    transformer(context, -1, actions=actions[:, :-1], kv_cache=kv_cache, update_cache=True)
    naive = NaiveFAR(transformer)
    naive_cache = naive.encode(context, actions[:, :-1])

    def far_step():
        return transformer(noisy, 500, actions=actions[:, -1:], kv_cache=kv_cache).sample

    def naive_step():
        return naive.step(noisy, 500.0, actions[:, -1:], naive_cache)

    error = (far_step() - naive_step()).abs().max().item()
    if not error < TOLERANCE:
        raise RuntimeError(f"FAR and the naive reference differ by {error} at {preset}, {num_frames} frames.")
    plan = transformer.context_plan(num_frames, LATENT_SIZE, LATENT_SIZE)
    rivals = {
        "far": far_step,
        "limit": bare_step(transformer, plan.num_tokens, plan.tokens_per_short_frame),
        "naive": naive_step,
    }
    timings = time_in_turn(rivals, num_rounds)
    return {
        "case": "step",
        "model": preset,
        "frames": num_frames,
        **{f"{name}_seconds": timing.median for name, timing in timings.items()},
        **{f"{name}_quartiles": (timing.low, timing.high) for name, timing in timings.items()},
        "share_of_limit": timings["limit"].median / timings["far"].median,
        "faster_than_naive": timings["naive"].median / timings["far"].median,
        "cache_bytes": kv_cache.num_bytes,
        "worst_error": error,
    }
