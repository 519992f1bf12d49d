"""What all walks of a data set have in common. Needs no Crafter."""

from dataclasses import dataclass

import numpy as np

from crafter_world.walkers import OutAndBack, RoundTrips, Wanderer


WALKS = ("wander", "out_and_back", "round_trip")
MIXED = "mixed"
STARTS = ("middle", "anywhere")
START_STREAM = 1  # of the seed's random numbers, beside the walker's
AREAS = range(8, 257)  # the window must fit in; a world takes a moment for each of its tiles


@dataclass(frozen=True)
class CrafterSettings:
    """What all walks of a data set have in common. A wrong value is a `ValueError`.

    Args:
        num_frames (`int`): Length of a walk.
        area (`int`): Tiles along each side of a world.
        walk (`str`): One of `WALKS`; or "mixed": they take turns from seed to seed.
        start (`str`): "middle", in a meadow; or "anywhere", on each kind of ground as often.
        creatures (`bool`), night (`bool`): See `CrafterWorld`.
    """

    num_frames: int = 256
    area: int = 32
    walk: str = MIXED
    creatures: bool = False
    night: bool = False
    start: str = "middle"

    def __post_init__(self):
        if self.num_frames < 2:
            raise ValueError(f"`num_frames` is {self.num_frames} but a walk has at least 2 frames; choose 256, say.")
        if self.area not in AREAS:
            raise ValueError(
                f"`area` is {self.area} but a world has {AREAS[0]} to {AREAS[-1]} tiles a side; choose 32, say."
            )
        if self.walk not in (*WALKS, MIXED):
            raise ValueError(f"`walk` is {self.walk!r}, which is no walk; choose one of {', '.join((*WALKS, MIXED))}.")
        if self.start not in STARTS:
            raise ValueError(f"`start` is {self.start!r}, where no walk starts; choose {' or '.join(STARTS)}.")

    def start_rng(self, seed):
        """What draws where the walk of a seed starts; `None` in the middle."""
        return np.random.default_rng((seed, START_STREAM)) if self.start == "anywhere" else None

    def walker(self, seed):
        """Who walks through the world of a seed."""
        rng = np.random.default_rng(seed)
        walk = WALKS[seed % len(WALKS)] if self.walk == MIXED else self.walk
        if walk == "out_and_back":
            return OutAndBack(rng, self.num_frames // 2)
        return {"wander": Wanderer, "round_trip": RoundTrips}[walk](rng)
