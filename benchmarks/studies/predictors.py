"""Trained models behind one interface: from the context of a clip to its new frames.

B walks, F frames; h/w pixels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol
from unittest.mock import patch

import torch
from diffusers import AutoModel, VQModel

from diffusers_far import ContextPlan, FARPipeline, FlexRoPEConfig, TokenARForVideo
from diffusers_far.baselines.pipeline_video_dit import load_pipeline
from diffusers_far.evaluation.results import pipeline_identity, settings_hash
from diffusers_far.models import frame_network
from diffusers_far.models.codec import decode_codes, decode_video
from diffusers_far.models.functional import position_ids

from .scripts import ROOT
from .settings import Evaluation, Method, Variant
from .walks import WalkClips


class Predictor(Protocol):
    """A model that continues clips."""

    def predict(
        self, clips: WalkClips, method: Method, num_inference_steps: int, generators: Sequence[torch.Generator]
    ) -> torch.Tensor:
        """The new frames, `(B, F_new, 3, h, w)` in [0, 1]."""
        ...

    def reconstruct(self, clips: WalkClips) -> torch.Tensor:
        """The true new frames after a detour over the autoencoder: what a perfect model would score."""
        ...


def decoded(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Frames `(B, F, 3, h, w)` in [0, 1] of latents `(B, F, C, H, W)`."""
    return decode_video(vae, latents.flatten(0, 1)).unflatten(0, latents.shape[:2]).float().cpu()


@dataclass(frozen=True)
class PipelinePredictor:
    """FAR or a Video DiT.

    Args:
        pipe ([`FARPipeline`]): Or a [`VideoDiTPipeline`], for which only the plain method is there.
        short_cache (`str` or `int`): As of a call.
    """

    pipe: FARPipeline
    short_cache: str | int = "exact"

    def predict(
        self, clips: WalkClips, method: Method, num_inference_steps: int, generators: Sequence[torch.Generator]
    ) -> torch.Tensor:
        num_new = clips.truth.shape[1]
        arguments = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": 1.0,
            "generator": list(generators),
            "output_type": "latent",
            "short_cache": self.short_cache,
        }
        context = clips.latents[:, :-num_new]
        with applied(method, self.pipe, num_frames=clips.latents.shape[1]):
            if method.kind == "window":
                latents = predict_in_window(self.pipe, context, clips.actions, num_new, **arguments)
            else:
                latents = self.pipe(
                    video_latents=context, actions=clips.actions, num_frames=num_new, **arguments
                ).frames
        return decoded(self.pipe.vae, latents)

    def reconstruct(self, clips: WalkClips) -> torch.Tensor:
        return decoded(self.pipe.vae, clips.latents[:, -clips.truth.shape[1] :])


@dataclass(frozen=True)
class TokenPredictor:
    """The token-autoregressive baseline, for which only the plain method is there.

    Args:
        model ([`TokenARForVideo`]), vq (`VQModel`): And the autoencoder of its codes.
    """

    model: TokenARForVideo
    vq: VQModel

    def predict(
        self, clips: WalkClips, method: Method, num_inference_steps: int, generators: Sequence[torch.Generator]
    ) -> torch.Tensor:
        num_new = clips.truth.shape[1]
        context = clips.latents[:, :-num_new].flatten(2).to(self.model.device)
        codes = self.model.generate_frames(
            context, clips.actions.to(self.model.device), num_new, generator=list(generators)
        )
        return self._decode(codes.view(len(codes), num_new, *clips.latents.shape[-2:]))

    def reconstruct(self, clips: WalkClips) -> torch.Tensor:
        return self._decode(clips.latents[:, -clips.truth.shape[1] :, 0])

    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        return decode_codes(self.vq, codes.flatten(0, 1)).unflatten(0, codes.shape[:2]).float().cpu()


