"""What a visitor may choose, and how much of the machine they may take."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ...data.media_files import MediaLimits


class WorldError(ValueError):
    """What a visitor can mend; the message is for their eyes."""


def checked_hosts(names: Iterable[str]) -> list[str]:
    """Names that a page may be served as: without scheme, port and path; `*.` before one for all names below it, `*` for all.

    Raises:
        ValueError: No such name, which would never be met.
    """
    names = list(names)
    for name in names:
        if not re.fullmatch(r"\*|(\*\.)?[A-Za-z0-9_.-]*[A-Za-z0-9]|\[[0-9A-Fa-f:.]+\]", name):
            raise ValueError(
                f"`allowed_hosts` has {name!r}; give names without scheme, port and path, such as maze.example.org, *.example.org "
                "or [2001:db8::1], or * for all."
            )
    return names


@dataclass(frozen=True)
class WorldLimits:
    """Bounds of time and memory, per visitor and in all.

    Args:
        max_context_frames (`int`): Of a start.
        max_new_frames (`int`): Of one walk.
        max_branches (`int`): Walks that one visitor keeps.
        max_visitors (`int`): At one time.
        max_waiting (`int`): Presses of one visitor that wait or are being answered.
        max_calls_per_second (`int`): Of one visitor.
        max_other_calls_per_second (`int`): Of all together who are no visitors, or not yet; of one of them `max_waiting`.
        idle_seconds (`float`): After so long without a press, a visitor's rollouts are dropped.
        yield_seconds (`float`): After so long without a press, a visitor makes room where all places are taken.
        upload (`MediaLimits`): Of a visitor's own clip or image.
        max_files (`int`), max_file_bytes (`int`): Uploads and downloads of all visitors; beyond, the oldest are removed.
        max_uploads_at_once (`int`), upload_seconds (`float`): How many are taken at one time, and for how long each.
    """

    max_context_frames: int = 64
    max_new_frames: int = 600
    max_branches: int = 8
    max_visitors: int = 16
    max_waiting: int = 4
    max_calls_per_second: int = 20
    max_other_calls_per_second: int = 8
    idle_seconds: float = 1800.0
    yield_seconds: float = 120.0
    upload: MediaLimits = MediaLimits(max_bytes=20 * 2**20, max_frames=1000, max_pixels=2**22, max_total_pixels=2**28)
    max_files: int = 64
    max_file_bytes: int = 2**28
    max_uploads_at_once: int = 4
    upload_seconds: float = 60.0


@dataclass(frozen=True)
class Settings:
    """How the next frames are made.

    Args:
        num_inference_steps (`int`): Denoising steps of a frame, 1 to 100; [`WorldModel.default_settings`] has the
            model's own.
        guidance_scale (`float`, defaults to 1.0): 0 to 10; guides above 1.
        flex_rope_slope (`float`, defaults to 0.0): 0 to 5; 0 is plain RoPE.
        short_cache (`str` or `int`, defaults to `"exact"`), max_long_frames (`int`, *optional*): Of the cache, fixed when
            a walk starts.

    Raises:
        WorldError: Out of range.
    """

    num_inference_steps: int
    guidance_scale: float = 1.0
    flex_rope_slope: float = 0.0
    short_cache: str | int = "exact"
    max_long_frames: int | None = None

    def __post_init__(self):
        require_number("Steps", self.num_inference_steps, 1, 100, whole=True)
        require_number("Guidance", self.guidance_scale, 0, 10)
        require_number("The FlexRoPE slope", self.flex_rope_slope, 0, 5)
        if self.short_cache not in ("exact", "rolling"):
            require_number(
                "The short cache, where it is not 'exact' or 'rolling',", self.short_cache, 1, 64, whole=True
            )
        if self.max_long_frames is not None:
            require_number("The number of long frames", self.max_long_frames, 1, 10_000, whole=True)


def require_number(name: str, value: object, low: float, high: float, *, whole: bool = False) -> None:
    """Refuse what is not a number from `low` to `high`."""
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        kind = "whole number" if whole else "number"
        given = "nothing" if value is None else repr(str(value)[:40])
        raise WorldError(f"{name} must be a {kind} from {low:g} to {high:g}, not {given}.")
