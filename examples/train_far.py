"""Train a FAR transformer on cached latents: next-frame prediction with flow matching.

    accelerate launch examples/train_far.py --latents_dir latents --vae vae-maze \
        --transformer_config examples/configs/far_maze.json --num_frames 40 --output_dir far-maze --use_ema

The latents come from `cache_latents.py`. The result in `--output_dir` is a pipeline folder that
`FARPipeline.from_pretrained` loads, beside the run's checkpoints and logs.
"""

import argparse
import json
import logging
import math
import resource
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import AutoModel, FlowMatchEulerDiscreteScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffusers_far import FARPipeline, FARTransformer3DModel
from diffusers_far.data.latents import LatentDataset
from diffusers_far.models.codec import spatial_compression
from diffusers_far.models.presets import PRESETS, preset_config
from diffusers_far.training.checkpoints import find_checkpoint, load_checkpoint, save_checkpoint
from diffusers_far.training.clips import TrainingBatches, clip_loss
from diffusers_far.training.objective import OBJECTIVES, TrainingObjective
from diffusers_far.training.validation import held_out_losses, psnr_per_horizon, rollout, validation_clips


logger = get_logger(__name__)

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "radam": torch.optim.RAdam}

# What a resumed run must share with the run that it continues, for the result to be that of one uninterrupted run.
IDENTITY = (
    "num_frames frame_interval train_batch_size gradient_accumulation_steps learning_rate lr_scheduler lr_warmup_steps "
    "optimizer adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm clean_context_ratio "
    "clean_prefix_ratio teacher_forcing condition_dropout logit_mean logit_std use_ema ema_decay mixed_precision objective seed"
).split()


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents_dir", required=True, help="Folder that cache_latents.py wrote.")
    parser.add_argument("--dataset_split", default="train")
    parser.add_argument("--validation_split", default="validation", help="Measured where it is cached too.")
    parser.add_argument("--vae", required=True, help="Folder or Hub id of the VAE that made the latents.")
    parser.add_argument("--transformer_config", help=f"JSON file, or one of {', '.join(PRESETS)}.")
    parser.add_argument("--pretrained_model_name_or_path", help="Pipeline or transformer to start from instead.")
    parser.add_argument("--output_dir", required=True, help="Must be empty or absent unless a run is resumed.")
    parser.add_argument("--fps", type=float, help="Frames per second of the clips; goes into the pipeline.")
    parser.add_argument("--action_names", nargs="*", help="Names of the actions; go into the pipeline.")

    parser.add_argument("--objective", choices=OBJECTIVES, default="far")
    parser.add_argument("--num_frames", type=int, default=16, help="Longest clip, long frames included.")
    parser.add_argument("--frame_interval", type=int, default=1)
    parser.add_argument("--clean_context_ratio", type=float, default=0.1, help="Share of frames that are clean.")
    parser.add_argument("--clean_prefix_ratio", type=float, default=0.0, help="Share of clips with a clean start.")
    parser.add_argument("--teacher_forcing", action="store_true", help="All frames noisy, all context clean.")
    parser.add_argument("--condition_dropout", type=float, default=0.1)
    parser.add_argument("--logit_mean", type=float, default=0.0, help="Of the noise levels; above 0: more noise.")
    parser.add_argument("--logit_std", type=float, default=1.0)

    parser.add_argument("--max_train_steps", type=int, default=10_000)
    parser.add_argument("--max_train_hours", type=float, help="Stop this launch with a checkpoint after so long.")
    parser.add_argument("--train_batch_size", type=int, default=16, help="Clips per process and pass.")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
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
    parser.add_argument("--use_ema", action="store_true")
    parser.add_argument("--ema_decay", type=float, default=0.9999)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="Compile the blocks with `torch.compile`.")
    parser.add_argument("--dataloader_num_workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry_run", action="store_true", help="Two steps on the longest clips; print their cost.")

    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--checkpoints_total_limit", type=int, default=2)
    parser.add_argument("--resume_from_checkpoint", help="'latest', the name of a checkpoint, or a path.")
    parser.add_argument("--allow_changed_run", action="store_true", help="Resume although data or settings changed.")
    parser.add_argument("--validation_steps", type=int, default=500)
    parser.add_argument("--num_validation_clips", type=int, default=64, help="Clips of the held-out loss.")
    parser.add_argument("--num_validation_videos", type=int, default=8, help="Clips that are continued; 0: none.")
    parser.add_argument("--num_validation_frames", type=int, default=8, help="Frames that are predicted in each.")
    parser.add_argument("--num_validation_inference_steps", type=int, default=20)
    parser.add_argument("--report_to", default="tensorboard", help="tensorboard, trackio, wandb or none.")
    return parser.parse_args(arguments)


