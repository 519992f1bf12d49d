"""One denoising step with the context cached, at the paper's sizes: 64 tokens a short frame, 4 a long one."""

from collections.abc import Iterator

import torch

from diffusers_far import FARTransformer3DModel
from diffusers_far.models.frames import FrameBatch

from ..anyflow import DIFFERENCES, AnyFlowStep
from ..checks import require_close
from ..limit import Limit, denoising_pass
from ..measurement import Measurement, Row, compared
from ..memory import in_fresh_process
from ..models import FAR_B, FAR_B_LONG, BenchmarkModel, Clip
from ..naive import NaiveFAR
from ..timing import time_in_turn


PLACES = ((FAR_B, (16, 64, 128)), (FAR_B_LONG, (64, 256, 1000)))
NUM_STEPS = 50  # of the frame, whose modulations FAR computes together, before it is timed; `frame` times all of it
TIMESTEPS = torch.linspace(1000, 0, NUM_STEPS + 1)[:-1]
TIMESTEP = 500.0


def run(num_rounds: int, places: tuple[tuple[BenchmarkModel, tuple[int, ...]], ...] = PLACES) -> Iterator[Row]:
    """Yield a row for each model and number of frames, the noisy one included.

    Raises:
        RuntimeError: FAR and the naive reference disagree.
    """
    for model, frame_counts in places:
        for num_frames in frame_counts:
            # What naive and AnyFlow free in one place makes the large tensors of the next one cheaper.
            yield in_fresh_process(measure, model, num_frames, num_rounds)


def measure(model: BenchmarkModel, num_frames: int, num_rounds: int) -> Row:
    """A step of the last of `num_frames` frames."""
    transformer, clip = model.build(), model.clip(num_frames)
    far, naive, anyflow = FARStep(transformer, clip), NaiveStep(transformer, clip), AnyFlowStep(transformer, clip)
    limit = Limit(transformer, [denoising_pass(transformer, num_frames, model.latent_size)])
    difference = require_close(far(), naive(), f"a step of {model.name} at {num_frames} frames")
    rivals = {"FAR": far, "limit": limit, "naive": naive, "AnyFlow": anyflow}
    return Row(
        case="step",
        settings={"model": model.name, "frames": num_frames},
        measurements={
            **compared(time_in_turn(rivals, num_rounds)),
            "arithmetic": Measurement((limit.num_flops / 1e9,), "GFLOP"),
            "cache": Measurement((far.kv_cache.num_bytes,), "bytes"),
            "difference": difference,
        },
        notes={
            "parameters": transformer.num_parameters(),
            "AnyFlow parameters": anyflow.transformer.num_parameters(),
            "AnyFlow differences": DIFFERENCES,
        },
    )


class FARStep:
    """A step of the last frame of a clip, the frames before it being cached."""

    @torch.no_grad()
    def __init__(self, transformer: FARTransformer3DModel, clip: Clip):
        self.transformer, self.clip = transformer, clip
        self.kv_cache = transformer.init_kv_cache(1, *clip.latents.shape[-2:], max_frames=clip.latents.shape[1])
        self._fill_cache()
        self.noisy = FrameBatch(clip.noise[:, -1:], clip.fed_actions[:, -1:])
        self.modulation = transformer.frame_modulations(self.noisy, TIMESTEPS)[TIMESTEPS.tolist().index(TIMESTEP)]

    def _fill_cache(self) -> None:
        context, actions = self.clip.latents[:, :-1], self.clip.fed_actions[:, :-1]
        self.transformer(context, -1, actions=actions, kv_cache=self.kv_cache, update_cache=True)

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """The velocity, `(1, 1, C, H, W)`."""
        return self.transformer(self.noisy.latents, kv_cache=self.kv_cache, modulation=self.modulation).sample


class NaiveStep:
    """The same by the naive reference."""

    def __init__(self, transformer: FARTransformer3DModel, clip: Clip):
        self.naive, self.clip = NaiveFAR(transformer), clip
        self._fill_cache()

    def _fill_cache(self) -> None:
        self.cache = self.naive.write(self.clip.latents[:, :-1], self.clip.fed_actions[:, :-1])

    def __call__(self) -> torch.Tensor:
        """The velocity, `(1, 1, C, H, W)`."""
        return self.naive.step(self.clip.noise[:, -1:], TIMESTEP, self.clip.fed_actions[:, -1:], self.cache)
