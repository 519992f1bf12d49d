"""What a pass costs in floating-point operations: matrix products and attention, two for each multiply-add.

Norms, activations and the optimizer are left out: they are few. Attention counts the pairs that the mask allows, whatever a
kernel computes beyond them.

B batch, F frames, L tokens of a pass.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch

from diffusers_far import ContextPlan, FARTransformer3DModel


FORWARD_AND_BACKWARD = 3  # a backward pass is two products for each one of the forward pass


def meta_transformer(config: Mapping) -> FARTransformer3DModel:
    """The model of a config without its weights: sizes are all that is asked of it."""
    with torch.device("meta"):
        return FARTransformer3DModel(**config)


def forward_flops(transformer: FARTransformer3DModel, plan: ContextPlan, *, has_twins: bool = False) -> int:
    """One clip through the transformer, without a cache.

    Args:
        transformer ([`FARTransformer3DModel`]): On any device.
        plan ([`ContextPlan`]): Its long and short frames.
        has_twins (`bool`): The short frames run once more as noisy twins, for teacher forcing.
    """
    num_twins = plan.num_short_frames if has_twins else 0
    sizes = [plan.tokens_per_long_frame] * plan.num_long_frames + [plan.tokens_per_short_frame] * plan.num_short_frames
    twin_sizes = [plan.tokens_per_short_frame] * num_twins
    num_tokens, num_frames = sum(sizes) + sum(twin_sizes), len(sizes) + num_twins
    # Of the last block only the short frames, or their twins, are read.
    num_outputs = plan.num_short_tokens
    all_pairs = attended_pairs(sizes, twin_sizes, frame_causal=transformer.config.frame_causal)
    output_pairs = sum(all_pairs[-(num_twins or plan.num_short_frames) :])

    num_blocks = transformer.config.num_layers
    return (
        (num_blocks - 1) * block_flops(transformer, num_tokens, num_tokens, sum(all_pairs), num_frames)
        + block_flops(transformer, num_tokens, num_outputs, output_pairs, num_frames)
        + embedding_flops(transformer, plan, num_frames, num_twins)
    )


def attended_pairs(sizes: Sequence[int], twin_sizes: Sequence[int] = (), *, frame_causal: bool = True) -> list[int]:
    """Pairs of query and key tokens, by the frame of the query.

    Args:
        sizes (sequence of `int`): Tokens of each frame, in order of time.
        twin_sizes (sequence of `int`): Of the noisy twins of the last frames, which see the clean frames before theirs.
        frame_causal (`bool`): `False`: every frame sees every other one.
    """
    if not frame_causal:
        return [size * sum(sizes) for size in sizes]
    seen = list(accumulate(sizes))
    clean_before = [0, *seen][len(sizes) - len(twin_sizes) : len(sizes)]
    clean_pairs = [size * num_keys for size, num_keys in zip(sizes, seen)]
    return clean_pairs + [size * (num_keys + size) for size, num_keys in zip(twin_sizes, clean_before)]


def block_flops(
    transformer: FARTransformer3DModel, num_keys: int, num_queries: int, num_pairs: int, num_frames: int
) -> int:
    """One block, of whose `num_keys` tokens `num_queries` are also read."""
    dim, mlp_ratio = transformer.inner_dim, transformer.config.mlp_ratio
    keys_and_values = 2 * dim**2 * num_keys
    query_output_and_mlp = int(2 + 2 * mlp_ratio) * dim**2 * num_queries
    modulation = 6 * dim**2 * num_frames
    attention = 2 * dim * num_pairs
    return 2 * (keys_and_values + query_output_and_mlp + modulation + attention)


def embedding_flops(transformer: FARTransformer3DModel, plan: ContextPlan, num_frames: int, num_twins: int) -> int:
    """Patches in and out, time, and the last modulation."""
    config, dim = transformer.config, transformer.inner_dim
    num_short = (plan.num_short_frames + num_twins) * plan.tokens_per_short_frame
    patches = config.in_channels * config.patch_size**2 * dim * num_short
    if plan.num_long_frames:
        patches += config.in_channels * config.long_patch_size**2 * dim * plan.num_long_tokens
    output = transformer.out_channels * config.patch_size**2 * dim * plan.num_short_tokens
    time = (transformer.time_proj.num_channels + dim) * dim * num_frames
    return 2 * (patches + output + time + 2 * dim**2 * plan.num_short_frames)


def far_step_flops(
    transformer: FARTransformer3DModel,
    *,
    num_frames: int,
    latent_size: int,
    num_clips: int,
    teacher_forcing: bool = False,
) -> float:
    """One training step of FAR or a Video DiT; for a long model the mean over the number of long frames that is drawn.

    Args:
        transformer ([`FARTransformer3DModel`]): On any device.
        num_frames (`int`): Longest clip.
        latent_size (`int`): Height and width of the latents.
        num_clips (`int`): Clips of a step, on all processes together.
        teacher_forcing (`bool`): Short frames run twice.
    """
    config = transformer.config
    lengths = [num_frames]
    if config.long_patch_size is not None:
        lengths = range(min(config.short_window, num_frames), num_frames + 1)
    costs = [
        forward_flops(
            transformer, transformer.context_plan(length, latent_size, latent_size), has_twins=teacher_forcing
        )
        for length in lengths
    ]
    return FORWARD_AND_BACKWARD * num_clips * sum(costs) / len(costs)


def token_ar_step_flops(decoder: Mapping, *, num_codes: int, tokens_per_frame: int, num_frames: int, num_clips: int):
    """One training step of the token-autoregressive baseline, with a Llama decoder.

    Args:
        decoder (`dict`): `hidden_size`, `intermediate_size`, `num_hidden_layers`; as many key as query heads.
        num_codes (`int`): Size of the codebook.
        tokens_per_frame (`int`): Codes of a frame; its opening token comes on top.
        num_frames (`int`), num_clips (`int`): Of a step.
    """
    dim, num_tokens = decoder["hidden_size"], num_frames * (tokens_per_frame + 1)
    block = (4 * dim**2 + 3 * dim * decoder["intermediate_size"]) * num_tokens
    attention = 2 * dim * num_tokens * (num_tokens + 1) // 2
    head = dim * num_codes * num_frames * tokens_per_frame
    return FORWARD_AND_BACKWARD * num_clips * 2 * (decoder["num_hidden_layers"] * (block + attention) + head)