def build_transformer(args: argparse.Namespace, latents: LatentDataset) -> FARTransformer3DModel:
    """The model to train, new or pretrained; what the config leaves open is taken from the data."""
    if args.pretrained_model_name_or_path is not None:
        path = Path(args.pretrained_model_name_or_path)
        is_pipeline = not path.is_dir() or (path / "transformer").is_dir()
        return FARTransformer3DModel.from_pretrained(path, subfolder="transformer" if is_pipeline else None)
    if args.transformer_config is None:
        raise ValueError(
            "`--transformer_config` is missing; give a preset or a JSON file, or `--pretrained_model_name_or_path`."
        )
    if args.transformer_config in PRESETS:
        config = preset_config(args.transformer_config, action_shift=1)
    else:
        config = json.loads(Path(args.transformer_config).read_text())
    config = {"in_channels": latents.latent_shape[0]} | config
    if args.objective == "video_dit":
        config |= {"frame_causal": False, "long_patch_size": None}
    return FARTransformer3DModel(**config)


def check_data(latents: LatentDataset, transformer: FARTransformer3DModel) -> None:
    """Refuse data that the model cannot be trained on, before any step."""
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
    if transformer.takes_labels and clip.label is None:
        raise ValueError(
            "The transformer takes classes but the latents have none; leave `num_classes` out of its config."
        )


@contextmanager
def averaged_weights(transformer: FARTransformer3DModel, ema: EMAModel | None):
    """The transformer with its EMA weights, where there are any, and in `eval` mode."""
    if ema is not None:
        ema.store(transformer.parameters())
        ema.copy_to(transformer.parameters())
    transformer.eval()
    yield
    transformer.train()
    if ema is not None:
        ema.restore(transformer.parameters())


def validate(args: argparse.Namespace, pipeline: FARPipeline, latents: LatentDataset) -> dict[str, float]:
    """Held-out loss per noise level, and PSNR of each predicted frame against the VAE's reconstruction."""
    device = pipeline.transformer.device
    clips = validation_clips(latents, args.num_validation_clips, args.num_frames, args.frame_interval)
    losses = held_out_losses(pipeline.transformer, clips.to(device), batch_size=args.train_batch_size)
    metrics = {f"loss_at_{level}": loss for level, loss in losses.items()} | {
        "loss": np.mean([*losses.values()]).item()
    }
    num_context_frames = args.num_frames - args.num_validation_frames
    if args.num_validation_videos and num_context_frames > 0 and pipeline.transformer.config.frame_causal:
        clips = validation_clips(latents, args.num_validation_videos, args.num_frames, args.frame_interval)
        predicted, truth = rollout(
            pipeline,
            clips.to(device),
            num_context_frames=num_context_frames,
            num_inference_steps=args.num_validation_inference_steps,
        )
        psnr = psnr_per_horizon(predicted, truth)
        metrics |= {f"psnr_of_frame_{horizon}": value for horizon, value in enumerate(psnr, start=1)}
        metrics["psnr"] = np.mean(psnr).item()
    return metrics


