"""In which dtype this machine computes fastest, and how far from float32 that is: a short measurement says both."""

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from ..models.frames import FrameBatch
from .estimate import NUM_MEASURED_STEPS
from .latency import seconds_in_turn
from .rollout import Rollout, frame_noise


LEAST_SPEEDUP = 1.05  # for less, nobody should give numbers away
MAX_STEP_DISTANCE = 0.02  # of a denoising step; what int8 does to it

Pass = Callable[[], Mapping[str, Sequence[torch.Tensor]]]


@dataclass(frozen=True)
class DtypeTiming:
    """What one dtype costs and is worth.

    Args:
        dtype (`torch.dtype`).
        seconds (`float`): Of a step, the median.
        speedup (`float`): Float32's seconds in its own, the median over rounds.
        distances (`dict[str, float]`): By the name of what is computed: the norm of its difference from float32's, in norms of
            float32's.
    """

    dtype: torch.dtype
    seconds: float
    speedup: float
    distances: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        far = ", ".join(f"{name} {distance:.2g}" for name, distance in self.distances.items())
        compared = f", {self.speedup:.2f} times as fast as float32, relative distance: {far}" if far else ""
        return f"{str(self.dtype).removeprefix('torch.')} {self.seconds:.3g} s{compared}"


@dataclass(frozen=True)
class DtypeComparison:
    """Which dtype is fastest here. Printed, it is one line to be read.

    Args:
        chosen (`torch.dtype`): The fastest of those that are near enough to float32; float32 where that gains too little.
        timings (`tuple[DtypeTiming, ...]`): Of all that were tried, float32 first.
    """

    chosen: torch.dtype
    timings: tuple[DtypeTiming, ...]

    def __str__(self) -> str:
        name, timings = str(self.chosen).removeprefix("torch."), "; ".join(map(str, self.timings))
        return f"{name} is taken ({timings})"


def candidate_dtypes(device: torch.device) -> list[torch.dtype]:
    """What is worth trying on a device beside float32."""
    return [torch.bfloat16, torch.float16] if device.type == "cuda" else [torch.bfloat16]


def relative_distance(values: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    """The norm of the difference of all tensors together, in norms of the reference."""
    norms = [
        math.hypot(*(tensor.float().norm().item() for tensor in tensors))
        for tensors in ([one.float() - other.float() for one, other in zip(values, reference)], reference)
    ]
    return norms[0] / norms[1] if norms[1] else norms[0]


def compare_dtypes(
    passes: Mapping[torch.dtype, Pass],
    device: torch.device,
    max_distance: float,
    num_steps: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> DtypeComparison:
    """Time the same pass in several dtypes, in turn.

    Args:
        passes (`dict`): What to run for each dtype, float32 among them. It returns the tensors that are compared, by a name
            for those that belong together.
        device (`torch.device`): Where they run.
        max_distance (`float`): A dtype that is farther from float32, or not finite, is not chosen, however fast it is.
        num_steps (`int`, defaults to 1): Steps of a pass.
        clock (callable): The time in seconds.
    """
    seconds, outputs = seconds_in_turn(passes, device, clock)
    reference, timings = outputs.pop(torch.float32), []
    for dtype, of_dtype in seconds.items():
        speedup = statistics.median(theirs / ours for theirs, ours in zip(seconds[torch.float32], of_dtype))
        distances = {
            name: relative_distance(tensors, reference[name]) for name, tensors in outputs.get(dtype, {}).items()
        }
        timings.append(DtypeTiming(dtype, statistics.median(of_dtype) / num_steps, speedup, distances))
    near = [each for each in timings if all(distance <= max_distance for distance in each.distances.values())]
    fastest = max(near, key=lambda timing: timing.speedup)
    chosen = fastest.dtype if fastest.speedup >= LEAST_SPEEDUP else torch.float32
    return DtypeComparison(chosen, tuple(sorted(timings, key=lambda timing: timing.dtype != torch.float32)))


@torch.no_grad()
def compare_steps(
    rollout: Rollout, num_context_frames: int, dtypes: Sequence[torch.dtype], max_distance: float
) -> DtypeComparison:
    """Denoising steps of the frame after a context of noise, in float32 and in other dtypes.

    Args:
        rollout (`Rollout`): Stays as it is; other dtypes get copies of its transformer.
        num_context_frames (`int`): In the cache.
        dtypes (sequence of `torch.dtype`): To be tried.
        max_distance (`float`): See [`compare_dtypes`].
    """
    device, (batch_size, *latent_size) = rollout.device, rollout.latent_shape
    few_steps = min(NUM_MEASURED_STEPS, rollout.config.num_inference_steps)
    config = replace(rollout.config, num_inference_steps=few_steps, sigmas=None)
    num_frames, seeded = num_context_frames + 1, torch.Generator(device).manual_seed
    noise = frame_noise((batch_size, num_frames, *latent_size), seeded(0), device)

    def context_in(dtype: torch.dtype) -> tuple[Rollout, FrameBatch]:
        """A rollout that has written its context, and the frame to come."""
        transformer = rollout.transformer
        if transformer.dtype != dtype:
            transformer = copy.deepcopy(transformer).to(dtype)
        twin = rollout.restarted(config, num_frames, transformer)
        blank = FrameBatch.blank(transformer, batch_size, num_frames, *latent_size[1:], device=device)
        frames = replace(blank, latents=noise)
        if num_context_frames:
            twin.write(frames.between(0, num_context_frames), frames.last(1))
        return twin, frames.last(1)

    def denoise(twin: Rollout, frame: FrameBatch) -> dict[str, list[torch.Tensor]]:
        return {"velocity": [frame.latents - twin.denoise(frame, generator=seeded(0))]}

    contexts = {dtype: context_in(dtype) for dtype in dict.fromkeys([torch.float32, *dtypes])}
    passes = {dtype: partial(denoise, *context) for dtype, context in contexts.items()}
    return compare_dtypes(passes, device, max_distance, contexts[torch.float32][0].num_steps)
