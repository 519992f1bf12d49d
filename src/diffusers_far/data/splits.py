"""Which split a trajectory belongs to: a function of its name alone, so that it never moves as a dataset grows."""

import hashlib


def choose_split(name: str, validation_share: float, test_share: float, rest: str = "train") -> str:
    """Place a name in [0, 1) by its hash: test from the lower end, validation from the upper, `rest` in between.

    So a share that grows takes trajectories from `rest` only.
    """
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    if place < test_share:
        return "test"
    return "validation" if place >= 1 - validation_share else rest
