"""What the transformer is fed: latent frames, each with the action that belongs to it, and for teacher forcing a noisy
twin beside each clean frame.

B batch, F frames, C latent channels, H/W latent height/width, A action channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .context_plan import ContextPlan


CLEAN_TIMESTEP = -1.0  # outside the schedule: a finished frame


@dataclass(frozen=True)
class FrameBatch:
    """Frames as the transformer is fed them: latents with the conditions that belong to each frame.

    Args:
        latents (`torch.Tensor` of shape `(B, F, C, H, W)`).
        actions (`torch.Tensor` of shape `(B, F)` or `(B, F, action_dim)`, *optional*).
        action_mask (`torch.Tensor` of shape `(B, F)`, bool, *optional*): `False` marks the null action.
    """

    latents: torch.Tensor
    actions: torch.Tensor | None = None
    action_mask: torch.Tensor | None = None

    @staticmethod
    def form(
        model: torch.nn.Module, batch_size: int, num_frames: int, height: int, width: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of frames as a model is fed them, in latents of `height` x `width`."""
        shape, config = (batch_size, num_frames), model.config
        form = {"latents": ((*shape, config.in_channels, height, width), model.dtype)}
        if model.takes_actions:
            is_discrete = config.action_dim is None
            form["actions"] = (shape, torch.int64) if is_discrete else ((*shape, config.action_dim), torch.float32)
            form["action_mask"] = (shape, torch.bool)
        return form

    @classmethod
    def blank(cls, model: torch.nn.Module, *sizes: int, device: torch.device | str) -> "FrameBatch":
        """Frames of a `form` with null actions, which take no memory."""
        return cls(**blank_tensors(cls.form(model, *sizes), device))

    def check_conditions(self, model: torch.nn.Module, class_labels: torch.Tensor | None) -> None:
        """Refuse conditions that the model lacks or takes otherwise.

        Raises:
            ValueError: Actions, their mask or the classes are missing, superfluous or of the wrong shape.
        """
        shape = self.latents.shape[:2]
        action_shape = shape if model.config.action_dim is None else (*shape, model.config.action_dim)
        check_condition("actions", self.actions, model.takes_actions, tuple(action_shape))
        check_condition("class_labels", class_labels, model.takes_labels, (shape[0],))
        if self.action_mask is not None:
            check_condition("action_mask", self.action_mask, model.takes_actions, tuple(shape))

    @property
    def num_frames(self) -> int:
        return self.latents.shape[1]

    def append(self, later: "FrameBatch") -> "FrameBatch":
        """These frames with `later` ones after them."""

        def join(ours, theirs):
            return None if theirs is None else torch.cat([ours, theirs], dim=1)

        earlier_mask, later_mask = self.action_mask, later.action_mask
        if (earlier_mask is None) != (later_mask is None):  # a missing mask means: every action is given
            earlier_mask, later_mask = self._full_mask(), later._full_mask()
        return FrameBatch(
            join(self.latents, later.latents), join(self.actions, later.actions), join(earlier_mask, later_mask)
        )

    def looking_ahead(self, coming: "FrameBatch") -> "FrameBatch":
        """These frames, each with the action of the frame after it, the last with that of `coming`: so a separable model's
        encoder is fed them."""
        ahead = self.append(coming).between(1, self.num_frames + 1)
        return FrameBatch(self.latents, ahead.actions, ahead.action_mask)

    def repeated(self, num_times: int) -> "FrameBatch":
        """One frame as `num_times` frames, as views."""
        return self._changed(lambda tensor: tensor.expand(-1, num_times, *tensor.shape[2:]))

    def drawn(self, latents: torch.Tensor) -> "FrameBatch":
        """Several draws of these frames, `(N, B, F, C, H, W)`, one after the other in the batch."""
        conditions = (repeat_batch(tensor, len(latents)) for tensor in (self.actions, self.action_mask))
        return FrameBatch(latents.flatten(0, 1), *conditions)

    def between(self, start: int, end: int) -> "FrameBatch":
        """The frames from `start` up to and without `end`, as views."""
        return self._changed(lambda tensor: tensor[:, start:end])

    def samples(self, rows: slice) -> "FrameBatch":
        """Some clips of the batch, as views."""
        return self._changed(lambda tensor: tensor[rows])

    def last(self, num_frames: int) -> "FrameBatch":
        """The last `num_frames` frames, as views."""
        return self.between(self.num_frames - num_frames, self.num_frames)

    def copy(self) -> "FrameBatch":
        """Copies that do not change with the caller's tensors."""
        return self._changed(torch.clone)

    def _changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "FrameBatch":
        tensors = (self.latents, self.actions, self.action_mask)
        return FrameBatch(*(None if tensor is None else change(tensor) for tensor in tensors))

    def _full_mask(self) -> torch.Tensor:
        if self.action_mask is not None:
            return self.action_mask
        return torch.ones(self.latents.shape[:2], dtype=torch.bool, device=self.latents.device)


def repeat_batch(tensor: torch.Tensor | None, num_times: int) -> torch.Tensor | None:
    """A batch that follows itself: `(B, ...)` as `(num_times * B, ...)`."""
    return None if tensor is None else tensor.expand(num_times, *tensor.shape).flatten(0, 1)


def blank_tensors(
    form: dict[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device | str
) -> dict[str, torch.Tensor]:
    """Zeros of such shapes and dtypes, each a view of one number."""
    return {name: torch.zeros((), dtype=dtype, device=device).expand(shape) for name, (shape, dtype) in form.items()}


def check_condition(name: str, value: torch.Tensor | None, is_taken: bool, shape: tuple[int, ...]) -> None:
    """Raise a ValueError where a condition is missing, superfluous or of the wrong shape."""
    if value is None and is_taken:
        raise ValueError(f"`{name}` is None but this model is conditioned on it; pass {name} of shape {shape}.")
    if value is not None and not is_taken:
        raise ValueError(f"`{name}` was given but this model is not conditioned on it; leave it out.")
    if value is not None and tuple(value.shape) != shape:
        raise ValueError(f"`{name}` has shape {tuple(value.shape)}; with these latents it must be {shape}.")


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


def pair_with_clean(
    frames: FrameBatch, timestep: torch.Tensor, clean_latents: torch.Tensor, plan: ContextPlan
) -> tuple[FrameBatch, torch.Tensor]:
    """All frames clean, and after them the short ones as they were given: their twins. Timesteps likewise."""
    clean_frames = FrameBatch(clean_latents, frames.actions, frames.action_mask)
    twins = frames.last(plan.num_short_frames)
    return clean_frames.append(twins), torch.cat(
        [torch.full_like(timestep, CLEAN_TIMESTEP), timestep[..., plan.num_long_frames :]], dim=-1
    )
