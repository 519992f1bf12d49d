"""Train an image autoencoder (`AutoencoderDC`, `AutoencoderKL` or `VQModel`) on the frames of a video dataset.

    accelerate launch examples/train_vae.py --dataset_name mazes --vae_config examples/configs/vae_maze.json \
        --output_dir vae-maze --max_train_steps 5000

The dataset has a row per trajectory with a column `video` of type `List(Image())`; with `--streaming` it is read as it is
needed. The result in `--output_dir` loads with `from_pretrained`; its config carries the scaling factor that brings its
latents to unit variance.
"""

import argparse
import math
import time
from pathlib import Path

from diffusers_far.command_line import HelpWithDefaults, Progress, set_up_logging
from diffusers_far.training.config import (
    add_log_arguments,
    add_precision_argument,
    add_streaming_arguments,
    read_config,
)


RESTART_STREAM = 1  # beside the stream of the latents' noise
MIN_SHOWN_HEIGHT = 192  # pixels of an image on a sheet
VAE_CLASSES = ("AutoencoderDC", "AutoencoderKL", "VQModel")

# What a resumed run must share with the run that it continues, for the result to be that of one uninterrupted run.
IDENTITY = (
    "vae_config train_batch_size max_train_steps learning_rate lr_scheduler lr_warmup_steps adam_beta2 weight_decay "
    "max_grad_norm ema_decay mse_weight lpips_weight kl_weight disc_start disc_weight latent_noise mixed_precision seed"
).split()
VQ_IDENTITY = ("commitment_weight", "idle_steps_to_restart")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    parser.add_argument("--dataset_name", required=True, help="Folder or Hub id that `load_dataset` opens.")
    parser.add_argument("--dataset_split", default="train")
    parser.add_argument("--validation_split", default="validation")
    parser.add_argument("--video_column", default="video")
    add_streaming_arguments(parser)
    parser.add_argument("--vae_config", required=True, help="JSON file: `_class_name` and the model's arguments.")
    parser.add_argument("--output_dir", required=True, help="Must be empty or absent unless a run is resumed.")

    parser.add_argument("--max_train_steps", type=int, default=10_000)
    parser.add_argument("--max_train_hours", type=float, help="Stop this launch with a checkpoint after so long.")
    parser.add_argument("--dry_run", action="store_true", help="Two steps; print what the run will cost.")
    parser.add_argument("--train_batch_size", type=int, default=32, help="Frames per step and process.")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--lr_scheduler", default="cosine", help="Name known to `diffusers.optimization`.")
    parser.add_argument("--lr_warmup_steps", type=int, default=200)
    parser.add_argument("--adam_beta2", type=float, default=0.99)
    parser.add_argument("--weight_decay", type=float, default=0.01)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--latent_noise", type=float, default=0.0, help="Noise before decoding, in latents' stds.")

    parser.add_argument("--mse_weight", type=float, default=0.0, help="Squared error beside the absolute error.")
    parser.add_argument("--kl_weight", type=float, default=1e-6, help="Only for AutoencoderKL.")
    parser.add_argument("--commitment_weight", type=float, default=1.0, help="Only for VQModel.")
    parser.add_argument(
        "--idle_steps_to_restart",
        type=int,
        default=50,
        help="Only for VQModel: after so many steps without use a code is put where latents are; 0: never.",
    )
    parser.add_argument(
        "--lpips_weights", help="File with the state dict of `lpips.LPIPS(net='vgg')`; absent: no LPIPS."
    )
    parser.add_argument("--lpips_weight", type=float, default=0.5)
    parser.add_argument("--disc_start", type=int, help="Step at which the patch GAN joins; absent: no GAN.")
    parser.add_argument("--disc_weight", type=float, default=0.5)
    parser.add_argument("--disc_fixed_weight", action="store_true", help="Take --disc_weight as it is, not adaptive.")
    parser.add_argument("--disc_channels", type=int, default=64)
    parser.add_argument("--disc_layers", type=int, default=3)

    parser.add_argument("--validation_steps", type=int, default=500)
    parser.add_argument("--num_validation_frames", type=int, default=256)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--checkpoints_total_limit", type=int, default=2)
    parser.add_argument("--resume_from_checkpoint", help="'latest', the name of a checkpoint, or a path.")
    parser.add_argument("--allow_changed_run", action="store_true", help="Resume although data or settings changed.")
    add_precision_argument(parser)
    parser.add_argument("--dataloader_num_workers", type=int, default=0)
    add_log_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    args = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

