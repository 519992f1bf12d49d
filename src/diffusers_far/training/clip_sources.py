"""Where the clips of a training come from: cached latents, or a dataset whose clips are encoded when they are drawn."""

import argparse
from pathlib import Path

import torch

from ..data import loading
from ..data.latents import EncodedDataset, LatentDataset
from .clips import usable_trajectories
from .config import action_combiner
from .streaming import StreamedClips


def open_clips(
    args: argparse.Namespace, split: str, vae: torch.nn.Module
) -> LatentDataset | EncodedDataset | StreamedClips:
    """The clips of a split, to train on.

    Args:
        args (`argparse.Namespace`): With `add_data_arguments` and `add_objective_arguments`.
        split (`str`): Such as `"train"`.
        vae (`nn.Module`): Must be the one that made the latents; encodes the dataset, where it lies.

    Raises:
        ValueError: The split is missing or damaged, or the latents are another VAE's.
    """
    combine_actions = action_combiner(args)
    if args.latents_dir is not None:
        latents = LatentDataset(args.latents_dir, split, combine_actions)
        latents.require_vae(vae)
        return latents
    if args.streaming:
        streamed = loading.stream_split(args.dataset_name, split)
        return StreamedClips(streamed, vae, combine_actions, args.num_actions)
    return EncodedDataset(loading.load_split(args.dataset_name, split), vae, combine_actions=combine_actions)


def open_validation_clips(args: argparse.Namespace, vae: torch.nn.Module) -> LatentDataset | EncodedDataset | None:
    """The held-out clips, in any order; `None` without such a split. Of a stream those of its first trajectories, as many
    as are measured.

    Raises:
        ValueError: As [`open_clips`], or all trajectories are shorter than a clip.
    """
    if args.validation_dataset_name is not None:
        trajectories = loading.load_split(args.validation_dataset_name, args.validation_split)
        clips = EncodedDataset(trajectories, vae, combine_actions=action_combiner(args))
    elif not has_split(args, args.validation_split):
        return None
    elif args.streaming:
        num_trajectories = max(args.num_validation_clips, args.num_validation_videos)
        head = loading.stream_split(args.dataset_name, args.validation_split).head(num_trajectories)
        clips = EncodedDataset(head, vae, combine_actions=action_combiner(args))
    else:
        clips = open_clips(args, args.validation_split, vae)
    try:
        usable_trajectories(clips, args.num_frames, args.frame_interval)
    except ValueError as error:
        raise ValueError(f"Of the split {args.validation_split!r}, which is held out: {error}") from error
    return clips


def has_split(args: argparse.Namespace, split: str) -> bool:
    """Whether there is such a split."""
    if args.latents_dir is None:
        return loading.has_split(args.dataset_name, split)
    return (Path(args.latents_dir) / split).is_dir()
