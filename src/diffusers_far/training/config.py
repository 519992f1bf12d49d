"""The arguments that the FAR training scripts share, in groups, and what is built from them.

A script whose defaults differ says so with `parser.set_defaults`.
"""

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.rows import COMBINATION_RULES, ActionCombiner


if TYPE_CHECKING:  # a script reads its arguments before it imports what takes seconds
    import torch

    from .objective import TrainingObjective


OPTIMIZERS = {"adamw": "AdamW", "adam": "Adam", "radam": "RAdam"}  # and their classes in `torch.optim`

# What a resumed run must share with the run that it continues, for the result to be that of one uninterrupted run.
RUN_IDENTITY = (
    "num_frames frame_interval combine_actions num_actions train_batch_size gradient_accumulation_steps "
    "learning_rate lr_scheduler lr_warmup_steps optimizer adam_beta1 adam_beta2 adam_weight_decay adam_epsilon "
    "max_grad_norm objective clean_context_ratio clean_prefix_ratio teacher_forcing condition_dropout logit_mean "
    "logit_std repeat_ratio mixed_precision seed"
).split()


# What else, if the data are streamed.
STREAM_IDENTITY = ("streaming", "shuffle_buffer_size", "clips_per_trajectory")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the clips come from, see [`~training.clips.open_clips`], and where the result goes."""
    parser.add_argument("--latents_dir", help="Folder that cache_latents.py wrote.")
    parser.add_argument("--dataset_name", help="Instead: a dataset's folder or Hub id, encoded again at every step.")
    add_streaming_arguments(parser)
    parser.add_argument(
        "--clips_per_trajectory", type=int, default=1, help="Of a stream: clips of a trajectory each time it is read."
    )
    parser.add_argument("--dataset_split", default="train")
    parser.add_argument("--validation_split", default="validation", help="Measured where there is one.")
    parser.add_argument("--output_dir", required=True, help="Must be empty or absent unless a run is resumed.")


def add_streaming_arguments(parser: argparse.ArgumentParser) -> None:
    """Whether a dataset is streamed, and how much of it is mixed at a time."""
    parser.add_argument("--streaming", action="store_true", help="Read the dataset as it is needed; copy nothing.")
    parser.add_argument(
        "--shuffle_buffer_size", type=int, default=128, help="Of a stream: trajectories in memory, mixed."
    )


def require_one_source(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with the rule unless `add_data_arguments` was given exactly one source of clips that can be read as asked."""
    if (args.latents_dir is None) == (args.dataset_name is None):
        parser.error("give `--latents_dir` or `--dataset_name`, one of the two.")
    if args.streaming and args.latents_dir is not None:
        parser.error("`--streaming` is for `--dataset_name`: cached latents are read from where they lie as it is.")


def add_objective_arguments(parser: argparse.ArgumentParser) -> None:
    """The clips and the objective, see [`TrainingObjective`]."""
    parser.add_argument("--objective", choices=("far", "video_dit"), default="far")
    parser.add_argument("--num_frames", type=int, default=16, help="Longest clip, long frames included.")
    parser.add_argument("--frame_interval", type=int, default=1)
    parser.add_argument(
        "--combine_actions", choices=COMBINATION_RULES, help="What becomes of the actions of skipped frames."
    )
    parser.add_argument("--num_actions", type=int, help="Discrete actions in the data: to stream, or combine jointly.")
    parser.add_argument("--clean_context_ratio", type=float, default=0.1, help="Share of frames that are clean.")
    parser.add_argument("--clean_prefix_ratio", type=float, default=0.0, help="Share of clips with a clean start.")
    parser.add_argument("--teacher_forcing", action="store_true", help="All frames noisy, all context clean.")
    parser.add_argument("--condition_dropout", type=float, default=0.1)
    parser.add_argument("--logit_mean", type=float, default=0.0, help="Of the noise levels; above 0: more noise.")
    parser.add_argument("--logit_std", type=float, default=1.0)
    parser.add_argument(
        "--repeat_ratio", type=float, default=0.0, help="Share of clips that repeat a stretch of theirs."
    )


def add_optimization_arguments(parser: argparse.ArgumentParser) -> None:
    """Length of the run, batches, optimizer and schedule."""
    parser.add_argument("--max_train_steps", type=int, default=10_000)
    parser.add_argument("--max_train_hours", type=float, help="Stop this launch with a checkpoint after so long.")
    parser.add_argument("--dry_run", action="store_true", help="Two steps; print what the run will cost.")
    parser.add_argument("--train_batch_size", type=int, default=16, help="Clips per process and pass.")
    parser.add_argument(
        "--gradient_accumulation_steps", type=int, help="Passes of a step; if left out, the launcher's, else 1."
    )
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument(
        "--lr_scheduler", default="constant_with_warmup", help="Name known to `diffusers.optimization`."
    )
    parser.add_argument("--lr_warmup_steps", type=int, default=500)
    parser.add_argument("--adam_beta1", type=float, default=0.9)
    parser.add_argument("--adam_beta2", type=float, default=0.999)
    parser.add_argument("--adam_weight_decay", type=float, default=0.0)
    parser.add_argument("--adam_epsilon", type=float, default=1e-8)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    add_precision_argument(parser)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--dataloader_num_workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)


