"""What frames cost before they are made: bytes are counted, seconds measured."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..models.frames import FrameBatch, blank_tensors
from .latency import LatencyBudget
from .rollout import Rollout


NUM_MEASURED_STEPS = 2  # of a frame
LEAST_MEASURED_FRAMES = 3


@dataclass(frozen=True)
class CostEstimate:
    """What a frame costs, and what is held when it is made. Printed, it is one line to be read.

    Args:
        num_frames (`int`): Of the video, with it.
        cache_bytes (`int`): Of the cache of the whole batch, a null half included.
        weight_bytes (`int`, *optional*): Of transformer and VAE; `None` of a session, whose models are the pipeline's.
        seconds (`float`, *optional*): That it takes on this machine: to write the frame before, to denoise, to decode. `None`
            where nothing was measured.
    """

    num_frames: int
    cache_bytes: int
    weight_bytes: int | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        weights = "" if self.weight_bytes is None else f"weights {self.weight_bytes / 2**20:.1f} MiB, "
        seconds = "" if self.seconds is None else f", {self.seconds:.3g} s"
        return f"frame {self.num_frames}: {weights}cache {self.cache_bytes / 2**20:.1f} MiB{seconds}"


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of what a model computes with; layers in int8 have theirs in pairs."""
    values = [
        part for value in model.state_dict().values() for part in (value if isinstance(value, tuple) else [value])
    ]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def estimate_frame(
    rollout: Rollout, writes: Sequence[int], decode: Callable | None, max_frames: int | None = None
) -> CostEstimate:
    """What the frame costs that comes after some writes.

    Args:
        rollout ([`Rollout`]): Stays as it is.
        writes (sequence of `int`): Clean frames of one write after the other, before the frame.
        decode (callable, *optional*): Of latents `(B, C, H, W)`. Without it nothing is measured.
        max_frames (`int`, *optional*): As if the rollout had been made with room for so many.
    """
    outline = rollout.outline(writes, max_frames)
    seconds = None if decode is None else measure_frame(outline, decode)
    return CostEstimate(outline.num_frames + 1, outline.num_bytes, seconds=seconds)


@torch.no_grad()
def measure_frame(outline: Rollout, decode: Callable) -> float:
    """Seconds of a frame of a rollout that is known but for its values: a few blank ones are made, with few steps; as many as a
    cache encodes its window anew for once, or a multiple."""
    config, clock, interval = outline.config, outline.state()[1], outline.config.cache_options.rebuild_interval
    num_measured = interval * math.ceil(LEAST_MEASURED_FRAMES / interval)
    few_steps = replace(config, num_inference_steps=min(NUM_MEASURED_STEPS, config.num_inference_steps), sigmas=None)
    rollout = outline.restarted(few_steps, max_frames=outline.num_frames + num_measured + 2)
    rollout.restore(blank_tensors(rollout.state_form(clock), rollout.device), clock)
    batch_size, _, *size = rollout.latent_shape
    frame = FrameBatch.blank(rollout.transformer, batch_size, 1, *size, device=rollout.device)
    budget, generator = LatencyBudget(sys.float_info.max, device=rollout.device), torch.Generator(rollout.device)
    budget.forget(num_measured)
    for _ in range(1 + num_measured):  # the first warms up
        with budget.frame(is_usual=True):
            rollout.write(frame, frame)
            with budget.denoising(rollout.num_steps):
                latents = rollout.denoise(frame, generator=generator)
            decode(latents[:, 0])
    return budget.seconds_of_frame(outline.num_steps)
