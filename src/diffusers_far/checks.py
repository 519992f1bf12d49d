"""What numbers must be, checked before they take memory or time."""

import math
import numbers
import os
from collections.abc import Mapping
from typing import Any

import torch


def is_whole_number(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_count(
    name: str,
    value: Any,
    rule: str | None = None,
    *,
    least: int = 1,
    most: int | None = None,
    optional: bool = False,
) -> None:
    """Refuse what is no whole number, or one out of range; `optional` lets `None` pass."""
    if optional and value is None:
        return
    if not is_whole_number(value) or value < least or (most is not None and value > most):
        rule = rule or f"pass a whole number {f'of at least {least}' if most is None else f'from {least} to {most}'}"
        raise ValueError(f"`{name}` is {value!r}; {rule}.")


def check_finite(name: str, value) -> None:
    """Refuse a number that is NaN, infinite or not above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 < value and math.isfinite(value)):
        raise ValueError(f"`{name}` is {value!r}; give a finite number above 0.")


def check_memory(num_weights: int, names: tuple[str, ...], config: Mapping) -> None:
    """Refuse a model that is about to be made in this machine's memory and is larger than all of it.

    Args:
        num_weights (`int`): So many at least.
        names (`tuple[str, ...]`), config (`dict`): The fields that make it large.
    """
    if torch.nn.Linear(1, 1).weight.device.type != "cpu" or not hasattr(os, "sysconf"):
        return  # on the meta device, as `from_pretrained` makes it, it takes no memory
    num_bytes, memory = num_weights * 4, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if num_bytes > memory:
        sizes = ", ".join(f"`{name}` {config.get(name)}" for name in names)
        raise ValueError(
            f"With {sizes} the model takes {num_bytes / 2**30:.0f} GiB in float32, and this machine has "
            f"{memory / 2**30:.0f}; make one of them smaller."
        )
