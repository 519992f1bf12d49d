"""Frames with what belongs to each of them."""

from dataclasses import dataclass

import torch


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

    def repeated(self, num_times: int) -> "FrameBatch":
        """One frame as `num_times` frames, as views."""

        def repeat(tensor):
            return None if tensor is None else tensor.expand(-1, num_times, *tensor.shape[2:])

        return FrameBatch(repeat(self.latents), repeat(self.actions), repeat(self.action_mask))

    def between(self, start: int, end: int) -> "FrameBatch":
        """The frames from `start` up to and without `end`, as views."""
        tensors = (self.latents, self.actions, self.action_mask)
        return FrameBatch(*(None if tensor is None else tensor[:, start:end] for tensor in tensors))

    def last(self, num_frames: int) -> "FrameBatch":
        """The last `num_frames` frames, as views."""
        return self.between(self.num_frames - num_frames, self.num_frames)

    def copy(self) -> "FrameBatch":
        """Copies that do not change with the caller's tensors."""
        tensors = (self.latents, self.actions, self.action_mask)
        return FrameBatch(*(None if tensor is None else tensor.clone() for tensor in tensors))

    def _full_mask(self) -> torch.Tensor:
        if self.action_mask is not None:
            return self.action_mask
        return torch.ones(self.latents.shape[:2], dtype=torch.bool, device=self.latents.device)
