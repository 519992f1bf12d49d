"""The pieces of a FAR training run that its scripts share; the loop itself stands in each script.

B batch, F frames.
"""

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.logging import get_logger
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration, gather_object, parse_flag_from_env

from ..checks import check_count
from ..data.clips import ClipBatch
from ..data.latents import LatentDataset
from ..data.video_clips import EncodedDataset, StreamedClips
from ..models.loading import name_some
from .checkpoints import way_back
from .clips import TrainingBatches, clip_loss, step_generator
from .config import STREAM_IDENTITY
from .objective import ObjectiveDraw, TrainingObjective
from .streaming import StreamedBatches


logger = get_logger(__name__)

PRECISIONS = ("no", "fp16", "bf16")
# By these a process knows that its launcher was told to cut models in pieces.
SHARDING_VARIABLES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
LEAST_COUNTS = {
    **dict.fromkeys(("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "shuffle_buffer_size"), 1),
    **dict.fromkeys(("num_frames", "frame_interval", "clips_per_trajectory", "num_inference_steps"), 1),
    **dict.fromkeys(("checkpointing_steps", "checkpoints_total_limit", "validation_steps"), 1),
    **dict.fromkeys(("num_validation_clips", "num_validation_frames", "num_validation_inference_steps"), 1),
    **dict.fromkeys(("num_validation_videos", "lr_warmup_steps", "dataloader_num_workers", "seed", "disc_start"), 0),
}
DROPOUT_STREAM = 3  # beside the streams of `clips`: what the network itself draws in a step


def build_accelerator(args: argparse.Namespace) -> Accelerator:
    """Accelerate for `args.output_dir`, `args.mixed_precision` and `args.report_to`; says in the log what was launched.

    `args.mixed_precision` and `args.gradient_accumulation_steps` that are `None` become what the launcher was told.

    On a machine without an accelerator it is told so: processes that torchrun starts there would otherwise not know of
    each other, and each would train and write alone.

    Raises:
        ValueError: A tracker is unknown or not installed, or the launcher was told what the scripts cannot do.
    """
    for variable, name in SHARDING_VARIABLES.items():
        if parse_flag_from_env(variable):
            raise ValueError(
                f"The launch asks for {name} (`{variable}`), but the training scripts need a whole model on every device; "
                "launch with examples/configs/accelerate/multi_gpu.yaml or one_gpu.yaml."
            )
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        cpu=not torch.accelerator.is_available(),
        log_with=tracker_names(args.report_to) or None,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
        # The long frames' parameters have no gradient in a step without long frames.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if accelerator.mixed_precision not in PRECISIONS:
        raise ValueError(
            f"The launcher's `mixed_precision` is {accelerator.mixed_precision!r}; the training scripts know "
            f"{', '.join(PRECISIONS)}. Give one of them with `--mixed_precision`."
        )
    args.mixed_precision = accelerator.mixed_precision
    launched_steps = accelerator.gradient_accumulation_steps
    if not hasattr(args, "gradient_accumulation_steps"):
        if launched_steps > 1:
            raise ValueError(
                f"The launch asks for `gradient_accumulation_steps` {launched_steps}, but this script accumulates none; "
                "leave it out, and give a larger `--train_batch_size`."
            )
    elif args.gradient_accumulation_steps is None:
        args.gradient_accumulation_steps = launched_steps
    check_numbers(args)
    # The scripts divide the loss by it themselves; Accelerate's `backward` would do so once more.
    accelerator.gradient_accumulation_steps = 1
    logger.info(describe_launch(args, accelerator))
    return accelerator


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse counts that are too small, and numbers that are negative or not finite, of any training script.

    Raises:
        ValueError: Names the argument and the rule.
    """
    for name, value in vars(args).items():
        if name in LEAST_COUNTS and value is not None:
            check_count(name, value, least=LEAST_COUNTS[name])
        elif isinstance(value, float) and not (math.isfinite(value) and (value >= 0 or name == "logit_mean")):
            raise ValueError(f"`{name}` is {value}; pass a finite number of at least 0.")


def tracker_names(report_to: str) -> list[str]:
    """The trackers that `--report_to` names: one, several with commas between them, `all` that are installed, or `none`.

    Raises:
        ValueError: One is unknown or not installed: Accelerate would leave it out without a word.
    """
    names = [name.strip().lower() for name in report_to.split(",")]
    if names == ["none"]:
        return []
    available = [str(tracker) for tracker in get_available_trackers()]
    if names == ["all"] and available:
        return available
    for name in names:
        if name not in available:
            is_known = name in LoggerType.list() and name != "all"
            cure = f"`pip install {name}`, or choose" if is_known else "choose"
            raise ValueError(
                f"`--report_to` {report_to!r} asks for {name!r}, which is {'not installed' if is_known else 'no tracker'}; "
                f"{cure} from {', '.join([*available, 'none'])}."
            )
    return names


def describe_launch(args: argparse.Namespace, accelerator: Accelerator) -> str:
    """One line: how many processes, on which device, at which precision, and the global batch."""
    num_processes, num_accumulated = accelerator.num_processes, getattr(args, "gradient_accumulation_steps", 1)
    device = accelerator.device.type
    if device == "cuda":
        device += f" ({torch.cuda.get_device_name(accelerator.device)})"
    return (
        f"{num_processes} process{'es' if num_processes > 1 else ''} on {device}, mixed precision {args.mixed_precision}, "
        f"global batch {num_processes * args.train_batch_size * num_accumulated} = {num_processes} x "
        f"{args.train_batch_size} x {num_accumulated} (processes, batch of each, accumulated)"
    )


def hyperparameters(args: argparse.Namespace, accelerator: Accelerator, **parts: Mapping[str, Any]) -> dict[str, Any]:
    """What a tracker is to know of a run: names and plain values.

    Args:
        args (`argparse.Namespace`): Of the script, after `build_accelerator`.
        accelerator (`Accelerator`): Of the run.
        parts: What else, such as the model's config; its names get the part's name in front: `transformer.num_layers`.
    """
    values = vars(args) | {"num_processes": accelerator.num_processes, "device": accelerator.device.type}
    values |= {f"{part}.{name}": value for part, config in parts.items() for name, value in config.items()}
    return {
        name: value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value, default=str)
        for name, value in values.items()
    }


def leave_out_planned_attention(transformer_config) -> None:
    """Let no attention of a long model run on cuDNN, which makes a plan for each new shape: the clips of such a model differ in
    length from step to step, and on an H200 its steps then took many times as long. A model without long frames sees one
    shape, and keeps it."""
    if transformer_config.long_patch_size is not None:
        torch.backends.cuda.enable_cudnn_sdp(False)


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
        transformer ([`FARTransformer3DModel`]): To be trained.
        num_fed_actions (`int`, *optional*): Discrete actions that it will be fed, see `arguments.num_fed_actions`.
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
    args: argparse.Namespace,
    latents: LatentDataset | EncodedDataset | StreamedClips,
    objective: TrainingObjective,
    transformer_config,
    accelerator: Accelerator,
) -> TrainingBatches | StreamedBatches:
    """This process's batches of the whole run; checkpoints of `accelerator` hold the place in a stream."""
    is_long = transformer_config.long_patch_size is not None
    sizes = {
        "num_frames": args.num_frames,
        "short_window": transformer_config.short_window if is_long else None,
        "interval": args.frame_interval,
        "batch_size": args.train_batch_size,
        "num_accumulated": args.gradient_accumulation_steps,
        "seed": args.seed,
        "process_index": accelerator.process_index,
        "num_processes": accelerator.num_processes,
    }
    if isinstance(latents, StreamedClips):
        batches = StreamedBatches(
            latents,
            objective,
            block_size=args.shuffle_buffer_size,
            clips_per_trajectory=args.clips_per_trajectory,
            **sizes,
        )
        batches.save_with(accelerator)
        return batches
    return TrainingBatches(latents, objective, **sizes)


def run_identity(
    args: argparse.Namespace,
    names: Sequence[str],
    latents: LatentDataset | EncodedDataset | StreamedClips,
    num_processes: int,
    **facts: Any,
) -> dict[str, Any]:
    """What a resumed run must share with the run that it continues, for `save_checkpoint` and `load_checkpoint`.

    Args:
        args (`argparse.Namespace`): Of the script.
        names (sequence of `str`): The arguments that matter, such as `RUN_IDENTITY`.
        latents (`LatentDataset`, `EncodedDataset` or `StreamedClips`): What is trained on.
        num_processes (`int`): Of the run.
        facts: What else must be the same; JSON values.
    """
    stream_names = STREAM_IDENTITY if isinstance(latents, StreamedClips) else ()
    identity = {name: getattr(args, name) for name in (*names, *stream_names)} | {
        "dataset": latents.dataset_fingerprint,
        "vae": latents.vae_hash,
        "num_processes": num_processes,
    }
    if not args.lr_scheduler.startswith("constant"):
        identity["max_train_steps"] = args.max_train_steps
    return identity | facts


def seed_step(seed: int, step: int, process_index: int = 0) -> None:
    """Make what the network itself draws in a step, such as dropout, a function of the seed and the step: measuring,
    resuming or worker processes cannot change it."""
    torch.manual_seed(step_generator(seed, step, process_index, stream=DROPOUT_STREAM).initial_seed())


@dataclass(frozen=True)
class StepOutcome:
    """What came of one step's forward and backward passes.

    Args:
        loss (`float`): Mean over the batches of all processes.
        num_frames (`int`): Frames of the clips of all processes.
        faulty_clips (`tuple[str]`): Where the loss is not finite: the trajectories, of all processes, whose latents or
            actions are not.
    """

    loss: float
    num_frames: int
    faulty_clips: tuple[str, ...] = ()


def accumulate_gradients(
    accelerator: Accelerator,
    model: torch.nn.Module,
    transformer_config,
    loaded: Iterator[tuple[ClipBatch, ObjectiveDraw]],
    *,
    num_accumulated: int,
) -> StepOutcome:
    """Forward and backward of one step; the mean gradient is left in the parameters, the same on all processes.

    Args:
        accelerator (`Accelerator`): Holds `model`.
        model (`torch.nn.Module`): The transformer as `accelerator.prepare` returned it.
        transformer_config: Of the transformer.
        loaded (iterator): Gives the step's `num_accumulated` batches next.
        num_accumulated (`int`): Batches of the step on this process.
    """
    step_loss, num_frames, batches = torch.zeros((), device=accelerator.device), 0, []
    for accumulated in range(num_accumulated):
        clips, draw = (part.to(accelerator.device) for part in next(loaded))
        batches.append(clips)
        is_last = accumulated == num_accumulated - 1
        with nullcontext() if is_last else accelerator.no_sync(model):
            loss = clip_loss(model, transformer_config, clips, draw) / num_accumulated
            accelerator.backward(loss)
        step_loss += loss.detach()
        num_frames += clips.latents.shape[0] * clips.latents.shape[1]
    step_loss = accelerator.reduce(step_loss, reduction="mean").item()
    faulty_clips = []
    if not math.isfinite(step_loss):
        faulty_clips = gather_object([name for clips in batches for name in clips.not_finite()])
    return StepOutcome(step_loss, num_frames * accelerator.num_processes, tuple(faulty_clips))


def require_finite(
    accelerator: Accelerator,
    step: int,
    output_dir: str | Path,
    *,
    loss: float,
    gradient_norm: torch.Tensor | float,
    faulty_clips: Sequence[str] = (),
) -> None:
    """Stop a run whose loss or gradient is NaN or infinite, before the optimizer changes the weights.

    With a loss scale (`--mixed_precision fp16`) a gradient that overflowed is no fault: the optimizer skips the step and the
    scale falls. It is one where the scale has fallen to 1 already.

    Args:
        accelerator (`Accelerator`): Of the run.
        step (`int`): From 0.
        output_dir (`str` or `Path`): The run's folder; the error names the newest intact checkpoint with other weights.
        loss (`float`): Of the step.
        gradient_norm (`torch.Tensor` or `float`): Of all gradients, before they are clipped.
        faulty_clips (sequence of `str`): See [`StepOutcome`].

    Raises:
        RuntimeError: With the cure.
    """
    scaler = accelerator.scaler
    is_overflow = scaler is not None and scaler.get_scale() > 1
    if math.isfinite(loss) and (is_overflow or math.isfinite(float(gradient_norm))):
        return
    what = "The norm of the gradient is" if math.isfinite(loss) else "The loss is"
    value = float(gradient_norm) if math.isfinite(loss) else loss
    if faulty_clips:
        reason, suspect = (
            f"The data are not finite: NaN or infinite values in {name_some(faulty_clips)}. Mend or remove them,",
            None,
        )
    else:
        # The checkpoint of this very step has the weights that fail.
        reason, suspect = "Lower `--learning_rate` or `--max_grad_norm`,", Path(output_dir) / f"checkpoint-{step}"
    raise RuntimeError(
        f"{what} {value} at step {step}; the weights were not changed by it. {reason} and go on with `--allow_changed_run`. "
        f"{way_back(output_dir, but_for=suspect)}"
    )


def require_finite_metrics(metrics: Mapping[str, float], step: int, output_dir: str | Path) -> None:
    """Fail a run whose model predicts no numbers, instead of saving it as a result.

    Raises:
        RuntimeError: Names the metrics, and the newest intact checkpoint before this step.
    """
    not_finite = [f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if not_finite:
        raise RuntimeError(
            f"The validation after step {step} gave {', '.join(not_finite)}: what the model computes on held-out data is not "
            f"finite, so no result is saved. Lower `--learning_rate`, and go on with `--allow_changed_run`. "
            f"{way_back(output_dir, but_for=Path(output_dir) / f'checkpoint-{step}')}"
        )


@contextmanager
def evaluated(transformer: torch.nn.Module, ema=None):
    """The transformer in `eval` mode, and with its averaged weights where there are any; afterwards as it trains.

    Args:
        transformer (`torch.nn.Module`): In `train` mode.
        ema (`diffusers.training_utils.EMAModel`, *optional*): Of its parameters.
    """
    if ema is not None:
        ema.store(transformer.parameters())
        ema.copy_to(transformer.parameters())
    transformer.eval()
    try:
        yield
    finally:
        transformer.train()
        if ema is not None:
            ema.restore(transformer.parameters())


def training_facts(
    args: argparse.Namespace, data: str, num_steps: int, objective: TrainingObjective
) -> dict[str, str]:
    """What a card says of a run; a folder of data by its name, not where it lies."""
    return {
        "Data": f"{Path(data).name}, split {args.dataset_split}, encoded by the VAE of the pipeline",
        "Clips": f"up to {args.num_frames} frames, every {args.frame_interval}",
        "Steps": f"{num_steps} of {args.train_batch_size * args.gradient_accumulation_steps} clips per process",
        "Objective": str(objective),
        "Optimizer": f"{args.optimizer}, learning rate {args.learning_rate}, {args.lr_scheduler}",
        "Seed": str(args.seed),
    }
