"""From the actions of a trajectory to the action that each frame is fed.

B batch, F frames, A action channels.
"""

import torch


def shift_actions(actions: torch.Tensor, action_shift: int, num_frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Feed each frame the action taken at it, or the action that led to it.

    Everywhere outside the model `actions[:, t]` is the action taken at frame t, which leads to frame t + 1.

    Args:
        actions (`torch.Tensor` of shape `(B, F)` or `(B, F, A)`): With `action_shift` 1 the last frame's action leads
            out of the clip and may be left out.
        action_shift (`int`): 0: frame t is fed `actions[:, t]`. 1: it is fed `actions[:, t - 1]`, and frame 0, which
            no action of the clip led to, the null action.
        num_frames (`int`): F.

    Returns:
        The fed actions, shape `(B, F)` or `(B, F, A)`, and the mask for the model, shape `(B, F)`, bool: `False` where
        a frame is fed the null action.

    Raises:
        ValueError: The number of actions does not fit the frames, or `action_shift` is neither 0 nor 1.
    """
    if action_shift not in (0, 1):
        raise ValueError(f"`action_shift` is {action_shift}; it is 0 or 1.")
    if actions.ndim not in (2, 3) or actions.shape[1] not in (num_frames, num_frames - action_shift):
        left_out = "; the last one may be left out" if action_shift else ""
        raise ValueError(
            f"`actions` has shape {tuple(actions.shape)} but there are {num_frames} frames; pass one action per frame, "
            f"(batch, {num_frames}) or (batch, {num_frames}, action_dim){left_out}."
        )
    action_mask = torch.ones(actions.shape[0], num_frames, dtype=torch.bool, device=actions.device)
    if action_shift == 0:
        return actions, action_mask
    action_mask[:, 0] = False
    # Zeros only fill the place of the null action: the mask makes the model ignore them.
    filler = actions.new_zeros(actions.shape[0], 1, *actions.shape[2:])
    return torch.cat([filler, actions[:, : num_frames - 1]], dim=1), action_mask


def check_condition(name: str, value: torch.Tensor | None, is_taken: bool, shape: tuple[int, ...]) -> None:
    """Raise a ValueError where a condition is missing, superfluous or of the wrong shape."""
    if value is None and is_taken:
        raise ValueError(f"`{name}` is None but this model is conditioned on it; pass {name} of shape {shape}.")
    if value is not None and not is_taken:
        raise ValueError(f"`{name}` was given but this model is not conditioned on it; leave it out.")
    if value is not None and tuple(value.shape) != shape:
        raise ValueError(f"`{name}` has shape {tuple(value.shape)}; with these latents it must be {shape}.")
