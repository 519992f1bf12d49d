"""Pure functions of the FAR transformer: patches, positions, rotary embedding, and which token sees which.

Frame-causal attention runs in chunks of queries, so that no time is spent on the masked half.

B batch, F frames, C latent channels, H/W latent height/width, P patch size, L tokens of a pass, N heads, D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .context_plan import ContextPlan


def patchify(latents: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut latent frames into flat patches, row by row; inside a patch channels come first.

    Args:
        latents (`torch.Tensor` of shape `(B, F, C, H, W)`): H and W are multiples of `patch_size`.
        patch_size (`int`): Side of a patch.

    Returns:
        `torch.Tensor` of shape `(B, F, H/P * W/P, C * P * P)`.
    """
    patches = latents.unflatten(-1, (-1, patch_size)).unflatten(-3, (-1, patch_size))  # (B, F, C, H/P, P, W/P, P)
    return patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)


def unpatchify(patches: torch.Tensor, patch_size: int, height: int, width: int) -> torch.Tensor:
    """Inverse of [`patchify`].

    Args:
        patches (`torch.Tensor` of shape `(B, F, H/P * W/P, C * P * P)`).
        patch_size (`int`): Side of a patch.
        height (`int`), width (`int`): H and W of the latent frames.

    Returns:
        `torch.Tensor` of shape `(B, F, C, H, W)`.
    """
    grid = (height // patch_size, width // patch_size)
    latents = patches.unflatten(2, grid).unflatten(-1, (-1, patch_size, patch_size))  # (B, F, H/P, W/P, C, P, P)
    return latents.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4)


def position_ids(plan: ContextPlan, device: torch.device | None = None, has_twins: bool = False) -> torch.Tensor:
    """Where each token of a pass stands. A long token stands at the first short token that its patch covers, and a noisy twin
    of a short frame where that frame's tokens do.

    Returns:
        `torch.Tensor` of shape `(L, 3)`, int64: frame, row and column, the latter two in short tokens.
    """

    def grid(first_frame: int, end_frame: int, patch_size: int) -> torch.Tensor:
        frames = torch.arange(first_frame, end_frame, device=device)
        rows = torch.arange(0, plan.height, patch_size, device=device) // plan.patch_size
        columns = torch.arange(0, plan.width, patch_size, device=device) // plan.patch_size
        return torch.cartesian_prod(frames, rows, columns)

    short_ids = grid(plan.first_short_frame, plan.end_frame, plan.patch_size)
    parts = [short_ids, short_ids] if has_twins else [short_ids]
    if plan.num_long_frames:
        parts.insert(0, grid(plan.first_frame, plan.end_long_frame, plan.long_patch_size))
    return torch.cat(parts)


def frame_ids(plan: ContextPlan, device: torch.device | None = None, has_twins: bool = False) -> torch.Tensor:
    """Absolute frame index of each token of a pass, after which the short frames may follow once more, as noisy twins.

    Returns:
        `torch.Tensor` of shape `(L,)`, int64.
    """
    long_frames = torch.arange(plan.first_frame, plan.end_long_frame, device=device)
    short_frames = torch.arange(plan.first_short_frame, plan.end_frame, device=device)
    short_ids = short_frames.repeat_interleave(plan.tokens_per_short_frame)
    parts = [long_frames.repeat_interleave(plan.tokens_per_long_frame), short_ids]
    return torch.cat([*parts, short_ids] if has_twins else parts)


def rotary_embedding(position_ids: torch.Tensor, axes_dims: tuple[int, ...], theta: float = 10000.0) -> torch.Tensor:
    """Rotations of 3D rotary position embedding: each axis turns its own share of the head's channel pairs.

    Args:
        position_ids (`torch.Tensor` of shape `([B,] L, 3)`): Integers; they enter float32 exactly up to 2^24.
        axes_dims (`tuple[int, ...]`): Head channels of each axis (time, height, width), even numbers.
        theta (`float`): Base of the frequencies.

    Returns:
        `torch.Tensor` of shape `([B,] L, D / 2)`, complex64 whatever the model's dtype: in bfloat16 every frame index above
        256 would be rounded.
    """
    angles = []
    for axis, dim in enumerate(axes_dims):
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=position_ids.device) / dim
        angles.append(position_ids[..., axis, None].float() / theta**exponents)
    angles = torch.cat(angles, dim=-1)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary_embedding(hidden_states: torch.Tensor, rotary_emb: torch.Tensor) -> torch.Tensor:
    """Rotate interleaved channel pairs, in float32.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, L, N, D)`): Queries or keys.
        rotary_emb (`torch.Tensor` of shape `([B,] L, D / 2)`, complex64): From [`rotary_embedding`].

    Returns:
        `torch.Tensor` of shape `(B, L, N, D)` in the dtype of `hidden_states`.
    """
    # One complex product: far fewer passes over memory than the same sums written out on even and odd channels.
    pairs = torch.view_as_complex(hidden_states.float().unflatten(-1, (-1, 2)))
    rotated = torch.view_as_real(pairs * rotary_emb[..., None, :]).flatten(-2)
    return rotated.to(hidden_states.dtype)


def frame_causal_mask(
    query_frames: torch.Tensor, key_frames: torch.Tensor, is_twin: torch.Tensor | None = None
) -> torch.Tensor:
    """Let each token see its own frame and every earlier one.

    Args:
        query_frames (`torch.Tensor` of shape `(L_query,)`): Absolute frame index of each query, from 0.
        key_frames (`torch.Tensor` of shape `(L_key,)`): Same clock, cached keys included.
        is_twin (`torch.Tensor` of shape `(L_query,)`, bool, *optional*): Where the queries are the keys too, marks the
            noisy twins of clean frames. A twin sees itself and the clean frames before it, and nobody else sees it.

    Returns:
        `torch.Tensor` of shape `(L_query, L_key)`, bool, `True` where attention is allowed.

    Source: FAR, arXiv:2503.19325, figure 3; the twins, ACDiT, arXiv:2412.07720.
    """
    distance = key_frames[None, :] - query_frames[:, None]
    if is_twin is None:
        return distance <= 0
    same_kind = is_twin[None, :] == is_twin[:, None]
    return torch.where(distance == 0, same_kind, (distance < 0) & ~is_twin[None, :])


def frame_causal_block_mask(query_frames: torch.Tensor, key_frames: torch.Tensor, is_twin: torch.Tensor | None = None):
    """[`frame_causal_mask`] as the `BlockMask` of flex attention, which skips the blocks where nothing is allowed."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(batch, head, query, key):
        if is_twin is None:
            return key_frames[key] <= query_frames[query]
        same_frame = (key_frames[key] == query_frames[query]) & (is_twin[key] == is_twin[query])
        return same_frame | ((key_frames[key] < query_frames[query]) & ~is_twin[key])

    return create_block_mask(
        sees, None, None, query_frames.shape[0], key_frames.shape[0], device=str(query_frames.device)
    )


# Of the clean tokens: with 8 chunks 1/16 of the square is computed in vain, and more chunks cost more than they save. Of
# fewer tokens than these in a chunk, calls and copies cost more than the products that are saved.
NUM_CHUNKS = 8
MIN_CHUNK_TOKENS = 128


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
            # With batch and heads: a mask of two dimensions could be taken for one of the keys of each sample.
            mask = None if chunk.mask is None else chunk.mask[None, None, first - chunk.start :]
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
    chunk_size = max(plan.num_tokens / NUM_CHUNKS, MIN_CHUNK_TOKENS)
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
