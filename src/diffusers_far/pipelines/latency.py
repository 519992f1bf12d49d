"""The clock: how long passes take in turn, how long a frame takes, and how many denoising steps come in time."""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers.utils import logging

from ..checks import check_count, is_finite_number
from .inputs import NUM_TIMESTEPS


logger = logging.get_logger(__name__)

NUM_MEASURED_FRAMES = 5  # the median of so many outlives a hiccup of the machine, and follows a lasting change soon
NUM_ROUNDS = 5  # for the same reason

Key, Output = TypeVar("Key"), TypeVar("Output")


def read_clock(device: torch.device | None, clock: Callable[[], float] = time.perf_counter) -> float:
    """The time in seconds when the device has done what it was given; else only the launch of the work would be measured."""
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)
    return clock()


def seconds_in_turn(
    passes: Mapping[Key, Callable[[], Output]], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[Key, list[float]], dict[Key, Output]]:
    """Run rivals in turn, so that what disturbs the machine hits all of a round alike.

    Returns:
        The seconds of each, `NUM_ROUNDS` of them, and what each returned when it warmed up.
    """
    outputs = {key: run() for key, run in passes.items()}
    seconds = {key: [] for key in passes}
    for _ in range(NUM_ROUNDS):
        for key, run in passes.items():
            start = read_clock(device, clock)
            run()
            seconds[key].append(read_clock(device, clock) - start)
    return seconds, outputs


