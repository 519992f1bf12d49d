"""A denoising step with the blocks in int8, beside float32, and how far off its velocity is."""

from collections.abc import Iterator

from diffusers_far import FARTransformer3DModel

from ..checks import require_close
from ..measurement import Measurement, Row
from ..models import FAR_B, BenchmarkModel
from ..timing import time_in_turn
from .step import FARStep, NaiveStep


def run(num_rounds: int, model: BenchmarkModel = FAR_B, frame_counts: tuple[int, ...] = (16, 64)) -> Iterator[Row]:
    """Yield a row for each number of frames, the noisy one included."""
    transformer, rounded = model.build(), model.build()
    rounded.quantize_int8()
    for num_frames in frame_counts:
        yield measure(model, transformer, rounded, num_frames, num_rounds)


def measure(
    model: BenchmarkModel,
    transformer: FARTransformer3DModel,
    rounded: FARTransformer3DModel,
    num_frames: int,
    num_rounds: int,
) -> Row:
    """A step of the last frame. The error is that of the whole velocity, in proportion to its norm; weights are random."""
    clip = model.clip(num_frames)
    far, int8 = FARStep(transformer, clip), FARStep(rounded, clip)
    velocity, naive = far(), NaiveStep(transformer, clip)()
    difference = require_close(velocity, naive, f"a step of {model.name} at {num_frames} frames")
    timings = time_in_turn({"float32": far, "int8": int8}, num_rounds)
    return Row(
        case="int8",
        settings={"model": model.name, "frames": num_frames},
        measurements={
            **timings,
            "float32 / int8": timings["float32"].per(timings["int8"]),
            "error of int8": Measurement((((int8() - velocity).norm() / velocity.norm()).item(),), "error"),
            "difference": difference,
        },
    )
