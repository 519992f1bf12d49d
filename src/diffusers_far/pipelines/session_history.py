"""What a session remembers: its finished frames, and the noise that they were made from.

B batch, F frames, C latent channels, H/W latent height/width, A action channels, G generators.
"""

from dataclasses import dataclass, replace

import torch

from ..checks import check_count
from ..models.transformer_far import FARTransformer3DModel
from .rollout import frame_noise


@dataclass(frozen=True)
class NoiseState:
    """The generators of a session at one moment.

    Args:
        states (`torch.Tensor` of shape `(G, num_bytes)`): uint8, on the CPU.
        device (`str`): What kind of device the generators draw on; states of another kind mean nothing to it.
    """

    states: torch.Tensor
    device: str


class NoiseSource:
    """Draws the noise of one frame after the other, and goes back to where it was.

    Args:
        generator (`torch.Generator` or a list of B, *optional*): One for the whole batch, or one per sample, so that a
            sample is the same alone as in a batch. Without one torch's global generator draws, whose state is not kept.
    """

    def __init__(self, generator: torch.Generator | list[torch.Generator] | None = None):
        self.generator: torch.Generator | list[torch.Generator] | None = generator
        if isinstance(generator, (list, tuple)):
            self._take(list(generator))

    def _take(self, generators: list[torch.Generator]) -> None:
        self.generator = generators if len(generators) > 1 else generators[0]

    @classmethod
    def from_state(cls, state: NoiseState | None, device: torch.device) -> "NoiseSource":
        """New generators in this state; on `device`, where it is of the kind that they drew on.

        Raises:
            ValueError: This machine has no device of that kind, or its generators have no such state.
        """
        if state is None:
            return cls()
        place = device if device.type == state.device else state.device
        source = cls([new_generator(place) for _ in state.states])
        try:
            source.restore(state)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"The states of the noise generators are none of {place} ({error}).") from error
        return source

    @property
    def generators(self) -> list[torch.Generator]:
        """The generators, G of them; none where torch's global one draws."""
        if self.generator is None:
            return []
        return self.generator if isinstance(self.generator, list) else [self.generator]

    @property
    def state(self) -> NoiseState | None:
        """What `restore` goes back to; `None` where torch's global generator draws."""
        if self.generator is None:
            return None
        states = torch.stack([generator.get_state() for generator in self.generators])
        return NoiseState(states, self.generators[0].device.type)

    def restore(self, state: NoiseState | None) -> None:
        """Go back to a state; nothing happens for `None`. The generators themselves are set back where they are of the
        kind and number that the state was taken from; else new ones take their place."""
        if state is None:
            return
        ours = [generator.device.type for generator in self.generators]
        if ours != [state.device] * len(state.states):
            self._take([new_generator(state.device) for _ in state.states])
        for generator, generator_state in zip(self.generators, state.states):
            generator.set_state(generator_state.clone())  # of a view torch would read the storage from its start

    def clone(self) -> "NoiseSource":
        """An independent source that draws the same noise from here on."""
        if isinstance(self.generator, list):
            return NoiseSource([generator.clone_state() for generator in self.generator])
        return NoiseSource(None if self.generator is None else self.generator.clone_state())

    def repeated(self, num_samples: int) -> "NoiseSource":
        """Independent generators for so many samples, which all draw the same noise from here on."""
        if self.generator is None:
            return NoiseSource()
        return NoiseSource([self.generators[0].clone_state() for _ in range(num_samples)])

    def draw(self, latent_shape: tuple[int, int, int, int], device: torch.device) -> torch.Tensor:
        """Noise of the next frame.

        Args:
            latent_shape (`tuple`): `(B, C, H, W)`.
            device (`torch.device`): Where the noise is wanted; generators of the CPU serve every device.

        Returns:
            `torch.Tensor` of shape `(B, 1, C, H, W)`, float32.
        """
        batch_size, *frame_shape = latent_shape
        return frame_noise((batch_size, 1, *frame_shape), self.generator, device)


def new_generator(device: torch.device | str, seed: int | None = None) -> torch.Generator:
    """A generator with this seed, or a random one.

    Raises:
        ValueError: There is no such device here.
    """
    try:
        generator = torch.Generator(device)
    except RuntimeError as error:
        raise ValueError(
            f"The noise was drawn on a device of type {str(device)!r}, which this machine does not have ({error}); continue "
            "where there is one, or start with generators of the CPU, which serve every device."
        ) from error
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(int(seed))
    return generator