def dry_run(args: argparse.Namespace, accelerator: Accelerator, model, optimizer, batches: TrainingBatches) -> None:
    """Print what two steps on the longest clips cost."""
    transformer = accelerator.unwrap_model(model)
    num_long_frames = 0 if batches.short_window is None else args.num_frames - batches.short_window
    for step in range(2):
        start_time = time.perf_counter()
        for accumulated in range(args.gradient_accumulation_steps):
            clips, draw = batches.batch(step, accumulated, num_long_frames)
            clips, draw = clips.to(accelerator.device), draw.to(accelerator.device)
            loss = clip_loss(model, transformer.config, clips, draw, teacher_forcing=args.teacher_forcing)
            accelerator.backward(loss / args.gradient_accumulation_steps)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        seconds = time.perf_counter() - start_time
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if accelerator.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    plan = transformer.context_plan(args.num_frames, *batches.dataset.latent_shape[1:])
    accelerator.print(
        f"{plan.num_tokens} tokens per clip of {args.num_frames} frames, {plan.num_long_tokens} of them long\n"
        f"{transformer.num_parameters() / 1e6:.2f} M parameters\n"
        f"{peak:.2f} GiB of memory at the peak, {seconds:.2f} s per step of {batches.clips_per_step} clips"
    )


def is_out_of_time(accelerator: Accelerator, max_hours: float | None, start_time: float) -> bool:
    """Whether this launch has run for `max_hours`; the same answer on all processes."""
    if max_hours is None:
        return False
    if time.perf_counter() - start_time > max_hours * 3600:
        accelerator.set_trigger()
    return accelerator.check_trigger()


