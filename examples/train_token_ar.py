"""Train the token-autoregressive baseline: a decoder of transformers that predicts a video code by code.

    accelerate launch examples/train_token_ar.py --codes_dir codes --vq vq-maze \
        --model_config examples/configs/token_ar_maze.json --num_frames 16 --output_dir token-ar-maze --use_ema

The codes come from `cache_latents.py` with a `VQModel`. The result in `--output_dir` loads with
`TokenARForVideo.from_pretrained`, the VQ autoencoder from its subfolder `vq`, beside the run's checkpoints and logs.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path

from diffusers_far.command_line import HelpWithDefaults, Progress, set_up_logging
from diffusers_far.training.config import (
    add_checkpoint_arguments,
    add_optimization_arguments,
    build_optimizer,
    read_config,
)


# What a resumed run must share with the run that it continues, for the result to be that of one uninterrupted run.
IDENTITY = (
    "num_frames train_batch_size gradient_accumulation_steps learning_rate lr_scheduler lr_warmup_steps optimizer "
    "adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm condition_dropout use_ema ema_decay "
    "mixed_precision seed"
).split()


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    parser.add_argument("--codes_dir", required=True, help="Folder that cache_latents.py wrote with a VQModel.")
    parser.add_argument("--dataset_split", default="train")
    parser.add_argument("--validation_split", default="validation", help="Measured where it is cached too.")
    parser.add_argument("--vq", required=True, help="Folder or Hub id of the VQModel that made the codes.")
    parser.add_argument(
        "--model_config", required=True, help="JSON file: `decoder`, and what else TokenARConfig takes."
    )
    parser.add_argument("--output_dir", required=True, help="Must be empty or absent unless a run is resumed.")
    parser.add_argument("--num_frames", type=int, default=16, help="Frames of a clip.")
    parser.add_argument("--condition_dropout", type=float, default=0.1, help="Share of actions that become null.")
    add_optimization_arguments(parser)
    parser.add_argument("--use_ema", action="store_true")
    parser.add_argument("--ema_decay", type=float, default=0.9999)
    add_checkpoint_arguments(parser)
    parser.add_argument("--validation_steps", type=int, default=500)
    parser.add_argument("--num_validation_clips", type=int, default=64, help="Clips of the held-out loss.")
    parser.add_argument("--num_validation_videos", type=int, default=8, help="Clips that are continued; 0: none.")
    parser.add_argument("--num_validation_frames", type=int, default=8, help="Frames that are generated in each.")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    args = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

import torch
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers import AutoModel, VQModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader

from diffusers_far import TokenARConfig, TokenARForVideo
from diffusers_far.data.latents import LatentDataset
from diffusers_far.models.loading import saved_whole
from diffusers_far.training.checkpoints import checkpoint_states, find_checkpoint, load_checkpoint, save_checkpoint
from diffusers_far.training.clips import TrainingBatches, usable_trajectories
from diffusers_far.training.launch import Launch, launched, leave_signals_to_parent
from diffusers_far.training.objective import TrainingObjective
from diffusers_far.training.run import (
    build_accelerator,
    evaluated,
    hyperparameters,
    require_finite,
    require_finite_metrics,
    run_identity,
    seed_step,
)
from diffusers_far.training.step_cost import DRY_RUN_STEPS, describe_cost
from diffusers_far.training.tokens import check_codes, measure_tokens, token_loss
from diffusers_far.training.validation import describe_metrics


logger = get_logger(__name__)


def model_config(args: argparse.Namespace, vq: VQModel, codes: LatentDataset) -> dict:
    """The arguments of `TokenARConfig`: the file's, and from codebook and data what it leaves open."""
    _, height, width = codes.latent_shape
    config = read_config("model_config", args.model_config)
    if "decoder" not in config:  # transformers' own default is a model of billions of weights
        raise ValueError(f"`--model_config` {args.model_config!r} has no `decoder`, the sizes of the transformer.")
    return {
        "num_codes": vq.config.num_vq_embeddings,
        "tokens_per_frame": height * width,
        "num_actions": codes.num_actions,
        "trained_frames": args.num_frames,
    } | config