@dataclass
class SessionFrame:
    """A finished frame.

    Args:
        latents (`torch.Tensor` of shape `(B, C, H, W)`): Its own memory, float32.
        previous_action (`torch.Tensor` of shape `(B,)` or `(B, A)`, *optional*): The action taken at the frame before, which
            led to this one, if any.
        action (`torch.Tensor` of shape `(B,)` or `(B, A)`, *optional*): The one taken at it, if it is known yet.
        noise (`NoiseState`, *optional*): Of the generators before they drew its noise; `None` for context.
    """

    latents: torch.Tensor
    previous_action: torch.Tensor | None = None
    action: torch.Tensor | None = None
    noise: NoiseState | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors; what all samples share counts once."""
        tensors = (self.latents, self.previous_action, self.action, None if self.noise is None else self.noise.states)
        held = (tensor[:1] if tensor.stride(0) == 0 else tensor for tensor in tensors if tensor is not None)
        return sum(tensor.nbytes for tensor in held)

    def repeated(self, num_samples: int) -> "SessionFrame":
        """The same frame of so many samples, as views; nobody goes back to its noise."""
        tensors = (self.latents, self.previous_action, self.action)
        return SessionFrame(*(None if each is None else each.expand(num_samples, *each.shape[1:]) for each in tensors))


class SessionHistory:
    """The last frames of a session, oldest first; older ones are forgotten.

    Args:
        max_frames (`int`, *optional*): Frames that are remembered; `None` remembers all. Frames that must still be
            written to the cache are never forgotten.

    Attributes:
        frames (`list[SessionFrame]`): Those that are remembered.
        num_frames (`int`): All frames, forgotten ones included.
        num_context_frames (`int`): How many of them came as context.
    """

    def __init__(self, max_frames: int | None = None):
        self.max_frames = max_frames
        self.frames: list[SessionFrame] = []
        self.num_frames = 0
        self.num_context_frames = 0

    @classmethod
    def of_context(
        cls, latents: torch.Tensor | None, actions: torch.Tensor | None, max_frames: int | None = None
    ) -> "SessionHistory":
        """The history of a session that has a context only.

        Args:
            latents (`torch.Tensor` of shape `(B, F, C, H, W)`, *optional*): Copied, so that a forgotten frame frees its
                memory.
            actions (`torch.Tensor` of shape `(B, F - 1)` or `(B, F - 1, A)`, *optional*): Taken at all frames but the
                last.
        """
        history = cls(max_frames)
        for frame in range(0 if latents is None else latents.shape[1]):
            previous_action = None if actions is None or frame == 0 else actions[:, frame - 1].clone()
            history.append(SessionFrame(latents[:, frame].clone(), previous_action))
        history.num_context_frames = history.num_frames
        return history

    @property
    def is_complete(self) -> bool:
        """Whether no frame is forgotten."""
        return len(self.frames) == self.num_frames

    @property
    def num_bytes(self) -> int:
        """Bytes of the frames that are remembered."""
        return sum(frame.num_bytes for frame in list(self.frames))

    def append(self, frame: SessionFrame) -> None:
        """Remember the next frame; the action that led to it was taken at the one before."""
        if self.frames:
            self.frames[-1].action = frame.previous_action
        self.frames.append(frame)
        self.num_frames += 1

    def forget_old(self, num_unwritten: int) -> None:
        """Forget what is beyond `max_frames`, but not the last `num_unwritten` frames."""
        if self.max_frames is not None:
            del self.frames[: max(0, len(self.frames) - max(self.max_frames, num_unwritten))]

    def drop_last(self, num_frames: int) -> None:
        """Go back so many frames, at least one; no action has been taken at the last that is left."""
        self.frames = self.frames[: len(self.frames) - num_frames]
        self.frames[-1].action = None
        self.num_frames -= num_frames
        self.num_context_frames = min(self.num_context_frames, self.num_frames)

    def last(self, num_frames: int) -> list[SessionFrame]:
        """The last frames, which must be remembered."""
        return self.frames[len(self.frames) - num_frames :]

    def before(self, frame: int, num_frames: int) -> list[SessionFrame]:
        """The `num_frames` frames before the one with this number, counted from the first of all; all that there are,
        near the start. They must be remembered."""
        end = frame - (self.num_frames - len(self.frames))
        start = end - min(num_frames, frame)
        assert start >= 0, "the frames are forgotten"
        return self.frames[start:end]

    def clone(self) -> "SessionHistory":
        """An independent history; tensors, which never change, are shared."""
        return self._with([replace(frame) for frame in self.frames])

    def repeated(self, num_samples: int) -> "SessionHistory":
        """An independent history of so many samples with the same past, whose tensors are shared."""
        return self._with([frame.repeated(num_samples) for frame in self.frames])

    def _with(self, frames: list[SessionFrame]) -> "SessionHistory":
        twin = SessionHistory(self.max_frames)
        twin.frames, twin.num_frames, twin.num_context_frames = frames, self.num_frames, self.num_context_frames
        return twin


def smallest_history(transformer: FARTransformer3DModel) -> int:
    """Frames that a session must remember to go back to the last one: a long model encodes its short window anew."""
    config = transformer.config
    return 1 if config.long_patch_size is None else config.short_window


def check_max_history(max_history: int | None, transformer: FARTransformer3DModel) -> None:
    """Refuse a history that is too short to go on.

    Raises:
        ValueError: No count, or fewer frames than [`smallest_history`].
    """
    if max_history is None:
        return
    check_count("max_history", max_history, "pass a whole number of at least 1, or None to keep all frames")
    if max_history < smallest_history(transformer):
        raise ValueError(
            f"`max_history` is {max_history} but the short window alone has {smallest_history(transformer)} frames; keep "
            "as many, and more to be able to `rewind`."
        )
