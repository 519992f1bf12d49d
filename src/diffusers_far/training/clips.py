"""The batches of each training step, and the loss on one: a pure function of the seed and the step, whatever the number of
processes.

Nothing here has a state to save: a run that resumes at step N draws what the uninterrupted run drew at step N.

B batch, F frames, C latent channels, H/W latent height/width, A action channels.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..data.clips import Clip, ClipBatch
from ..models.frames import FrameBatch, shift_actions
from .launch import leave_signals_to_parent
from .objective import (
    ObjectiveDraw,
    TrainingObjective,
    add_noise,
    draw_num_long_frames,
    flow_map_loss,
    flow_map_target,
    velocity_loss,
)


logger = logging.getLogger(__name__)


class ClipDataset(Protocol):
    """Trajectories that clips are cut from in any order, such as [`~diffusers_far.data.latents.LatentDataset`]."""

    num_frames: np.ndarray  # (num_trajectories,), int64
    latent_shape: tuple[int, int, int]  # C, H, W

    def clip(self, trajectory: int, start: int, length: int, interval: int = 1) -> Clip: ...


# The order of the clips, and what is drawn for them


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a permutation of `num_samples`, read-only.

    The last two are remembered, as all steps of an epoch ask for the same one: to draw that of millions of frames takes
    longer than a small training step.
    """
    order = np.random.default_rng((seed, epoch)).permutation(num_samples)
    order.flags.writeable = False
    return order


def step_indices(num_samples: int, global_batch_size: int, seed: int, step: int) -> np.ndarray:
    """The samples of one step. Epochs follow each other without a gap, each in an order of its own.

    Args:
        num_samples (`int`): Size of the dataset, at least 1.
        global_batch_size (`int`): Samples per step over all processes.
        seed (`int`): Seed of the run.
        step (`int`): Optimizer step, from 0.

    Returns:
        `np.ndarray` of shape `(global_batch_size,)`, int64, in `[0, num_samples)`.
    """
    positions = step * global_batch_size + np.arange(global_batch_size)
    epochs, places = np.divmod(positions, num_samples)
    indices = np.empty(global_batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        indices[epochs == epoch] = epoch_order(num_samples, seed, int(epoch))[places[epochs == epoch]]
    return indices


def step_generator(seed: int, step: int, process_index: int = 0, stream: int = 0) -> torch.Generator:
    """A CPU generator for the draws of one step on one process; `stream` separates independent uses in a step."""
    state = np.random.SeedSequence((seed, step, process_index, stream)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))


# What is drawn once per step; for each of its clips; and, of streamed trajectories, where a clip starts.
STEP_STREAM, CLIP_STREAM, START_STREAM = 1, 2, 4


def draw_start(num_trajectory_frames: int, num_frames: int, interval: int, generator: torch.Generator) -> int:
    """Where a clip of `num_frames` frames, `interval` apart, starts in a trajectory: all places are equally likely."""
    num_starts = num_trajectory_frames - (num_frames - 1) * interval
    return int(torch.randint(num_starts, (), generator=generator))


def draw_clip(
    dataset: ClipDataset, trajectory: int, num_frames: int, interval: int, generator: torch.Generator
) -> Clip:
    """A clip of one trajectory, its start drawn from `generator`."""
    start = draw_start(int(dataset.num_frames[trajectory]), num_frames, interval, generator)
    clip = dataset.clip(trajectory, start, num_frames, interval)
    return replace(clip, name=clip.name or f"trajectory {trajectory}")


def usable_trajectories(dataset: ClipDataset, num_frames: int, interval: int = 1) -> np.ndarray:
    """The trajectories that are long enough for clips of `num_frames` frames, `interval` apart.

    Returns:
        `np.ndarray` of shape `(num_usable,)`, int64: their numbers.

    Raises:
        ValueError: There is none.
    """
    span = (num_frames - 1) * interval + 1
    usable = np.flatnonzero(dataset.num_frames >= span)
    if not len(usable):
        raise ValueError(
            f"Clips of `num_frames` {num_frames} at `frame_interval` {interval} need {span} frames, but the longest of "
            f"{len(dataset.num_frames)} trajectories has {max(dataset.num_frames, default=0)}; lower one of the two."
        )
    return usable


