"""What the training of an autoencoder needs: batches of single frames, its losses, a codebook that stays in use, and the
discriminator of the adversarial loss. The loop is in `examples/train_vae.py`.

B batch, C or D latent channels, H/W latent height/width, N size of the codebook; h/w pixels.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from ..data.clips import StoredTrajectory
from ..data.loading import dataset_fingerprint, load_split, stream_split
from ..data.rows import BadExampleError
from ..data.streaming import StreamedSplit
from ..data.video_clips import FrameDataset
from ..models.codec import encode_codes, encode_images, nearest_codes, scale_latents
from .clips import step_indices
from .config import FrameSettings
from .launch import leave_signals_to_parent
from .streaming import StreamLoader, TrajectoryStream


SAMPLED_TRAJECTORIES = 32  # of a stream: as many stand for all where its frames are measured


def open_frames(settings: FrameSettings, accelerator: Accelerator) -> "FrameBatches | StreamedFrames":
    """The frames to train on.

    Raises:
        ValueError: There is no such split, or no column of images.
    """
    order = {
        "batch_size": settings.train_batch_size,
        "seed": settings.seed,
        "process_index": accelerator.process_index,
        "num_processes": accelerator.num_processes,
    }
    place = (settings.dataset_name, settings.dataset_split)
    if not settings.streaming:
        return FrameBatches(load_split(*place, settings.dataset_config_name), settings.video_column, **order)
    split = stream_split(*place, settings.video_column, settings.dataset_config_name)
    frames = StreamedFrames(split, block_size=settings.shuffle_buffer_size, **order)
    frames.save_with(accelerator)
    return frames


def open_validation_frames(settings: FrameSettings) -> FrameDataset:
    """Held-out frames; of a stream those of the first trajectories."""
    place = (settings.dataset_name, settings.validation_split)
    if not settings.streaming:
        trajectories = load_split(*place, settings.dataset_config_name)
        frames = FrameDataset(trajectories, settings.video_column)
        frames.clips.check_frame_sizes()
        return frames
    split = stream_split(*place, settings.video_column, settings.dataset_config_name)
    return FrameDataset(split.head(SAMPLED_TRAJECTORIES), settings.video_column)


class FrameBatches(torch.utils.data.Dataset):
    """Batches of the frames of a dataset, by step; each frame once an epoch.

    Args:
        trajectories (`datasets.Dataset`): A row per trajectory.
        column (`str`): Of type `List(Image())`.
        batch_size (`int`): Frames per step on this process.
        seed (`int`): Of the run.
        process_index, num_processes (`int`): This process's share of each step.

    Attributes:
        sample ([`FrameDataset`]): Frames to measure.
        fingerprint (`str`): What it is made of.
    """

    def __init__(
        self,
        trajectories: Dataset,
        column: str = "video",
        *,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.sample = FrameDataset(trajectories, column)
        self.sample.clips.check_frame_sizes()
        self.fingerprint = dataset_fingerprint(trajectories)
        self.batch_size, self.seed = batch_size, seed
        self.process_index, self.num_processes = process_index, num_processes

    @property
    def description(self) -> str:
        return f"{len(self.sample)} frames"

    def load(self, first_step: int, last_step: int, num_workers: int = 0) -> Iterator[torch.Tensor]:
        """A batch (B, 3, height, width), uint8, for each step from `first_step` to before `last_step`."""
        steps = range(first_step, last_step)
        loader = DataLoader(
            self, batch_size=None, sampler=steps, num_workers=num_workers, worker_init_fn=leave_signals_to_parent
        )
        return iter(loader)

    def __getitem__(self, step: int) -> torch.Tensor:
        """This process's batch of a step."""
        indices = step_indices(len(self.sample), self.batch_size * self.num_processes, self.seed, step)
        own = indices[self.process_index * self.batch_size :][: self.batch_size]
        return torch.stack([self.sample[index] for index in own.tolist()])


