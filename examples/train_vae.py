"""Train an image autoencoder (`AutoencoderDC`, `AutoencoderKL` or `VQModel`) on the frames of a video dataset.

    accelerate launch examples/train_vae.py --dataset_name mazes --vae_config examples/configs/vae_maze.json \
        --output_dir vae-maze --max_train_steps 5000

The dataset has a row per trajectory with a column `video` of type `List(Image())`; with `--streaming` it is read as it is
needed. The result in `--output_dir` loads with `from_pretrained`; its config carries the scaling factor that brings its
latents to unit variance.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from diffusers_far.command_line import set_up_logging
from diffusers_far.training.config import FrameSettings, parse_settings, read_config, setting


RESTART_STREAM = 1  # beside the stream of the latents' noise
MIN_SHOWN_HEIGHT = 192  # pixels of an image on a sheet
STEPS_BETWEEN_PARTS = 10  # of the loss, in the trackers
VAE_CLASSES = ("AutoencoderDC", "AutoencoderKL", "VQModel")


@dataclass(kw_only=True)
class TrainVAESettings(FrameSettings):
    """Of this script, beside what all trainings share."""

    vae_config: str = setting(help="JSON file: `_class_name` and the model's arguments.")
    train_batch_size: int = setting(32, "Frames per step and process.", least=1)
    learning_rate: float = setting(1e-3)
    lr_scheduler: str = setting("cosine", "Name known to `diffusers.optimization`.")
    lr_warmup_steps: int = setting(200, least=0)
    adam_beta2: float = setting(0.99)
    weight_decay: float = setting(0.01)
    ema_decay: float = setting(0.999)
    latent_noise: float = setting(0.0, "Noise before decoding, in latents' stds.")

    mse_weight: float = setting(0.0, "Squared error beside the absolute error.")
    kl_weight: float = setting(1e-6, "Only for AutoencoderKL.")
    commitment_weight: float = setting(1.0, "Only for VQModel.")
    idle_steps_to_restart: int = setting(
        50, "Only for VQModel: after so many steps without use a code is put where latents are; 0: never."
    )
    lpips_weights: str | None = setting(
        None, "File with the state dict of `lpips.LPIPS(net='vgg')`; absent: no LPIPS.", free=True
    )
    lpips_weight: float = setting(0.5)
    disc_start: int | None = setting(None, "Step at which the patch GAN joins; absent: no GAN.", least=0)
    disc_weight: float = setting(0.5)
    disc_fixed_weight: bool = setting(False, "Take --disc_weight as it is, not adaptive.")
    disc_channels: int = setting(64)
    disc_layers: int = setting(3)
    num_validation_frames: int = setting(256, "Held-out frames that are reconstructed.", least=1, free=True)


def parse_args(arguments: list[str] | None = None) -> TrainVAESettings:
    return parse_settings(TrainVAESettings, __doc__, arguments)


if __name__ == "__main__":
    settings = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

import diffusers
import torch
from accelerate.logging import get_logger
from diffusers.training_utils import EMAModel
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader, Subset

from diffusers_far.data.clips import evenly_spaced
from diffusers_far.evaluation.media import contact_sheet
from diffusers_far.evaluation.networks import load_lpips
from diffusers_far.files import written_whole
from diffusers_far.models.codec import latent_statistics
from diffusers_far.models.loading import saved_whole
from diffusers_far.training.clips import step_generator
from diffusers_far.training.launch import Launch, launched
from diffusers_far.training.run import StepOutcome, TrainingRun, evaluated
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
def main(settings: TrainVAESettings, launch: Launch) -> None:
    set_up_logging(__name__)
    run = TrainingRun(settings, launch)
    accelerator = run.accelerator
    frames_per_step = settings.train_batch_size * accelerator.num_processes

    # 1. Data
    train_frames = open_frames(settings, accelerator)
    settings.count_epochs(len(train_frames.sample), frames_per_step)
    held_out = open_validation_frames(settings)
    held_out = Subset(held_out, evenly_spaced(len(held_out), settings.num_validation_frames))
    held_out_batches = DataLoader(held_out, settings.train_batch_size)

    # 2. Models and optimizers
    vae = build_vae(settings.vae_config).to(memory_format=torch.channels_last)
    is_vq = isinstance(vae, diffusers.VQModel)
    last_layer = decoder_last_layer(vae)
    ema = EMAModel(vae.parameters(), decay=settings.ema_decay)
    lpips = load_lpips(settings.lpips_weights).to(run.device) if settings.lpips_weights else None
    if lpips is None:
        logger.info("No --lpips_weights: training goes on without LPIPS.")
    betas, weight_decay = (0.9, settings.adam_beta2), settings.weight_decay
    optimizer = torch.optim.AdamW(vae.parameters(), settings.learning_rate, betas=betas, weight_decay=weight_decay)
    restart = None
    if is_vq and settings.idle_steps_to_restart:
        restart = CodebookRestart(vae, settings.idle_steps_to_restart)
    autoencoding = Autoencoding(vae, settings.latent_noise)

    def as_target(frames: torch.Tensor) -> torch.Tensor:
        return (frames.to(run.device) / 127.5 - 1).contiguous(memory_format=torch.channels_last)

    run.prepare(
        autoencoding,
        optimizer,
        ema,
        order=("ema", "lr_scheduler"),
        trial=lambda: autoencoding.trial(
            as_target(torch.stack([train_frames.sample[0]] * settings.train_batch_size)), settings.mse_weight
        ),
        codebook_restart=restart,
    )
    if settings.disc_start is not None:
        discriminator = PatchDiscriminator(3, settings.disc_channels, settings.disc_layers)
        disc_optimizer = torch.optim.AdamW(discriminator.parameters(), settings.learning_rate, betas=(0.5, 0.9))
        discriminator, disc_optimizer = accelerator.prepare(discriminator, disc_optimizer)

    # 3. Start or resume
    run.start(
        "train_vae",
        dataset=train_frames.fingerprint,
        vae_config=read_config("vae_config", settings.vae_config),
    )
    num_parameters = sum(parameter.numel() for parameter in vae.parameters())
    logger.info(f"{num_parameters / 1e6:.2f} M parameters, {train_frames.description}, from step {run.first_step}")

    def validate() -> dict[str, float]:
        with evaluated(vae, ema):
            metrics = measure_reconstruction(vae, held_out_batches)
            if is_vq:
                metrics |= measure_codebook(vae, held_out_batches)
            shown = [*evenly_spaced(len(held_out), 12), metrics["worst_patch_image"]]
            samples = torch.stack([held_out[i] for i in shown])
            save_sample_grid(vae, samples, run.output_dir / "samples" / f"step-{run.finished:06d}.png")
        run.log_validation(metrics, run.finished, describe_reconstruction(metrics))
        return metrics

    # 4. Train
    for step, frames in zip(run.steps(), run.load(train_frames)):
        target = as_target(frames)
        generator = step_generator(settings.seed, step, accelerator.process_index)
        # A dry run tells what the dearest steps cost.
        gan_is_on = settings.disc_start is not None and (step >= settings.disc_start or settings.dry_run)

        reconstruction = run.model(target, generator)
        reconstructed = reconstruction.images.float()
        losses = {"reconstruction": reconstruction_loss(reconstructed, target, settings.mse_weight)}
        loss = losses["reconstruction"] + settings.kl_weight * reconstruction.kl
        if is_vq:
            losses["commitment"] = reconstruction.commitment
            loss = loss + settings.commitment_weight * reconstruction.commitment
        if lpips is not None:
            losses["lpips"] = lpips(reconstructed, target).mean()
            loss = loss + settings.lpips_weight * losses["lpips"]
        if gan_is_on:
            # Unwrapped: its gradients of this pass are thrown away, so no process need send them.
            losses["generator"] = hinge_generator_loss(accelerator.unwrap_model(discriminator)(reconstructed))
            is_fixed = settings.disc_fixed_weight
            weight = 1.0 if is_fixed else adaptive_weight(loss, losses["generator"], last_layer)
            loss = loss + settings.disc_weight * weight * losses["generator"]
        accelerator.backward(loss)
        outcome = StepOutcome(loss.item(), frames_per_step)
        run.update_weights(outcome)
        figures = {}
        if restart is not None:
            # The same latents and draws on all processes, so that their codebooks stay the same.
            generator = step_generator(settings.seed, step, stream=RESTART_STREAM)
            figures["restarted_codes"] = restart.step(accelerator.gather(reconstruction.latents), generator)
        run.average_weights()

        if gan_is_on:
            disc_optimizer.zero_grad()
            real_logits, fake_logits = discriminator(torch.cat([target, reconstructed.detach()])).chunk(2)
            losses["discriminator"] = hinge_discriminator_loss(real_logits, fake_logits)
            accelerator.backward(losses["discriminator"])
            accelerator.unscale_gradients(disc_optimizer)
            disc_norm = get_total_norm([p.grad for p in discriminator.parameters() if p.grad is not None])
            run.require_finite(losses["discriminator"].item(), disc_norm)
            disc_optimizer.step()

        if (step + 1) % STEPS_BETWEEN_PARTS == 0 or step + 1 == run.last_step:
            figures |= {name: value.item() for name, value in losses.items()}
        run.log(outcome, **figures)
        if run.must_stop():
            break
        run.save_checkpoint_if_due()
        if run.is_main and run.is_due(settings.validation_steps):
            validate()
    if settings.dry_run:
        cost = run.describe_cost(f"{frames_per_step} frames{', with the GAN' if gan_is_on else ''}")
        accelerator.print(cost)
        return

    # 5. Save
    if run.finish() and run.is_main:
        run.require_finite_metrics(validate(), run.finished)
        ema.copy_to(vae.parameters())
        sample = Subset(train_frames.sample, evenly_spaced(len(train_frames.sample), 2048))
        scaling_factor = measure_scaling_factor(vae, DataLoader(sample, settings.train_batch_size))
        vae.register_to_config(scaling_factor=scaling_factor)
        with saved_whole(run.output_dir) as folder:
            vae.to(memory_format=torch.contiguous_format).save_pretrained(folder)
        logger.info(f"Saved to {run.output_dir}, scaling factor {scaling_factor:.5f}")
    accelerator.end_training()


if __name__ == "__main__":
    main(settings)
