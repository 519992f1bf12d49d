"""What a training step costs on the machine that it is to run on: `--dry_run` of the training scripts."""

import argparse
import resource
import time

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from transformers import PreTrainedModel

from .clips import StepBatches, encode_batches
from .run import accumulate_gradients


DRY_RUN_STEPS = 2  # the first warms up, the last is timed


def describe_step_cost(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model: torch.nn.Module,
    vae: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: StepBatches,
) -> str:
    """Take two optimizer steps on the longest clips; the first warms up, the second is timed. The model is not the same
    after it.

    Args:
        args: Of a training script.
        accelerator, model, optimizer: Prepared.
        vae: Encodes clips that are no latents.
        batches ([`StepBatches`]): Of the training.

    Returns:
        `str`: Tokens of a clip and what `describe_cost` says, to be read.
    """
    transformer = accelerator.unwrap_model(model)
    loaded = encode_batches(batches.longest.load(0, DRY_RUN_STEPS), vae)
    for _ in range(DRY_RUN_STEPS):
        start_time = time.perf_counter()
        accumulate_gradients(
            accelerator,
            model,
            transformer.config,
            loaded,
            num_accumulated=args.gradient_accumulation_steps,
        )
        optimizer.step()
        optimizer.zero_grad()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        seconds = time.perf_counter() - start_time
    plan = transformer.context_plan(args.num_frames, *batches.latent_shape[1:])
    tokens = f"{plan.num_tokens} tokens per clip of {args.num_frames} frames, {plan.num_long_tokens} of them long"
    if batches.objective.teacher_forcing:
        tokens += f"; {plan.num_tokens + plan.num_short_tokens} with the noisy twins of teacher forcing"
    cost = describe_cost(args, accelerator.device, transformer, seconds, f"{batches.clips_per_step} clips")
    return f"{tokens}\n{cost}"


def describe_cost(
    args: argparse.Namespace, device: torch.device, model: ModelMixin | PreTrainedModel, seconds: float, batch: str
) -> str:
    """What a run costs that takes `seconds` for each step, to be read.

    Args:
        args (`argparse.Namespace`): Of a training script.
        device (`torch.device`): That the steps ran on.
        model: That is trained, not wrapped.
        seconds (`float`): Of a step that was timed.
        batch (`str`): What a step takes, on all processes, such as `"16 clips"`.

    Returns:
        `str`: Parameters; GiB of memory at the peak, seconds of a step; hours of the run.
    """
    return (
        f"{_describe_parameters(model)}\n"
        f"{_peak_memory(device):.2f} GiB of memory at the peak, {seconds:.3f} s per step of {batch}\n"
        f"{seconds * args.max_train_steps / 3600:.2f} hours for --max_train_steps {args.max_train_steps}, if all are like "
        "it; measuring and saving come on top"
    )


def _describe_parameters(model: ModelMixin | PreTrainedModel) -> str:
    total, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    part = "" if trained == total else f", {trained / 1e6:.2f} M of them trained"
    return f"{total / 1e6:.2f} M parameters{part}"


def _peak_memory(device: torch.device) -> float:
    """In GiB: of the device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
