"""The batches of each training step: a pure function of the seed and the step, whatever the number of processes.

B batch, F frames, C latent channels, H/W latent height/width, A action channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch

from ..models.conditions import shift_actions
from .objective import ObjectiveDraw, TrainingObjective, add_noise, draw_num_long_frames, velocity_loss
from .order import step_generator, step_indices


STEP_STREAM, CLIP_STREAM = 1, 2  # what is drawn once per step, and what is drawn for each of its clips


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
    """

    latents: torch.Tensor
    actions: torch.Tensor | None
    labels: torch.Tensor | None

    def to(self, device: torch.device | str) -> "ClipBatch":
        values = (getattr(self, field.name) for field in fields(self))
        return ClipBatch(*(None if value is None else value.to(device) for value in values))

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


def cut_clips(
    dataset: ClipDataset,
    trajectories: Sequence[int],
    generators: Sequence[torch.Generator],
    num_frames: int,
    interval: int = 1,
) -> ClipBatch:
    """Cut one clip from each trajectory, its start drawn from its generator."""
    span = (num_frames - 1) * interval + 1
    clips = []
    for trajectory, generator in zip(trajectories, generators):
        num_starts = int(dataset.num_frames[trajectory]) - span + 1
        start = int(torch.randint(num_starts, (), generator=generator))
        clips.append(dataset.clip(trajectory, start, num_frames, interval))
    return ClipBatch(
        latents=torch.stack([clip.latents for clip in clips]),
        actions=None if clips[0].actions is None else torch.stack([clip.actions for clip in clips]),
        labels=None if clips[0].label is None else torch.tensor([clip.label for clip in clips]),
    )


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


class TrainingBatches(torch.utils.data.Dataset):
    """The batches of one process, numbered from 0 over the whole run: a step takes `num_accumulated` of them.

    A step's clips are numbered over all processes and accumulated batches, and each has a generator of its own. So a
    resumed run sees what the uninterrupted one saw, and two processes see together what one would.

    Args:
        dataset (`ClipDataset`): Where the clips come from.
        objective (`TrainingObjective`): Draws what is noisy.
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
        dataset: ClipDataset,
        objective: TrainingObjective,
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
        self.dataset = dataset
        self.objective = objective
        self.num_frames = num_frames
        self.short_window = short_window
        self.interval = interval
        self.batch_size = batch_size
        self.num_accumulated = num_accumulated
        self.seed = seed
        self.process_index = process_index
        self.num_processes = num_processes
        self.trajectories = usable_trajectories(dataset, num_frames, interval)

    @property
    def clips_per_step(self) -> int:
        return self.batch_size * self.num_accumulated * self.num_processes

    def num_long_frames(self, step: int) -> int:
        """The long frames of a step's clips."""
        if self.short_window is None:
            return 0
        generator = step_generator(self.seed, step, stream=STEP_STREAM)
        return draw_num_long_frames(self.num_frames, self.short_window, generator)

    def __getitem__(self, index: int) -> tuple[ClipBatch, ObjectiveDraw]:
        step, accumulated = divmod(index, self.num_accumulated)
        return self.batch(step, accumulated, self.num_long_frames(step))

    def batch(self, step: int, accumulated: int, num_long_frames: int) -> tuple[ClipBatch, ObjectiveDraw]:
        """The clips of one pass and what chance decides for them."""
        num_frames = self.num_frames if self.short_window is None else num_long_frames + self.short_window
        first_clip = (accumulated * self.num_processes + self.process_index) * self.batch_size
        clip_numbers = range(first_clip, first_clip + self.batch_size)
        indices = step_indices(len(self.trajectories), self.clips_per_step, self.seed, step)
        generators = [step_generator(self.seed, step, number, stream=CLIP_STREAM) for number in clip_numbers]
        clips = cut_clips(
            self.dataset,
            self.trajectories[indices[list(clip_numbers)]].tolist(),
            generators,
            num_frames,
            self.interval,
        )
        draws = [
            self.objective.draw(num_frames, num_long_frames, self.dataset.latent_shape, generator)
            for generator in generators
        ]
        return clips, ObjectiveDraw.stack(draws)


def clip_loss(
    model: torch.nn.Module,
    transformer_config,
    clips: ClipBatch,
    draw: ObjectiveDraw,
    *,
    teacher_forcing: bool = False,
) -> torch.Tensor:
    """The loss of one pass. `model` is the transformer, or what wraps it for training on several devices."""
    noisy_latents = add_noise(clips.latents, draw.noise, draw.timestep)
    conditions = clips.conditions(transformer_config, draw)
    if teacher_forcing:
        conditions["clean_hidden_states"] = clips.latents
    velocity = model(noisy_latents, draw.timestep, **conditions).sample
    return velocity_loss(velocity, clips.latents, draw.noise, draw.timestep)
