"""Running the cases of a protocol: read the true video, roll out, measure, keep.

B cases, F frames; h/w pixels. Videos are (B, F, 3, h, w) in [0, 1].
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from ..data.clips import Clip, evenly_spaced
from ..data.video_clips import VideoClips
from ..data.workers import Share
from ..pipelines import FARPipeline
from .media import contact_sheet, write_mp4
from .metrics import frame_lpips, frame_psnr, frame_ssim, revisits_by_age
from .networks import LPIPS, EfficientNetLite0
from .protocols import Case, ContinuationProtocol, LatteProtocol, RolloutProtocol, Task
from .results import ResultFolder


SHEET_FRAMES = 10  # of a sample, on the contact sheet
SMALL_SIDE = 128  # frames below are shown enlarged


class TrueVideos:
    """The clips that a protocol asks for, by number.

    Args:
        dataset (`datasets.Dataset`): A row per video: `video` (images or a file), and `actions`, `label` and `pose` where
            they exist.
        protocol ([`RolloutProtocol`]): How many, how long, where they start.
        transformer_config: Which conditions the model takes.

    Attributes:
        rows (`list[int]`): The row of each video.
        num_too_short (`int`): Rows that are not long enough.

    Raises:
        ValueError: Too few videos that are long enough, or a column that the model needs is missing.
    """

    def __init__(self, dataset: Dataset, protocol: RolloutProtocol, transformer_config) -> None:
        self.protocol = protocol
        self.needs_actions = transformer_config.num_actions is not None or transformer_config.action_dim is not None
        self.needs_label = transformer_config.num_classes is not None and getattr(protocol, "condition", "") != "free"
        check_conditions(dataset, protocol, self.needs_actions, self.needs_label, transformer_config)
        conditions = {"actions": self.needs_actions, "label": self.needs_label, "pose": True}
        self.clips = VideoClips(dataset, conditions=[name for name, is_needed in conditions.items() if is_needed])
        usable = np.flatnonzero(self.clips.num_frames >= protocol.num_frames_needed)
        self.num_too_short = len(self.clips.num_frames) - len(usable)
        if len(usable) < protocol.num_videos:
            raise ValueError(
                f"`num_videos` is {protocol.num_videos}, but {len(usable)} of {len(dataset)} videos have the "
                f"{protocol.num_frames_needed} frames that this protocol needs; lower it, or the numbers of frames."
            )
        self.rows = usable[evenly_spaced(len(usable), protocol.num_videos)].tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def clip(self, video: int, num_frames: int) -> Clip:
        """The first `num_frames` frames of a video's clip, with the conditions that the model takes, and poses."""
        row = self.rows[video]
        start = self.protocol.first_frame(video, int(self.clips.num_frames[row]))
        return self.clips.clip(row, start, num_frames, self.protocol.frame_interval)


def check_conditions(
    dataset: Dataset, protocol: RolloutProtocol, needs_actions: bool, needs_label: bool, transformer_config
) -> None:
    """Refuse a dataset without the columns that the model takes, or a protocol that the model cannot follow."""
    for column, is_needed in (("actions", needs_actions), ("label", needs_label)):
        if is_needed and column not in dataset.column_names:
            raise ValueError(
                f"The model takes {column}, but the dataset has the columns {dataset.column_names}; name one with "
                f"`{column}`."
            )
    if needs_actions and protocol.frame_interval > 1:
        raise ValueError(
            f"`frame_interval` is {protocol.frame_interval}, and the actions between two frames would be lost; prepare "
            "the dataset with `far prepare --frame_interval ... --combine_actions ...`, and leave it at 1 here."
        )
    is_under_classes = isinstance(protocol, LatteProtocol) and protocol.condition == "class"
    if is_under_classes and transformer_config.num_classes is None:
        raise ValueError("`condition` is 'class', but this model knows no classes; pass `--condition free`.")


