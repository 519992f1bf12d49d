"""Which frames are long-term or short-term, how many tokens they take, where they stand. Integers only."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ContextPlan:
    """The layout of one pass of the transformer: first its long frames, then its short frames, in order of time.

    Args:
        num_long_frames (`int`): Frames at the start of the pass that are compressed with the long patch size.
        num_short_frames (`int`): Frames after them, at the standard patch size.
        height (`int`), width (`int`): Size of the latent frames.
        patch_size (`int`): Side of a short frame's patches, in latents.
        long_patch_size (`int`, *optional*): Side of a long frame's patches; `None` where no frame is ever long.
        first_frame (`int`, defaults to 0): Absolute index of the first frame of the pass.
        num_skipped_frames (`int`, defaults to 0): Frames between the long and the short ones that the pass leaves out,
            because they stay as they are in a cache.

    Source: FAR, arXiv:2503.19325, section "long short-term context".
    """

    num_long_frames: int
    num_short_frames: int
    height: int
    width: int
    patch_size: int
    long_patch_size: int | None = None
    first_frame: int = 0
    num_skipped_frames: int = 0

    def __post_init__(self):
        for name in ("patch_size", "long_patch_size"):
            size = getattr(self, name)
            if size is not None and (self.height % size or self.width % size):
                raise ValueError(
                    f"Latent frames of {self.height}x{self.width} cannot be cut by `{name}` {size}; "
                    f"choose a height and a width that are multiples of {size}."
                )

    @classmethod
    def for_frames(
        cls,
        num_frames: int,
        *,
        short_window: int,
        height: int,
        width: int,
        patch_size: int,
        long_patch_size: int | None = None,
        rebuild_interval: int = 1,
    ) -> "ContextPlan":
        """The window rule: the last `short_window` frames are short, all before them long; without a long patch size
        every frame is short. With a `rebuild_interval` of k, k frames turn long at once, and so the window breathes
        between `short_window - k + 1` and `short_window` frames."""
        num_long_frames = 0
        if long_patch_size is not None:
            num_leaving = max(0, num_frames - short_window)
            num_long_frames = -(-num_leaving // rebuild_interval) * rebuild_interval
        return cls(num_long_frames, num_frames - num_long_frames, height, width, patch_size, long_patch_size)

    def segment(self, first_frame: int, last_frame: int | None = None) -> "ContextPlan":
        """The same frames from `first_frame` on, up to and without `last_frame` (absolute indices), each as it was."""
        last_frame = self.end_frame if last_frame is None else last_frame
        num_long_frames = max(0, min(last_frame, self.first_short_frame) - first_frame)
        num_short_frames = last_frame - first_frame - num_long_frames
        return replace(
            self, num_long_frames=num_long_frames, num_short_frames=num_short_frames, first_frame=first_frame
        )

    @property
    def num_frames(self) -> int:
        return self.num_long_frames + self.num_short_frames

    @property
    def end_long_frame(self) -> int:
        return self.first_frame + self.num_long_frames

    @property
    def first_short_frame(self) -> int:
        return self.end_long_frame + self.num_skipped_frames

    @property
    def end_frame(self) -> int:
        return self.first_short_frame + self.num_short_frames

    @property
    def tokens_per_short_frame(self) -> int:
        return (self.height // self.patch_size) * (self.width // self.patch_size)

    @property
    def tokens_per_long_frame(self) -> int:
        if self.long_patch_size is None:
            return 0
        return (self.height // self.long_patch_size) * (self.width // self.long_patch_size)

    @property
    def num_long_tokens(self) -> int:
        return self.num_long_frames * self.tokens_per_long_frame

    @property
    def num_short_tokens(self) -> int:
        return self.num_short_frames * self.tokens_per_short_frame

    @property
    def num_tokens(self) -> int:
        return self.num_long_tokens + self.num_short_tokens