class StreamedFrames(StreamLoader):
    """As [`FrameBatches`], of a split that is streamed: the frames of so many trajectories at a time are mixed.

    Args:
        split (`StreamedSplit`): Its rows; lists of images.
        batch_size (`int`): Frames per step on this process.
        block_size (`int`): Trajectories that are held in memory and mixed.
        order: Of [`TrajectoryStream`].

    Raises:
        ValueError: The rows are video files.
    """

    def __init__(self, split: StreamedSplit, *, batch_size: int, block_size: int, **order) -> None:
        self.sample = FrameDataset(split.head(SAMPLED_TRAJECTORIES), split.column)
        super().__init__(TrajectoryStream(split, draws_per_row=None, min_frames=1, block_size=block_size, **order))
        self.fingerprint, self.batch_size = split.fingerprint, batch_size

    def read_step(self, draws: Iterator[tuple[StoredTrajectory, int]], step: int) -> Iterator[list[tuple]]:
        """A step's trajectories, and which frame of each it takes."""
        yield [
            (trajectory.without_other_images(frame, 1), frame)
            for trajectory, frame in (next(draws) for _ in range(self.batch_size))
        ]

    def decode(self, read: list[tuple[StoredTrajectory, int]]) -> torch.Tensor:
        """The frames of a step, (B, 3, height, width), uint8.

        Raises:
            BadExampleError: One cannot be read, or is of another size than the first; names its trajectory.
        """
        frames = []
        for trajectory, frame in read:
            frames.append(trajectory.frames(frame, 1)[0])
            if frames[-1].shape != frames[0].shape:
                raise BadExampleError(
                    f"{trajectory.name} has frames of {tuple(frames[-1].shape[1:])}, but those of {read[0][0].name} are "
                    f"{tuple(frames[0].shape[1:])} (height, width); prepare the dataset with `far prepare` and "
                    "`--size`."
                )
        return torch.stack(frames)


PATCH = 8  # side, in pixels, of the square whose reconstruction is worst


@dataclass(frozen=True)
class Reconstruction:
    """What an autoencoder made.

    Args:
        images (`torch.Tensor` of shape `(B, 3, height, width)`): Around [-1, 1].
        kl (`torch.Tensor` of shape `()`): Nats per latent value; 0 without a distribution.
        commitment (`torch.Tensor` of shape `()`): How far latents and codebook are apart; 0 without a codebook.
        latents (`torch.Tensor` of shape `(B, C, H, W)`): What was decoded; before it was quantized, with a codebook.
    """

    images: torch.Tensor
    kl: torch.Tensor
    commitment: torch.Tensor
    latents: torch.Tensor


class Autoencoding(nn.Module):
    """An autoencoder whose `forward` is its training pass, so that wrappers such as DDP see one call.

    Args:
        vae (`nn.Module`): `AutoencoderDC`, `AutoencoderKL` or `VQModel`.
        latent_noise (`float`): Standard deviation of Gaussian noise added to the latents before decoding, relative to
            the latents' own. A decoder that is fed predicted latents should forgive small errors. Unlike the KL
            term's noise it cannot be escaped by larger latents.
    """

    def __init__(self, vae: nn.Module, latent_noise: float = 0.0) -> None:
        super().__init__()
        if latent_noise < 0:
            raise ValueError(f"`latent_noise` is {latent_noise}; it is a standard deviation, so give 0 or more.")
        self.vae = vae
        self.latent_noise = latent_noise

    def trial(self, images: torch.Tensor, mse_weight: float) -> Callable[[], torch.Tensor]:
        """What computes the same loss of `images` at every call, without LPIPS and discriminator: to try what a pass costs."""

        def loss() -> torch.Tensor:
            reconstructed = self(images, torch.Generator().manual_seed(0)).images
            return reconstruction_loss(reconstructed.float(), images, mse_weight)

        return loss

    def forward(self, images: torch.Tensor, generator: torch.Generator) -> Reconstruction:
        """Encode, disturb and decode `images` (B, 3, height, width) in [-1, 1]; `generator` is a CPU one."""
        encoded = self.vae.encode(images)
        if hasattr(encoded, "latent_dist"):
            mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
            latents = mean + std * _noise_like(mean, generator)
            kl = 0.5 * (mean.pow(2) + std.pow(2) - 1 - 2 * std.log()).mean()
        else:
            latents = encoded.latent if hasattr(encoded, "latent") else encoded.latents
            kl = latents.new_zeros(())
        if self.latent_noise > 0:
            latents = latents + self.latent_noise * latents.detach().std() * _noise_like(latents, generator)
        decoded = self.vae.decode(latents)
        commitment = getattr(decoded, "commit_loss", None)
        return Reconstruction(
            images=decoded.sample,
            kl=kl,
            commitment=latents.new_zeros(()) if commitment is None else commitment,
            latents=latents.detach(),
        )


