"""Images to latents and back, the same for every image autoencoder of diffusers; to codes and back for `VQModel`."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .internals import execution_device


def latent_statistics(
    vae: torch.nn.Module, latents: torch.Tensor
) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """Shift and factor of `(latents - shift) * factor`, which brings raw latents to unit variance.

    A VAE has a `scaling_factor`, a `shift_factor` (or `latents_mean`, per channel), and a `latents_std` per channel to
    divide by; what its config does not have is 1 or 0. `AutoencoderTiny`'s `latent_magnitude` and `latent_shift` only say
    how latents are stored as bytes.

    Args:
        latents (`torch.Tensor` of shape `(..., C, H, W)`): Gives channels, dtype and device.

    Raises:
        ValueError: A field of the VAE's config is no statistic of these channels, or two of them contradict each other.
    """
    config, num_channels = vae.config, latents.shape[-3]
    per_channel = {}
    for name in ("latents_mean", "latents_std"):
        if config.get(name) is not None:
            per_channel[name] = _channel_statistic(name, config[name], num_channels)
    shift, factor = config.get("shift_factor"), config.get("scaling_factor")
    if factor is None and per_channel:
        factor = 1.0
    if not isinstance(factor, (int, float)) or not math.isfinite(factor) or factor == 0:
        raise ValueError(
            f"`scaling_factor` of the VAE's config is {factor}; give 1 / the standard deviation of its latents: "
            "`vae.register_to_config(scaling_factor=...)`."
        )
    if shift is not None and not (isinstance(shift, (int, float)) and math.isfinite(shift)):
        raise ValueError(f"`shift_factor` of the VAE's config is {shift}; give a finite number, or None.")
    if shift and per_channel:
        raise ValueError(
            f"The VAE's config has `shift_factor` {shift} and `{next(iter(per_channel))}`, which say the same twice; set "
            "one of them to None."
        )
    if not per_channel:
        return shift or 0.0, factor
    mean, std = per_channel.get("latents_mean", torch.zeros(())), per_channel.get("latents_std", torch.ones(()))
    return mean.to(latents), (factor / std).to(latents)


def _channel_statistic(name: str, values, num_channels: int) -> torch.Tensor:
    """A statistic of a VAE's config, `(C, 1, 1)`, float64."""
    try:
        statistic = torch.tensor(values, dtype=torch.float64).flatten()
    except (TypeError, ValueError, RuntimeError):
        statistic = torch.empty(0)  # numbers of no channel
    is_deviation = name == "latents_std"
    if len(statistic) != num_channels or not statistic.isfinite().all() or (is_deviation and statistic.min() <= 0):
        raise ValueError(
            f"`{name}` of the VAE's config is {values}; it has one finite number for each of the {num_channels} "
            "latent channels, above 0 for the deviation. Correct it, or set it to None."
        )
    return statistic.view(-1, 1, 1)


def scale_latents(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Raw latents to the unit variance that the transformer works in: `(latents - shift) * factor`."""
    shift, factor = latent_statistics(vae, latents)
    return (latents - shift) * factor


def unscale_latents(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `scale_latents`."""
    shift, factor = latent_statistics(vae, latents)
    return latents / factor + shift


@contextmanager
def without_overflow(vae: torch.nn.Module) -> Iterator[None]:
    """Let a VAE whose config says `force_upcast` compute in float32 where it is in float16, whose range it exceeds."""
    is_upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    if is_upcast:
        vae.float()
    try:
        yield
    finally:
        if is_upcast:
            vae.half()


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
    parts, dtype, device = [], vae.dtype, device or execution_device(vae)
    with without_overflow(vae):
        for frames in video.split(batch_size):
            images = frames.to(device, vae.dtype) / (255 if frames.dtype == torch.uint8 else 1) * 2 - 1
            parts.append(scale_latents(vae, encode_images(vae, images)))
    return torch.cat(parts).to(dtype)


@torch.no_grad()
def decode_video(
    vae: torch.nn.Module, latents: torch.Tensor, batch_size: int = 64, device: torch.device | None = None
) -> torch.Tensor:
    """The video of scaled latents (F, C, H, W), `batch_size` frames at a time: (F, 3, height, width) in [0, 1]."""
    dtype = vae.dtype
    with without_overflow(vae):
        latents = unscale_latents(vae, latents.to(device or execution_device(vae), vae.dtype))
        parts = [(vae.decode(part).sample / 2 + 0.5).clamp(0, 1) for part in latents.split(batch_size)]
    return torch.cat(parts).to(dtype)


@torch.no_grad()
def encode_codes(vq: torch.nn.Module, video: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """Codes of a video, `batch_size` frames at a time.

    Args:
        vq (`VQModel`): A VQ autoencoder.
        video (`torch.Tensor` of shape `(F, 3, height, width)`): uint8, or float in [0, 1].

    Returns:
        `torch.Tensor` of shape `(F, H, W)`, int64, in `[0, num_vq_embeddings)`.
    """
    parts, device = [], execution_device(vq)
    with without_overflow(vq):
        for frames in video.split(batch_size):
            images = frames.to(device, vq.dtype) / (255 if frames.dtype == torch.uint8 else 1) * 2 - 1
            parts.append(nearest_codes(vq, encode_images(vq, images)))
    return torch.cat(parts)


def nearest_codes(vq: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """The code that each latent is quantized to: `(B, D, H, W)`, raw, to `(B, H, W)`, int64."""
    _, _, (_, _, codes) = vq.quantize(latents)
    return codes.view(latents.shape[0], *latents.shape[2:])


@torch.no_grad()
def decode_codes(vq: torch.nn.Module, codes: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """The video of codes (F, H, W), `batch_size` frames at a time: (F, 3, height, width) in [0, 1]."""
    parts, dtype = [], vq.dtype
    with without_overflow(vq):
        for part in codes.to(execution_device(vq)).split(batch_size):
            latents = vq.quantize.get_codebook_entry(part.flatten(), shape=(*part.shape, -1))
            # It quantizes once more, which leaves the codebook's entries as they are.
            parts.append((vq.decode(latents).sample / 2 + 0.5).clamp(0, 1))
    return torch.cat(parts).to(dtype)


def spatial_compression(vae: torch.nn.Module) -> int:
    """Pixels per latent along one side."""
    if hasattr(vae, "spatial_compression_ratio"):
        return vae.spatial_compression_ratio
    channels = getattr(vae.config, "block_out_channels", None) or vae.config.encoder_block_out_channels
    return 2 ** (len(channels) - 1)