@dataclass(kw_only=True, eq=False)
class StepBatches(Dataset):
    """What the batches of a run have in common, wherever their clips come from. A step takes `num_accumulated` of them on
    each process.

    A step's clips are numbered over all processes and accumulated batches, and each has a generator of its own.

    Args:
        objective (`TrainingObjective`): Draws what is noisy.
        latent_shape (`tuple`): `(C, H, W)`.
        num_frames (`int`): Longest clip.
        short_window (`int`, *optional*): Of a long model, whose clips have a random number of long frames, the same for
            all clips of a step, none where `num_frames` is within the window; `None`: all clips have `num_frames`
            frames, none of them long.
        interval (`int`): Distance between the frames of a clip.
        batch_size (`int`): Clips of a batch.
        num_accumulated (`int`): Batches that a step accumulates on each process.
        seed (`int`): Of the run.
        process_index, num_processes (`int`): This process's share.
        has_longest_only (`bool`): Every clip has the longest length: to try out what a step costs.
    """

    objective: TrainingObjective
    latent_shape: tuple[int, int, int]
    num_frames: int
    short_window: int | None
    interval: int
    batch_size: int
    num_accumulated: int
    seed: int
    process_index: int = 0
    num_processes: int = 1
    has_longest_only: bool = False

    def __post_init__(self) -> None:
        if self.short_window is not None and self.num_frames <= self.short_window:
            logger.warning(
                "`num_frames` is %d, within the short window of %d: no frame is long, and what only long frames use learns "
                "nothing. Train on longer clips afterwards.",
                self.num_frames,
                self.short_window,
            )

    @property
    def clips_per_step(self) -> int:
        """Clips of a step, over all processes."""
        return self.batch_size * self.num_accumulated * self.num_processes

    @property
    def longest(self) -> "StepBatches":
        """The same batches, every clip of the longest length."""
        batches = copy.copy(self)
        batches.has_longest_only = True
        return batches

    def num_long_frames(self, step: int) -> int:
        """The long frames of a step's clips."""
        if self.short_window is None:
            return 0
        if self.has_longest_only:
            return max(0, self.num_frames - self.short_window)
        generator = step_generator(self.seed, step, stream=STEP_STREAM)
        return draw_num_long_frames(self.num_frames, self.short_window, generator)

    def clip_length(self, step: int) -> int:
        """The frames of a step's clips."""
        return min(self.num_frames, self.num_long_frames(step) + (self.short_window or self.num_frames))

    def clip_numbers(self, accumulated: int) -> range:
        """The numbers, within a step, of the clips of one batch on this process."""
        first_clip = (accumulated * self.num_processes + self.process_index) * self.batch_size
        return range(first_clip, first_clip + self.batch_size)

    def generators(self, step: int, accumulated: int, stream: int) -> list[torch.Generator]:
        """One for each clip of a batch."""
        return [step_generator(self.seed, step, number, stream) for number in self.clip_numbers(accumulated)]

    def draw(self, step: int, generators: Sequence[torch.Generator]) -> ObjectiveDraw:
        """What chance decides for the clips of a batch."""
        sizes = (self.clip_length(step), self.num_long_frames(step), self.latent_shape)
        return ObjectiveDraw.stack([self.objective.draw(*sizes, generator) for generator in generators])

    def invented(self, transformer: torch.nn.Module) -> tuple[ClipBatch, ObjectiveDraw]:
        """A batch of the longest clips whose latents are noise, on the transformer's device: what a pass costs, without data."""
        batches, device = self.longest, transformer.device
        sizes = (self.batch_size, batches.clip_length(0), *self.latent_shape[1:])
        blank = FrameBatch.blank(transformer, *sizes, device=device)
        latents = torch.randn(blank.latents.shape, generator=step_generator(self.seed, 0)).to(device)
        labels = torch.zeros(self.batch_size, dtype=torch.int64, device=device) if transformer.takes_labels else None
        draw = batches.draw(0, self.generators(0, 0, CLIP_STREAM))
        return ClipBatch(latents=latents, actions=blank.actions, labels=labels), draw.to(device)


class TrainingBatches(StepBatches):
    """The batches of one process, numbered from 0 over the whole run, of trajectories that can be read in any order.

    A resumed run sees what the uninterrupted one saw, and two processes see together what one would.

    Args:
        dataset (`ClipDataset`): Where the clips come from.
        objective (`TrainingObjective`): Draws what is noisy.
        sizes: As of [`StepBatches`]; `latent_shape` is the dataset's.
    """

    def __init__(self, dataset: ClipDataset, objective: TrainingObjective, **sizes) -> None:
        super().__init__(objective=objective, latent_shape=dataset.latent_shape, **sizes)
        self.dataset = dataset
        self.trajectories = usable_trajectories(dataset, self.num_frames, self.interval)

    @property
    def description(self) -> str:
        """How many trajectories are long enough, in words for the log."""
        return (
            f"{len(self.trajectories)} of {len(self.dataset.num_frames)} trajectories are long enough for "
            f"{self.num_frames} frames"
        )

    def load(self, first_step: int, last_step: int, num_workers: int = 0) -> Iterator[tuple[ClipBatch, ObjectiveDraw]]:
        """The batches of the steps from `first_step` to before `last_step`, loaded in `num_workers` processes."""
        numbers = range(first_step * self.num_accumulated, last_step * self.num_accumulated)
        loader = DataLoader(
            self, batch_size=None, sampler=numbers, num_workers=num_workers, worker_init_fn=leave_signals_to_parent
        )
        return iter(loader)

    def __getitem__(self, index: int) -> tuple[ClipBatch, ObjectiveDraw]:
        """The clips of one pass and what chance decides for them."""
        step, accumulated = divmod(index, self.num_accumulated)
        indices = step_indices(len(self.trajectories), self.clips_per_step, self.seed, step)
        trajectories = self.trajectories[indices[list(self.clip_numbers(accumulated))]].tolist()
        generators = self.generators(step, accumulated, CLIP_STREAM)
        length = self.clip_length(step)
        clips = [
            draw_clip(self.dataset, trajectory, length, self.interval, generator)
            for trajectory, generator in zip(trajectories, generators)
        ]
        return ClipBatch.stack(clips), self.draw(step, generators)