@dataclass(frozen=True)
class MetricNetworks:
    """The networks that metrics need; what is `None` is not measured, and its figure says so.

    Args:
        lpips ([`LPIPS`], *optional*): For LPIPS.
        image_features ([`EfficientNetLite0`], *optional*): For the Fréchet distance of frames.
        video_features ([`I3D`], *optional*): For FVD.
    """

    lpips: LPIPS | None = None
    image_features: EfficientNetLite0 | None = None
    video_features: Callable[[torch.Tensor], torch.Tensor] | None = None

    def can_measure(self, task: Task) -> bool:
        """Whether anything would be measured on a task."""
        has_features = self.image_features is not None or self.video_features is not None
        return task.compares_frames or (task.compares_distributions and has_features)


def run_cases(
    pipe: FARPipeline,
    videos: TrueVideos,
    protocol: RolloutProtocol,
    networks: MetricNetworks,
    folder: ResultFolder,
    *,
    num_samples: int = 0,
    share: Share = Share(),
    on_batch_end: Callable[[int], None] = lambda num_cases: None,
) -> None:
    """Run this process's share of the cases that are not finished.

    A batch that was interrupted runs again as a whole, so that its rounding is that of an uninterrupted evaluation.

    Args:
        pipe ([`FARPipeline`]), videos ([`TrueVideos`]), protocol ([`RolloutProtocol`]): What is rolled out.
        networks ([`MetricNetworks`]): What it is measured by.
        folder ([`ResultFolder`]): Where results go.
        num_samples (`int`): Videos of which the first trajectory is written down to be looked at, for each task.
        share ([`Share`]): Which batches are this process's.
        on_batch_end (callable): Told the number of cases of each batch that is done.
    """
    for batch in share.of(measured_batches(protocol, networks)):
        if not all(folder.has(case) for case in batch):
            task = protocol.task(batch[0].task)
            clips = {video: videos.clip(video, task.num_all_frames) for video in sorted({c.video for c in batch})}
            rollouts = roll_out(pipe, [clips[case.video] for case in batch], batch, protocol)
            for case, predicted in zip(batch, rollouts):
                if folder.has(case):
                    continue
                clip = clips[case.video]
                if case.video < num_samples and case.trajectory == 0 and case.seed == protocol.seeds[0]:
                    write_sample(folder.path / "samples", case, clip, predicted, fps=pipe.config.fps or 8)
                folder.add(case, measure_case(case, clip, predicted, protocol, networks))
        on_batch_end(len(batch))


def measured_batches(protocol: RolloutProtocol, networks: MetricNetworks) -> list[list[Case]]:
    """The protocol's batches but for tasks on which nothing can be measured."""
    return [batch for batch in protocol.batches() if networks.can_measure(protocol.task(batch[0].task))]


def roll_out(pipe: FARPipeline, clips: list[Clip], cases: list[Case], protocol: RolloutProtocol) -> torch.Tensor:
    """The new frames of each case, `(B, task.num_frames, 3, h, w)`, float32, on the CPU."""
    task = protocol.task(cases[0].task)
    sizes = {tuple(clip.frames.shape[-2:]) for clip in clips}
    if len(sizes) > 1:
        raise ValueError(f"The dataset's videos have sizes {sorted(sizes)}; prepare them with one size.")
    height, width = sizes.pop()
    video = torch.stack([clip.video[: task.num_context_frames] for clip in clips]) if task.num_context_frames else None
    actions = None if clips[0].actions is None else torch.stack([clip.actions for clip in clips])
    num_classes = pipe.transformer.config.num_classes
    labels = None
    if num_classes is not None:  # free generation is under the null class
        labels = torch.tensor([num_classes if clip.label is None else clip.label for clip in clips])
    says_batch_size = any(given is not None for given in (video, actions, labels))
    frames = pipe(
        video=video,
        actions=actions,
        class_labels=labels,
        num_frames=task.num_frames,
        height=height,
        width=width,
        num_inference_steps=protocol.num_inference_steps,
        guidance_scale=protocol.guidance_scale,
        num_videos_per_context=1 if says_batch_size else len(cases),
        generator=[case.generator() for case in cases],
        output_type="pt",
    ).frames
    return frames.float().cpu()


