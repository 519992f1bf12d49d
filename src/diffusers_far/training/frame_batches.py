"""The batches of single frames that an autoencoder is trained on, read in any order or from a stream."""

import argparse
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader

from ..data.faults import BadExampleError
from ..data.fingerprint import dataset_fingerprint
from ..data.frames import FrameDataset, decode_images
from ..data.loading import load_split, stream_split
from ..data.streaming import StoredTrajectory, StreamedSplit
from ..data.video_clips import VideoClips
from .launch import leave_signals_to_parent
from .order import StepBatchSampler
from .stream_loader import StreamLoader
from .streams import TrajectoryStream


SAMPLED_TRAJECTORIES = 32  # of a stream: as many stand for all where its frames are measured


def open_frames(args: argparse.Namespace, accelerator: Accelerator) -> "FrameBatches | StreamedFrames":
    """The frames that `args` of train_vae.py asks for.

    Raises:
        ValueError: There is no such split, or no column of images.
    """
    order = {
        "batch_size": args.train_batch_size,
        "seed": args.seed,
        "process_index": accelerator.process_index,
        "num_processes": accelerator.num_processes,
    }
    if not args.streaming:
        return FrameBatches(load_split(args.dataset_name, args.dataset_split), args.video_column, **order)
    split = stream_split(args.dataset_name, args.dataset_split, args.video_column)
    frames = StreamedFrames(split, block_size=args.shuffle_buffer_size, **order)
    frames.loader.save_with(accelerator)
    return frames


def open_validation_frames(args: argparse.Namespace) -> FrameDataset:
    """Held-out frames; of a stream those of the first trajectories."""
    if not args.streaming:
        trajectories = load_split(args.dataset_name, args.validation_split)
        frames = FrameDataset(trajectories, args.video_column)
        VideoClips(trajectories, args.video_column).check_frame_sizes()
        return frames
    split = stream_split(args.dataset_name, args.validation_split, args.video_column)
    return FrameDataset(split.head(SAMPLED_TRAJECTORIES), args.video_column)


class FrameBatches:
    """Batches of the frames of a dataset, each frame once an epoch.

    Args:
        trajectories (`datasets.Dataset`): A row per trajectory.
        column (`str`): Of type `List(Image())`.
        order: Of [`StepBatchSampler`], but for the steps.

    Attributes:
        sample ([`FrameDataset`]): Frames to measure.
        fingerprint (`str`): What it is made of.
    """

    def __init__(self, trajectories: Dataset, column: str = "video", **order) -> None:
        self.sample = FrameDataset(trajectories, column)
        VideoClips(trajectories, column).check_frame_sizes()
        self.fingerprint = dataset_fingerprint(trajectories)
        self.order = order

    @property
    def extent(self) -> str:
        return f"{len(self.sample)} frames"

    def load(self, first_step: int, last_step: int, num_workers: int = 0) -> Iterator[torch.Tensor]:
        """A batch (B, 3, height, width), uint8, for each step from `first_step` to before `last_step`."""
        sampler = StepBatchSampler(len(self.sample), first_step=first_step, last_step=last_step, **self.order)
        loader = DataLoader(
            self.sample, batch_sampler=sampler, num_workers=num_workers, worker_init_fn=leave_signals_to_parent
        )
        return iter(loader)


class StreamedFrames:
    """As [`FrameBatches`], of a split that is streamed: the frames of so many trajectories at a time are mixed.

    Args:
        split (`StreamedSplit`): Its rows; lists of images.
        batch_size (`int`): Frames per step on this process.
        block_size (`int`): Trajectories that are held in memory and mixed.
        order: Of [`TrajectoryStream`].

    Raises:
        ValueError: The rows are video files.
    """

    def __init__(self, split: StreamedSplit, *, batch_size: int, block_size: int, **order) -> None:
        self.sample = FrameDataset(split.head(SAMPLED_TRAJECTORIES), split.column)
        self.fingerprint = split.fingerprint
        self.batch_size, self.num_files = batch_size, len(split.files)
        stream = TrajectoryStream(split, draws_per_row=None, min_frames=1, block_size=block_size, **order)
        self.loader = StreamLoader(stream, self._read_step, _decode_named)

    @property
    def extent(self) -> str:
        return f"a stream of {self.num_files} files"

    def load(self, first_step: int, last_step: int, num_workers: int = 0) -> Iterator[torch.Tensor]:
        """As of [`FrameBatches`], from the position that a checkpoint saved."""
        return self.loader.load(first_step, last_step, num_workers)

    def _read_step(self, draws: Iterator[tuple[StoredTrajectory, int]], step: int) -> Iterator[list[tuple]]:
        yield [
            (trajectory.name, trajectory.video[frame])
            for trajectory, frame in (next(draws) for _ in range(self.batch_size))
        ]


def _decode_named(images: list[tuple[str, dict]]) -> torch.Tensor:
    """Images of trajectories that are named where they cannot be read, or are of another size than the first."""
    frames = []
    for name, image in images:
        try:
            frames.append(decode_images([image])[0])
        except (ValueError, OSError) as error:
            raise BadExampleError(f"{name!r} has an image that cannot be read: {error}") from error
        if frames[-1].shape != frames[0].shape:
            raise BadExampleError(
                f"{name!r} has frames of {tuple(frames[-1].shape[1:])}, but those of {images[0][0]!r} are "
                f"{tuple(frames[0].shape[1:])} (height, width); prepare the dataset with prepare_dataset.py and `--size`."
            )
    return torch.stack(frames)
