"""The protocol of action-conditioned worlds: continue held-out walks at their true actions, and see what holds.

B walks, F frames; h/w pixels. Videos are (B, F, 3, h, w) in [0, 1].
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from datasets import Dataset

from ..models.codec import decode_video, encode_video
from ..pipelines import FARPipeline
from .metrics import Estimate, frame_psnr, gradient_magnitude, mean_where, seen_before
from .protocols import WorldModelProtocol


@dataclass(frozen=True)
class Walks:
    """Recorded walks: `video` (B, F, 3, h, w) in [0, 1], `actions` (B, F), `pose` (B, F, 3); F context and new frames."""

    video: torch.Tensor
    actions: torch.Tensor
    pose: torch.Tensor


@dataclass(frozen=True)
class Predictions:
    """Everything that is compared, each `(B, num_frames, 3, h, w)` in [0, 1] but for `mirrored`, which has one frame.

    `mirrored`: the first frame under the mirrored action; `forgetful`: predicted from the recent frames alone, if memory is
    measured. Both from the same noise as `predicted`.
    """

    truth: torch.Tensor
    predicted: torch.Tensor
    mirrored: torch.Tensor
    repeated: torch.Tensor
    reconstructed: torch.Tensor
    forgetful: torch.Tensor | None = None


def load_walks(dataset: Dataset, protocol: WorldModelProtocol) -> Walks:
    """Cut the protocol's frames from the first walks of a dataset with columns `video`, `actions` and `pose`."""
    if len(dataset) < protocol.num_walks:
        raise ValueError(f"`num_walks` is {protocol.num_walks} but the dataset has {len(dataset)}; ask for fewer.")
    window = slice(protocol.first_context_frame, protocol.last_frame)
    rows = dataset.select(range(protocol.num_walks)).with_format("arrow")
    decoder = dataset.features["video"].feature
    videos, actions, poses = [], [], []
    for row in rows.iter(batch_size=1):
        encoded = row["video"][0].values.slice(window.start, window.stop - window.start).to_pylist()
        if len(encoded) < window.stop - window.start:
            raise ValueError(f"A walk ends before frame {window.stop}, which this protocol needs; use longer walks.")
        videos.append(np.stack([np.asarray(decoder.decode_example(image).convert("RGB")) for image in encoded]))
        actions.append(row["actions"][0].as_py()[window])
        poses.append(row["pose"][0].as_py()[window])
    video = torch.from_numpy(np.stack(videos)).permute(0, 1, 4, 2, 3).float() / 255
    return Walks(video, torch.tensor(actions), torch.tensor(poses))


@torch.no_grad()
def predict_walks(pipe: FARPipeline, walks: Walks, protocol: WorldModelProtocol) -> Predictions:
    """Continue every walk at its true actions, one frame at the mirrored action, and from the recent frames if it is asked."""
    num_context, short_cache = protocol.num_context_frames, protocol.short_cache
    if short_cache is not None and short_cache.isdigit():
        short_cache = int(short_cache)
    left, right = protocol.mirrored_actions
    predicted, mirrored, forgetful, reconstructed = [], [], [], []
    for start in range(0, len(walks.video), protocol.batch_size):
        batch = slice(start, start + protocol.batch_size)
        video, actions = walks.video[batch], walks.actions[batch]
        context = encode_video(pipe.vae, video.flatten(0, 1)).unflatten(0, video.shape[:2])

        def continue_walks(actions: torch.Tensor, num_frames: int, first_shown: int = 0) -> torch.Tensor:
            return pipe(
                video_latents=context[:, first_shown:num_context],
                actions=actions[:, first_shown : num_context + num_frames],
                num_frames=num_frames,
                num_inference_steps=protocol.num_inference_steps,
                guidance_scale=protocol.guidance_scale,
                short_cache=short_cache,
                generator=[torch.Generator().manual_seed(protocol.seed + start + walk) for walk in range(len(video))],
                output_type="pt",
            ).frames

        predicted.append(continue_walks(actions, protocol.num_frames))
        mirrored_actions = actions.clone()
        taken = actions[:, num_context - 1]  # the action that leads to the first new frame
        mirrored_actions[taken == left, num_context - 1] = right
        mirrored_actions[taken == right, num_context - 1] = left
        mirrored.append(continue_walks(mirrored_actions, 1))
        if protocol.num_recent_frames:
            forgetful.append(continue_walks(actions, protocol.num_frames, num_context - protocol.num_recent_frames))
        new_latents = context[:, num_context:]
        reconstructed.append(decode_video(pipe.vae, new_latents.flatten(0, 1)).unflatten(0, new_latents.shape[:2]))

    truth = walks.video[:, num_context:]
    return Predictions(
        truth=truth,
        predicted=torch.cat(predicted).to(truth),
        mirrored=torch.cat(mirrored).to(truth),
        repeated=walks.video[:, num_context - 1 : num_context].expand_as(truth),
        reconstructed=torch.cat(reconstructed).to(truth),
        forgetful=torch.cat(forgetful).to(truth) if forgetful else None,
    )