@launched
def main(args: argparse.Namespace, launch: Launch) -> None:
    set_up_logging(__name__)
    checkpoint = None if args.dry_run else find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    output_dir = Path(args.output_dir)
    accelerator = build_accelerator(args)
    set_seed(args.seed)

    # 1. Data and models
    vq = AutoModel.from_pretrained(args.vq)
    if not isinstance(vq, VQModel):
        raise ValueError(
            f"`--vq` {args.vq!r} is of the class {type(vq).__name__}; give the VQModel that made the codes."
        )
    vq = vq.to(accelerator.device).requires_grad_(False).eval()
    codes = LatentDataset(args.codes_dir, args.dataset_split)
    validation_codes = None
    if (Path(args.codes_dir) / args.validation_split).is_dir():
        validation_codes = LatentDataset(args.codes_dir, args.validation_split)
    config_arguments = model_config(args, vq, codes)
    token_ar = TokenARForVideo(TokenARConfig(**config_arguments))
    config = token_ar.config
    for split in (codes, validation_codes):
        if split is not None:
            check_codes(split, vq)
            split.check_rows(config.num_actions)
            usable_trajectories(split, args.num_frames)
    if args.gradient_checkpointing:
        token_ar.activation_checkpointing_enable()
    batches = TrainingBatches(
        codes,
        TrainingObjective(condition_dropout=args.condition_dropout),  # of its draws only the dropped actions count
        num_frames=args.num_frames,
        short_window=None,
        interval=1,
        batch_size=args.train_batch_size,
        num_accumulated=args.gradient_accumulation_steps,
        seed=args.seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )

    # 2. Optimizer
    optimizer = build_optimizer(args, token_ar.parameters())
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    model, optimizer = accelerator.prepare(token_ar, optimizer)
    ema = EMAModel(token_ar.parameters(), decay=args.ema_decay, foreach=True) if args.use_ema else None
    # The schedule counts optimizer steps, whatever the number of processes, so Accelerate does not step it.
    checkpoint_states(accelerator, lr_scheduler=lr_scheduler, ema=ema)

    # 3. Start or resume
    identity = run_identity(args, IDENTITY, codes, accelerator.num_processes, model=config_arguments)
    first_step = 0
    if checkpoint is not None:
        first_step = load_checkpoint(accelerator, checkpoint, identity, allow_changes=args.allow_changed_run)
    if ema is not None:
        ema.to(accelerator.device)
    if accelerator.is_main_process and not args.dry_run:
        output_dir.mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers("train_token_ar", hyperparameters(args, accelerator, model=config_arguments))
    logger.info(
        f"{token_ar.num_parameters() / 1e6:.2f} M parameters; {len(batches.trajectories)} of {len(codes)} trajectories "
        f"are long enough for {args.num_frames} frames of {config.tokens_per_frame} codes; from step {first_step}"
    )

    def validate(step: int) -> dict[str, float]:
        if validation_codes is None or not accelerator.is_main_process:
            return {}
        with evaluated(token_ar, ema):
            metrics = measure_tokens(
                token_ar,
                vq,
                validation_codes,
                num_frames=args.num_frames,
                num_clips=args.num_validation_clips,
                num_videos=args.num_validation_videos,
                num_new_frames=args.num_validation_frames,
                batch_size=args.train_batch_size,
            )
        accelerator.log({f"validation/{name}": value for name, value in metrics.items()}, step=step)
        logger.info(f"step {step}, held out:\n{describe_metrics(metrics)}")
        return metrics

    # 4. Train
    token_ar.train()
    num_accumulated = args.gradient_accumulation_steps
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(first_step * num_accumulated, args.max_train_steps * num_accumulated),
        num_workers=args.dataloader_num_workers,
        worker_init_fn=leave_signals_to_parent,
    )
    launch.begin()  # before processes that load data begin, so that they die of no signal
    loaded = iter(loader)
    progress = Progress(
        args.max_train_steps,
        first_step,
        seconds_between_lines=args.logging_seconds,
        max_hours=args.max_train_hours,
        is_silent=not accelerator.is_main_process,
    )
    finished = first_step
    for step in range(first_step, args.max_train_steps):
        seed_step(args.seed, step, accelerator.process_index)
        step_loss = torch.zeros((), device=accelerator.device)
        for accumulated in range(num_accumulated):
            clips, draw = (part.to(accelerator.device) for part in next(loaded))
            is_last = accumulated == num_accumulated - 1
            with nullcontext() if is_last else accelerator.no_sync(model):
                loss = token_loss(model, config, clips, draw) / num_accumulated
                accelerator.backward(loss)
            step_loss += loss.detach()
        step_loss = accelerator.reduce(step_loss, reduction="mean").item()
        gradient_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        require_finite(accelerator, step, output_dir, loss=step_loss, gradient_norm=gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        if ema is not None:
            ema.step(token_ar.parameters())

        finished = step + 1
        scalars = {
            "train/loss": step_loss,
            "train/gradient_norm": float(gradient_norm),
            "train/learning_rate": lr_scheduler.get_last_lr()[0],
        }
        accelerator.log(scalars, step=finished)
        progress.update(loss=step_loss, learning_rate=scalars["train/learning_rate"])
        if args.dry_run:
            if finished < min(DRY_RUN_STEPS, args.max_train_steps):
                continue
            cost = (token_ar, progress.seconds_of_last_step, f"{batches.clips_per_step} clips")
            accelerator.print(
                f"{args.num_frames * config.tokens_per_frame} tokens per clip of {args.num_frames} frames"
            )
            accelerator.print(describe_cost(args, accelerator.device, *cost))
            return
        if launch.must_stop(accelerator, finished):
            break
        if finished % args.checkpointing_steps == 0 and finished < args.max_train_steps:
            save_checkpoint(accelerator, output_dir, finished, identity, args.checkpoints_total_limit)
        if finished % args.validation_steps == 0 and finished < args.max_train_steps:
            validate(finished)
    progress.close()

    # 5. Save
    if finished > first_step:
        save_checkpoint(accelerator, output_dir, finished, identity, args.checkpoints_total_limit)
    if accelerator.is_main_process and not launch.is_interrupted:
        require_finite_metrics(validate(finished), finished, output_dir)
        with evaluated(token_ar, ema), saved_whole(output_dir) as folder:
            token_ar.save_pretrained(folder)
            vq.save_pretrained(folder / "vq")
        logger.info(f"Saved the model to {output_dir} after step {finished}")
    accelerator.end_training()


if __name__ == "__main__":
    main(args)
