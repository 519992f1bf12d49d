"""FAR as it is easily written, for comparison: equal in result, wasteful in the usual ways.

Every denoising step builds a dense (tokens x tokens) mask, concatenates the cached keys with the new ones, rotates all of
them again, and computes the modulation once per token.

B batch, F frames, L tokens of a pass, N heads, D head dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from diffusers_far import FARTransformer3DModel
from diffusers_far.models.functional import (
    apply_rotary_embedding,
    frame_ids,
    patchify,
    position_ids,
    rotary_embedding,
    unpatchify,
)


@dataclass
class NaiveCache:
    """Unrotated keys and values of the context, a pair for each layer, with the place and the frame of each token."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    positions: torch.Tensor
    frames: torch.Tensor


class NaiveFAR:
    """Runs the weights of a transformer the wasteful way.

    Args:
        transformer (`FARTransformer3DModel`): With discrete actions.
    """

    def __init__(self, transformer: FARTransformer3DModel):
        self.transformer = transformer

    @torch.no_grad()
    def encode(self, latents: torch.Tensor, actions: torch.Tensor) -> NaiveCache:
        """A cache of clean frames, `(B, F, C, H, W)`, in front of one more, noisy frame."""
        num_frames = latents.shape[1]
        plan = self.transformer.context_plan(num_frames + 1, *latents.shape[-2:]).segment(0, num_frames)
        layers = self._run(latents, torch.full(latents.shape[:2], -1.0), actions, plan, None)[1]
        return NaiveCache(layers, position_ids(plan), frame_ids(plan))

    @torch.no_grad()
    def step(self, noisy: torch.Tensor, timestep: float, actions: torch.Tensor, cache: NaiveCache) -> torch.Tensor:
        """The velocity of one noisy frame, `(B, 1, C, H, W)`."""
        frame = int(cache.frames.max()) + 1
        plan = self.transformer.context_plan(frame + 1, *noisy.shape[-2:]).segment(frame)
        return self._run(noisy, torch.full(noisy.shape[:2], timestep), actions, plan, cache)[0]

    def _run(self, latents, timestep, actions, plan, cache):
        model, config, num_long = self.transformer, self.transformer.config, plan.num_long_frames
        long_tokens = plan.num_long_tokens
        hidden_states = model.x_embedder(patchify(latents[:, num_long:], plan.patch_size)).flatten(1, 2)
        if num_long:
            long_states = model.context_embedder(patchify(latents[:, :num_long], plan.long_patch_size)).flatten(1, 2)
            hidden_states = torch.cat([long_states, hidden_states], dim=1)

        # One embedding per token, which the modulation of every layer is computed from.
        timestep = timestep.clone()
        timestep[:, :num_long] = -2
        temb = model.timestep_embedder(model.time_proj(timestep.flatten())).unflatten(0, timestep.shape)
        temb = temb + model.action_embedder(actions)
        frames, positions = frame_ids(plan), position_ids(plan)
        temb = temb[:, frames - plan.first_frame]

        key_frames, key_positions = frames, positions
        if cache is not None:
            key_frames = torch.cat([cache.frames, frames])
            key_positions = torch.cat([cache.positions, positions])
        mask = torch.zeros(len(frames), len(key_frames))
        mask.masked_fill_(key_frames[None] > frames[:, None], float("-inf"))
        rotations = rotary_embedding(positions, config.axes_dims_rope, config.rope_theta)
        key_rotations = rotary_embedding(key_positions, config.axes_dims_rope, config.rope_theta)

        layers = []
        for number, block in enumerate(model.transformer_blocks):
            attn = block.attn
            shift, scale, gate = block.norm1.linear(F.silu(temb)).chunk(3, dim=-1)
            states = block.norm1.norm(hidden_states) * (1 + scale) + shift
            query, key, value = self._project(attn, states, long_tokens)
            layers.append((key, value))
            if cache is not None:
                cached_key, cached_value = cache.layers[number]
                key, value = torch.cat([cached_key, key], dim=1), torch.cat([cached_value, value], dim=1)
            query, key = apply_rotary_embedding(query, rotations), apply_rotary_embedding(key, key_rotations)
            query, key, value = (each.transpose(1, 2) for each in (query, key, value))
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
            outputs = [attn.to_out[0](output[:, long_tokens:])]
            if long_tokens:
                skipped = attn.context_pre_only
                outputs.insert(0, output[:, :long_tokens] if skipped else attn.to_add_out(output[:, :long_tokens]))
            hidden_states = hidden_states + gate * torch.cat(outputs, dim=1)
            shift, scale, gate = block.norm2.linear(F.silu(temb)).chunk(3, dim=-1)
            states = block.norm2.norm(hidden_states) * (1 + scale) + shift
            hidden_states = hidden_states + gate * block.mlp(states)

        scale, shift = model.norm_out.linear(F.silu(temb)).chunk(2, dim=-1)
        patches = model.proj_out(model.norm_out.norm(hidden_states) * (1 + scale) + shift)[:, long_tokens:]
        patches = patches.unflatten(1, (plan.num_short_frames, -1))
        return unpatchify(patches, plan.patch_size, plan.height, plan.width), layers

    def _project(self, attn, states, long_tokens):
        short = states[:, long_tokens:]
        query, key, value = (
            project(short).unflatten(-1, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        if not long_tokens:
            return query, key, value
        long_query, long_key, long_value = (
            project(states[:, :long_tokens]).unflatten(-1, (attn.heads, -1))
            for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        long_query, long_key = attn.norm_added_q(long_query), attn.norm_added_k(long_key)
        pairs = ((long_query, query), (long_key, key), (long_value, value))
        return tuple(torch.cat(pair, dim=1) for pair in pairs)
