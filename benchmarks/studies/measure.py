"""One model on one task: what it predicts on every walk, and how near that is to the truth.

B walks, F frames; h/w pixels.
"""

import math

import torch

from diffusers_far.evaluation.metrics import frame_psnr, gradient_magnitude, mean_where

from .predictors import Predictor
from .settings import Evaluation, Method, Task
from .walks import HeldOutWalks, WalkClips


DIGITS = 4


@torch.no_grad()
def measure(predictor: Predictor, walks: HeldOutWalks, task: Task, method: Method, evaluation: Evaluation) -> dict:
    """The scores of a model, ready for JSON.

    Returns:
        `dict`: `by_walk`, a list per metric with a number for each walk (`None` where it has no such frame):

        - `psnr`, `psnr_first`: dB, the mean over the new frames, and over the first `num_first_frames` of them;
        - `revisited`, `unseen`: dB, on such frames;
        - `gain`: dB over repeating the last frame of the context;
        - `sharpness`: mean gradient magnitude, of the autoencoder's;
        - `repeated`, `codec`: dB of that repetition, and of the autoencoder's own reconstruction;

        and `psnr_by_frame`, the mean over walks of each new frame.
    """
    by_walk, psnr_by_frame = {}, []
    for start in range(0, evaluation.num_walks, evaluation.batch_size):
        numbers = range(start, min(start + evaluation.batch_size, evaluation.num_walks))
        clips = walks.clips(task, numbers)
        generators = [torch.Generator().manual_seed(evaluation.seed + walk) for walk in numbers]
        predicted = predictor.predict(clips, method, evaluation.num_inference_steps, generators)
        scores, psnr = score(predicted, predictor.reconstruct(clips), clips, evaluation.num_first_frames)
        for metric, values in scores.items():
            by_walk.setdefault(metric, []).extend(values)
        psnr_by_frame.append(psnr)
    mean = torch.cat(psnr_by_frame).mean(dim=0)
    return {"by_walk": by_walk, "psnr_by_frame": [round(value, DIGITS) for value in mean.tolist()]}


def score(
    predicted: torch.Tensor, reconstructed: torch.Tensor, clips: WalkClips, num_first_frames: int
) -> tuple[dict[str, list[float | None]], torch.Tensor]:
    """The metrics of each walk, and the PSNR of each frame, `(B, F)`.

    Args:
        predicted, reconstructed (`torch.Tensor` of shape `(B, F, 3, h, w)`): In [0, 1].
        clips ([`WalkClips`]): The truth.
        num_first_frames (`int`): For `psnr_first`.
    """
    psnr = frame_psnr(predicted, clips.truth)
    repeated = frame_psnr(clips.last_shown.expand_as(clips.truth), clips.truth).mean(dim=1)
    sharpness = gradient_magnitude(predicted).mean(dim=1) / gradient_magnitude(reconstructed).mean(dim=1)
    scores = {
        "psnr": psnr.mean(dim=1),
        "psnr_first": psnr[:, :num_first_frames].mean(dim=1),
        "revisited": mean_where(psnr, clips.revisited),
        "unseen": mean_where(psnr, clips.unseen),
        "gain": psnr.mean(dim=1) - repeated,
        "sharpness": sharpness,
        "repeated": repeated,
        "codec": frame_psnr(reconstructed, clips.truth).mean(dim=1),
    }
    return {name: [rounded(value) for value in values.tolist()] for name, values in scores.items()}, psnr


def rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, DIGITS)
