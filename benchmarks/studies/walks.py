"""Held-out walks: what a model is shown, what it should predict, and which of these views were seen before.

B walks, F frames, C latent channels, H/W latent height/width; h/w pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diffusers_far.data.latents import LatentDataset
from diffusers_far.data.loading import load_split
from diffusers_far.data.video_clips import VideoClips
from diffusers_far.evaluation.metrics import revisits_by_age

from .settings import MOST_REVISITS, Evaluation, Task


@dataclass(frozen=True)
class WalkClips:
    """Clips of some walks for one task.

    Args:
        walks (sequence of `int`): Which ones.
        latents (`torch.Tensor` of shape `(B, F, C, H, W)`): Of context and new frames: scaled latents, or codes.
        actions (`torch.Tensor` of shape `(B, F)` or `(B, F, A)`): Taken at each frame, or its pose.
        pose (`torch.Tensor` of shape `(B, F, 3)`): Of the camera at each frame: x and y in map units, heading in degrees.
        truth (`torch.Tensor` of shape `(B, F_new, 3, h, w)`): The new frames, in [0, 1].
        last_shown (`torch.Tensor` of shape `(B, 1, 3, h, w)`): The last frame of the context.
        revisited, unseen (`torch.Tensor` of shape `(B, F_new)`): Whether a new frame shows a view that was seen long
            before, or one that never was.
    """

    walks: Sequence[int]
    latents: torch.Tensor
    actions: torch.Tensor
    pose: torch.Tensor
    truth: torch.Tensor
    last_shown: torch.Tensor
    revisited: torch.Tensor
    unseen: torch.Tensor


class HeldOutWalks:
    """The first walks of a split.

    Args:
        mazes (`Path`), latents_dir (`Path`): The dataset, and its latents or codes.
        evaluation ([`Evaluation`]): How many, and what a revisit is.

    Raises:
        ValueError: There are too few.
    """

    def __init__(self, mazes: Path, latents_dir: Path, evaluation: Evaluation) -> None:
        dataset = load_split(str(mazes), evaluation.split)
        if len(dataset) < evaluation.num_walks:
            raise ValueError(
                f"`num_walks` is {evaluation.num_walks} but {str(mazes)!r} has {len(dataset)} of {evaluation.split!r}."
            )
        self.evaluation = evaluation
        self.latents = LatentDataset(latents_dir, evaluation.split)
        self.videos = VideoClips(dataset)
        self.poses = [torch.tensor(pose) for pose in dataset.select_columns(["pose"])["pose"]]

    def clips(self, task: Task, walks: Sequence[int]) -> WalkClips:
        """What a task asks for, of some walks."""
        latents, actions, poses, videos, masks = [], [], [], [], []
        for walk in walks:
            first_new = self.first_new_frame(task, walk)
            start, length = first_new - task.num_context_frames, task.num_context_frames + task.num_frames
            clip = self.latents.clip(walk, start, length)
            latents.append(clip.latents)
            actions.append(clip.actions)
            poses.append(self.poses[walk][start : start + length])
            videos.append(self.videos.frames(walk, first_new - 1, 1 + task.num_frames))
            frames = range(first_new, first_new + task.num_frames)
            masks.append(view_masks(self.poses[walk], frames, self.evaluation))
        video = torch.stack(videos).float() / 255
        revisited, unseen = (torch.stack(each) for each in zip(*masks))
        shown = (torch.stack(each) for each in (latents, actions, poses))
        return WalkClips(walks, *shown, video[:, 1:], video[:, :1], revisited, unseen)

    def first_new_frame(self, task: Task, walk: int) -> int:
        """Where in a walk a task predicts; told by the poses alone, so that no model has a say in it."""
        if task.first_new_frame != MOST_REVISITS:
            return task.first_new_frame
        pose = self.poses[walk]
        revisited, _ = view_masks(pose, range(task.history, len(pose)), self.evaluation)
        counts = revisited.long().unfold(0, task.num_frames, 1).sum(dim=1)
        return task.history + int(counts.argmax())  # the first of equals


def view_masks(pose: torch.Tensor, frames: range, evaluation: Evaluation) -> tuple[torch.Tensor, torch.Tensor]:
    """Which frames revisit a view, and which show one that was never seen, each of shape `(len(frames),)`, bool. The whole walk
    counts, wherever a context begins; see [`revisits_by_age`]."""
    return revisits_by_age(
        pose,
        slice(frames.start, frames.stop),
        min_revisit_age=evaluation.min_revisit_age,
        max_recent_age=evaluation.max_recent_age,
        max_distance=evaluation.max_distance,
        max_turn=evaluation.max_turn,
    )
