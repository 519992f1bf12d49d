"""Where the clips of a training come from: cached latents, or a dataset whose clips are encoded when they are drawn."""

import argparse
from pathlib import Path

import torch
from datasets import get_dataset_split_names

from ..data.encoded import EncodedDataset
from ..data.latents import LatentDataset
from ..data.loading import load_split
from .arguments import action_combiner


def open_clips(args: argparse.Namespace, split: str, vae: torch.nn.Module) -> LatentDataset | EncodedDataset:
    """The clips of a split.

    Args:
        args (`argparse.Namespace`): With `add_data_arguments` and `add_objective_arguments`.
        split (`str`): Such as `"train"`.
        vae (`nn.Module`): Must be the one that made the latents; encodes the dataset, where it lies.

    Raises:
        ValueError: The split is missing or damaged, or the latents are another VAE's.
    """
    combine_actions = action_combiner(args)
    if args.latents_dir is None:
        return EncodedDataset(load_split(args.dataset_name, split), vae, combine_actions=combine_actions)
    latents = LatentDataset(args.latents_dir, split, combine_actions)
    latents.require_vae(vae)
    return latents


def has_split(args: argparse.Namespace, split: str) -> bool:
    """Whether there is such a split."""
    if args.latents_dir is None:
        return split in get_dataset_split_names(args.dataset_name)
    return (Path(args.latents_dir) / split).is_dir()
