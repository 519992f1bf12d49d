"""The data of a training of a FAR transformer: opened, compared with the model, and made the batches of a run.

B batch, F frames, C latent channels, H/W latent height/width, A action channels.
"""

from pathlib import Path

import torch
from accelerate import Accelerator

from ..data import loading
from ..data.latents import LatentDataset
from ..data.video_clips import EncodedDataset, StreamedClips
from .clips import StepBatches, TrainingBatches, usable_trajectories
from .config import FARSettings, check_context_parallel
from .streaming import StreamedBatches


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
    if settings.validation_dataset_name is None and not _has_split(settings, settings.validation_split):
        return None
    clips = _open_held_out(settings, vae)
    try:
        usable_trajectories(clips, settings.num_frames, settings.frame_interval)
    except ValueError as error:
        raise ValueError(f"Of the split {settings.validation_split!r}, which is held out: {error}") from error
    return clips


def _open_held_out(settings: FARSettings, vae: torch.nn.Module) -> LatentDataset | EncodedDataset:
    split, config_name = settings.validation_split, settings.dataset_config_name

    def encoded(trajectories) -> EncodedDataset:
        return EncodedDataset(trajectories, vae, settings.video_column, settings.action_combiner())

    if settings.validation_dataset_name is not None:
        return encoded(loading.load_split(settings.validation_dataset_name, split, config_name))
    if settings.streaming:
        num_trajectories = max(settings.num_validation_clips, settings.num_validation_videos)
        streamed = loading.stream_split(settings.dataset_name, split, settings.video_column, config_name)
        return encoded(streamed.head(num_trajectories))
    return open_clips(settings, split, vae)


def _has_split(settings: FARSettings, split: str) -> bool:
    if settings.latents_dir is None:
        return loading.has_split(settings.dataset_name, split, settings.dataset_config_name)
    return (Path(settings.latents_dir) / split).is_dir()


def check_data(
    latents: LatentDataset | EncodedDataset | StreamedClips,
    transformer: torch.nn.Module,
    num_fed_actions: int | None,
    validation_latents: LatentDataset | EncodedDataset | None = None,
) -> None:
    """Refuse data that the model cannot be trained on or measured with, before any step. Every row of both splits is looked
    at; of a stream the first one, and the others as they come.

    Args:
        latents (`LatentDataset`, `EncodedDataset` or `StreamedClips`): To train on.
        transformer ([`FARTransformer3DModel`] or [`SCDTransformer3DModel`]): To be trained.
        num_fed_actions (`int`, *optional*): Discrete actions that it will be fed, see `FARSettings.num_fed_actions`.
        validation_latents (`LatentDataset` or `EncodedDataset`, *optional*): Held out.

    Raises:
        ValueError: Channels or the number of actions do not fit, or the latents lack the actions or classes that the
            transformer takes, or have others.
        BadExampleError: A row does not fit, see [`VideoClips.check_rows`]; the message names it.
    """
    if validation_latents is not None:
        try:
            check_data(validation_latents, transformer, None)
        except ValueError as error:
            raise type(error)(f"Of the split that is held out: {error}") from error
    config = transformer.config
    if latents.latent_shape[0] != config.in_channels:
        raise ValueError(
            f"The latents have {latents.latent_shape[0]} channels but the transformer has `in_channels` "
            f"{config.in_channels}; change the transformer's config, or cache latents of another VAE."
        )
    clip = latents.clip(0, 0, 1)
    if transformer.takes_actions and clip.actions is None:
        raise ValueError(
            "The transformer takes actions but the latents have none; leave `num_actions` out of its config."
        )
    dtype = torch.int64 if config.num_actions is not None else torch.float32
    if transformer.takes_actions and clip.actions.dtype != dtype:
        kinds = {torch.int64: "discrete", torch.float32: "continuous"}
        raise ValueError(
            f"The actions of the data are {kinds[clip.actions.dtype]}, but the transformer's are {kinds[dtype]}; give its "
            "config `num_actions` for discrete ones and `action_dim` for continuous ones."
        )
    if config.num_actions is not None and num_fed_actions is not None and num_fed_actions > config.num_actions:
        raise ValueError(
            f"The actions go up to {num_fed_actions - 1} but the transformer has `num_actions` {config.num_actions}; "
            f"give at least {num_fed_actions} in its config."
        )
    if transformer.takes_labels and clip.label is None:
        raise ValueError(
            "The transformer takes classes but the latents have none; leave `num_classes` out of its config."
        )
    latents.check_rows(config.num_actions, config.num_classes)


def training_batches(
    settings: FARSettings,
    latents: LatentDataset | EncodedDataset | StreamedClips,
    transformer_config,
    accelerator: Accelerator,
) -> TrainingBatches | StreamedBatches:
    """This process's batches of the whole run, of the longest clips alone in a dry run; checkpoints of `accelerator` hold
    the place in a stream. `num_train_epochs` becomes a number of steps."""
    group_size, is_long = settings.context_parallel_size, transformer_config.long_patch_size is not None
    if group_size > 1:
        check_context_parallel(settings, accelerator.num_processes, transformer_config)
    objective = settings.training_objective(transformer_config)
    sizes = {
        "num_frames": settings.num_frames,
        "short_window": transformer_config.short_window if is_long else None,
        "interval": settings.frame_interval,
        "batch_size": settings.train_batch_size,
        "num_accumulated": settings.gradient_accumulation_steps,
        "seed": settings.seed,
        # Those that share clips draw the same ones.
        "process_index": accelerator.process_index // group_size,
        "num_processes": accelerator.num_processes // group_size,
    }
    if isinstance(latents, StreamedClips):
        sizes |= {"block_size": settings.shuffle_buffer_size, "clips_per_trajectory": settings.clips_per_trajectory}
        batches = StreamedBatches(latents, objective, **sizes)
        batches.save_with(accelerator)
    else:
        batches = TrainingBatches(latents, objective, **sizes)
        settings.count_epochs(len(batches.trajectories), batches.clips_per_step)
    return batches.longest if settings.dry_run else batches


def describe_tokens(transformer: torch.nn.Module, batches: StepBatches) -> str:
    """How many tokens a clip of the longest length has, to be read."""
    plan = transformer.context_plan(batches.num_frames, *batches.latent_shape[1:])
    tokens = f"{plan.num_tokens} tokens per clip of {batches.num_frames} frames, {plan.num_long_tokens} of them long"
    if transformer.is_separable:
        num_decoded = 2 * batches.objective.decoder_draws * plan.num_short_tokens
        tokens += f"; the decoder sees {num_decoded}, each noisy frame beside its feature"
    elif batches.objective.teacher_forcing:
        tokens += f"; {plan.num_tokens + plan.num_short_tokens} with the noisy twins of teacher forcing"
    return tokens