class LatencyBudget:
    """Chooses the number of denoising steps of each frame from the seconds that the latest frames took.

    A frame takes `other seconds + steps x seconds per step`, each part being the median of the latest
    `NUM_MEASURED_FRAMES` frames; the other seconds are those in which the last frame is written to the cache and the new
    one decoded. Before both parts have been measured, a frame takes the fewest steps.

    Args:
        max_seconds_per_frame (`float`, *optional*): Above 0; `None` switches the budget off: no clock is read, and every
            frame takes the steps that are wanted.
        min_inference_steps (`int`, defaults to 4): Never fewer, even where frames then come late; all that are wanted
            where these are fewer.
        device (`torch.device`, *optional*): Waited for before the clock is read.
        clock (callable): The time in seconds.

    Attributes:
        num_inference_steps_used (`int`, *optional*): Denoising steps of the latest frame.
    """

    def __init__(
        self,
        max_seconds_per_frame: float | None = None,
        min_inference_steps: int = 4,
        *,
        device: torch.device | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.set_budget(max_seconds_per_frame, min_inference_steps)
        self.clock = clock
        self.num_inference_steps_used: int | None = None
        self._device = device
        self._announced: int | None = None
        self.forget()

    def set_budget(self, max_seconds_per_frame: float | None, min_inference_steps: int = 4) -> None:
        """Take another budget over; what was measured stays known.

        Raises:
            ValueError: `max_seconds_per_frame` is not a finite number above 0, or `min_inference_steps` no count.
        """
        if max_seconds_per_frame is not None and not (
            is_finite_number(max_seconds_per_frame) and max_seconds_per_frame > 0
        ):
            raise ValueError(
                f"`max_seconds_per_frame` is {max_seconds_per_frame!r}; pass seconds above 0, or None for no limit."
            )
        check_count("min_inference_steps", min_inference_steps)
        self.max_seconds_per_frame = None if max_seconds_per_frame is None else float(max_seconds_per_frame)
        self.min_inference_steps = int(min_inference_steps)

    def forget(self, num_measured_frames: int = NUM_MEASURED_FRAMES) -> None:
        """Measure anew, for steps have become longer or shorter; the latest frames count, so many of them."""
        self._step_seconds: deque[float] = deque(maxlen=num_measured_frames)
        self._other_seconds: deque[float] = deque(maxlen=num_measured_frames)

    def choose_steps(self, num_inference_steps: int) -> int:
        """Denoising steps of the next frame: as many of the `num_inference_steps` wanted as come in time. A change is
        logged, as info."""
        if self.max_seconds_per_frame is None:
            return num_inference_steps
        fewest, chosen = min(self.min_inference_steps, num_inference_steps), self._num_affordable_steps()
        chosen = max(fewest, min(chosen, num_inference_steps))
        if chosen != self._announced:
            self._announced = chosen
            logger.info(
                f"{chosen} of {num_inference_steps} denoising steps, for frames within {self.max_seconds_per_frame:g} "
                f"seconds (never fewer than {fewest})."
            )
        return chosen

    def seconds_of_frame(self, num_inference_steps: int) -> float:
        """Of a frame of so many steps, as the latest were. Of the seconds beside the steps it is the mean, for some writes may
        encode the window anew, and others not."""
        return statistics.fmean(self._other_seconds) + num_inference_steps * statistics.median(self._step_seconds)

    def _num_affordable_steps(self) -> int:
        if not self._step_seconds or not self._other_seconds:
            return 0
        seconds_left = self.max_seconds_per_frame - statistics.median(self._other_seconds)
        step_seconds = statistics.median(self._step_seconds)
        if step_seconds <= 0:  # a clock too coarse to see a step
            return self.min_inference_steps
        return max(0, math.floor(min(seconds_left / step_seconds, NUM_TIMESTEPS)))

    @contextmanager
    def frame(self, *, is_usual: bool) -> Iterator[None]:
        """Measure all that is done for one frame.

        Args:
            is_usual (`bool`): `False` where a whole context is written before it, which says nothing of later frames.
        """
        start = self._now()
        self._denoised: tuple[int, float] | None = None
        yield
        if self._denoised is None:
            return
        self.num_inference_steps_used, denoising_seconds = self._denoised
        if self.max_seconds_per_frame is None:
            return
        self._step_seconds.append(denoising_seconds / self.num_inference_steps_used)
        if is_usual:
            self._other_seconds.append(self._now() - start - denoising_seconds)

    @contextmanager
    def denoising(self, num_inference_steps: int) -> Iterator[None]:
        """Measure the denoising steps of the frame."""
        start = self._now()
        yield
        self._denoised = (num_inference_steps, self._now() - start)

    def _now(self) -> float:
        return 0.0 if self.max_seconds_per_frame is None else read_clock(self._device, self.clock)

    def clone(self) -> "LatencyBudget":
        """An independent budget that knows the same measurements."""
        return LatencyBudget.from_state(self.state(), device=self._device, clock=self.clock)

    def state(self) -> dict[str, Any]:
        """Limits and measurements, as JSON values."""
        return {
            "max_seconds_per_frame": self.max_seconds_per_frame,
            "min_inference_steps": self.min_inference_steps,
            "num_inference_steps_used": self.num_inference_steps_used,
            "announced": self._announced,
            "step_seconds": list(self._step_seconds),
            "other_seconds": list(self._other_seconds),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], **arguments) -> "LatencyBudget":
        """A budget with the limits and measurements of another; `arguments` are its device and clock.

        Raises:
            ValueError: No budget has such a state.
        """
        if not isinstance(state, dict) or state.keys() != cls().state().keys():
            raise ValueError(f"the latency budget is {state!r}; it has {', '.join(cls().state())}")
        for name in ("num_inference_steps_used", "announced"):
            check_count(name, state[name], optional=True)
        for name in ("step_seconds", "other_seconds"):
            if not isinstance(state[name], list) or not all(map(is_finite_number, state[name])):
                raise ValueError(f"`{name}` is {state[name]!r}; it is a list of seconds")
        budget = cls(state["max_seconds_per_frame"], state["min_inference_steps"], **arguments)
        budget.num_inference_steps_used = state["num_inference_steps_used"]
        budget._announced = state["announced"]
        budget._step_seconds.extend(state["step_seconds"])
        budget._other_seconds.extend(state["other_seconds"])
        return budget
