"""What a token-autoregressive model is trained on and measured by; the loop is in `examples/train_token_ar.py`.

Its clips are those of a FAR training, with the codes of a VQ autoencoder as latents of one channel.

B batch, F frames, H/W codes along a frame's sides, T = H * W codes per frame; h/w pixels.
"""

import torch

from ..baselines.token_ar import TokenARConfig, TokenARForVideo
from ..data.clips import ClipBatch
from ..data.latents import LatentDataset
from ..models.codec import decode_codes
from ..models.frames import shift_actions
from .clips import step_generator
from .objective import ObjectiveDraw
from .validation import psnr_metrics, validation_clips


def check_codes(codes: LatentDataset, vq: torch.nn.Module) -> None:
    """Refuse data that is not of the codes of `vq`, before any step.

    Raises:
        ValueError: The folder holds latents, or another autoencoder's codes.
    """
    dtype = codes.clip(0, 0, 1).latents.dtype
    if dtype != torch.int64:
        raise ValueError(
            f"{str(codes.latents_dir)!r} holds latents of type {dtype}, but a token model is trained on codes; run "
            "cache_latents.py with a `VQModel`."
        )
    codes.require_vae(vq)


def token_conditions(
    clips: ClipBatch, config: TokenARConfig, draw: ObjectiveDraw | None = None
) -> dict[str, torch.Tensor]:
    """The actions that led to the frames of `clips`, as keyword arguments of the model; what `draw` drops is null."""
    if config.num_actions is None:
        return {}
    actions, mask = shift_actions(clips.actions, action_shift=1, num_frames=clips.num_frames)
    return {"actions": actions, "action_mask": mask if draw is None else mask & draw.keeps_action}


def token_loss(
    model: torch.nn.Module, config: TokenARConfig, clips: ClipBatch, draw: ObjectiveDraw | None = None
) -> torch.Tensor:
    """Mean cross entropy of the codes, in nats. `model` is a [`TokenARForVideo`], or what wraps it for training."""
    codes = clips.latents.flatten(2)  # (B, F, T)
    return model(codes, labels=codes, **token_conditions(clips, config, draw)).loss


@torch.no_grad()
def measure_tokens(
    model: TokenARForVideo,
    vq: torch.nn.Module,
    codes: LatentDataset,
    *,
    num_frames: int,
    num_clips: int,
    num_videos: int,
    num_new_frames: int,
    batch_size: int,
) -> dict[str, float]:
    """Held-out loss, and PSNR of each generated frame against the VQ autoencoder's reconstruction of the true one.

    Args:
        model (`TokenARForVideo`): In `eval` mode.
        vq (`VQModel`): That made the codes.
        codes (`LatentDataset`): Held out; the same clips of it are measured every time.
        num_frames (`int`): Of each clip.
        num_clips (`int`): Clips of the loss.
        num_videos (`int`): Clips that are continued; 0: none.
        num_new_frames (`int`): Frames that are generated in each, after `num_frames - num_new_frames` of context.
        batch_size (`int`): Clips that go through the model at once for the loss.

    Returns:
        `loss`, nats per code; where videos were continued `psnr` and `psnr_of_frame_...`, dB, and `repeated_psnr...` of the
        last context frame shown again.
    """
    clips = validation_clips(codes, num_clips, num_frames).to(model.device)
    total = 0.0
    for first in range(0, num_clips, batch_size):
        part = clips[first : first + batch_size]
        total += token_loss(model, model.config, part).item() * len(part)
    metrics = {"loss": total / num_clips}
    if not num_videos or num_new_frames >= num_frames:
        return metrics
    clips = validation_clips(codes, num_videos, num_frames).to(model.device)
    generated, true = continue_clips(model, vq, clips, num_new_frames)
    last_context_frame = decode_codes(vq, clips.latents[:, num_frames - num_new_frames - 1, 0]).float().cpu()
    metrics |= psnr_metrics("psnr", generated, true)
    return metrics | psnr_metrics("repeated_psnr", last_context_frame[:, None], true)


@torch.no_grad()
def continue_clips(
    model: TokenARForVideo, vq: torch.nn.Module, clips: ClipBatch, num_new_frames: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generate the last frames of `clips` after the others, at the true actions and with fixed seeds.

    Returns:
        Generated and true frames, each `(B, num_new_frames, 3, h, w)` in [0, 1]. The true ones are decoded from their
        codes, so that what the VQ autoencoder loses does not count.
    """
    batch_size, num_frames, _, height, width = clips.latents.shape
    generated = model.generate_frames(
        clips.latents[:, : num_frames - num_new_frames].flatten(2),
        clips.actions if model.config.num_actions is not None else None,
        num_new_frames,
        generator=[step_generator(0, 2, number) for number in range(batch_size)],
    )
    true = clips.latents[:, num_frames - num_new_frames :].flatten(2)
    videos = [
        decode_codes(vq, codes.reshape(-1, height, width)).unflatten(0, (batch_size, num_new_frames))
        for codes in (generated, true)
    ]
    return videos[0].float().cpu(), videos[1].float().cpu()
