"""Clips that several processes share (context parallel): each takes some of the frames through the blocks, and in attention
some of the heads, over all frames (Ulysses, arXiv:2309.14509).

So who sees whom is decided over whole passes, as ever: masks, chunks and positions are those of one process. What stands before
and after the blocks, each process computes for all frames.

B batch, F frames, L tokens of a pass, N heads, D head dim.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from .context_plan import ContextPlan


class _AllToAll(torch.autograd.Function):
    """`torch.distributed.all_to_all_single`; the gradients go the way back. Torch's own, of `torch.distributed.nn`, is deprecated,
    in favour of a private one."""

    @staticmethod
    def forward(ctx, tensor, group, num_sent, num_received):
        ctx.way_back = (group, num_received, num_sent)
        received = tensor.new_empty(sum(num_received), *tensor.shape[1:])
        dist.all_to_all_single(received, tensor.contiguous(), num_received, num_sent, group)
        return received

    @staticmethod
    def backward(ctx, gradient):
        return _AllToAll.apply(gradient, *ctx.way_back), None, None, None


def divided(
    kinds: Sequence[tuple[int, int]], num_shares: int, device: torch.device | None = None
) -> list[torch.Tensor]:
    """Divide a row of frames among processes, those of each kind as evenly as whole frames allow.

    Args:
        kinds (sequence of `tuple[int, int]`): How many frames in a row, and what each counts, such as its tokens.
        num_shares (`int`): Processes.
        device (`torch.device`, *optional*): Of the result.

    Returns:
        `list[torch.Tensor]`, each of shape `(L_share,)`, int64: for each process the places of what it has, in order.
    """
    shares, start = [[] for _ in range(num_shares)], 0
    for num_frames, size in kinds:
        bounds = [start + num_frames * number // num_shares * size for number in range(num_shares + 1)]
        for share, (first, end) in zip(shares, pairwise(bounds)):
            share.append(torch.arange(first, end, device=device))
        start = bounds[-1]
    return [torch.cat(share) for share in shares]


class ClipGroup:
    """The processes that share each clip.

    After `backward` of the same loss on each, a process has the gradients of what it computed for its own frames, times the
    number of processes, and of what it computed for all frames. Both are right in the mean over the processes, which is what
    data parallel training takes.

    Args:
        group (`torch.distributed.ProcessGroup`): Of them.

    Attributes:
        size (`int`), rank (`int`): How many processes, and which of them this one is.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def own(self, states: torch.Tensor, dim: int = 0, num_kinds: int = 1) -> torch.Tensor:
        """This process's part of what all processes have; along `dim` there are so many kinds, of equal length."""
        kinds = [(states.shape[dim] // num_kinds, 1)] * num_kinds
        return states.index_select(dim, divided(kinds, self.size, states.device)[self.rank])

    def gathered(self, states: torch.Tensor, total: int, dim: int = 0) -> torch.Tensor:
        """The `total` of which each process has its `own` part along `dim`, on all of them."""
        num_received = [len(share) for share in divided([(total, 1)], self.size)]
        part = states.transpose(0, dim)
        copies = part.expand(self.size, *part.shape).flatten(0, 1)
        return self.exchange(copies, [len(part)] * self.size, num_received).transpose(0, dim)

    def exchange(self, tensor: torch.Tensor, num_sent: list[int], num_received: list[int]) -> torch.Tensor:
        """Send so many rows to each process, and receive so many from each."""
        return _AllToAll.apply(tensor, self.group, num_sent, num_received)


class SharedPass:
    """One pass of the blocks over the frames of shared clips, in place of its attention mask.

    Args:
        clip_group ([`ClipGroup`]): The processes.
        plan (`ContextPlan`): Of all frames, without a cache.
        attention_mask: Of all of them, as of one process.
        has_twins (`bool`): The short frames follow once more, as noisy twins.
        device (`torch.device`): Of the pass.
    """

    def __init__(
        self, clip_group: ClipGroup, plan: ContextPlan, attention_mask: Any, has_twins: bool, device: torch.device
    ) -> None:
        self.clip_group, self.attention_mask = clip_group, attention_mask
        self._num_short_frames, self._num_short_kinds = plan.num_short_frames, 1 + has_twins
        kinds = [(plan.num_long_frames, plan.tokens_per_long_frame)]
        kinds += [(plan.num_short_frames, plan.tokens_per_short_frame)] * self._num_short_kinds
        self._frames = divided([(num_frames, 1) for num_frames, _ in kinds], clip_group.size, device)
        self._tokens = divided(kinds, clip_group.size, device)
        read_tokens = divided(kinds[-1:], clip_group.size, device)  # what is read of the last block
        self.num_own_frames = len(read_tokens[clip_group.rank]) // plan.tokens_per_short_frame
        # How many rows each process has, and the rows of one process after another's; the same in all blocks.
        self._rows, self._read_rows = (
            ([len(share) for share in shares], torch.cat(shares)) for shares in (self._tokens, read_tokens)
        )
        self._places, self._read_places = self._rows[1].argsort(), self._read_rows[1].argsort()

    def own(self, short_states, long_states, temb, rotary_emb) -> tuple[torch.Tensor | None, ...]:
        """What the blocks are given, of this process's frames."""
        group = self.clip_group
        long_states = None if long_states is None else group.own(long_states, dim=1)
        short_states = group.own(short_states, dim=1, num_kinds=self._num_short_kinds)
        return short_states, long_states, temb[:, self._frames[group.rank]], rotary_emb[self._tokens[group.rank]]

    def attend(self, attend: Callable[..., torch.Tensor], query, key, value, reads_all: bool) -> torch.Tensor:
        """Run `attend(query, key, value, mask)` for all frames and some of the heads, of `(B, L_own, N, D)` with all heads.
        Unless it `reads_all`, the queries are those of the short frames, or of the twins, alone."""
        (lengths, rows), places = (self._rows, self._places) if reads_all else (self._read_rows, self._read_places)
        key, value = (self._to_heads(states, self._rows[0], self._places) for states in (key, value))
        attended = attend(self._to_heads(query, lengths, places), key, value, self.attention_mask)
        return self._to_frames(attended, lengths, rows)

    def gathered(self, short_states: torch.Tensor) -> torch.Tensor:
        """The short frames of all processes, or their twins where there are any: what is read of the last block."""
        return self.clip_group.gathered(short_states[:, -self.num_own_frames :], self._num_short_frames, dim=1)

    def _to_heads(self, states: torch.Tensor, lengths: list[int], places: torch.Tensor) -> torch.Tensor:
        """`(B, L_own, N, D)` -> `(B, L, N / processes, D)`, in the order of the pass."""
        size = self.clip_group.size
        sent = states.unflatten(2, (size, -1)).permute(2, 1, 0, 3, 4).flatten(0, 1)
        received = self.clip_group.exchange(sent, [states.shape[1]] * size, lengths)  # one process's after another's
        return received[places].transpose(0, 1)

    def _to_frames(self, states: torch.Tensor, lengths: list[int], rows: torch.Tensor) -> torch.Tensor:
        """`(B, L, N / processes, D)` -> `(B, L_own, N, D)`."""
        size, own = self.clip_group.size, lengths[self.clip_group.rank]
        received = self.clip_group.exchange(states.transpose(0, 1)[rows], lengths, [own] * size)
        return received.unflatten(0, (size, own)).permute(2, 1, 0, 3, 4).flatten(2, 3)