def training_facts(args: argparse.Namespace, num_steps: int, objective: TrainingObjective) -> dict[str, str]:
    """What the model card says of this run."""
    return {
        "Data": f"{Path(args.latents_dir).name}, split {args.dataset_split}, encoded by the VAE of this pipeline",
        "Clips": f"up to {args.num_frames} frames, every {args.frame_interval}",
        "Steps": f"{num_steps} of {args.train_batch_size * args.gradient_accumulation_steps} clips per process",
        "Objective": str(objective),
        "Optimizer": f"{args.optimizer}, learning rate {args.learning_rate}, {args.lr_scheduler}",
        "EMA": str(args.ema_decay) if args.use_ema else "none",
        "Seed": str(args.seed),
    }


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    checkpoint = None if args.dry_run else find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
        # The long frames' parameters have no gradient in a step without long frames.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    set_seed(args.seed)

    # 1. Data and models
    latents = LatentDataset(args.latents_dir, args.dataset_split)
    vae = AutoModel.from_pretrained(args.vae).to(accelerator.device).requires_grad_(False).eval()
    latents.require_vae(vae)
    transformer = build_transformer(args, latents)
    check_data(latents, transformer)
    config = transformer.config
    objective = TrainingObjective(
        args.objective,
        args.clean_context_ratio,
        args.clean_prefix_ratio,
        args.teacher_forcing,
        args.condition_dropout,
        args.logit_mean,
        args.logit_std,
    )
    batches = TrainingBatches(
        latents,
        objective,
        num_frames=args.num_frames,
        short_window=None if config.long_patch_size is None else config.short_window,
        interval=args.frame_interval,
        batch_size=args.train_batch_size,
        num_accumulated=args.gradient_accumulation_steps,
        seed=args.seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    # Conditions are dropped by the objective, each clip's by its own generator, so the model must not drop more.
    transformer.register_to_config(condition_dropout=0.0, trained_frames=args.num_frames)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.compile:
        transformer.compile_repeated_blocks(dynamic=True)

    # 2. Optimizer
    optimizer = OPTIMIZERS[args.optimizer](
        transformer.parameters(),
        args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    model, optimizer = accelerator.prepare(transformer, optimizer)
    ema = EMAModel(transformer.parameters(), decay=args.ema_decay, foreach=True) if args.use_ema else None
    # The schedule counts optimizer steps, whatever the number of processes, so Accelerate only saves it.
    accelerator.register_for_checkpointing(lr_scheduler, *([ema] if ema else []))

    # 3. Start or resume
    identity = {name: getattr(args, name) for name in IDENTITY} | {
        "transformer": {name: value for name, value in config.items() if not name.startswith("_")},
        "dataset": latents.source.dataset_fingerprint,
        "vae": latents.source.vae_hash,
        "num_processes": accelerator.num_processes,
    }
    if not args.lr_scheduler.startswith("constant"):
        identity["max_train_steps"] = args.max_train_steps
    first_step = 0
    if checkpoint is not None:
        first_step = load_checkpoint(accelerator, checkpoint, identity, allow_changes=args.allow_changed_run)
    if ema is not None:
        ema.to(accelerator.device)
    if accelerator.is_main_process and not args.dry_run:
        output_dir.mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers("train_far")
    logger.info(
        f"{transformer.num_parameters() / 1e6:.2f} M parameters; {len(batches.trajectories)} of {len(latents)} trajectories are long "
        f"enough for {args.num_frames} frames; from step {first_step}"
    )

    if args.dry_run:
        dry_run(args, accelerator, model, optimizer, batches)
        return

    # 4. The pipeline that is measured and, in the end, saved
    validation_latents = None
    if (Path(args.latents_dir) / args.validation_split).is_dir():
        validation_latents = LatentDataset(args.latents_dir, args.validation_split)
    height, width = (size * spatial_compression(vae) for size in latents.latent_shape[1:])
    pipeline = FARPipeline(
        transformer, vae, FlowMatchEulerDiscreteScheduler(), args.fps, args.action_names, height, width
    )
    pipeline.set_progress_bar_config(disable=True)

    # 5. Train
    transformer.train()
    num_accumulated = args.gradient_accumulation_steps
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(first_step * num_accumulated, args.max_train_steps * num_accumulated),
        num_workers=args.dataloader_num_workers,
    )
    loaded = iter(loader)
    progress = tqdm(total=args.max_train_steps, initial=first_step, disable=not accelerator.is_main_process)
    start_time, training_seconds, num_trained_frames, finished = time.perf_counter(), 0.0, 0, first_step
    for step in range(first_step, args.max_train_steps):
        step_start_time, step_loss = time.perf_counter(), torch.zeros((), device=accelerator.device)
        for accumulated in range(num_accumulated):
            clips, draw = (part.to(accelerator.device) for part in next(loaded))
            is_last = accumulated == num_accumulated - 1
            with nullcontext() if is_last else accelerator.no_sync(model):
                loss = clip_loss(model, config, clips, draw, teacher_forcing=args.teacher_forcing) / num_accumulated
                accelerator.backward(loss)
            step_loss += loss.detach()
        step_loss = accelerator.reduce(step_loss, reduction="mean").item()
        if not math.isfinite(step_loss):
            raise RuntimeError(
                f"The loss is {step_loss} at step {step}. The last checkpoint in {args.output_dir!r} is intact: lower "
                "`--learning_rate` or `--max_grad_norm` and resume from it with `--allow_changed_run`."
            )
        gradient_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        if ema is not None:
            ema.step(transformer.parameters())

        finished = step + 1
        num_trained_frames += batches.clips_per_step * clips.latents.shape[1]
        training_seconds += time.perf_counter() - step_start_time
        frames_per_second = num_trained_frames / training_seconds
        scalars = {
            "train/loss": step_loss,
            "train/gradient_norm": float(gradient_norm),
            "train/learning_rate": lr_scheduler.get_last_lr()[0],
            "train/frames_per_second": frames_per_second,
        }
        accelerator.log(scalars, step=finished)
        progress.set_postfix(loss=f"{step_loss:.4f}", frames_per_second=f"{frames_per_second:.0f}", refresh=False)
        progress.update()
        if finished % args.checkpointing_steps == 0 and finished < args.max_train_steps:
            save_checkpoint(accelerator, output_dir, finished, identity, args.checkpoints_total_limit)
        if validation_latents and accelerator.is_main_process and finished % args.validation_steps == 0:
            with averaged_weights(transformer, ema):
                metrics = validate(args, pipeline, validation_latents)
            accelerator.log({f"validation/{name}": value for name, value in metrics.items()}, step=finished)
            logger.info(f"step {finished}: " + ", ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
        if is_out_of_time(accelerator, args.max_train_hours, start_time):
            logger.info(f"Stopped after step {finished}: --max_train_hours {args.max_train_hours} are over.")
            break
    progress.close()

    # 6. Save
    save_checkpoint(accelerator, output_dir, finished, identity, args.checkpoints_total_limit)
    if accelerator.is_main_process:
        transformer.register_to_config(condition_dropout=args.condition_dropout)
        with averaged_weights(transformer, ema):
            pipeline.save_pretrained(output_dir, training_facts=training_facts(args, finished, objective))
        logger.info(f"Saved the pipeline to {output_dir} after step {finished}")
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