def add_precision_argument(parser: argparse.ArgumentParser) -> None:
    """Of the passes; the weights stay float32."""
    parser.add_argument(
        "--mixed_precision", choices=("no", "fp16", "bf16"), help="If left out, what the launcher was told, else no."
    )


def add_log_arguments(parser: argparse.ArgumentParser) -> None:
    """Where figures go while the run lasts, see [`~training.run.tracker_names`] and [`~command_line.Progress`]."""
    parser.add_argument(
        "--report_to",
        default="tensorboard",
        help="Trackers: tensorboard, trackio, wandb ..., several with commas between them, all that are installed, or none.",
    )
    parser.add_argument(
        "--logging_seconds", type=float, default=30.0, help="Between lines of the log, where stderr is no terminal."
    )


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Checkpoints, resuming and logs."""
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--checkpoints_total_limit", type=int, default=2)
    parser.add_argument("--resume_from_checkpoint", help="'latest', the name of a checkpoint, or a path.")
    parser.add_argument("--allow_changed_run", action="store_true", help="Resume although data or settings changed.")
    add_log_arguments(parser)


def add_validation_arguments(parser: argparse.ArgumentParser) -> None:
    """What [`~training.validation.measure`] measures, and how often."""
    parser.add_argument("--validation_steps", type=int, default=500)
    parser.add_argument("--num_validation_clips", type=int, default=64, help="Clips of the held-out loss.")
    parser.add_argument("--num_validation_videos", type=int, default=8, help="Clips that are continued; 0: none.")
    parser.add_argument("--num_validation_frames", type=int, default=8, help="Frames that are predicted in each.")
    parser.add_argument(
        "--num_validation_inference_steps", type=int, help="Steps of each; if left out, as many as the pipeline takes."
    )
    parser.add_argument(
        "--validation_dataset_name",
        help="With --latents_dir: the dataset that the latents are of. Its held-out frames are encoded anew, and then what "
        "the VAE loses is measured too.",
    )


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    """Whether and where the result is uploaded; the token is the one of `hf auth login` or `HF_TOKEN`."""
    parser.add_argument("--push_to_hub", action="store_true", help="Upload the result, without checkpoints and logs.")
    parser.add_argument(
        "--hub_model_id", help="Repo to upload to; the name of --output_dir in your namespace if left out."
    )

    parser.add_argument(
        "--license", type=license_id, help="Of the result, as the Hub calls it: apache-2.0. For the card."
    )
    parser.add_argument(
        "--dataset_ids",
        type=hub_id,
        nargs="+",
        help="Ids on the Hub of what is trained on, for the card; folders have none.",
    )
    parser.add_argument(
        "--base_model_id",
        type=hub_id,
        help="Id on the Hub of what training starts from, for the card, if that is a folder.",
    )


def read_config(name: str, path: str) -> dict[str, Any]:
    """The JSON object in the file that the argument `name` gives.

    Raises:
        ValueError: There is none.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"`--{name}` {path!r} cannot be read as JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"`--{name}` {path!r} holds no JSON object; give a model's arguments by name.")
    return config


def license_id(text: str) -> str:
    """An argument type: a licence as the Hub writes it."""
    if not re.fullmatch(r"[a-z0-9.\-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no identifier of the Hub, such as apache-2.0")
    return text


def hub_id(text: str) -> str:
    """An argument type: a repo on the Hub."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no id of a repo on the Hub, such as org/mazes") from error
    return text


def action_combiner(args: argparse.Namespace) -> ActionCombiner | None:
    """What makes one action of those of skipped frames; `None` where `--combine_actions` was left out."""
    if args.combine_actions is None:
        return None
    # A stream needs the number of actions in any case; the combiner needs it only to join them.
    is_for_stream = args.streaming and args.combine_actions != "joint"
    return ActionCombiner(args.combine_actions, None if is_for_stream else args.num_actions)


def num_fed_actions(args: argparse.Namespace, num_actions: int | None) -> int | None:
    """Discrete actions that the model is fed: the `num_actions` of the data, or their sequences where they are joined."""
    return args.num_actions**args.frame_interval if args.combine_actions == "joint" else num_actions


def training_objective(args: argparse.Namespace) -> "TrainingObjective":
    """The objective that `add_objective_arguments` asked for.

    Raises:
        ValueError: A share is not between 0 and 1, or the arguments contradict each other.
    """
    from .objective import TrainingObjective

    return TrainingObjective(
        args.objective,
        args.clean_context_ratio,
        args.clean_prefix_ratio,
        args.teacher_forcing,
        args.condition_dropout,
        args.logit_mean,
        args.logit_std,
        args.repeat_ratio,
    )


def build_optimizer(args: argparse.Namespace, parameters: Iterable["torch.nn.Parameter"]) -> "torch.optim.Optimizer":
    """The optimizer that `add_optimization_arguments` asked for, over `parameters`."""
    import torch

    return getattr(torch.optim, OPTIMIZERS[args.optimizer])(
        parameters,
        args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
