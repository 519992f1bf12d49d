"""The batches of each training step, and the loss on one: a pure function of the seed and the step, whatever the number of
processes.

Nothing here has a state to save: a run that resumes at step N draws what the uninterrupted run drew at step N.

B batch, F frames, C latent channels, H/W latent height/width, A action channels.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..data.video_clips import VideoClip
from ..models.codec import encode_video
from ..models.frames import shift_actions
from .launch import leave_signals_to_parent
from .objective import ObjectiveDraw, TrainingObjective, add_noise, draw_num_long_frames, velocity_loss


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


class StepBatchSampler:
    """The batches of one process from `first_step` on, for `torch.utils.data.DataLoader(batch_sampler=...)`.

    Args:
        num_samples (`int`): Size of the dataset.
        batch_size (`int`): Samples per step on this process.
        seed (`int`): Seed of the run.
        first_step, last_step (`int`): The steps to serve, `first_step <= step < last_step`.
        process_index, num_processes (`int`): This process's share of each global batch.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        first_step: int,
        last_step: int,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        if num_samples < 1 or batch_size < 1:
            raise ValueError(f"`num_samples` is {num_samples} and `batch_size` {batch_size}; both must be at least 1.")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.steps = range(first_step, last_step)
        self.process_index = process_index
        self.num_processes = num_processes

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            indices = step_indices(self.num_samples, self.batch_size * self.num_processes, self.seed, step)
            yield indices[self.process_index * self.batch_size :][: self.batch_size].tolist()


# What is drawn once per step; for each of its clips; and, of streamed trajectories, where a clip starts.
STEP_STREAM, CLIP_STREAM, START_STREAM = 1, 2, 4


class Clip(Protocol):
    """Consecutive frames of one trajectory, such as [`~diffusers_far.data.latents.LatentClip`]."""

    latents: torch.Tensor  # (F, C, H, W), float32, scaled
    actions: torch.Tensor | None  # (F,) int64 or (F, A) float: the action taken at each frame
    label: int | None


class ClipDataset(Protocol):
    """Trajectories that clips are cut from, such as [`~diffusers_far.data.latents.LatentDataset`]."""

    num_frames: np.ndarray  # (num_trajectories,), int64
    latent_shape: tuple[int, int, int]  # C, H, W

    def clip(self, trajectory: int, start: int, length: int, interval: int = 1) -> Clip: ...


@dataclass(frozen=True)
class ClipBatch:
    """Clips of one length.

    Args:
        latents (`torch.Tensor` of shape `(B, F, C, H, W)`): Scaled, float32.
        actions (`torch.Tensor` of shape `(B, F)` or `(B, F, A)`, *optional*): The action taken at each frame.
        labels (`torch.Tensor` of shape `(B,)`, int64, *optional*): Classes.
        names (`tuple[str]`): Of the clips' trajectories, for errors; empty where they are not known.
    """

    latents: torch.Tensor
    actions: torch.Tensor | None
    labels: torch.Tensor | None
    names: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> "ClipBatch":
        values = (getattr(self, field.name) for field in fields(self))
        return ClipBatch(*(value.to(device) if isinstance(value, torch.Tensor) else value for value in values))

    def not_finite(self) -> list[str]:
        """The names of the clips whose latents or actions have NaN or infinite values."""
        is_finite = torch.stack(
            [value.flatten(1).isfinite().all(1) for value in (self.latents, self.actions) if value is not None]
        )
        names = self.names or [f"clip {number} of the batch" for number in range(len(self.latents))]
        return [name for name, is_good in zip(names, is_finite.all(0).tolist()) if not is_good]

    def in_order(self, frame_order: torch.Tensor) -> "ClipBatch":
        """The clips with the frames `frame_order`, shape `(B, F)`, int64, of each, and the actions taken at them."""
        clips = torch.arange(len(frame_order), device=frame_order.device)[:, None]
        actions = None if self.actions is None else self.actions[clips, frame_order]
        return ClipBatch(self.latents[clips, frame_order], actions, self.labels)

    def conditions(self, transformer_config, draw: ObjectiveDraw | None = None) -> dict[str, torch.Tensor]:
        """What the transformer is fed beside latents and timesteps, as keyword arguments; what `draw` drops is null.

        The first frame of a clip is fed the null action with `action_shift` 1, wherever the clip starts: so the
        pipeline feeds the first frame of its context.
        """
        conditions = {}
        if transformer_config.num_actions is not None or transformer_config.action_dim is not None:
            actions, mask = shift_actions(self.actions, transformer_config.action_shift, self.latents.shape[1])
            conditions["actions"] = actions
            conditions["action_mask"] = mask if draw is None else mask & draw.keeps_action
        if transformer_config.num_classes is not None:
            labels = self.labels
            if draw is not None:
                labels = labels.masked_fill(~draw.keeps_label, transformer_config.num_classes)
            conditions["class_labels"] = labels
        return conditions