def _noise_like(latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(latents.shape, generator=generator).to(latents)


def reconstruction_loss(images: torch.Tensor, target: torch.Tensor, mse_weight: float = 0.0) -> torch.Tensor:
    """Mean absolute error, plus `mse_weight` times the mean squared error; both sides in [-1, 1]."""
    loss = F.l1_loss(images, target)
    return loss + mse_weight * F.mse_loss(images, target) if mse_weight else loss


@torch.no_grad()
def measure_reconstruction(vae: nn.Module, batches: Iterable[torch.Tensor]) -> dict[str, float]:
    """How well a VAE reconstructs images, and where worst: a small thing that is lost hardly changes the PSNR of its image.

    Args:
        vae (`nn.Module`): Any autoencoder that `encode_images` knows.
        batches (iterable of `torch.Tensor` of shape `(B, 3, height, width)`): uint8.

    Returns:
        `psnr` (dB, mean over images of each image's own), `ssim`; `worst_patch_psnr` (dB) of the worst square of `PATCH`
        pixels in all images, wherever it lies, and its place: `worst_patch_image` (counted from 0 over all batches),
        `worst_patch_top` and `worst_patch_left` (pixels).
    """
    # One process may measure alone, so the metrics must not wait for the others.
    psnr = PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3), sync_on_compute=False).to(vae.device)
    ssim = StructuralSimilarityIndexMeasure(data_range=1.0, sync_on_compute=False).to(vae.device)
    worst, num_images = (-1.0, 0, 0, 0), 0  # squared error, image, top, left
    for batch in batches:
        target = batch.to(vae.device) / 255
        images = vae.decode(encode_images(vae, (target * 2 - 1).to(vae.dtype))).sample
        images = (images.float() / 2 + 0.5).clamp(0, 1)
        psnr.update(images, target)
        ssim.update(images, target)
        squared_error = (images - target).square().mean(dim=1)
        errors = F.avg_pool2d(squared_error, (min(PATCH, batch.shape[2]), min(PATCH, batch.shape[3])), stride=1)
        place = torch.unravel_index(errors.argmax(), errors.shape)
        image, top, left = (index.item() for index in place)
        worst = max(worst, (errors[place].item(), num_images + image, top, left))
        num_images += len(batch)
    error, image, top, left = worst
    return {
        "psnr": psnr.compute().item(),
        "ssim": ssim.compute().item(),
        "worst_patch_psnr": -10 * math.log10(max(error, 1e-10)),
        "worst_patch_image": image,
        "worst_patch_top": top,
        "worst_patch_left": left,
    }


@torch.no_grad()
def measure_scaling_factor(vae: nn.Module, batches: Iterable[torch.Tensor]) -> float:
    """The `scaling_factor` with which the latents of `batches`, uint8 images (B, 3, height, width), have unit variance,
    beside the other statistics of the VAE's config.

    Raises:
        RuntimeError: The latents are not finite, or all the same.
    """
    count, total, total_of_squares = 0, 0.0, 0.0
    for batch in batches:
        latents = encode_images(vae, (batch.to(vae.device) / 127.5 - 1).to(vae.dtype))
        latents = scale_latents(vae, latents).double() / vae.config.scaling_factor
        count += latents.numel()
        total += latents.sum().item()
        total_of_squares += latents.pow(2).sum().item()
    mean = total / count
    variance = total_of_squares / count - mean**2
    if not 0 < variance < math.inf:
        raise RuntimeError(
            f"The latents of the frames have the variance {variance}, so they cannot be scaled to 1: the autoencoder has not "
            "learned anything. Train it longer, or with a lower `--learning_rate`."
        )
    return variance**-0.5


def decoder_last_layer(vae: nn.Module) -> nn.Parameter:
    """The weight of the decoder's last convolution, where the gradients of GAN and reconstruction are balanced."""
    conv_out = vae.decoder.conv_out
    return conv_out.weight if isinstance(conv_out, nn.Conv2d) else conv_out.conv.weight


