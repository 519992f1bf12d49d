"""How the cost grows with the number of frames: of a step in a context that grows, and of frames in bounded memory, where
neither time nor memory should grow."""

from collections.abc import Iterator

import torch

from ..bounded import naive_frame_of, walk_in_bounded_memory
from ..checks import require_close
from ..limit import Limit, denoising_pass
from ..measurement import Measurement, Row
from ..memory import in_fresh_process
from ..models import FAR_B_LONG, SMALL_LONG, BenchmarkModel
from ..timing import time_in_turn
from .step import FARStep, NaiveStep


STEP_FRAMES = (64, 1000)
BOUNDED_FRAMES = (500, 2000)
MAX_LONG_FRAMES = 64


def run(
    num_rounds: int,
    step_model: BenchmarkModel = FAR_B_LONG,
    step_frames: tuple[int, int] = STEP_FRAMES,
    bounded_model: BenchmarkModel = SMALL_LONG,
    bounded_frames: tuple[int, int] = BOUNDED_FRAMES,
    max_long_frames: int = MAX_LONG_FRAMES,
) -> Iterator[Row]:
    """Yield a row for the step and one for bounded memory. Growth is what something costs late, per what it costs early."""
    yield grow_context(step_model, step_frames, num_rounds)
    yield grow_in_bounded_memory(bounded_model, bounded_frames, max_long_frames, num_rounds)


def grow_context(model: BenchmarkModel, frame_counts: tuple[int, int], num_rounds: int) -> Row:
    """A step at the end of a short and of a long video."""
    transformer, rivals, differences = model.build(), {}, []
    for num_frames in frame_counts:
        far, naive = (step(transformer, model.clip(num_frames)) for step in (FARStep, NaiveStep))
        differences += require_close(far(), naive(), f"a step of {model.name} at {num_frames} frames").values
        limit = Limit(transformer, [denoising_pass(transformer, num_frames, model.latent_size)])
        rivals |= {("FAR", num_frames): far, ("limit", num_frames): limit, ("naive", num_frames): naive}
    timings, (early, late) = time_in_turn(rivals, num_rounds), frame_counts
    growth = {f"{name} growth": timings[name, late].per(timings[name, early]) for name in ("FAR", "limit", "naive")}
    return Row(
        case="growth",
        settings={"model": model.name, "what": "step", "early": early, "late": late},
        measurements={
            "FAR, early": timings["FAR", early],
            "FAR, late": timings["FAR", late],
            **growth,
            "difference": Measurement((max(differences),), "difference"),
        },
    )


def grow_in_bounded_memory(
    model: BenchmarkModel, frame_counts: tuple[int, int], max_long_frames: int, num_rounds: int
) -> Row:
    """A frame, early and late in a session that forgets; measured in a process of its own."""
    walked = in_fresh_process(walk_in_bounded_memory, model, frame_counts, max_long_frames, num_rounds)
    early, late = frame_counts
    resident = Measurement((walked.late_bytes,), "bytes").per(Measurement((walked.early_bytes,), "bytes"))
    return Row(
        case="growth",
        settings={"model": model.name, "what": f"frame, {max_long_frames} long", "early": early, "late": late},
        measurements={
            "FAR, early": walked.early,
            "FAR, late": walked.late,
            "FAR growth": walked.late.per(walked.early),
            "resident, early": Measurement((walked.early_bytes,), "bytes"),
            "resident, late": Measurement((walked.late_bytes,), "bytes"),
            "resident growth": resident,
            "difference": require_close(
                torch.from_numpy(walked.last_frame), naive_frame_of(model, walked), f"frame {walked.num_frames}"
            ),
        },
    )