@dataclass(frozen=True)
class VideoBatch:
    """Clips of one length that are not encoded yet.

    Args:
        frames (`torch.Tensor` of shape `(B, F, 3, height, width)`): uint8, RGB.
        actions, labels, names: As of [`ClipBatch`].
    """

    frames: torch.Tensor
    actions: torch.Tensor | None
    labels: torch.Tensor | None
    names: tuple[str, ...] = ()

    def encode(self, vae: torch.nn.Module) -> ClipBatch:
        """Each clip by itself, so that its latents do not depend on the others in the batch."""
        latents = torch.stack([encode_video(vae, frames).float() for frames in self.frames])
        return ClipBatch(latents, self.actions, self.labels, self.names)


def stack_clips(clips: Sequence[Clip | VideoClip], names: Sequence[str] = ()) -> ClipBatch | VideoBatch:
    """A batch of clips of one kind and length, of the trajectories `names`."""
    actions = None if clips[0].actions is None else torch.stack([clip.actions for clip in clips])
    labels = None if clips[0].label is None else torch.tensor([clip.label for clip in clips])
    if isinstance(clips[0], VideoClip):
        return VideoBatch(torch.stack([clip.frames for clip in clips]), actions, labels, tuple(names))
    return ClipBatch(torch.stack([clip.latents for clip in clips]), actions, labels, tuple(names))


def cut_clips(
    dataset: ClipDataset,
    trajectories: Sequence[int],
    generators: Sequence[torch.Generator],
    num_frames: int,
    interval: int = 1,
) -> ClipBatch | VideoBatch:
    """Cut one clip from each trajectory, its start drawn from its generator."""
    clips = []
    for trajectory, generator in zip(trajectories, generators):
        start = draw_start(int(dataset.num_frames[trajectory]), num_frames, interval, generator)
        clips.append(dataset.clip(trajectory, start, num_frames, interval))
    return stack_clips(clips, [f"trajectory {trajectory}" for trajectory in trajectories])


def draw_start(num_trajectory_frames: int, num_frames: int, interval: int, generator: torch.Generator) -> int:
    """Where a clip of `num_frames` frames, `interval` apart, starts in a trajectory: any place is as likely."""
    num_starts = num_trajectory_frames - (num_frames - 1) * interval
    return int(torch.randint(num_starts, (), generator=generator))


def usable_trajectories(dataset: ClipDataset, num_frames: int, interval: int = 1) -> np.ndarray:
    """The trajectories that are long enough for clips of `num_frames` frames, `interval` apart."""
    span = (num_frames - 1) * interval + 1
    usable = np.flatnonzero(dataset.num_frames >= span)
    if not len(usable):
        raise ValueError(
            f"Clips of `num_frames` {num_frames} at `frame_interval` {interval} need {span} frames, but the longest of "
            f"{len(dataset.num_frames)} trajectories has {max(dataset.num_frames, default=0)}; lower one of the two."
        )
    return usable