import diffusers
import torch
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader, Subset

from diffusers_far.data.clips import evenly_spaced
from diffusers_far.evaluation.media import contact_sheet
from diffusers_far.evaluation.networks import load_lpips
from diffusers_far.files import written_whole
from diffusers_far.models.codec import latent_statistics
from diffusers_far.models.loading import saved_whole
from diffusers_far.training.checkpoints import checkpoint_states, find_checkpoint, load_checkpoint, save_checkpoint
from diffusers_far.training.clips import step_generator
from diffusers_far.training.launch import Launch, launched
from diffusers_far.training.run import build_accelerator, hyperparameters, require_finite, require_finite_metrics
from diffusers_far.training.step_cost import DRY_RUN_STEPS, describe_cost
from diffusers_far.training.vae import (
    PATCH,
    Autoencoding,
    CodebookRestart,
    PatchDiscriminator,
    adaptive_weight,
    decoder_last_layer,
    hinge_discriminator_loss,
    hinge_generator_loss,
    measure_codebook,
    measure_reconstruction,
    measure_scaling_factor,
    open_frames,
    open_validation_frames,
    reconstruction_loss,
)


logger = get_logger(__name__)


def build_vae(config_file: str) -> torch.nn.Module:
    config = read_config("vae_config", config_file)
    if config.get("_class_name") not in VAE_CLASSES:
        raise ValueError(
            f"`--vae_config` {config_file!r} has `_class_name` {config.get('_class_name')!r}; it must be one of "
            f"{', '.join(VAE_CLASSES)}."
        )
    vae = getattr(diffusers, config["_class_name"]).from_config(config)
    vae.register_to_config(scaling_factor=1.0)  # is measured in the end
    latent_statistics(vae, torch.empty(vae.config.latent_channels, 1, 1))  # refuses what does not fit its latents
    return vae


def describe_reconstruction(metrics: dict[str, float]) -> str:
    """One line for the log: the figures, and where the worst patch is."""
    figures = [f"{name} {value:.4g}" for name, value in metrics.items() if not name.startswith("worst_patch")]
    return (
        f"{', '.join(figures)}; worst {PATCH}x{PATCH} patch {metrics['worst_patch_psnr']:.4g} dB, at row "
        f"{metrics['worst_patch_top']}, column {metrics['worst_patch_left']} of the frame on the right of the sheet"
    )


def save_sample_grid(vae: torch.nn.Module, images: torch.Tensor, path: Path) -> None:
    """Truth above reconstruction, a column per image, small ones enlarged; `images` uint8 (B, 3, height, width)."""
    with torch.no_grad():
        decoded = vae(images.to(vae.device, vae.dtype) / 127.5 - 1).sample
    decoded = (decoded.float().cpu() / 2 + 0.5).clamp(0, 1)
    path.parent.mkdir(exist_ok=True)
    with written_whole(path) as unfinished:
        sheet = contact_sheet([images / 255, decoded], scale=max(1, math.ceil(MIN_SHOWN_HEIGHT / images.shape[2])))
        sheet.save(unfinished)


