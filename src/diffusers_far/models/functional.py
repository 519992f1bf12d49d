"""Pure functions of the FAR transformer: patches, positions, rotary embedding, masks.

B batch, F frames, C latent channels, H/W latent height/width, P patch size, L tokens, N heads, D head dim.
"""

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


def position_ids(plan: ContextPlan, device: torch.device | None = None) -> torch.Tensor:
    """Where each token of a pass stands. A long token stands at the first short token that its patch covers.

    Returns:
        `torch.Tensor` of shape `(L, 3)`, int64: frame, row and column, the latter two in short tokens.
    """

    def grid(first_frame: int, end_frame: int, patch_size: int) -> torch.Tensor:
        frames = torch.arange(first_frame, end_frame, device=device)
        rows = torch.arange(0, plan.height, patch_size, device=device) // plan.patch_size
        columns = torch.arange(0, plan.width, patch_size, device=device) // plan.patch_size
        return torch.cartesian_prod(frames, rows, columns)

    short_ids = grid(plan.first_short_frame, plan.end_frame, plan.patch_size)
    if plan.num_long_frames == 0:
        return short_ids
    return torch.cat([grid(plan.first_frame, plan.end_long_frame, plan.long_patch_size), short_ids])


def frame_ids(plan: ContextPlan, device: torch.device | None = None) -> torch.Tensor:
    """Absolute frame index of each token of a pass.

    Returns:
        `torch.Tensor` of shape `(L,)`, int64.
    """
    long_frames = torch.arange(plan.first_frame, plan.end_long_frame, device=device)
    short_frames = torch.arange(plan.first_short_frame, plan.end_frame, device=device)
    return torch.cat(
        [
            long_frames.repeat_interleave(plan.tokens_per_long_frame),
            short_frames.repeat_interleave(plan.tokens_per_short_frame),
        ]
    )


def rotary_embedding(position_ids: torch.Tensor, axes_dims: tuple[int, ...], theta: float = 10000.0) -> torch.Tensor:
    """Rotations of 3D rotary position embedding: each axis turns its own share of the head's channel pairs.

    Args:
        position_ids (`torch.Tensor` of shape `(L, 3)`): Integers; they enter float32 exactly up to 2^24.
        axes_dims (`tuple[int, ...]`): Head channels of each axis (time, height, width), even numbers.
        theta (`float`): Base of the frequencies.

    Returns:
        `torch.Tensor` of shape `(L, D / 2)`, complex64 whatever the model's dtype: in bfloat16 every frame index above
        256 would be rounded.
    """
    angles = []
    for axis, dim in enumerate(axes_dims):
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=position_ids.device) / dim
        angles.append(position_ids[:, axis, None].float() / theta**exponents)
    angles = torch.cat(angles, dim=-1)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary_embedding(hidden_states: torch.Tensor, rotary_emb: torch.Tensor) -> torch.Tensor:
    """Rotate interleaved channel pairs, in float32.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, L, N, D)`): Queries or keys.
        rotary_emb (`torch.Tensor` of shape `(L, D / 2)`, complex64): From [`rotary_embedding`].

    Returns:
        `torch.Tensor` of shape `(B, L, N, D)` in the dtype of `hidden_states`.
    """
    # One complex product: far fewer passes over memory than the same sums written out on even and odd channels.
    pairs = torch.view_as_complex(hidden_states.float().unflatten(-1, (-1, 2)))
    rotated = torch.view_as_real(pairs * rotary_emb[:, None]).flatten(-2)
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
