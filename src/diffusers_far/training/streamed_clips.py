"""Clips of a streamed split, and the batches of a training on them.

B batch, F frames, C latent channels, H/W latent height/width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..data.encoded import EncodedDataset
from ..data.faults import BadExampleError
from ..data.latents import LatentClip
from ..data.streaming import StoredClip, StoredTrajectory, StreamedSplit
from .clips import CLIP_STREAM, START_STREAM, StepBatches, VideoBatch, draw_start, stack_clips
from .objective import ObjectiveDraw, TrainingObjective
from .stream_loader import StreamLoader
from .streams import TrajectoryStream


class StreamedClips:
    """As [`EncodedDataset`], of a split that is streamed: what a training must know before it reads it.

    Args:
        split (`StreamedSplit`): Its rows.
        vae (`nn.Module`): Encodes, where it lies.
        combine_actions (callable, *optional*): As for [`LatentDataset`].
        num_actions (`int`, *optional*): Number of discrete actions, which a stream cannot be asked for.

    Attributes:
        latent_shape (`tuple`): `(C, H, W)`.
        dataset_fingerprint (`str`), vae_hash (`str`): What it is made of.

    Raises:
        ValueError: The actions are discrete and `num_actions` is missing, or the VAE cannot encode the frames.
    """

    def __init__(
        self,
        split: StreamedSplit,
        vae: torch.nn.Module,
        combine_actions: Callable[[np.ndarray], np.ndarray] | None = None,
        num_actions: int | None = None,
    ) -> None:
        if split.has_discrete_actions and num_actions is None:
            raise ValueError(
                "`--num_actions` is missing: the actions are discrete, and a stream is not read to its end to count them; "
                "say how many there are."
            )
        self.split = split
        self.combine_actions = combine_actions
        self.num_actions = num_actions if split.has_discrete_actions else None
        self._first = EncodedDataset(split.head(1), vae, split.column, combine_actions)
        self.latent_shape, self.vae_hash = self._first.latent_shape, self._first.vae_hash
        self.dataset_fingerprint = split.fingerprint
        self.frame_size = tuple(self._first.videos.clip(0, 0, 1).frames.shape[2:])
        self.num_classes = None

    def __getstate__(self) -> dict:
        # The processes that load need no VAE.
        return {name: value for name, value in self.__dict__.items() if name != "_first"}

    def clip(self, trajectory: int, start: int, length: int, interval: int = 1) -> LatentClip:
        """A clip of the first trajectory, number 0: the others can only be had in the order of the stream."""
        return self._first.clip(trajectory, start, length, interval)

    def check_rows(self, num_actions: int | None = None, num_classes: int | None = None) -> None:
        """Look at the first row now, and at each of the others when it is read; see [`VideoClips.check_rows`]."""
        self._first.check_rows(num_actions, num_classes)
        self.num_classes = num_classes

    def cut(self, trajectory: StoredTrajectory, start: int, length: int, interval: int = 1) -> StoredClip:
        """A clip of a trajectory of the stream, not yet decoded.

        Raises:
            BadExampleError: Its actions do not fit its frames, or one of them or its label is not below what there is.
        """
        if self.num_classes is not None and not (
            trajectory.label is not None and 0 <= trajectory.label < self.num_classes
        ):
            raise BadExampleError(
                f"{trajectory.name!r} has the label {trajectory.label}, but there are {self.num_classes} classes, 0 to "
                f"{self.num_classes - 1}; give the model a larger `num_classes`."
            )
        clip = trajectory.cut(start, length, interval, self.combine_actions, self.frame_size)
        highest = max(trajectory.actions, default=0) if self.num_actions is not None else 0
        if self.num_actions is not None and highest >= self.num_actions:
            raise BadExampleError(
                f"{trajectory.name!r} has the action {highest}, but `--num_actions` is {self.num_actions}; it must be "
                "above every action."
            )
        return clip


@dataclass(frozen=True)
class StoredBatch:
    """The clips of one batch, not yet decoded, and which batch it is: of which step, and which of those that the step
    accumulates."""

    step: int
    accumulated: int
    clips: list[StoredClip]
    names: list[str]  # of their trajectories


class StreamedBatches(StepBatches):
    """The batches of one process, of a stream.

    Args:
        clips (`StreamedClips`): Where the clips come from.
        objective (`TrainingObjective`): Draws what is noisy.
        block_size (`int`): Trajectories that are held in memory and mixed.
        clips_per_trajectory (`int`): Clips that are cut of a trajectory each time it is read.
        sizes: As of [`StepBatches`].

    Attributes:
        loader (`StreamLoader`): Reads, decodes and remembers the position.
    """

    def __init__(
        self,
        clips: StreamedClips,
        objective: TrainingObjective,
        *,
        block_size: int,
        clips_per_trajectory: int = 1,
        **sizes,
    ) -> None:
        super().__init__(objective, clips.latent_shape, **sizes)
        if clips_per_trajectory < 1:
            raise ValueError(f"`clips_per_trajectory` is {clips_per_trajectory}; it must be at least 1.")
        self.clips = clips
        self.stream = TrajectoryStream(
            clips.split,
            draws_per_row=clips_per_trajectory,
            min_frames=(self.num_frames - 1) * self.interval + 1,
            block_size=block_size,
            seed=self.seed,
            process_index=self.process_index,
            num_processes=self.num_processes,
        )
        # As much as a block, so that the next one is read while this one is served.
        block = block_size * clips_per_trajectory // self.batch_size
        self._num_read_ahead = 2 if clips.split.points_to_files else max(2, block)
        self.loader = self._build_loader()

    def _build_loader(self) -> StreamLoader:
        return StreamLoader(self.stream, self._read_step, self._decode, self._num_read_ahead)

    @property
    def longest(self) -> "StreamedBatches":
        batches = super().longest
        batches.loader = batches._build_loader()
        return batches

    @property
    def extent(self) -> str:
        return f"a stream of {len(self.clips.split.files)} files"

    def load(
        self, first_step: int, last_step: int, num_workers: int = 0
    ) -> Iterator[tuple[VideoBatch, ObjectiveDraw]]:
        """The batches of the steps from `first_step` to before `last_step`, see [`StreamLoader`]."""
        return self.loader.load(first_step, last_step, num_workers)

    def _read_step(self, draws: Iterator[tuple[StoredTrajectory, int]], step: int) -> Iterator[StoredBatch]:
        length = self.clip_length(step)
        for accumulated in range(self.num_accumulated):
            clips, names = [], []
            for generator in self.generators(step, accumulated, START_STREAM):
                trajectory, _ = next(draws)
                names.append(trajectory.name)
                start = draw_start(trajectory.num_frames, length, self.interval, generator)
                clips.append(self.clips.cut(trajectory, start, length, self.interval))
            yield StoredBatch(step, accumulated, clips, names)

    def _decode(self, stored: StoredBatch) -> tuple[VideoBatch, ObjectiveDraw]:
        clips = stack_clips([clip.decode() for clip in stored.clips], stored.names)
        return clips, self.draw(stored.step, self.generators(stored.step, stored.accumulated, CLIP_STREAM))
