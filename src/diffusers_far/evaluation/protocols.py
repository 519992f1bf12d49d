"""The protocols that published figures were measured by, every number a setting.

A protocol names tasks; a task is a length of context and of prediction, and what is measured on it. A case is one rollout
of a task: one video, one trajectory (of several from the same context), one seed.
"""

import hashlib
import math
import re
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, ClassVar


if TYPE_CHECKING:  # a script reads its arguments before it imports what takes seconds
    import torch

    from ..pipelines import FARPipeline


# When two views are the same one, and when one comes again; see `metrics.revisited_and_unseen`.
MAX_DISTANCE = 40.0  # in units of `pose`
MAX_TURN = 15.0  # in degrees
MIN_REVISIT_AGE = 32  # in frames
MAX_RECENT_AGE = 10  # in frames


@dataclass(frozen=True)
class Task:
    """One length of rollouts and what they are compared by.

    Args:
        name (`str`): Unique within the protocol.
        num_context_frames (`int`), num_frames (`int`): What the model is shown, and what it then makes.
        num_trajectories (`int`): Rollouts of each video and seed.
        compares_frames (`bool`): Each frame with the true one: PSNR, SSIM, LPIPS.
        compares_distributions (`bool`): All videos with all true ones: Fréchet distances.
    """

    name: str
    num_context_frames: int
    num_frames: int
    num_trajectories: int = 1
    compares_frames: bool = True
    compares_distributions: bool = True

    @property
    def num_all_frames(self) -> int:
        return self.num_context_frames + self.num_frames


