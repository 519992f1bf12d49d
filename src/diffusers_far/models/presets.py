"""The model sizes of the paper as keyword arguments of [`FARTransformer3DModel`]. Source: arXiv:2503.19325, table 1."""

PRESETS = {
    "far-b": {"num_layers": 12, "num_attention_heads": 12},
    "far-m": {"num_layers": 12, "num_attention_heads": 16},
    "far-l": {"num_layers": 24, "num_attention_heads": 16},
    "far-xl": {"num_layers": 28, "num_attention_heads": 18},
    "far-b-long": {"num_layers": 12, "num_attention_heads": 12, "long_patch_size": 4},
    "far-m-long": {"num_layers": 12, "num_attention_heads": 16, "long_patch_size": 4},
}


def preset_config(name: str, **overrides) -> dict:
    """Keyword arguments of a preset, for `FARTransformer3DModel(**preset_config("far-b-long", num_actions=4))`.

    Args:
        name (`str`): `"far-b"`, `"far-m"`, `"far-l"`, `"far-xl"`, `"far-b-long"` or `"far-m-long"`.
        overrides: Further arguments of the model, which win over the preset's.

    Raises:
        ValueError: No preset has this name.
    """
    if name not in PRESETS:
        raise ValueError(f"`name` is {name!r}; the presets are {', '.join(PRESETS)}.")
    return {**PRESETS[name], **overrides}
