"""What a FAR training is measured by on held-out trajectories, with the same draws every time.

B batch, F frames, C latent channels, H/W latent height/width; h/w pixels.
"""

import numpy as np
import torch

from ..data.faults import BadExampleError
from ..models.codec import decode_video
from ..models.loading import name_some
from .clips import ClipBatch, ClipDataset, cut_clips, usable_trajectories
from .objective import add_noise, velocity_loss
from .order import step_generator


NOISE_LEVELS = (100, 300, 500, 700, 900)  # timesteps at which the held-out loss is taken


def validation_clips(dataset: ClipDataset, num_clips: int, num_frames: int, interval: int = 1) -> ClipBatch:
    """The same clips in every run: of trajectories spread over the dataset, at fixed random starts.

    Raises:
        BadExampleError: Latents or actions are not finite; names the trajectories.
    """
    usable = usable_trajectories(dataset, num_frames, interval)
    places = np.linspace(0, len(usable) - 1, num_clips).round().astype(int)
    generators = [step_generator(0, 0, number) for number in range(num_clips)]
    clips = cut_clips(dataset, usable[places].tolist(), generators, num_frames, interval)
    faulty = clips.not_finite() if isinstance(clips, ClipBatch) else ()
    if faulty:
        raise BadExampleError(
            f"The split that is held out has NaN or infinite values in {name_some(set(faulty))}; mend or remove them."
        )
    return clips


@torch.no_grad()
def held_out_losses(transformer, clips: ClipBatch, *, batch_size: int) -> dict[int, float]:
    """The loss at each of `NOISE_LEVELS`, of the last frame after a clean context as at inference.

    For a model that is not frame-causal all frames are noisy, at the same level.

    Args:
        transformer ([`FARTransformer3DModel`]): In `eval` mode, so that no condition is dropped.
        clips (`ClipBatch`): On the transformer's device.
        batch_size (`int`): Clips that go through the transformer at once.
    """
    num_clips, num_frames = clips.latents.shape[:2]
    num_noisy = 1 if transformer.config.frame_causal else num_frames
    noise = torch.stack(
        [torch.randn(clips.latents.shape[1:], generator=step_generator(0, 1, number)) for number in range(num_clips)]
    ).to(clips.latents)
    conditions = clips.conditions(transformer.config)
    losses = {}
    for level in NOISE_LEVELS:
        timestep = torch.full((num_clips, num_frames), -1.0, device=noise.device)
        timestep[:, num_frames - num_noisy :] = level
        total = 0.0
        for first in range(0, num_clips, batch_size):
            part = slice(first, first + batch_size)
            velocity = transformer(
                add_noise(clips.latents[part], noise[part], timestep[part]),
                timestep[part],
                **{name: value[part] for name, value in conditions.items()},
            ).sample
            loss = velocity_loss(velocity, clips.latents[part], noise[part], timestep[part])
            total += loss.item() * len(timestep[part])
        losses[level] = total / num_clips
    return losses


@torch.no_grad()
def rollout(
    pipeline, clips: ClipBatch, *, num_context_frames: int, num_inference_steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predict the frames of `clips` after the context, at the true actions.

    Returns:
        Predicted and true frames, each `(B, F - num_context_frames, 3, h, w)` in [0, 1]. The true ones are decoded from
        their latents, so that what the VAE loses does not count.
    """
    num_frames = clips.latents.shape[1] - num_context_frames
    config = pipeline.transformer.config
    takes_actions = config.num_actions is not None or config.action_dim is not None
    generators = [step_generator(0, 2, number) for number in range(len(clips.latents))]
    predicted = pipeline(
        video_latents=clips.latents[:, :num_context_frames],
        actions=clips.actions if takes_actions else None,
        class_labels=clips.labels if config.num_classes is not None else None,
        num_frames=num_frames,
        num_inference_steps=num_inference_steps,
        generator=generators,
        output_type="pt",
    ).frames
    true_latents = clips.latents[:, num_context_frames:]
    truth = decode_video(pipeline.vae, true_latents.flatten(0, 1)).unflatten(0, true_latents.shape[:2])
    return predicted.float().cpu(), truth.float().cpu()


def psnr_metrics(name: str, predicted: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """`psnr_per_horizon` as metrics: `{name}_of_frame_1` and so on, and their mean as `name`."""
    values = psnr_per_horizon(predicted, truth)
    metrics = {f"{name}_of_frame_{horizon}": value for horizon, value in enumerate(values, start=1)}
    return metrics | {name: np.mean(values).item()}


def psnr_per_horizon(predicted: torch.Tensor, truth: torch.Tensor) -> list[float]:
    """PSNR in dB of the first, second, ... predicted frame: each video's own, then the mean over videos.

    Args:
        predicted, truth (`torch.Tensor` of shape `(B, F, 3, h, w)`): In [0, 1].
    """
    squared_error = (predicted - truth).square().flatten(2).mean(dim=2)
    return (-10 * squared_error.clamp(min=1e-10).log10()).mean(dim=0).tolist()