class CodebookRestart:
    """Puts codes that no latent is near to where latents are. Such a code has no gradient and would never move.

    Args:
        vq (`VQModel`): In training.
        num_idle_steps (`int`): Steps without use after which a code is restarted, at least 1.
    """

    def __init__(self, vq: nn.Module, num_idle_steps: int) -> None:
        if num_idle_steps < 1:
            raise ValueError(f"`num_idle_steps` is {num_idle_steps}; it counts steps, so give 1 or more.")
        self.vq = vq
        self.num_idle_steps = num_idle_steps
        self.idle_steps = torch.zeros(vq.config.num_vq_embeddings, dtype=torch.int64)

    @torch.no_grad()
    def step(self, latents: torch.Tensor, generator: torch.Generator) -> int:
        """Count which codes a training step used, and restart the idle ones at random latents of that step.

        Args:
            latents (`torch.Tensor` of shape `(B, D, H, W)`): Of all processes, before quantization.
            generator (`torch.Generator`): On the CPU, the same on all processes.

        Returns:
            `int`: How many codes were restarted.
        """
        codebook = self.vq.quantize.embedding.weight
        latents = latents.to(codebook)
        self.idle_steps += 1
        self.idle_steps[nearest_codes(self.vq, latents).unique().cpu()] = 0
        idle = (self.idle_steps >= self.num_idle_steps).nonzero().squeeze(1)
        if len(idle):
            places = latents.movedim(1, -1).flatten(0, -2)  # (B * H * W, D)
            chosen = torch.randint(len(places), (len(idle),), generator=generator)
            codebook[idle.to(codebook.device)] = places[chosen.to(places.device)]
            self.idle_steps[idle] = 0
        return len(idle)

    def state_dict(self) -> dict[str, Any]:
        return {"idle_steps": self.idle_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.idle_steps = state_dict["idle_steps"].cpu()


def measure_codebook(vq: nn.Module, batches: Iterable[torch.Tensor]) -> dict[str, float]:
    """How much of the codebook some images use.

    Args:
        vq (`VQModel`): The autoencoder.
        batches (iterable of `torch.Tensor` of shape `(B, 3, height, width)`): uint8.

    Returns:
        `codes_used`, a count; `perplexity`, the number of equally frequent codes that would be as hard to guess.
    """
    num_codes = vq.config.num_vq_embeddings
    counts = sum(torch.bincount(encode_codes(vq, batch).flatten(), minlength=num_codes) for batch in batches)
    frequencies = counts[counts > 0] / counts.sum()
    entropy = -(frequencies * frequencies.log()).sum()
    return {"codes_used": float((counts > 0).sum()), "perplexity": entropy.exp().item()}


class PatchDiscriminator(nn.Module):
    """Says of each patch of an image whether it looks real (pix2pix, arXiv:1611.07004).

    Group norm stands in for batch norm: real and reconstructed images are judged in separate batches, whose statistics
    would give them away.

    Args:
        in_channels (`int`): Channels of the image.
        base_channels (`int`): Channels of the first layer; doubled by each layer up to 8 times.
        num_layers (`int`): Number of layers that halve the size; 3 sees patches of 70 pixels, 2 of 34.
    """

    def __init__(self, in_channels: int = 3, base_channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        widths = [base_channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers = [nn.Conv2d(in_channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride, 1, bias=False),
                nn.GroupNorm(min(32, widths[i]), widths[i]),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, height, width) in [-1, 1] to logits (B, 1, rows, columns); above 0 means real."""
        return self.layers(images)


def hinge_discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def hinge_generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    return -fake_logits.mean()


def adaptive_weight(
    reconstruction_loss: torch.Tensor, generator_loss: torch.Tensor, last_layer: torch.Tensor, max_weight: float = 1e4
) -> torch.Tensor:
    """The weight at which both losses pull equally at the decoder's last layer.

    Source: VQGAN, arXiv:2012.09841, equation 7.

    Args:
        reconstruction_loss, generator_loss (`torch.Tensor`, scalars): Both with a graph that reaches `last_layer`.
        last_layer (`torch.Tensor`): The weight of the decoder's last layer.
        max_weight (`float`): Upper limit, for a discriminator whose gradient vanishes.
    """
    reconstruction_gradient = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)[0]
    generator_gradient = torch.autograd.grad(generator_loss, last_layer, retain_graph=True)[0]
    weight = reconstruction_gradient.norm() / (generator_gradient.norm() + 1e-4)
    return weight.clamp(0, max_weight).detach()
