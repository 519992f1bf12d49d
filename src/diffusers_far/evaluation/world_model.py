"""The protocol of world models: continue held-out recordings at their true actions, and see what holds.

What only some recordings have is measured where it is there: poses tell which views were shown before, and two actions that
mirror each other whether the model follows actions.

B walks, F frames; h/w pixels. Videos are (B, F, 3, h, w) in [0, 1].
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from datasets import Dataset

from ..data.clips import ClipBatch
from ..data.video_clips import VideoClips
from ..data.workers import Share
from ..models.codec import decode_video, encode_video
from ..pipelines import FARPipeline
from .metrics import (
    Estimate,
    frame_psnr,
    gradient_magnitude,
    mean_where,
    revisited_and_unseen,
    scores_by_view,
    seen_before,
)
from .protocols import RecordingProtocol, WorldModelProtocol


@dataclass(frozen=True)
class Predictions:
    """Everything that is compared, each `(B, num_frames, 3, h, w)` in [0, 1] but for `mirrored`, which has one frame.

    `mirrored`: the first frame under the mirrored action, where two actions mirror each other; `forgetful`: predicted from the
    recent frames alone, if memory is measured. Both from the same noise as `predicted`.
    """

    truth: torch.Tensor
    predicted: torch.Tensor
    repeated: torch.Tensor
    reconstructed: torch.Tensor
    mirrored: torch.Tensor | None = None
    forgetful: torch.Tensor | None = None


def check_dataset(dataset: Dataset, pipe: FARPipeline, protocol: WorldModelProtocol) -> None:
    """Refuse a dataset without a column that the model or the protocol needs, before anything is read or predicted.

    Raises:
        ValueError: Names the column.
    """
    config = pipe.transformer.config
    require_columns(
        dataset,
        {
            "video": "frames are compared",
            "actions": "the model takes actions" if config.num_actions or config.action_dim else None,
            "label": "the model takes classes" if config.num_classes else None,
            "pose": "`num_recent_frames` asks for memory" if protocol.num_recent_frames else None,
        },
    )


def require_columns(dataset: Dataset, reasons: dict[str, str | None]) -> None:
    """Refuse a dataset without a column that there is a reason for.

    Raises:
        ValueError: Names the column.
    """
    for column, reason in reasons.items():
        if reason and column not in dataset.column_names:
            raise ValueError(
                f"The dataset has the columns {dataset.column_names} and no `{column}`, but {reason}; prepare it with "
                f"`{column}`, or evaluate another model or protocol."
            )


def load_walks(dataset: Dataset, protocol: WorldModelProtocol) -> ClipBatch:
    """Cut the protocol's frames from the first walks that are long enough: F context and new frames of each.

    Args:
        dataset (`datasets.Dataset`): A column `video`, images or files; and `actions`, `pose`, `label` where they exist.
        protocol ([`WorldModelProtocol`]).

    Raises:
        ValueError: Too few walks that are long enough, frames of several sizes, or conditions that do not fit the frames.
    """
    clips = VideoClips(dataset, conditions=("actions", "pose", "label"))
    starts = dict.fromkeys(long_enough(clips, protocol), protocol.first_context_frame)
    return cut_walks(clips, starts, protocol.last_frame - protocol.first_context_frame)


def long_enough(clips: VideoClips, protocol: RecordingProtocol) -> list[int]:
    """The rows of the protocol's walks.

    Raises:
        ValueError: There are too few.
    """
    rows = np.flatnonzero(clips.num_frames >= protocol.last_frame)[: protocol.num_walks].tolist()
    if len(rows) < protocol.num_walks:
        raise ValueError(
            f"`num_walks` is {protocol.num_walks}, but {len(rows)} of {len(clips)} recordings reach frame "
            f"{protocol.last_frame} (the longest has {max(clips.num_frames)}); lower `num_walks`, `first_context_frame`, "
            "`num_context_frames` or `num_frames`."
        )
    return rows


def cut_walks(clips: VideoClips, starts: dict[int, int], num_frames: int) -> ClipBatch:
    """The frames of some rows, `starts` has the first one of each, as a batch.

    Raises:
        ValueError: Frames of several sizes, or conditions that do not fit the frames.
    """
    walks = []
    for row, start in starts.items():
        walks.append(clips.clip(row, start, num_frames))
        if walks[-1].frames.shape != walks[0].frames.shape:
            raise ValueError(
                f"Row {row} has frames of {tuple(walks[-1].frames.shape[-2:])} pixels and row {next(iter(starts))} of "
                f"{tuple(walks[0].frames.shape[-2:])}; prepare the dataset with one size."
            )
    return ClipBatch.stack(walks)


@torch.no_grad()
def predict_walks(
    pipe: FARPipeline,
    walks: ClipBatch,
    protocol: WorldModelProtocol,
    on_batch_end: Callable[[int], object] = lambda num_walks: None,
    share: Share = Share(),
) -> Predictions:
    """Continue every walk at its true actions, one frame at the mirrored action, and from the recent frames if it is asked.
    `on_batch_end` is told how many walks are done since the last time. Of several processes each predicts its `share`, and has
    everything in the end."""
    num_context = protocol.num_context_frames
    config = pipe.transformer.config
    takes_actions = config.num_actions is not None or config.action_dim is not None

    def predict_batch(numbers: range) -> dict[str, torch.Tensor]:
        batch = walks[numbers.start : numbers.stop]
        video, labels = batch.video, batch.labels
        actions = batch.actions if takes_actions else None
        context = encode_video(pipe.vae, video.flatten(0, 1)).unflatten(0, video.shape[:2])

        def continue_walks(actions: torch.Tensor | None, num_frames: int, first_shown: int = 0) -> torch.Tensor:
            return pipe(
                video_latents=context[:, first_shown:num_context],
                actions=None if actions is None else actions[:, first_shown : num_context + num_frames],
                class_labels=None if config.num_classes is None else labels,
                num_frames=num_frames,
                **protocol.how_frames_are_made(),
                generator=protocol.noise_of(numbers),
                output_type="pt",
            ).frames

        made = {"predicted": continue_walks(actions, protocol.num_frames)}
        if protocol.mirrored_actions is not None:
            left, right = protocol.mirrored_actions
            mirrored_actions = actions.clone()
            taken = actions[:, num_context - 1]  # the action that leads to the first new frame
            mirrored_actions[taken == left, num_context - 1] = right
            mirrored_actions[taken == right, num_context - 1] = left
            made["mirrored"] = continue_walks(mirrored_actions, 1)
        if protocol.num_recent_frames:
            made["forgetful"] = continue_walks(actions, protocol.num_frames, num_context - protocol.num_recent_frames)
        new_latents = context[:, num_context:]
        made["reconstructed"] = decode_video(pipe.vae, new_latents.flatten(0, 1)).unflatten(0, new_latents.shape[:2])
        on_batch_end(len(numbers))
        return {name: frames.to(video) for name, frames in made.items()}

    of_batches = share.do(predict_batch, protocol.batches(len(walks)))
    video = walks.video
    truth = video[:, num_context:]
    return Predictions(
        truth=truth,
        repeated=video[:, num_context - 1 : num_context].expand_as(truth),
        **{name: torch.cat([made[name] for made in of_batches]) for name in of_batches[0]},
    )


def measure_walks(
    pipe: FARPipeline,
    walks: ClipBatch,
    protocol: WorldModelProtocol,
    on_batch_end: Callable[[int], object] = lambda num_walks: None,
    share: Share = Share(),
) -> dict:
    """Predict every walk and score it; see [`predict_walks`] and [`score_walks`]."""
    return score_walks(predict_walks(pipe, walks, protocol, on_batch_end, share), walks, protocol)


def score_walks(predictions: Predictions, walks: ClipBatch, protocol: WorldModelProtocol) -> dict:
    """The protocol's figures, ready for JSON: estimates with 95% intervals over walks.

    Returns:
        `dict` with the settings; PSNR by horizon of the prediction, of repeating the last frame and of the VAE's
        reconstruction; the gains over repeating on the first frame and over all; the same on the frames that change
        (`changed`); the ratio of gradient magnitudes; and, where they can be measured, how often the true action's frame is
        nearer to the truth than the mirrored one's (`follows_actions`), gains on views that were seen in the context and on
        those that were not (`by_view`), and `memory`, see [`memory_scores`].
    """
    num_context = protocol.num_context_frames
    psnr = {
        name: frame_psnr(getattr(predictions, name), predictions.truth)
        for name in ("predicted", "repeated", "reconstructed")
    }
    gain = psnr["predicted"] - psnr["repeated"]
    sharpness = gradient_magnitude(predictions.predicted).mean() / gradient_magnitude(predictions.reconstructed).mean()
    has_changed = psnr["repeated"] < protocol.min_repeated_psnr
    everywhere = torch.ones_like(has_changed)
    scores = {
        "protocol": asdict(protocol),
        **_psnr_scores(psnr, everywhere),
        "gain_on_first_frame": Estimate.of(gain[:, 0]).to_json(),
        "gain_on_all_frames": Estimate.of(gain.mean(dim=1)).to_json(),
        "changed": {
            "share_of_frames": has_changed.double().mean().item(),
            **_psnr_scores(psnr, has_changed),
            "gain_over_repeating": Estimate.of(mean_where(gain, has_changed)).to_json(),
        },
        "gradient_ratio": sharpness.item(),
    }
    if predictions.mirrored is not None:
        is_turn = torch.isin(walks.actions[:, num_context - 1], torch.tensor(protocol.mirrored_actions))
        mirrored_psnr = frame_psnr(predictions.mirrored, predictions.truth[:, :1])[:, 0]
        follows = (psnr["predicted"][:, 0] > mirrored_psnr)[is_turn].double()
        scores["follows_actions"] = Estimate.of(follows).to_json()
    if walks.pose is not None:
        seen = _seen_views(walks, protocol, slice(0, num_context))
        scores["by_view"] = scores_by_view(psnr["predicted"], gain, {"seen": seen, "unseen": ~seen})
    if predictions.forgetful is not None:
        gain = psnr["predicted"] - frame_psnr(predictions.forgetful, predictions.truth)
        scores["memory"] = memory_scores(gain, walks, protocol)
    return scores


def _psnr_scores(psnr: dict[str, torch.Tensor], mask: torch.Tensor) -> dict:
    """Means over the masked frames, of each horizon and of all: masks and PSNR are (B, num_frames)."""
    horizons = range(mask.shape[1])
    return {
        "psnr_by_horizon": {
            name: [Estimate.of(values[:, frame][mask[:, frame]]).to_json() for frame in horizons]
            for name, values in psnr.items()
        },
        "psnr": {name: Estimate.of(mean_where(values, mask)).to_json() for name, values in psnr.items()},
    }


def _seen_views(walks: ClipBatch, protocol: WorldModelProtocol, memory: slice) -> torch.Tensor:
    """Which new frames show a view that a stretch of the context showed: `(B, num_frames)`, bool."""
    frames = slice(protocol.num_context_frames, protocol.num_context_frames + protocol.num_frames)
    near = {"max_distance": protocol.max_distance, "max_turn": protocol.max_turn}
    return torch.stack([seen_before(pose, memory, frames, **near) for pose in walks.pose])


def memory_scores(gain: torch.Tensor, walks: ClipBatch, protocol: WorldModelProtocol) -> dict:
    """What the whole context is better by than its recent frames, `gain` `(B, num_frames)` in dB of PSNR: a model that remembers
    is better on views that it was shown before the recent frames and not since (`remembered`: a revisit, long ago being
    told by place), and no better on those that it never was (`unseen`)."""
    num_context = protocol.num_context_frames
    first_recent = num_context - protocol.num_recent_frames
    shown_early, shown_late = (
        _seen_views(walks, protocol, memory) for memory in (slice(0, first_recent), slice(first_recent, num_context))
    )
    remembered, unseen = revisited_and_unseen(shown_early, shown_late)
    return {
        name: {"share_of_frames": mask.double().mean().item(), "gain": Estimate.of(mean_where(gain, mask)).to_json()}
        for name, mask in (("remembered", remembered), ("unseen", unseen))
    }


def format_scores(scores: dict) -> str:
    """The figures as a table for people."""

    def show(estimate: dict) -> str:
        if estimate["mean"] is None:
            return "no frames"
        if estimate["half_width"] is None:
            return f"{estimate['mean']:.2f}"
        return str(Estimate(**estimate))

    def show_psnr(by_horizon: dict) -> list[str]:
        titles = {"predicted": "FAR", "repeated": "last frame repeated", "reconstructed": "VAE (the ceiling)"}
        return [
            f"{title:<25}" + "".join(f"{show(each):>15}" for each in by_horizon[name])
            for name, title in titles.items()
        ]

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

    protocol, changed = scores["protocol"], scores["changed"]
    lines = ["PSNR in dB by frame      " + "".join(f"{frame + 1:>15}" for frame in range(protocol["num_frames"]))]
    lines += show_psnr(scores["psnr_by_horizon"])
    if 0 < changed["share_of_frames"] < 1:
        lines += [f"of the {changed['share_of_frames']:.0%} that change:", *show_psnr(changed["psnr_by_horizon"])]
    gains = {
        "first frame": show(scores["gain_on_first_frame"]) + " dB",
        "all frames": show(scores["gain_on_all_frames"]) + " dB",
        "frames that change": (
            f"{show(changed['gain_over_repeating'])} dB ({changed['share_of_frames']:.0%} of the frames)"
            if changed["share_of_frames"]
            else "no frames"
        ),
    }
    lines += ["", *(f"gain over repeating, {name:<20} {gain}" for name, gain in gains.items())]
    for name in scores.get("by_view", ()):
        lines.append(f"  of views {name} in the context    {show_view(name)}")
    for name in scores.get("memory", ()):
        lines.append(f"gain over the last {protocol['num_recent_frames']} frames, {name:<10}  {show_memory(name)}")
    lines.append(f"gradient magnitude, of the VAE's   {scores['gradient_ratio']:.0%}")
    if "follows_actions" in scores:
        turns = scores["follows_actions"]
        share_of_turns = f"{turns['mean']:.0%} of " if turns["num_samples"] else ""
        lines.append(f"nearer to the truth than mirrored  {share_of_turns}{turns['num_samples']} turns")
    return "\n".join(lines)
