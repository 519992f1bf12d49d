"""Configs that no model here can have."""

import math
import os
from collections.abc import Mapping

import torch


# Fields that count, with the most that they may be; `None` is allowed where it is a default.
COUNTS = {
    "in_channels": 2**16,
    "out_channels": 2**16,
    "num_layers": 2**10,
    "num_attention_heads": 2**10,
    "attention_head_dim": 2**12,
    "patch_size": 2**10,
    "long_patch_size": 2**10,
    "short_window": 2**20,
    "num_actions": 2**24,
    "action_dim": 2**16,
    "num_classes": 2**24,
    "trained_frames": 2**31,
}
OPTIONAL = ("out_channels", "long_patch_size", "num_actions", "action_dim", "num_classes", "trained_frames")


def check_count(name: str, value, most: int, *, optional: bool = False) -> None:
    """Refuse what is no whole number from 1 to `most`, before a size of it takes memory."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"`{name}` is {value!r}; it counts, so give a whole number from 1 to {most}.")


def check_finite(name: str, value) -> None:
    """Refuse a number that is NaN, infinite or not above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 < value and math.isfinite(value)):
        raise ValueError(f"`{name}` is {value!r}; give a finite number above 0.")


def check_config(config) -> None:
    """Refuse impossible sizes at construction, the values named."""
    if not isinstance(config.short_window, int) or config.short_window < 1:
        raise ValueError(f"`short_window` is {config.short_window}; the noisy frame alone needs 1.")
    for name, most in COUNTS.items():
        check_count(name, config[name], most, optional=name in OPTIONAL)
    check_finite("mlp_ratio", config.mlp_ratio)
    check_finite("rope_theta", config.rope_theta)
    axes = config.axes_dims_rope
    if not isinstance(axes, (list, tuple)) or [type(dim) for dim in axes] != [int] * 3 or min(axes) < 0:
        raise ValueError(f"`axes_dims_rope` is {axes!r}; give three whole numbers, for time, height and width.")
    if sum(config.axes_dims_rope) != config.attention_head_dim or any(dim % 2 for dim in config.axes_dims_rope):
        raise ValueError(
            f"`axes_dims_rope` is {tuple(config.axes_dims_rope)} and `attention_head_dim` {config.attention_head_dim}; "
            "the axes must be even and add up to the head dim."
        )
    if config.long_patch_size is not None and config.long_patch_size % config.patch_size:
        raise ValueError(
            f"`long_patch_size` is {config.long_patch_size} and `patch_size` {config.patch_size}; a long patch must "
            "cover whole short patches, so choose a multiple."
        )
    if config.action_shift not in (0, 1):
        raise ValueError(f"`action_shift` is {config.action_shift}; it is 0 or 1.")
    if config.num_actions is not None and config.action_dim is not None:
        raise ValueError(
            f"`num_actions` is {config.num_actions} and `action_dim` {config.action_dim}; actions are discrete or "
            "continuous, so give one of the two."
        )
    if not isinstance(config.condition_dropout, (int, float)) or not 0 <= config.condition_dropout < 1:
        raise ValueError(f"`condition_dropout` is {config.condition_dropout}; it is a share, at least 0 and below 1.")
    if not isinstance(config.frame_causal, bool):
        raise ValueError(f"`frame_causal` is {config.frame_causal!r}; it is `True` or `False`.")
    width = config.num_attention_heads * config.attention_head_dim
    if not 1 <= width * config.mlp_ratio < 2**40:
        raise ValueError(
            f"`mlp_ratio` is {config.mlp_ratio}; of a width of {width} it makes no possible hidden layer."
        )
    conditions = sum(config[name] or 0 for name in ("num_actions", "action_dim", "num_classes"))
    attention = 4 if config.long_patch_size is None else 8
    num_weights = int((config.num_layers * (attention + 2 * config.mlp_ratio) * width + conditions) * width)
    check_memory(num_weights, ("num_layers", "num_attention_heads", "attention_head_dim", "mlp_ratio"), config)


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


# Fields of transformers' decoders that count.
DECODER_COUNTS = {
    "hidden_size": 2**16,
    "n_embd": 2**16,
    "intermediate_size": 2**18,
    "n_inner": 2**18,
    "num_hidden_layers": 2**10,
    "n_layer": 2**10,
    "num_attention_heads": 2**10,
    "n_head": 2**10,
    "num_key_value_heads": 2**10,
    "head_dim": 2**12,
    "max_position_embeddings": 2**31,
    "n_positions": 2**31,
}


def check_decoder(decoder: Mapping) -> None:
    """Refuse impossible sizes of a decoder of transformers, and numbers that are not finite; the values named."""
    for name, value in decoder.items():
        if name in DECODER_COUNTS:
            check_count(f"decoder.{name}", value, DECODER_COUNTS[name], optional=True)
        for inner_name, number in value.items() if isinstance(value, Mapping) else ((name, value),):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"`decoder.{inner_name}` is {number}; give a finite number.")
