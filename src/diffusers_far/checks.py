"""What numbers and tensors must be, checked before they take memory or time."""

import math
import numbers
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


def is_whole_number(value: Any) -> bool:
    """Whether this is an integer of Python or NumPy; `True` and `False` are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_finite_number(value: Any) -> bool:
    """Whether this is a real number of Python or NumPy, neither NaN nor infinite; `True` and `False` are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def check_count(
    name: str,
    value: Any,
    rule: str | None = None,
    *,
    least: float = 1,
    most: int | None = None,
    optional: bool = False,
) -> None:
    """Refuse what is no whole number, or one out of range; `optional` lets `None` pass."""
    if optional and value is None:
        return
    if not is_whole_number(value) or value < least or (most is not None and value > most):
        rule = rule or f"pass a whole number {f'of at least {least}' if most is None else f'from {least} to {most}'}"
        raise ValueError(f"`{name}` is {value!r}; {rule}.")


def check_finite(name: str, value: Any) -> None:
    """Refuse a number that is NaN, infinite or not above 0."""
    if not is_finite_number(value) or value <= 0:
        raise ValueError(f"`{name}` is {value!r}; give a finite number above 0.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse what is none of these words."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` is {value!r}; choose one of {', '.join(choices)}.")


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


def as_tensor(name: str, value: Any, cure: str) -> torch.Tensor:
    """A number, an array or a nested list as a tensor; what is none of these is refused."""
    try:
        if isinstance(value, (list, tuple)) and any(np.ndim(part) for part in value):
            value = np.asarray(value)
        return torch.as_tensor(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"`{name}` cannot be read as a tensor ({error}); {cure}.") from error


def fits(tensor: torch.Tensor, shape: tuple[int | None, ...]) -> bool:
    """Whether a tensor has this shape, where `None` stands for any size."""
    return tensor.ndim == len(shape) and all(size in (None, given) for size, given in zip(shape, tensor.shape))


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], meaning: str) -> None:
    """Refuse a tensor of another shape, where `None` stands for any size; `meaning` names the dimensions."""
    if not fits(tensor, shape):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}; it must be ({wanted}): {meaning}.")


def check_values_finite(name: str, tensor: torch.Tensor, cure: str) -> None:
    """Refuse a tensor with NaN or infinite values."""
    if not torch.isfinite(tensor).all():
        raise ValueError(f"`{name}` contains NaN or infinite values; {cure}.")


def check_integers(name: str, tensor: torch.Tensor, most: int, rule: str) -> None:
    """Refuse a tensor that does not hold integers from 0 to `most`."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"`{name}` has dtype {tensor.dtype} but {rule}; pass integers.")
    if tensor.numel() and (tensor.min() < 0 or tensor.max() > most):
        raise ValueError(f"`{name}` has values from {tensor.min().item()} to {tensor.max().item()}; {rule}.")
