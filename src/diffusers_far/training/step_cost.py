"""What a training step costs on the machine that it is to run on: `--dry_run` of the training scripts."""

import argparse
import resource
import time

import torch
from accelerate import Accelerator
from diffusers import ModelMixin

from .clips import StepBatches, encode_batches
from .run import accumulate_gradients


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
        `str`: Tokens of a clip, parameters, GiB of memory at the peak and seconds of a step, to be read.
    """
    transformer = accelerator.unwrap_model(model)
    loaded = encode_batches(batches.longest.load(0, 2), vae)
    for _ in range(2):
        start_time = time.perf_counter()
        accumulate_gradients(
            accelerator,
            model,
            transformer.config,
            loaded,
            num_accumulated=args.gradient_accumulation_steps,
            teacher_forcing=args.teacher_forcing,
        )
        optimizer.step()
        optimizer.zero_grad()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        seconds = time.perf_counter() - start_time
    plan = transformer.context_plan(args.num_frames, *batches.latent_shape[1:])
    return (
        f"{plan.num_tokens} tokens per clip of {args.num_frames} frames, {plan.num_long_tokens} of them long\n"
        f"{_describe_parameters(transformer)}\n"
        f"{_peak_memory(accelerator.device):.2f} GiB of memory at the peak, {seconds:.2f} s per step of "
        f"{batches.clips_per_step} clips"
    )


def _describe_parameters(model: ModelMixin) -> str:
    total, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    part = "" if trained == total else f", {trained / 1e6:.2f} M of them trained"
    return f"{total / 1e6:.2f} M parameters{part}"


def _peak_memory(device: torch.device) -> float:
    """In GiB: of the device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