def score_walks(predictions: Predictions, walks: Walks, protocol: WorldModelProtocol) -> dict:
    """The protocol's figures, ready for JSON: estimates with 95% intervals over walks.

    Returns:
        `dict` with the settings; PSNR by horizon of the prediction, of repeating the last frame and of the VAE's
        reconstruction; the gains over repeating on the first frame and over all; the ratio of gradient magnitudes;
        how often the true action's frame is nearer to the truth than the mirrored one's; gains on views that were seen
        in the context and on those that were not; and `memory`, if it is measured, see [`memory_scores`].
    """
    num_context = protocol.num_context_frames
    psnr = {
        name: frame_psnr(getattr(predictions, name), predictions.truth)
        for name in ("predicted", "repeated", "reconstructed")
    }
    gain = psnr["predicted"] - psnr["repeated"]
    sharpness = gradient_magnitude(predictions.predicted).mean() / gradient_magnitude(predictions.reconstructed).mean()

    taken = walks.actions[:, num_context - 1]
    is_turn = torch.isin(taken, torch.tensor(protocol.mirrored_actions))
    mirrored_psnr = frame_psnr(predictions.mirrored, predictions.truth[:, :1])[:, 0]
    follows = (psnr["predicted"][:, 0] > mirrored_psnr)[is_turn].double()

    frames = slice(num_context, num_context + protocol.num_frames)
    seen = torch.stack([seen_before(pose, slice(0, num_context), frames) for pose in walks.pose])
    by_view = {}
    for name, mask in (("seen", seen), ("unseen", ~seen)):
        by_view[name] = {
            "share_of_frames": mask.double().mean().item(),
            "psnr": Estimate.of(mean_where(psnr["predicted"], mask)).to_json(),
            "gain_over_repeating": Estimate.of(mean_where(gain, mask)).to_json(),
        }
    scores = {
        "protocol": asdict(protocol),
        "psnr_by_horizon": {
            name: [Estimate.of(values[:, frame]).to_json() for frame in range(protocol.num_frames)]
            for name, values in psnr.items()
        },
        "psnr": {name: Estimate.of(values.mean(dim=1)).to_json() for name, values in psnr.items()},
        "gain_on_first_frame": Estimate.of(gain[:, 0]).to_json(),
        "gain_on_all_frames": Estimate.of(gain.mean(dim=1)).to_json(),
        "gradient_ratio": sharpness.item(),
        "follows_actions": Estimate.of(follows).to_json(),
        "by_view": by_view,
    }
    if predictions.forgetful is not None:
        gain = psnr["predicted"] - frame_psnr(predictions.forgetful, predictions.truth)
        scores["memory"] = memory_scores(gain, walks, protocol)
    return scores


def memory_scores(gain: torch.Tensor, walks: Walks, protocol: WorldModelProtocol) -> dict:
    """What the whole context is better by than its recent frames, `gain` `(B, num_frames)` in dB of PSNR: a model that remembers
    is better on views that it was shown before the recent frames and not since (`remembered`), and no better on those that
    it never was (`unseen`)."""
    num_context = protocol.num_context_frames
    first_recent = num_context - protocol.num_recent_frames
    frames = slice(num_context, num_context + protocol.num_frames)
    shown_early, shown_late = (
        torch.stack([seen_before(pose, memory, frames) for pose in walks.pose])
        for memory in (slice(0, first_recent), slice(first_recent, num_context))
    )
    return {
        name: {"share_of_frames": mask.double().mean().item(), "gain": Estimate.of(mean_where(gain, mask)).to_json()}
        for name, mask in (("remembered", shown_early & ~shown_late), ("unseen", ~shown_early & ~shown_late))
    }


def format_scores(scores: dict) -> str:
    """The figures as a table for people."""

    def show(estimate: dict) -> str:
        if estimate["half_width"] is None:
            return f"{estimate['mean']:.2f}"
        return str(Estimate(**estimate))

    def show_view(name: str) -> str:
        view = scores["by_view"][name]
        if not view["psnr"]["num_samples"]:
            return "no frames"
        return (
            f"{show(view['gain_over_repeating'])} dB, PSNR {show(view['psnr'])} "
            f"({view['share_of_frames']:.0%} of the frames)"
        )

    def show_memory(name: str) -> str:
        view = scores["memory"][name]
        if not view["gain"]["num_samples"]:
            return "no frames"
        return f"{show(view['gain'])} dB ({view['share_of_frames']:.0%} of the frames)"

    num_recent = scores["protocol"]["num_recent_frames"]
    horizons = range(1, scores["protocol"]["num_frames"] + 1)
    lines = ["PSNR in dB by frame      " + "".join(f"{horizon:>15}" for horizon in horizons)]
    titles = {"predicted": "FAR", "repeated": "last frame repeated", "reconstructed": "VAE (the ceiling)"}
    for name, title in titles.items():
        lines.append(f"{title:<25}" + "".join(f"{show(each):>15}" for each in scores["psnr_by_horizon"][name]))
    turns = scores["follows_actions"]
    share_of_turns = f"{turns['mean']:.0%} of " if turns["num_samples"] else ""
    lines += [
        "",
        f"gain over repeating, first frame   {show(scores['gain_on_first_frame'])} dB",
        f"gain over repeating, all frames    {show(scores['gain_on_all_frames'])} dB",
        *(f"  of views {name} in the context    {show_view(name)}" for name in scores["by_view"]),
        *(
            f"gain over the last {num_recent} frames, {name:<10}  {show_memory(name)}"
            for name in scores.get("memory", ())
        ),
        f"gradient magnitude, of the VAE's   {scores['gradient_ratio']:.0%}",
        f"nearer to the truth than mirrored  {share_of_turns}{turns['num_samples']} turns",
    ]
    return "\n".join(lines)