class StepBatches(torch.utils.data.Dataset):
    """What the batches of a run have in common, wherever their clips come from. A step takes `num_accumulated` of them on
    each process.

    A step's clips are numbered over all processes and accumulated batches, and each has a generator of its own.

    Args:
        objective (`TrainingObjective`): Draws what is noisy.
        latent_shape (`tuple`): `(C, H, W)`.
        num_frames (`int`): Longest clip.
        short_window (`int`, *optional*): Of a long model, whose clips have a random number of long frames, the same for
            all clips of a step; `None`: all clips have `num_frames` frames, none of them long.
        interval (`int`): Distance between the frames of a clip.
        batch_size (`int`): Clips of a batch.
        num_accumulated (`int`): Batches that a step accumulates on each process.
        seed (`int`): Of the run.
        process_index, num_processes (`int`): This process's share.
    """

    def __init__(
        self,
        objective: TrainingObjective,
        latent_shape: tuple[int, int, int],
        *,
        num_frames: int,
        short_window: int | None,
        interval: int,
        batch_size: int,
        num_accumulated: int,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        if short_window is not None and num_frames < short_window:
            raise ValueError(
                f"`num_frames` is {num_frames}, but the model's short window alone has {short_window} frames; give at "
                "least as many."
            )
        self.objective = objective
        self.latent_shape = latent_shape
        self.num_frames = num_frames
        self.short_window = short_window
        self.interval = interval
        self.batch_size = batch_size
        self.num_accumulated = num_accumulated
        self.seed = seed
        self.process_index = process_index
        self.num_processes = num_processes
        self._only_longest = False

    @property
    def clips_per_step(self) -> int:
        return self.batch_size * self.num_accumulated * self.num_processes

    @property
    def longest(self) -> "StepBatches":
        """The same batches, every clip of the longest length: to try out what a step costs."""
        batches = copy.copy(self)
        batches._only_longest = True
        return batches

    def num_long_frames(self, step: int) -> int:
        """The long frames of a step's clips."""
        if self.short_window is None:
            return 0
        if self._only_longest:
            return self.num_frames - self.short_window
        generator = step_generator(self.seed, step, stream=STEP_STREAM)
        return draw_num_long_frames(self.num_frames, self.short_window, generator)

    def clip_length(self, step: int) -> int:
        """The frames of a step's clips."""
        return self.num_frames if self.short_window is None else self.num_long_frames(step) + self.short_window

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


class TrainingBatches(StepBatches):
    """The batches of one process, numbered from 0 over the whole run, of trajectories that can be read in any order.

    A resumed run sees what the uninterrupted one saw, and two processes see together what one would.

    Args:
        dataset (`ClipDataset` or [`VideoClips`]): Where the clips come from.
        objective (`TrainingObjective`): Draws what is noisy.
        latent_shape (`tuple`, *optional*): `(C, H, W)`; the dataset's own by default.
        sizes: As of [`StepBatches`].
    """

    def __init__(
        self,
        dataset: ClipDataset,
        objective: TrainingObjective,
        latent_shape: tuple[int, int, int] | None = None,
        **sizes,
    ) -> None:
        super().__init__(objective, latent_shape or dataset.latent_shape, **sizes)
        self.dataset = dataset
        self.trajectories = usable_trajectories(dataset, self.num_frames, self.interval)

    @property
    def extent(self) -> str:
        """How much of the data is long enough, in words for the log."""
        return (
            f"{len(self.trajectories)} of {len(self.dataset.num_frames)} trajectories are long enough for "
            f"{self.num_frames} frames"
        )

    def load(
        self, first_step: int, last_step: int, num_workers: int = 0
    ) -> Iterator[tuple[ClipBatch | VideoBatch, ObjectiveDraw]]:
        """The batches of the steps from `first_step` to before `last_step`, loaded in `num_workers` processes."""
        numbers = range(first_step * self.num_accumulated, last_step * self.num_accumulated)
        loader = DataLoader(
            self, batch_size=None, sampler=numbers, num_workers=num_workers, worker_init_fn=leave_signals_to_parent
        )
        return iter(loader)

    def __getitem__(self, index: int) -> tuple[ClipBatch | VideoBatch, ObjectiveDraw]:
        """The clips of one pass and what chance decides for them."""
        step, accumulated = divmod(index, self.num_accumulated)
        indices = step_indices(len(self.trajectories), self.clips_per_step, self.seed, step)
        trajectories = self.trajectories[indices[list(self.clip_numbers(accumulated))]].tolist()
        generators = self.generators(step, accumulated, CLIP_STREAM)
        clips = cut_clips(self.dataset, trajectories, generators, self.clip_length(step), self.interval)
        return clips, self.draw(step, generators)


def encode_batches(
    loaded: Iterator[tuple[ClipBatch | VideoBatch, ObjectiveDraw]], vae: torch.nn.Module
) -> Iterator[tuple[ClipBatch, ObjectiveDraw]]:
    """Loaded batches as a training step takes them: videos are encoded here, where the VAE lies."""
    for clips, draw in loaded:
        yield clips.encode(vae) if isinstance(clips, VideoBatch) else clips, draw


def clip_loss(
    model: torch.nn.Module,
    transformer_config,
    clips: ClipBatch,
    draw: ObjectiveDraw,
) -> torch.Tensor:
    """The loss of one pass. `model` is the transformer, or what wraps it for training on several devices."""
    clips = clips.in_order(draw.frame_order)
    noisy_latents = add_noise(clips.latents, draw.noise, draw.timestep)
    conditions = clips.conditions(transformer_config, draw)
    if draw.teacher_forcing:
        conditions["clean_hidden_states"] = clips.latents
    velocity = model(noisy_latents, draw.timestep, **conditions).sample
    return velocity_loss(velocity, clips.latents, draw.noise, draw.timestep)