def encode_batches(
    loaded: Iterator[tuple[ClipBatch, ObjectiveDraw]], vae: torch.nn.Module
) -> Iterator[tuple[ClipBatch, ObjectiveDraw]]:
    """Loaded batches as a training step takes them: videos are encoded here, where the VAE lies."""
    for clips, draw in loaded:
        yield clips.encode(vae), draw


# The loss


def fed_conditions(clips: ClipBatch, transformer_config, draw: ObjectiveDraw | None = None) -> dict[str, torch.Tensor]:
    """What the transformer is fed beside latents and timesteps, as keyword arguments; what `draw` drops is null.

    The first frame of a clip is fed the null action with `action_shift` 1, wherever the clip starts: so the pipeline feeds
    the first frame of its context.

    Args:
        clips ([`ClipBatch`]): With the actions and labels that the transformer takes.
        transformer_config: Of the transformer.
        draw ([`ObjectiveDraw`], *optional*): Of these clips; `None` drops nothing.
    """
    conditions = {}
    if transformer_config.num_actions is not None or transformer_config.action_dim is not None:
        actions, mask = shift_actions(clips.actions, transformer_config.action_shift, clips.num_frames)
        conditions["actions"] = actions
        conditions["action_mask"] = mask if draw is None else mask & draw.keeps_action
    if transformer_config.num_classes is not None:
        labels = clips.labels
        if draw is not None:
            labels = labels.masked_fill(~draw.keeps_label, transformer_config.num_classes)
        conditions["class_labels"] = labels
    return conditions


def null_conditions(conditions: dict[str, torch.Tensor], transformer_config) -> dict[str, torch.Tensor]:
    """Those of `fed_conditions` that stand for none."""
    nothing = {}
    if "action_mask" in conditions:
        nothing["action_mask"] = torch.zeros_like(conditions["action_mask"])
    if "class_labels" in conditions:
        nothing["class_labels"] = torch.full_like(conditions["class_labels"], transformer_config.num_classes)
    return nothing


def clip_loss(
    model: torch.nn.Module,
    transformer_config,
    clips: ClipBatch,
    draw: ObjectiveDraw,
) -> torch.Tensor:
    """The loss of one pass. `model` is the transformer, or what wraps it for training on several devices."""
    clips = clips.in_order(draw.frame_order)
    conditions = fed_conditions(clips, transformer_config, draw)
    if draw.teacher_forcing:
        conditions["clean_hidden_states"] = clips.latents
    noise, timestep = draw.noise, draw.timestep
    if timestep.ndim == 3:  # several draws, which go in front of the batch
        noise, timestep = noise.transpose(0, 1), timestep.transpose(0, 1)
    noisy = add_noise(clips.latents, noise, timestep)
    if draw.r_timestep is not None:
        end = draw.r_timestep if timestep.ndim == 2 else draw.r_timestep.transpose(0, 1)
        way = (noisy, noise - clips.latents, timestep, end)
        return _flow_map_loss(model, transformer_config, conditions, draw.guidance_scale, *way)
    velocity = model(noisy, timestep, **conditions).sample
    return velocity_loss(velocity, clips.latents, noise, timestep)


def _flow_map_loss(
    model: torch.nn.Module,
    transformer_config,
    conditions: dict[str, torch.Tensor],
    guidance_scale: float,
    noisy: torch.Tensor,
    velocity: torch.Tensor,
    timestep: torch.Tensor,
    r_timestep: torch.Tensor,
) -> torch.Tensor:
    """The loss of noisy latents on their way along `velocity`, with two passes without gradient, three with guidance. What the
    network draws itself, such as the noise on features, is the same in all of them, or their difference would be noise."""

    def predict(latents: torch.Tensor, start: torch.Tensor, end: torch.Tensor, **changed) -> torch.Tensor:
        return model(latents, start, r_timestep=end, **conditions | changed).sample

    @torch.no_grad()
    def predict_first(*arguments, **changed) -> torch.Tensor:
        with torch.random.fork_rng([noisy.device] if noisy.device.type == "cuda" else []):
            return predict(*arguments, **changed)

    if guidance_scale != 1:
        null = predict_first(noisy, timestep, timestep, **null_conditions(conditions, transformer_config)).float()
        num_short_frames = null.shape[-4]
        guided = null + guidance_scale * (velocity[..., -num_short_frames:, :, :, :] - null)
        velocity = torch.cat([velocity[..., :-num_short_frames, :, :, :], guided], dim=-4)
    target = flow_map_target(predict_first, noisy, velocity, timestep, r_timestep)
    return flow_map_loss(predict(noisy, timestep, r_timestep), target, timestep, r_timestep)
