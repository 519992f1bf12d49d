"""Frame-causal attention in chunks of queries, so that no time is spent on the masked half.

B batch, F frames, L tokens of a pass, N heads, D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .context_plan import ContextPlan


NUM_CHUNKS = (
    8  # of the clean tokens: 1/16 of the square is then computed in vain, and more chunks cost more than they save
)


@dataclass(frozen=True)
class CausalChunk:
    """The queries of some frames in a row, and the keys that any of them sees; all in tokens.

    Args:
        start (`int`), end (`int`): The queries.
        context_end (`int`): The keys are those before it,
        own_start (`int`): and those from it up to `end`. Equal to `context_end` but for noisy twins, between whose
            context and themselves other tokens lie.
        mask (`torch.Tensor` of shape `(L_query, L_key)`, bool, *optional*): `None` where all see all.
    """

    start: int
    end: int
    context_end: int
    own_start: int
    mask: torch.Tensor | None

    def keys_of(self, states: torch.Tensor) -> torch.Tensor:
        """The part of `(B, L, N, D)` that the queries see; a view where it can be."""
        if self.own_start == self.context_end:
            return states[:, : self.end]
        return torch.cat([states[:, : self.context_end], states[:, self.own_start : self.end]], dim=1)


@dataclass(frozen=True)
class CausalChunks:
    """A frame-causal attention mask, cut along the queries. Chunks follow each other and cover all queries."""

    chunks: tuple[CausalChunk, ...]

    def attend(
        self, attend: Callable[..., torch.Tensor], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Run `attend(query, key, value, mask)` chunk by chunk on `(B, L, N, D)`.

        `query` may lack the first tokens of the pass: those whose output nobody reads.
        """
        num_missing = key.shape[1] - query.shape[1]
        outputs = []
        for chunk in self.chunks:
            if chunk.end <= num_missing:
                continue
            first = max(chunk.start, num_missing)
            mask = None if chunk.mask is None else chunk.mask[first - chunk.start :]
            queries = query[:, first - num_missing : chunk.end - num_missing]
            outputs.append(attend(queries, chunk.keys_of(key), chunk.keys_of(value), mask))
        return torch.cat(outputs, dim=1)


def frame_causal_chunks(plan: ContextPlan, mask: torch.Tensor, *, has_twins: bool = False) -> CausalChunks:
    """Cut a frame-causal mask at frames' edges into chunks of about equal size.

    Args:
        plan (`ContextPlan`): The frames of the pass, from the first on.
        mask (`torch.Tensor` of shape `(L, L)`, bool): From [`frame_causal_mask`].
        has_twins (`bool`): The short frames follow once more, as noisy twins.
    """
    long_size, short_size = plan.tokens_per_long_frame, plan.tokens_per_short_frame
    sizes = [long_size] * plan.num_long_frames + [short_size] * plan.num_short_frames
    chunk_size = plan.num_tokens / NUM_CHUNKS
    chunks = [
        CausalChunk(start, end, start, start, None if num_frames == 1 else mask[start:end, :end])
        for start, end, num_frames in _group(sizes, chunk_size)
    ]
    if has_twins:
        for start, end, num_frames in _group([short_size] * plan.num_short_frames, chunk_size):
            chunks.append(_twin_chunk(plan, mask, start, end, num_frames))
    return CausalChunks(tuple(chunks))


def _twin_chunk(plan: ContextPlan, mask: torch.Tensor, start: int, end: int, num_frames: int) -> CausalChunk:
    """Twins see the clean frames before theirs; `start` and `end` count from the first twin on."""
    context_end = plan.num_long_tokens + end - plan.tokens_per_short_frame
    start, end = plan.num_tokens + start, plan.num_tokens + end
    keys = torch.cat([mask[start:end, :context_end], mask[start:end, start:end]], dim=1)
    return CausalChunk(start, end, context_end, start, None if num_frames == 1 else keys)


def _group(sizes: list[int], chunk_size: float) -> list[tuple[int, int, int]]:
    """Frames in a row of at least `chunk_size` tokens together: first token, end, number of frames."""
    groups, start, end, num_frames = [], 0, 0, 0
    for size in sizes:
        end, num_frames = end + size, num_frames + 1
        if end - start >= chunk_size:
            groups.append((start, end, num_frames))
            start, num_frames = end, 0
    if num_frames:
        groups.append((start, end, num_frames))
    return groups
