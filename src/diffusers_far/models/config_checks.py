"""Configs that no FAR transformer can have."""


def check_config(config) -> None:
    """Refuse impossible sizes at construction, the values named."""
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
    if config.short_window < 1:
        raise ValueError(f"`short_window` is {config.short_window}; the noisy frame alone needs 1.")
    if config.action_shift not in (0, 1):
        raise ValueError(f"`action_shift` is {config.action_shift}; it is 0 or 1.")
    if config.num_actions is not None and config.action_dim is not None:
        raise ValueError(
            f"`num_actions` is {config.num_actions} and `action_dim` {config.action_dim}; actions are discrete or "
            "continuous, so give one of the two."
        )
    if not 0 <= config.condition_dropout < 1:
        raise ValueError(f"`condition_dropout` is {config.condition_dropout}; it is a share, at least 0 and below 1.")
