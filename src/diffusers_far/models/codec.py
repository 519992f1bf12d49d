"""Images to latents and back, the same for every image autoencoder of diffusers; to codes and back for `VQModel`."""

import torch


def scale_latents(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Raw latents to the unit variance that the transformer works in: `(latents - shift) * scaling_factor`."""
    return (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor


def unscale_latents(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `scale_latents`."""
    return latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)


def encode_images(vae: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Raw latents of images, without sampling: the mode where the VAE gives a distribution.

    Args:
        vae: `AutoencoderDC`, `AutoencoderKL` or `AutoencoderTiny`.
        images (`torch.Tensor` of shape `(B, 3, height, width)`): In [-1, 1].

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`, not scaled.
    """
    encoded = vae.encode(images)
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    return encoded.latent if hasattr(encoded, "latent") else encoded.latents


@torch.no_grad()
def encode_video(
    vae: torch.nn.Module, video: torch.Tensor, batch_size: int = 64, device: torch.device | None = None
) -> torch.Tensor:
    """Scaled latents of a video, `batch_size` frames at a time.

    Args:
        video (`torch.Tensor` of shape `(F, 3, height, width)`): uint8, or float in [0, 1].
        device (`torch.device`, *optional*): Where the VAE runs; its own device, but for one that is offloaded.

    Returns:
        `torch.Tensor` of shape `(F, C, H, W)`, scaled, in the VAE's dtype.
    """
    parts = []
    for frames in video.split(batch_size):
        images = frames.to(device or vae.device, vae.dtype) / (255 if frames.dtype == torch.uint8 else 1) * 2 - 1
        parts.append(scale_latents(vae, encode_images(vae, images)))
    return torch.cat(parts)


@torch.no_grad()
def decode_video(
    vae: torch.nn.Module, latents: torch.Tensor, batch_size: int = 64, device: torch.device | None = None
) -> torch.Tensor:
    """The video of scaled latents (F, C, H, W), `batch_size` frames at a time: (F, 3, height, width) in [0, 1]."""
    latents = unscale_latents(vae, latents.to(device or vae.device, vae.dtype))
    return torch.cat([(vae.decode(part).sample / 2 + 0.5).clamp(0, 1) for part in latents.split(batch_size)])


@torch.no_grad()
def encode_codes(vq: torch.nn.Module, video: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """Codes of a video, `batch_size` frames at a time.

    Args:
        vq (`VQModel`): A VQ autoencoder.
        video (`torch.Tensor` of shape `(F, 3, height, width)`): uint8, or float in [0, 1].

    Returns:
        `torch.Tensor` of shape `(F, H, W)`, int64, in `[0, num_vq_embeddings)`.
    """
    parts = []
    for frames in video.split(batch_size):
        images = frames.to(vq.device, vq.dtype) / (255 if frames.dtype == torch.uint8 else 1) * 2 - 1
        latents = encode_images(vq, images)
        parts.append(nearest_codes(vq, latents))
    return torch.cat(parts)


def nearest_codes(vq: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """The code that each latent is quantized to: `(B, D, H, W)`, raw, to `(B, H, W)`, int64."""
    _, _, (_, _, codes) = vq.quantize(latents)
    return codes.view(latents.shape[0], *latents.shape[2:])


@torch.no_grad()
def decode_codes(vq: torch.nn.Module, codes: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """The video of codes (F, H, W), `batch_size` frames at a time: (F, 3, height, width) in [0, 1]."""
    parts = []
    for part in codes.to(vq.device).split(batch_size):
        latents = vq.quantize.get_codebook_entry(part.flatten(), shape=(*part.shape, -1))
        # It quantizes once more, which leaves the codebook's entries as they are.
        parts.append((vq.decode(latents).sample / 2 + 0.5).clamp(0, 1))
    return torch.cat(parts)


def spatial_compression(vae: torch.nn.Module) -> int:
    """Pixels per latent along one side."""
    if hasattr(vae, "spatial_compression_ratio"):
        return vae.spatial_compression_ratio
    channels = getattr(vae.config, "block_out_channels", None) or vae.config.encoder_block_out_channels
    return 2 ** (len(channels) - 1)