@launched
def main(args: argparse.Namespace, launch: Launch) -> None:
    set_up_logging(__name__)
    checkpoint = None if args.dry_run else find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    output_dir = Path(args.output_dir)
    accelerator = build_accelerator(args)
    set_seed(args.seed)

    # 1. Data
    train_frames = open_frames(args, accelerator)
    validation_frames = open_validation_frames(args)
    validation_frames = Subset(validation_frames, evenly_spaced(len(validation_frames), args.num_validation_frames))
    validation_loader = DataLoader(validation_frames, args.train_batch_size)

    # 2. Models
    vae = build_vae(args.vae_config).to(memory_format=torch.channels_last)
    last_layer = decoder_last_layer(vae)
    ema = EMAModel(vae.parameters(), decay=args.ema_decay)
    ema.to(accelerator.device)
    lpips = load_lpips(args.lpips_weights).to(accelerator.device) if args.lpips_weights else None
    if lpips is None:
        logger.info("No --lpips_weights: training goes on without LPIPS.")
    optimizer = torch.optim.AdamW(
        vae.parameters(), args.learning_rate, betas=(0.9, args.adam_beta2), weight_decay=args.weight_decay
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    autoencoding, optimizer = accelerator.prepare(Autoencoding(vae, args.latent_noise), optimizer)
    restart = None
    if isinstance(vae, diffusers.VQModel) and args.idle_steps_to_restart:
        restart = CodebookRestart(vae, args.idle_steps_to_restart)
    # The schedule counts optimizer steps, whatever the number of processes, so Accelerate does not step it.
    checkpoint_states(accelerator, ema=ema, lr_scheduler=lr_scheduler, codebook_restart=restart)
    if args.disc_start is not None:
        discriminator = PatchDiscriminator(3, args.disc_channels, args.disc_layers)
        disc_optimizer = torch.optim.AdamW(discriminator.parameters(), args.learning_rate, betas=(0.5, 0.9))
        discriminator, disc_optimizer = accelerator.prepare(discriminator, disc_optimizer)

    # 3. Start or resume
    identity = {name: getattr(args, name) for name in IDENTITY} | {
        "vae_config": read_config("vae_config", args.vae_config),
        "dataset": train_frames.fingerprint,
        "num_processes": accelerator.num_processes,
    }
    if isinstance(vae, diffusers.VQModel):
        identity |= {name: getattr(args, name) for name in VQ_IDENTITY}
    if args.streaming:
        identity |= {"streaming": True, "shuffle_buffer_size": args.shuffle_buffer_size}
    first_step = 0
    if checkpoint is not None:
        first_step = load_checkpoint(accelerator, checkpoint, identity, allow_changes=args.allow_changed_run)
    if accelerator.is_main_process and not args.dry_run:
        output_dir.mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers("train_vae", hyperparameters(args, accelerator, vae=identity["vae_config"]))
    launch.begin()  # before processes that load data begin, so that they die of no signal
    loaded = train_frames.load(first_step, args.max_train_steps, args.dataloader_num_workers)
    num_parameters = sum(parameter.numel() for parameter in vae.parameters())
    logger.info(f"{num_parameters / 1e6:.2f} M parameters, {train_frames.extent}, from step {first_step}")

    def validate(step: int) -> dict[str, float]:
        ema.store(vae.parameters())
        ema.copy_to(vae.parameters())
        metrics = measure_reconstruction(vae, validation_loader)
        if isinstance(vae, diffusers.VQModel):
            metrics |= measure_codebook(vae, validation_loader)
        shown = [*evenly_spaced(len(validation_frames), 12), metrics["worst_patch_image"]]
        samples = torch.stack([validation_frames[i] for i in shown])
        save_sample_grid(vae, samples, output_dir / "samples" / f"step-{step:06d}.png")
        ema.restore(vae.parameters())
        accelerator.log({f"validation/{name}": value for name, value in metrics.items()}, step=step)
        logger.info(f"step {step}: held-out {describe_reconstruction(metrics)}")
        return metrics

    # 4. Train
    autoencoding.train()
    progress = Progress(
        args.max_train_steps,
        first_step,
        seconds_between_lines=args.logging_seconds,
        max_hours=args.max_train_hours,
        is_silent=not accelerator.is_main_process,
    )
    start_time, finished = time.perf_counter(), first_step
    for step, frames in zip(range(first_step, args.max_train_steps), loaded):
        target = (frames.to(accelerator.device) / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        generator = step_generator(args.seed, step, accelerator.process_index)
        # A dry run tells what the dearest steps cost.
        gan_is_on = args.disc_start is not None and (step >= args.disc_start or args.dry_run)

        reconstruction = autoencoding(target, generator)
        reconstructed = reconstruction.images.float()
        losses = {"reconstruction": reconstruction_loss(reconstructed, target, args.mse_weight)}
        loss = losses["reconstruction"] + args.kl_weight * reconstruction.kl
        if isinstance(vae, diffusers.VQModel):
            losses["commitment"] = reconstruction.commitment
            loss = loss + args.commitment_weight * reconstruction.commitment
        if lpips is not None:
            losses["lpips"] = lpips(reconstructed, target).mean()
            loss = loss + args.lpips_weight * losses["lpips"]
        if gan_is_on:
            # Unwrapped: its gradients of this pass are thrown away, so no process need send them.
            losses["generator"] = hinge_generator_loss(accelerator.unwrap_model(discriminator)(reconstructed))
            weight = 1.0 if args.disc_fixed_weight else adaptive_weight(loss, losses["generator"], last_layer)
            loss = loss + args.disc_weight * weight * losses["generator"]
        accelerator.backward(loss)
        gradient_norm = accelerator.clip_grad_norm_(autoencoding.parameters(), args.max_grad_norm)
        require_finite(accelerator, step, output_dir, loss=loss.item(), gradient_norm=gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        if restart is not None:
            # The same latents and draws on all processes, so that their codebooks stay the same.
            generator = step_generator(args.seed, step, stream=RESTART_STREAM)
            num_restarted = restart.step(accelerator.gather(reconstruction.latents), generator)
        ema.step(vae.parameters())

        if gan_is_on:
            disc_optimizer.zero_grad()
            real_logits, fake_logits = discriminator(torch.cat([target, reconstructed.detach()])).chunk(2)
            losses["discriminator"] = hinge_discriminator_loss(real_logits, fake_logits)
            accelerator.backward(losses["discriminator"])
            accelerator.unscale_gradients(disc_optimizer)
            disc_norm = get_total_norm([p.grad for p in discriminator.parameters() if p.grad is not None])
            disc_loss = losses["discriminator"].item()
            require_finite(accelerator, step, output_dir, loss=disc_loss, gradient_norm=disc_norm)
            disc_optimizer.step()

        finished = step + 1
        if finished % 10 == 0 or finished == args.max_train_steps:
            seconds_per_step = (time.perf_counter() - start_time) / (finished - first_step)
            scalars = {f"train/{name}": value.item() for name, value in losses.items()} | {
                "train/gradient_norm": float(gradient_norm),
                "train/learning_rate": lr_scheduler.get_last_lr()[0],
                "train/frames_per_second": args.train_batch_size * accelerator.num_processes / seconds_per_step,
            }
            if restart is not None:
                scalars["train/restarted_codes"] = num_restarted
            accelerator.log(scalars, step=finished)
        progress.update(loss=loss.item(), learning_rate=lr_scheduler.get_last_lr()[0])
        if args.dry_run:
            if finished < min(DRY_RUN_STEPS, args.max_train_steps):
                continue
            batch = (
                f"{args.train_batch_size * accelerator.num_processes} frames{', with the GAN' if gan_is_on else ''}"
            )
            accelerator.print(describe_cost(args, accelerator.device, vae, progress.seconds_of_last_step, batch))
            return
        if launch.must_stop(accelerator, finished):
            break
        if finished % args.checkpointing_steps == 0 and finished < args.max_train_steps:
            save_checkpoint(accelerator, output_dir, finished, identity, args.checkpoints_total_limit)
        if accelerator.is_main_process and finished % args.validation_steps == 0 and finished < args.max_train_steps:
            validate(finished)
    progress.close()

    # 5. Save
    if finished > first_step:
        save_checkpoint(accelerator, output_dir, finished, identity, args.checkpoints_total_limit)
    if accelerator.is_main_process and not launch.is_interrupted:
        require_finite_metrics(validate(finished), finished, output_dir)
        ema.copy_to(vae.parameters())
        sample = Subset(train_frames.sample, evenly_spaced(len(train_frames.sample), 2048))
        scaling_factor = measure_scaling_factor(vae, DataLoader(sample, args.train_batch_size))
        vae.register_to_config(scaling_factor=scaling_factor)
        with saved_whole(output_dir) as folder:
            vae.to(memory_format=torch.contiguous_format).save_pretrained(folder)
        logger.info(f"Saved to {output_dir}, scaling factor {scaling_factor:.5f}")
    accelerator.end_training()


if __name__ == "__main__":
    main(args)