@dataclass(frozen=True, order=True)
class Case:
    """What a result is computed by, in the order in which cases run."""

    task: str
    seed: int
    video: int
    trajectory: int

    @property
    def name(self) -> str:
        return f"{self.task}-seed{self.seed}-video{self.video:05d}-trajectory{self.trajectory:03d}"

    def generator(self) -> "torch.Generator":
        """Noise of its own, whatever runs beside it."""
        import torch

        digest = hashlib.sha256(f"{self.seed} {self.video} {self.trajectory}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def setting(default, text: str, least: float | None = None):
    """A field with its meaning, which the command line shows, and the least that it may be; by default 1 for counts, else 0."""
    return field(default=default, metadata={"help": text, "least": least})


def check_ranges(protocol: object) -> None:
    """Raises:
    ValueError: A setting that was given is below what it may be, or not finite.
    """
    for each in fields(protocol):
        value = getattr(protocol, each.name)
        if not isinstance(value, (int, float)):
            continue
        least = each.metadata["least"]
        if least is None:
            least = 1 if each.name.startswith("num_") or each.name in ("frame_interval", "batch_size") else 0
        if not least <= value < math.inf:
            raise ValueError(f"`{each.name}` is {value}; it must be finite and at least {least}.")


@dataclass(frozen=True, kw_only=True)
class RolloutProtocol:
    """What all protocols of rollouts share; see the fields' help."""

    name: ClassVar[str]
    default_guidance_scale: ClassVar[float] = 1.0

    num_videos: int = setting(256, "True videos, evenly spaced over those of the split that are long enough.")
    frame_interval: int = setting(1, "Distance between the frames of a video that are used.")
    num_inference_steps: int = setting(50, "Denoising steps of each frame.")
    guidance_scale: float = setting(None, "Guidance; by default the protocol's own.")
    seeds: tuple[int, ...] = setting((0,), "Seeds of the noise; figures are given over all of them.")
    num_feature_frames: int = setting(16, "Evenly spaced frames of each video whose features are compared.")
    batch_size: int = setting(16, "Cases at once; changes the time, not the result beyond rounding.")

    def __post_init__(self) -> None:
        if self.guidance_scale is None:
            object.__setattr__(self, "guidance_scale", self.default_guidance_scale)
        check_ranges(self)
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ValueError(f"`seeds` is {self.seeds}; give at least one, each once.")

    @property
    def tasks(self) -> tuple[Task, ...]:
        raise NotImplementedError

    @property
    def num_frames_needed(self) -> int:
        """Frames that a true video must have, those between the used ones included."""
        return (max(task.num_all_frames for task in self.tasks) - 1) * self.frame_interval + 1

    def first_frame(self, video: int, num_video_frames: int) -> int:
        """Where the clip of a video starts."""
        return 0

    def task(self, name: str) -> Task:
        return next(task for task in self.tasks if task.name == name)

    def cases(self) -> list[Case]:
        """All cases, in the order in which they run."""
        return [
            Case(task.name, seed, video, trajectory)
            for task in self.tasks
            for seed in self.seeds
            for video in range(self.num_videos)
            for trajectory in range(task.num_trajectories)
        ]

    def batches(self) -> list[list[Case]]:
        """The cases that run together, of one task each. The same in every run, so that rounding is too."""
        batches = []
        for task in self.tasks:
            cases = [case for case in self.cases() if case.task == task.name]
            batches += [cases[first : first + self.batch_size] for first in range(0, len(cases), self.batch_size)]
        return batches


@dataclass(frozen=True, kw_only=True)
class ContinuationProtocol(RolloutProtocol):
    """Continues true videos. Where the dataset knows poses, PSNR is given on revisited and on unseen views too."""

    first_context_frame: int = setting(0, "First frame of the context.")
    max_distance: float = setting(MAX_DISTANCE, "Views are near within this distance, in units of `pose`,")
    max_turn: float = setting(MAX_TURN, "and this angle, in degrees.")
    min_revisit_age: int = setting(
        MIN_REVISIT_AGE, "Revisited: a near view was seen at least so many frames before, and none since."
    )
    max_recent_age: int = setting(
        MAX_RECENT_AGE,
        "The last so many frames led there and do not count; unseen: no near view was seen before them.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.max_recent_age < self.min_revisit_age:
            raise ValueError(
                f"`max_recent_age` is {self.max_recent_age} and `min_revisit_age` {self.min_revisit_age}; the first is "
                "at least 0 and below the second."
            )

    @property
    def num_frames_needed(self) -> int:
        return self.first_context_frame + super().num_frames_needed

    def first_frame(self, video: int, num_video_frames: int) -> int:
        return self.first_context_frame


@dataclass(frozen=True, kw_only=True)
class TecoProtocol(ContinuationProtocol):
    """Long prediction: a long context for frames that can be known, a short one for those that cannot.

    Source: arXiv:2210.02396; the numbers are those of arXiv:2503.19325.
    """

    name: ClassVar[str] = "teco"
    default_guidance_scale: ClassVar[float] = 1.5

    num_context_frames: int = setting(144, "Context where frames are compared.")
    num_frames: int = setting(156, "Frames to predict there.")
    num_distance_context_frames: int = setting(36, "Context where distributions are compared.")
    num_distance_frames: int = setting(264, "Frames to predict there.")

    @property
    def tasks(self) -> tuple[Task, ...]:
        return (
            Task("frames", self.num_context_frames, self.num_frames, compares_distributions=False),
            Task("distance", self.num_distance_context_frames, self.num_distance_frames, compares_frames=False),
        )


@dataclass(frozen=True, kw_only=True)
class McvdProtocol(ContinuationProtocol):
    """Short prediction of what cannot be known: several trajectories, the best one for frames, all for distributions.

    Source: arXiv:2205.09853. UCF-101 is 4 -> 12, the default; BAIR is 2 -> 14 and 2 -> 28.
    """

    name: ClassVar[str] = "mcvd"

    num_context_frames: int = setting(4, "Frames that the model is shown.")
    num_frames: int = setting(12, "Frames to predict.")
    num_trajectories: int = setting(100, "Rollouts of each video.")

    @property
    def tasks(self) -> tuple[Task, ...]:
        return (Task("prediction", self.num_context_frames, self.num_frames, self.num_trajectories),)


@dataclass(frozen=True, kw_only=True)
class LatteProtocol(RolloutProtocol):
    """Generation from nothing, under the classes of the true videos or free; one distance for each seed.

    Source: arXiv:2401.03048.
    """

    name: ClassVar[str] = "latte"
    default_guidance_scale: ClassVar[float] = 2.0

    num_videos: int = setting(2048, "Videos to make for each seed, and as many true ones.")
    num_frames: int = setting(16, "Frames of each.")
    seeds: tuple[int, ...] = setting((0, 2, 4, 6), "One distance for each; mean and deviation are given.")
    condition: str = setting("class", "`class`: each video under a true video's label; `free`: under none.")
    clip_seed: int = setting(0, "Where in its video each true clip lies.")

    def __post_init__(self) -> None:
        if self.condition not in ("class", "free"):
            raise ValueError(f"`condition` is {self.condition!r}; it is 'class' or 'free'.")
        if self.guidance_scale is None and self.condition == "free":
            object.__setattr__(self, "guidance_scale", 1.0)
        super().__post_init__()

    @property
    def tasks(self) -> tuple[Task, ...]:
        return (Task("generation", 0, self.num_frames, compares_frames=False),)

    def first_frame(self, video: int, num_video_frames: int) -> int:
        """Drawn for each video."""
        import torch

        generator = Case("clip", self.clip_seed, video, 0).generator()
        return int(torch.randint(num_video_frames - self.num_frames_needed + 1, (), generator=generator))


@dataclass(frozen=True, kw_only=True)
class RecordingProtocol:
    """What the protocols share that continue held-out recordings at their true actions; see the fields' help."""

    num_walks: int = setting(64, "Recordings, the first ones of the split that are long enough.")
    first_context_frame: int = setting(68, "First frame that the model is shown, from 0.")
    num_context_frames: int = setting(32, "Frames that it is shown.")
    num_frames: int = setting(8, "Frames that it then predicts.")
    # `None` is the pipeline's own; the type is that of what is given, which the command line reads.
    num_inference_steps: int = setting(None, "Denoising steps of each frame.")
    guidance_scale: float = setting(None, "Guidance.")
    short_cache: str = setting(None, "How the short window is cached: exact, rolling or a number.")
    seed: int = setting(0, "Recording k is predicted with noise of its own, seeded with this plus k.")
    batch_size: int = setting(16, "Recordings at once; changes the time, not the result beyond rounding.")

    def __post_init__(self):
        check_ranges(self)
        if self.short_cache not in (None, "exact", "rolling") and not re.fullmatch("[1-9][0-9]*", self.short_cache):
            raise ValueError(f"`short_cache` is {self.short_cache!r}; it is 'exact', 'rolling' or a number from 1.")

    def with_defaults_of(self, pipe: "FARPipeline") -> "RecordingProtocol":
        """The same with the settings that `pipe` is shipped with, where they were left open."""
        return replace(
            self,
            num_inference_steps=self.num_inference_steps or pipe.default_inference_steps,
            guidance_scale=pipe.default_guidance_scale if self.guidance_scale is None else self.guidance_scale,
            short_cache=self.short_cache or str(pipe.default_short_cache),
        )

    @property
    def num_parts(self) -> int:
        """How many times recordings are gone through."""
        return 1

    @property
    def last_frame(self) -> int:
        return self.first_context_frame + self.num_context_frames + self.num_frames

    def how_frames_are_made(self) -> dict:
        """These settings as arguments of a pipeline."""
        is_number = self.short_cache is not None and self.short_cache.isdigit()
        return {
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "short_cache": int(self.short_cache) if is_number else self.short_cache,
        }

    def batches(self, num_walks: int) -> list[range]:
        """The recordings that are predicted together, by number. The same in every process, so that rounding is too."""
        return [range(num_walks)[first : first + self.batch_size] for first in range(0, num_walks, self.batch_size)]

    def noise_of(self, walks: range) -> "list[torch.Generator]":
        """A generator for each of the recordings, by number."""
        import torch

        return [torch.Generator().manual_seed(self.seed + walk) for walk in walks]


@dataclass(frozen=True, kw_only=True)
class WorldModelProtocol(RecordingProtocol):
    """How good each next frame is, whether it follows actions, and what is remembered; see the fields' help."""

    num_recent_frames: int = setting(
        0,
        "Above 0, the same frames are predicted from the last so many of the context alone too; what the whole context is "
        "better by is what the model remembers.",
        least=0,
    )
    mirrored_actions: tuple[int, int] = setting(
        None,
        "Two actions that mirror each other, to see whether the model follows actions. By default those that the pipeline "
        "names left and right; where there are none, this is not measured.",
    )
    max_distance: float = setting(MAX_DISTANCE, "Views are the same within this distance, in units of `pose`,")
    max_turn: float = setting(MAX_TURN, "and this angle, in degrees.")
    min_repeated_psnr: float = setting(
        40.0,
        "A frame is unchanged where the last frame of the context, repeated, has so many dB; the others are scored by "
        "themselves as well.",
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.num_recent_frames < self.num_context_frames:
            raise ValueError(
                f"`num_recent_frames` is {self.num_recent_frames} and `num_context_frames` {self.num_context_frames}; the first "
                "is below the second, and 0 to measure no memory."
            )

    def with_defaults_of(self, pipe: "FARPipeline") -> "WorldModelProtocol":
        """The same with the settings that `pipe` is shipped with, where they were left open.

        Raises:
            ValueError: `mirrored_actions` that are no two actions of the model.
        """
        num_actions, mirrored = pipe.transformer.config.num_actions, self.mirrored_actions
        if mirrored is None:
            names = [name.lower() for name in pipe.config.action_names or []]
            mirrored = (names.index("left"), names.index("right")) if {"left", "right"} <= set(names) else None
        elif len(set(mirrored) & set(range(num_actions or 0))) < 2:
            raise ValueError(
                f"`mirrored_actions` is {mirrored}, but the model has {num_actions or 'no'} discrete actions; give two of "
                "them, from 0, or leave it out."
            )
        return replace(super().with_defaults_of(pipe), mirrored_actions=mirrored)


@dataclass(frozen=True, kw_only=True)
class TilesProtocol(RecordingProtocol):
    """What a model knows of a world of tiles, and whether the worlds that it makes up hold; see the fields' help."""

    first_context_frame: int = setting(64, "First frame that the model is shown of each recording, from 0.")
    num_frames: int = setting(24, "Frames that it then predicts at the true actions; 0 leaves this part out.", least=0)
    way_back_share: float = setting(
        0.5,
        "A way back leads to at least so many places for each of its frames, all of them places of the context; of each "
        "recording the stretch with most places counts.",
    )
    num_made_frames: int = setting(256, "Frames of each made-up world; 0 leaves this part out.", least=0)
    return_steps: tuple[int, ...] = setting(
        (2, 4, 8, 16, 32), "Moves out, after which the model goes back as many; none leaves this part out."
    )

    def __post_init__(self):
        super().__post_init__()
        if min(self.return_steps, default=1) < 1 or len(set(self.return_steps)) != len(self.return_steps):
            raise ValueError(f"`return_steps` is {self.return_steps}; give numbers from 1, each once, or none at all.")

    @property
    def num_parts(self) -> int:
        """With ways back, which not all recordings have, counted as if they had."""
        return 2 * (self.num_frames > 0) + (self.num_made_frames > 0) + len(self.return_steps)

    @property
    def continuation(self) -> WorldModelProtocol:
        """How the frames of a recording are predicted."""
        return WorldModelProtocol(**{each.name: getattr(self, each.name) for each in fields(RecordingProtocol)})


PROTOCOLS = {protocol.name: protocol for protocol in (TecoProtocol, McvdProtocol, LatteProtocol)}
