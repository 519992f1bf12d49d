"""Where the clips of a training come from: cached latents, or a dataset whose clips are encoded when they are drawn."""

from pathlib import Path

import torch

from ..data import loading
from ..data.latents import EncodedDataset, LatentDataset
from .clips import usable_trajectories
from .config import FARSettings
from .streaming import StreamedClips


def open_clips(
    settings: FARSettings, split: str, vae: torch.nn.Module
) -> LatentDataset | EncodedDataset | StreamedClips:
    """The clips of a split, to train on.

    Args:
        settings ([`FARSettings`]): Of the script.
        split (`str`): Such as `"train"`.
        vae (`nn.Module`): Must be the one that made the latents; encodes the dataset, where it lies.

    Raises:
        ValueError: The split is missing or damaged, or the latents are another VAE's.
    """
    combine_actions, config_name = settings.action_combiner(), settings.dataset_config_name
    if settings.latents_dir is not None:
        latents = LatentDataset(settings.latents_dir, split, combine_actions)
        latents.require_vae(vae)
        return latents
    if settings.streaming:
        streamed = loading.stream_split(settings.dataset_name, split, settings.video_column, config_name)
        return StreamedClips(streamed, vae, combine_actions, settings.num_actions)
    trajectories = loading.load_split(settings.dataset_name, split, config_name)
    return EncodedDataset(trajectories, vae, settings.video_column, combine_actions)


def open_validation_clips(settings: FARSettings, vae: torch.nn.Module) -> LatentDataset | EncodedDataset | None:
    """The held-out clips, in any order; `None` without such a split. Of a stream those of its first trajectories, as many
    as are measured.

    Raises:
        ValueError: As [`open_clips`], or all trajectories are shorter than a clip.
    """
    if settings.validation_dataset_name is not None:
        name, split = settings.validation_dataset_name, settings.validation_split
        trajectories = loading.load_split(name, split, settings.dataset_config_name)
        clips = EncodedDataset(trajectories, vae, settings.video_column, settings.action_combiner())
    elif not has_split(settings, settings.validation_split):
        return None
    elif settings.streaming:
        num_trajectories = max(settings.num_validation_clips, settings.num_validation_videos)
        split = loading.stream_split(
            settings.dataset_name, settings.validation_split, settings.video_column, settings.dataset_config_name
        )
        head = split.head(num_trajectories)
        clips = EncodedDataset(head, vae, settings.video_column, settings.action_combiner())
    else:
        clips = open_clips(settings, settings.validation_split, vae)
    try:
        usable_trajectories(clips, settings.num_frames, settings.frame_interval)
    except ValueError as error:
        raise ValueError(f"Of the split {settings.validation_split!r}, which is held out: {error}") from error
    return clips


def has_split(settings: FARSettings, split: str) -> bool:
    """Whether there is such a split."""
    if settings.latents_dir is None:
        return loading.has_split(settings.dataset_name, split, settings.dataset_config_name)
    return (Path(settings.latents_dir) / split).is_dir()
