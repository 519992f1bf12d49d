"""A call of a pipeline that was checked and is ready to run."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .inputs import PipelineInputs
from .rollout import RolloutConfig


@dataclass(frozen=True)
class Callbacks:
    """What the user wants to be called with, after each step and after each frame."""

    on_step_end: Callable | None = None
    tensor_inputs: tuple[str, ...] = ()
    on_frame_end: Callable | None = None


@dataclass(frozen=True)
class Generation:
    """A call that was checked and is ready to run."""

    inputs: PipelineInputs
    config: RolloutConfig
    generator: torch.Generator | list[torch.Generator] | None
    callbacks: Callbacks


class GenerationInterrupted(Exception):
    """Raised inside a call whose user set `pipe._interrupt`; the frames that are finished are returned."""
