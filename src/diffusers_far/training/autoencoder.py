"""What an autoencoder is trained on and measured by; the loop is in `examples/train_vae.py`."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from ..models.codec import encode_images, scale_latents


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
