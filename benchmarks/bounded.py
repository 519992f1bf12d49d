"""A session in bounded memory, and the same with the naive reference.

Frame after frame is made and then replaced by a random one that its number decides, so that the naive reference can be fed
the same frames without anybody remembering them.

C latent channels, H/W latent height/width.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from diffusers_far import FARSession

from .measurement import Measurement
from .memory import resident_memory
from .models import BenchmarkModel, latent_pipeline
from .naive import NaiveFAR, denoise
from .timing import time_in_turn


NUM_STEPS = 2  # of a frame
FRAMES_PER_RUN = 8  # the oldest frames are forgotten several at once, so some frames take longer than others


@dataclass(frozen=True)
class NumberedFrame:
    """Latents and noise, `(1, 1, C, H, W)`, and the action taken at the frame, `(1,)`."""

    latents: torch.Tensor
    noise: torch.Tensor
    action: torch.Tensor

    @classmethod
    def of(cls, model: BenchmarkModel, number: int) -> "NumberedFrame":
        generator = torch.Generator().manual_seed(number)
        shape = (1, 1, model.config["in_channels"], model.latent_size, model.latent_size)
        latents, noise = (torch.randn(shape, generator=generator) for _ in range(2))
        return cls(latents, noise, torch.randint(0, model.config["num_actions"], (1,), generator=generator))


class BoundedWalk:
    """A session that starts from frame 0 and forgets.

    Args:
        model (`BenchmarkModel`): With long frames.
        session (`FARSession`).
        num_forgotten (`list[int]`): Frames forgotten until each frame that was made.
    """

    def __init__(self, model: BenchmarkModel, session: FARSession, num_forgotten: list[int]):
        self.model, self.session, self.num_forgotten = model, session, num_forgotten
        self.made = None

    @classmethod
    def start(cls, model: BenchmarkModel, max_long_frames: int) -> "BoundedWalk":
        transformer = model.build()
        session = latent_pipeline(transformer).start_session(
            video_latents=NumberedFrame.of(model, 0).latents,
            actions=torch.empty(1, 0, dtype=torch.int64),
            num_inference_steps=NUM_STEPS,
            max_long_frames=max_long_frames,
            max_history=transformer.config.short_window,
            output_type="latent",
        )
        return cls(model, session, [0])

    def fork(self) -> "BoundedWalk":
        return BoundedWalk(self.model, self.session.fork(), list(self.num_forgotten))

    def go_on(self, num_frames: int) -> None:
        for _ in range(num_frames):
            number, rollout = self.session.num_frames, self.session.rollout
            frame, action = NumberedFrame.of(self.model, number), NumberedFrame.of(self.model, number - 1).action
            self.session.advance(action, noise=frame.noise, on_frame_end=partial(self._replace, frame.latents))
            self.num_forgotten.append(rollout.num_frames - rollout.kv_cache.num_frames)

    def _replace(self, latents: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        self.made = made
        return latents


@dataclass(frozen=True)
class Walked:
    """What came out of a walk: seconds of a frame and bytes of the process, early and late; the last frame,
    `(1, 1, C, H, W)`, and how many frames had been forgotten until each frame."""

    early: Measurement
    late: Measurement
    early_bytes: int
    late_bytes: int
    last_frame: np.ndarray
    num_forgotten: list[int]

    @property
    def num_frames(self) -> int:
        return len(self.num_forgotten)


def walk_in_bounded_memory(
    model: BenchmarkModel, frame_counts: tuple[int, int], max_long_frames: int, num_rounds: int
) -> Walked:
    """Walk to the later place, with a fork left at the earlier one; then time both in turn, where some frames are made in
    each run. Memory is measured at both places, the fork included."""
    early, late = frame_counts
    walk = BoundedWalk.start(model, max_long_frames)
    walk.go_on(early - walk.session.num_frames)
    fork = walk.fork()
    early_bytes = resident_memory()
    walk.go_on(late - early)
    late_bytes = resident_memory()
    rivals = {"early": partial(fork.go_on, FRAMES_PER_RUN), "late": partial(walk.go_on, FRAMES_PER_RUN)}
    seconds = {
        name: Measurement(tuple(run / FRAMES_PER_RUN for run in timing.values), "s")
        for name, timing in time_in_turn(rivals, num_rounds).items()
    }
    return Walked(seconds["early"], seconds["late"], early_bytes, late_bytes, walk.made.numpy(), walk.num_forgotten)


@torch.no_grad()
def naive_frame_of(model: BenchmarkModel, walked: Walked) -> torch.Tensor:
    """The last frame of a walk, by the naive reference, which forgets when the walk forgot."""
    naive, cache = NaiveFAR(model.build()), None
    action = torch.tensor([model.config["num_actions"]])  # the null action: none led to the first frame
    for number in range(walked.num_frames - 1):
        num_newly_forgotten = walked.num_forgotten[number + 1] - walked.num_forgotten[number]
        if num_newly_forgotten:
            cache = cache.without_first(num_newly_forgotten)
        frame = NumberedFrame.of(model, number)
        cache = naive.write(frame.latents, action[None], cache)
        action = frame.action
    noise = NumberedFrame.of(model, walked.num_frames - 1).noise
    return denoise(partial(naive.step, actions=action[None], cache=cache), noise, NUM_STEPS)