@dataclass(frozen=True)
class NearestViewPredictor:
    """What memory is worth: each new frame is the shown one that was seen from the nearest pose. It is told all poses.

    Args:
        vae (`torch.nn.Module`): The autoencoder of the latents.
        max_distance (`float`), max_turn (`float`): Of near views; so much place counts as much as so much heading.
    """

    vae: torch.nn.Module
    max_distance: float
    max_turn: float

    def predict(
        self, clips: WalkClips, method: Method, num_inference_steps: int, generators: Sequence[torch.Generator]
    ) -> torch.Tensor:
        num_new = clips.truth.shape[1]
        shown, asked = clips.pose[:, :-num_new], clips.pose[:, -num_new:]
        distance = torch.cdist(asked[..., :2], shown[..., :2])  # (B, F_new, F_context)
        turn = (asked[:, :, None, 2] - shown[:, None, :, 2] + 180).remainder(360) - 180
        nearest = (distance / self.max_distance + turn.abs() / self.max_turn).argmin(dim=2)
        walks = torch.arange(len(nearest))[:, None]
        return decoded(self.vae, clips.latents[walks, nearest])

    def reconstruct(self, clips: WalkClips) -> torch.Tensor:
        return decoded(self.vae, clips.latents[:, -clips.truth.shape[1] :])


def load_predictor(variant: Variant, model_dir: Path, vae_dir: Path, evaluation: Evaluation) -> Predictor:
    """What a variant's training has saved, or its checkpoint, on the accelerator where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if variant.checkpoint is not None:
        model_dir = ROOT / variant.checkpoint
    elif variant.script is None:
        vae = AutoModel.from_pretrained(str(vae_dir)).to(device).eval()
        return NearestViewPredictor(vae, evaluation.max_distance, evaluation.max_turn)
    if variant.script == "train_token_ar":
        model = TokenARForVideo.from_pretrained(model_dir).to(device).eval()
        return TokenPredictor(model, VQModel.from_pretrained(model_dir / "vq").to(device).eval())
    pipe = load_pipeline(model_dir).to(device)
    pipe.set_progress_bar_config(disable=True)
    return PipelinePredictor(pipe)


def checkpoint_hash(checkpoint: str) -> str:
    """Sha256 (hex) of all that predictions of a pipeline depend on, by its folder from the repository's root: with it in the
    records, numbers of an earlier checkpoint are not taken for those of this one."""
    return settings_hash(pipeline_identity(load_pipeline(ROOT / checkpoint)))


@contextmanager
def applied(method: Method, pipe: FARPipeline, num_frames: int) -> Iterator[None]:
    """A pipeline under a method, for clips of `num_frames` frames."""
    if method.kind == "decay":
        pipe.enable_flex_rope(FlexRoPEConfig(method.slope, method.schedule))
        try:
            yield
        finally:
            pipe.disable_flex_rope()
    elif method.kind == "interpolation":
        scale = min(1.0, (trained_frames(pipe) - 1) / max(1, num_frames - 1))
        with patch.object(frame_network, "position_ids", partial(scaled_position_ids, scale=scale)):
            yield
    else:
        yield


def trained_frames(pipe: FARPipeline) -> int:
    """Frames of the longest clip that a pipeline's transformer was trained on.

    Raises:
        ValueError: It does not say.
    """
    num_frames = pipe.transformer.config.trained_frames
    if num_frames is None:
        raise ValueError("`trained_frames` is None in the transformer's config; methods for longer clips need it.")
    return num_frames


def scaled_position_ids(
    plan: ContextPlan, device: torch.device | None = None, has_twins: bool = False, *, scale: float
) -> torch.Tensor:
    """[`position_ids`] with the frames closer together: frame f stands where frame `scale * f` would. Rows and columns
    stay.

    Returns:
        `torch.Tensor` of shape `(L, 3)`, float32.
    """
    positions = position_ids(plan, device, has_twins).float()
    positions[:, 0] *= scale
    return positions


def predict_in_window(
    pipe: FARPipeline, context: torch.Tensor, actions: torch.Tensor, num_frames: int, **arguments
) -> torch.Tensor:
    """Predict frame after frame, each from the frames before it alone that fit into a clip of the training.

    Args:
        pipe ([`FARPipeline`]): Its positions start at 0 anew in every window, as they did in training.
        context (`torch.Tensor` of shape `(B, F, C, H, W)`): Latents.
        actions (`torch.Tensor` of shape `(B, F + num_frames)`): Taken at each frame.
        num_frames (`int`): New frames.
        arguments: Of the pipeline's call.

    Returns:
        `torch.Tensor` of shape `(B, num_frames, C, H, W)`: latents.
    """
    window, video = trained_frames(pipe) - 1, context
    for _ in range(num_frames):
        end = video.shape[1]
        start = max(0, end - window)
        made = pipe(video_latents=video[:, start:], actions=actions[:, start : end + 1], num_frames=1, **arguments)
        video = torch.cat([video, made.frames.to(video)], dim=1)
    return video[:, context.shape[1] :]
