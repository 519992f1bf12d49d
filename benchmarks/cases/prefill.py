"""Encoding a context: many clean frames are written to a new cache at once. Peak memory is of a process that does just that."""

from collections.abc import Iterator
from functools import partial

import torch

from diffusers_far import FARKVCache, FARTransformer3DModel

from ..checks import require_close
from ..limit import Limit, writing_pass
from ..measurement import Measurement, Row, compared
from ..memory import peak_memory_of
from ..models import FAR_B, FAR_B_LONG, BenchmarkModel, Clip
from ..naive import NaiveCache, NaiveFAR
from ..timing import MAX_LONG_ROUNDS, time_in_turn
from .step import TIMESTEP


PLACES = ((FAR_B, (16, 64, 128)), (FAR_B_LONG, (300,)))


def run(num_rounds: int, places: tuple[tuple[BenchmarkModel, tuple[int, ...]], ...] = PLACES) -> Iterator[Row]:
    """Yield a row for each model and number of context frames."""
    for model, frame_counts in places:
        transformer = model.build()
        for num_frames in frame_counts:
            yield measure(model, transformer, num_frames, min(num_rounds, MAX_LONG_ROUNDS))


@torch.no_grad()
def measure(model: BenchmarkModel, transformer: FARTransformer3DModel, num_frames: int, num_rounds: int) -> Row:
    """Of one size; the next step's velocity is what is compared."""
    peaks = {
        "FAR peak": peak_memory_of(encode_once, model, num_frames),
        "naive peak": peak_memory_of(encode_naively_once, model, num_frames),
    }
    clip, naive = model.clip(num_frames + 1), NaiveFAR(transformer)
    noisy, action = clip.noise[:, -1:], clip.fed_actions[:, -1:]
    velocity = transformer(noisy, TIMESTEP, actions=action, kv_cache=encode(transformer, clip)).sample
    naive_velocity = naive.step(noisy, TIMESTEP, action, encode_naively(naive, clip))
    limit = Limit(transformer, [writing_pass(transformer, 0, num_frames, model.latent_size)])
    rivals = {
        "FAR": partial(encode, transformer, clip),
        "limit": limit,
        "naive": partial(encode_naively, naive, clip),
    }
    timings = time_in_turn(rivals, num_rounds)
    return Row(
        case="prefill",
        settings={"model": model.name, "frames": num_frames},
        measurements={
            **compared(timings),
            "arithmetic": Measurement((limit.num_flops / 1e9,), "GFLOP"),
            **peaks,
            "difference": require_close(velocity, naive_velocity, f"{num_frames} context frames of {model.name}"),
        },
        notes={"tokens of an attention call of the limit": limit.group_size},
    )


@torch.no_grad()
def encode(transformer: FARTransformer3DModel, clip: Clip) -> FARKVCache:
    """A cache of all frames of a clip but the last."""
    context = clip.latents[:, :-1]
    kv_cache = transformer.init_kv_cache(1, *context.shape[-2:], max_frames=clip.latents.shape[1])
    transformer(context, -1, actions=clip.fed_actions[:, :-1], kv_cache=kv_cache, update_cache=True)
    return kv_cache


def encode_naively(naive: NaiveFAR, clip: Clip) -> NaiveCache:
    return naive.write(clip.latents[:, :-1], clip.fed_actions[:, :-1])


def encode_once(model: BenchmarkModel, num_frames: int) -> None:
    encode(model.build(), model.clip(num_frames + 1))


def encode_naively_once(model: BenchmarkModel, num_frames: int) -> None:
    encode_naively(NaiveFAR(model.build()), model.clip(num_frames + 1))
