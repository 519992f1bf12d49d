"""The noise that frames are made from, and the generators that draw it.

B batch, C latent channels, H/W latent height/width, G generators.
"""

from dataclasses import dataclass

import torch

from .inputs import frame_noise


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
            f"The noise was drawn on a device of type {str(device)!r}, which is not to be had here ({error}); go on where "
            "there is one, or start with generators of the CPU, which serve every device."
        ) from error
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(int(seed))
    return generator