def measure_case(
    case: Case, clip: Clip, predicted: torch.Tensor, protocol: RolloutProtocol, networks: MetricNetworks
) -> dict[str, torch.Tensor]:
    """Everything that is kept of a case: scores of each frame, and features.

    Args:
        predicted (`torch.Tensor` of shape `(F, 3, h, w)`): The new frames.

    Returns:
        `dict`: `psnr`, `ssim`, `lpips` of shape `(F,)`; of the first trajectory also the same of repeating the last frame
        of the context, and, where there are poses, `revisited` and `unseen`, bool; `image_features` of shape
        `(frames, features)`, `video_features` of shape `(features,)`, and once for each video those of the truth.
    """
    task = protocol.task(case.task)
    num_context, true_video = task.num_context_frames, clip.video
    result = {}
    if task.compares_frames:
        truth = true_video[num_context:]
        result |= frame_scores(predicted, truth, networks)
        if case.trajectory == 0:
            repeated = true_video[num_context - 1].expand_as(truth)
            result |= {f"repeated_{name}": score for name, score in frame_scores(repeated, truth, networks).items()}
            if clip.pose is not None and isinstance(protocol, ContinuationProtocol):
                result |= view_masks(clip.pose, num_context, protocol)
    if task.compares_distributions:
        made = torch.cat([true_video[:num_context], predicted])
        result |= features_of(made, num_context, protocol, networks)
        if case.trajectory == 0 and case.seed == protocol.seeds[0]:
            true_features = features_of(true_video, num_context, protocol, networks)
            result |= {f"true_{name}": features for name, features in true_features.items()}
    return result


def frame_scores(predicted: torch.Tensor, truth: torch.Tensor, networks: MetricNetworks) -> dict[str, torch.Tensor]:
    """Scores of each frame of one video, by metric: (F, 3, h, w), (F, 3, h, w) -> (F,)."""
    predicted, truth = predicted[None], truth[None]
    scores = {"psnr": frame_psnr(predicted, truth)[0], "ssim": frame_ssim(predicted, truth)[0]}
    if networks.lpips is not None:
        scores["lpips"] = frame_lpips(networks.lpips, predicted, truth)[0]
    return scores


def view_masks(pose: torch.Tensor, num_context_frames: int, protocol: ContinuationProtocol) -> dict[str, torch.Tensor]:
    """Which of the predicted frames revisit a view, and which show one that was never seen, counted from the first frame of
    the context on; see [`revisits_by_age`]."""
    names = ("min_revisit_age", "max_recent_age", "max_distance", "max_turn")
    settings = {name: getattr(protocol, name) for name in names}
    revisited, unseen = revisits_by_age(pose, slice(num_context_frames, len(pose)), **settings)
    return {"revisited": revisited, "unseen": unseen}


@torch.no_grad()
def features_of(
    video: torch.Tensor, num_context_frames: int, protocol: RolloutProtocol, networks: MetricNetworks
) -> dict[str, torch.Tensor]:
    """Features of a whole video `(F, 3, h, w)`: of evenly spaced new frames, and of the video with its context, as FVD is
    published for continued videos."""
    features = {}
    if networks.image_features is not None:
        new_frames = video[num_context_frames:]
        images = new_frames[evenly_spaced(len(new_frames), protocol.num_feature_frames)]
        device = next(networks.image_features.parameters()).device
        features["image_features"] = networks.image_features(images.to(device)).cpu()
    if networks.video_features is not None:
        features["video_features"] = networks.video_features(video[None])[0]
    return features


def write_sample(folder: Path, case: Case, clip: Clip, predicted: torch.Tensor, fps: float) -> None:
    """One rollout to look at: an mp4, truth on the left, and evenly spaced frames, truth above."""
    folder.mkdir(exist_ok=True)
    true_video, num_context = clip.video, len(clip.frames) - len(predicted)
    made = torch.cat([true_video[:num_context], predicted])
    height, width = made.shape[-2:]
    scale = max(1, 2 * SMALL_SIDE // min(height, width)) if min(height, width) < SMALL_SIDE else 1
    if (height * scale) % 2:
        scale *= 2  # H.264 wants even sides
    write_mp4(folder / f"{case.name}.mp4", torch.cat([true_video, made], dim=-1), fps, scale)
    shown = evenly_spaced(len(predicted), SHEET_FRAMES)
    sheet = contact_sheet([true_video[num_context:][shown], predicted[shown]], scale=1 if scale == 1 else 2)
    sheet.save(folder / f"{case.name}.png")
