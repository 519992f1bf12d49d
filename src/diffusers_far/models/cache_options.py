"""How a KV cache trades exactness or memory of the past for time and space."""

import numbers
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CacheOptions:
    """How a cache saves time and memory.

    Args:
        short_cache (`str` or `int`, defaults to `"exact"`): What happens to the short frames when a frame turns long,
            which changes what they attended to. `"exact"`: they are encoded anew, at every write. An integer k: k frames
            turn long at once, every k frames, so that they are encoded anew only then; exact for a window that breathes
            by k frames. `"rolling"`: frames that are written one at a time leave the others as they were.
        max_long_frames (`int`, *optional*): Beyond so many, the oldest long frames but the sinks are forgotten, and there
            is no end to the video.
        num_sink_frames (`int`, defaults to 0): First frames of the video that are never forgotten.
    """

    short_cache: str | int = "exact"
    max_long_frames: int | None = None
    num_sink_frames: int = 0

    @property
    def rebuild_interval(self) -> int:
        return int(self.short_cache) if is_whole_number(self.short_cache) else 1

    @property
    def is_rolling(self) -> bool:
        return self.short_cache == "rolling"

    def check(self, short_window: int, has_long_frames: bool) -> None:
        """Refuse what a model with this window cannot do."""
        for name in ("max_long_frames", "num_sink_frames"):
            value = getattr(self, name)
            if value is not getattr(CacheOptions, name) and not is_whole_number(value):
                raise ValueError(f"`{name}` is {value!r}; it is a number of frames.")
        is_interval = is_whole_number(self.short_cache) and 1 <= self.short_cache < max(short_window, 2)
        if self.short_cache not in ("exact", "rolling") and not is_interval:
            raise ValueError(
                f"`short_cache` is {self.short_cache!r}; choose 'exact', 'rolling' or a number of frames from 1 to "
                f"{max(short_window - 1, 1)}, below the short window."
            )
        if self.max_long_frames is None:
            if self.num_sink_frames:
                raise ValueError(
                    f"`num_sink_frames` is {self.num_sink_frames} but `max_long_frames` is None: nothing is forgotten; "
                    "leave it at 0."
                )
            return
        if not has_long_frames:
            raise ValueError(
                f"`max_long_frames` is {self.max_long_frames} but this model has no long frames; leave it out."
            )
        if not 0 <= self.num_sink_frames < self.max_long_frames:
            raise ValueError(
                f"`num_sink_frames` is {self.num_sink_frames} and `max_long_frames` {self.max_long_frames}; the sinks "
                "must be at least 0 and fewer than all."
            )
        if self.rebuild_interval > 1 and self.max_long_frames - self.num_sink_frames < 3 * self.rebuild_interval:
            raise ValueError(
                f"`max_long_frames` is {self.max_long_frames}, {self.num_sink_frames} of them sinks, but `short_cache` "
                f"turns {self.rebuild_interval} frames long at once; keep at least {3 * self.rebuild_interval} beside "
                "the sinks."
            )


def is_whole_number(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
