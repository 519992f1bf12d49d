"""FAR and its cache on one page, as they are easily written: the place to start reading, and what the library is compared with.

Equal in result to the rooms that do the same fast:

    NaiveFAR._run, _heads         `models.frame_network.FrameNetwork`, `models.frame_network.FARAttention`
    context_plan of a model       `models.context_plan.ContextPlan`, the only rule that is shared
    NaiveCache, write, step       `models.kv_cache.FARKVCache`
    position_ids, patchify        `models.functional.position_ids`, `models.functional.patchify`
    dense_mask, its slope         `models.functional.frame_causal_mask`, `hooks.flex_rope.FlexRoPEConfig`
    denoise                       `pipelines.rollout.Rollout`

It works as published implementations do. Every call, a denoising step too, builds a dense float mask of all tokens, in which
FlexRoPE's decay with their distance in time has its place whether it is used or not, and takes the rows of its queries; the
cache holds keys that are not rotated, and every step concatenates them with the new ones and rotates them all, by tables of
cosines and sines; the modulation is computed for each token. It shares the weights of a transformer and none of its code; the
rotary embedding is diffusers' own, as its pipelines use it.

B batch, F frames, P patch size, L tokens of a pass, N heads, D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed, get_timestep_embedding

from diffusers_far import ContextPlan, FARTransformer3DModel


CLEAN_TIMESTEP, LONG_TIMESTEP = -1.0, -2.0
EPS = 1e-6  # of all norms


@dataclass(frozen=True)
class NaiveKeys:
    """Keys, not rotated, and values of some tokens: a pair of `(B, N, L, D)` for each layer.

    `positions`, `(L, 3)`, has the frame, row and column of each token.
    """

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    positions: torch.Tensor

    def split(self, frame: int) -> tuple["NaiveKeys", "NaiveKeys"]:
        """Those before a frame, and those from it on."""
        num_tokens = int((self.positions[:, 0] < frame).sum())
        before = [(key[:, :, :num_tokens], value[:, :, :num_tokens]) for key, value in self.layers]
        after = [(key[:, :, num_tokens:], value[:, :, num_tokens:]) for key, value in self.layers]
        return NaiveKeys(before, self.positions[:num_tokens]), NaiveKeys(after, self.positions[num_tokens:])


@dataclass(frozen=True)
class NaiveCache:
    """The context of a rollout: keys of all frames, and what the frames after the `num_long_frames` were made of, since
    these are encoded anew when one of them turns long: latents `(B, F, C, H, W)` and actions `(B, F)`."""

    keys: NaiveKeys
    num_long_frames: int
    latents: torch.Tensor
    actions: torch.Tensor

    @property
    def num_frames(self) -> int:
        return self.num_long_frames + self.latents.shape[1]

    def without_first(self, num_frames: int) -> "NaiveCache":
        """Forget the oldest long frames; the frames after them move up in time."""
        kept = self.keys.split(num_frames)[1]
        kept = NaiveKeys(kept.layers, kept.positions - torch.tensor([num_frames, 0, 0]))
        return NaiveCache(kept, self.num_long_frames - num_frames, self.latents, self.actions)


class NaiveFAR:
    """Runs the weights of a transformer the easy way.

    Args:
        transformer (`FARTransformer3DModel`): With discrete actions; index `num_actions` is the null action.
    """

    def __init__(self, transformer: FARTransformer3DModel):
        self.config = transformer.config
        self.context_plan = transformer.context_plan
        self.weights = dict(transformer.named_parameters())

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """The velocity of the short frames of a clip `(B, F, C, H, W)`, without a cache; for training."""
        plan = self.context_plan(latents.shape[1], *latents.shape[-2:])
        return self._run(latents, timestep, actions, plan, None)[0]

    @torch.no_grad()
    def write(self, latents: torch.Tensor, actions: torch.Tensor, cache: NaiveCache | None = None) -> NaiveCache:
        """The cache with clean frames after its own. Where frames turn long, they and all short ones are encoded."""
        num_cached, num_cached_long, kept = 0, 0, None
        if cache is not None:
            num_cached, num_cached_long, kept = cache.num_frames, cache.num_long_frames, cache.keys
            latents, actions = torch.cat([cache.latents, latents], 1), torch.cat([cache.actions, actions], 1)
        num_frames = num_cached_long + latents.shape[1]
        plan = self.context_plan(num_frames + 1, *latents.shape[-2:])
        num_kept = num_cached
        if kept is not None and plan.num_long_frames > num_cached_long:
            kept, num_kept = kept.split(num_cached_long)[0], num_cached_long

        encoded, encoded_actions = latents[:, num_kept - num_cached_long :], actions[:, num_kept - num_cached_long :]
        timestep = torch.full(encoded.shape[:2], CLEAN_TIMESTEP)
        keys = self._run(encoded, timestep, encoded_actions, plan.segment(num_kept, num_frames), kept, is_write=True)[
            1
        ]
        num_new_long = plan.num_long_frames - num_cached_long
        return NaiveCache(keys, plan.num_long_frames, latents[:, num_new_long:], actions[:, num_new_long:])

    @torch.no_grad()
    def step(
        self, noisy: torch.Tensor, timestep: torch.Tensor | float, actions: torch.Tensor, cache: NaiveCache
    ) -> torch.Tensor:
        """The velocity of the one noisy frame after those in the cache, `(B, 1, C, H, W)`."""
        plan = self.context_plan(cache.num_frames + 1, *noisy.shape[-2:]).segment(cache.num_frames)
        timestep = torch.full(noisy.shape[:2], float(timestep))
        return self._run(noisy, timestep, actions, plan, cache.keys)[0]

    def _run(
        self, latents, timestep, actions, plan: ContextPlan, cached: NaiveKeys | None, is_write: bool = False
    ) -> tuple[torch.Tensor, NaiveKeys]:
        """The velocity of the short frames of a pass, and, of a write, the keys of the cached tokens and of the pass."""
        num_long, last_layer = plan.num_long_tokens, self.config.num_layers - 1
        hidden_states = self._embed_patches(latents, plan)
        positions = position_ids(plan)
        temb = self._embed_conditions(latents, timestep, actions, plan)[:, positions[:, 0] - plan.first_frame]
        num_queries = len(positions)
        if cached is not None:
            positions = torch.cat([cached.positions, positions])
        mask = dense_mask(positions[:, 0])[:, -num_queries:]
        rotary_emb = self._rotary_embedding(positions)
        query_rotary_emb = tuple(table[-num_queries:] for table in rotary_emb)

        layers = []
        for number in range(self.config.num_layers):
            block = f"transformer_blocks.{number}"
            shift, scale, gate = self._linear(f"{block}.norm1.linear", F.silu(temb)).chunk(3, dim=-1)
            states = self._norm(hidden_states) * (1 + scale) + shift
            query, key, value = self._project(f"{block}.attn", states, num_long)
            if cached is not None:
                cached_key, cached_value = cached.layers[number]
                key, value = torch.cat([cached_key, key], dim=2), torch.cat([cached_value, value], dim=2)
            if is_write:  # else each layer's are made in the memory that the one before has left
                layers.append((key, value))
            query, key = apply_rotary_emb(query, query_rotary_emb), apply_rotary_emb(key, rotary_emb)
            states = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            states = states.permute(0, 2, 1, 3).contiguous().flatten(2)
            attention = self._linear(f"{block}.attn.to_out.0", states[:, num_long:])
            if num_long:
                long_states = states[:, :num_long]
                if number < last_layer:  # after which nobody reads the long tokens
                    long_states = self._linear(f"{block}.attn.to_add_out", long_states)
                attention = torch.cat([long_states, attention], dim=1)
            hidden_states = hidden_states + gate * attention

            shift, scale, gate = self._linear(f"{block}.norm2.linear", F.silu(temb)).chunk(3, dim=-1)
            states = self._norm(hidden_states) * (1 + scale) + shift
            states = F.gelu(self._linear(f"{block}.mlp.net.0.proj", states), approximate="tanh")
            hidden_states = hidden_states + gate * self._linear(f"{block}.mlp.net.2", states)

        scale, shift = self._linear("norm_out.linear", F.silu(temb)).chunk(2, dim=-1)
        patches = self._linear("proj_out", self._norm(hidden_states) * (1 + scale) + shift)[:, num_long:]
        return unpatchify(patches, plan), NaiveKeys(layers, positions)

    def _linear(self, name: str, states: torch.Tensor) -> torch.Tensor:
        return F.linear(states, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, states: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(states, states.shape[-1:], eps=EPS)

    def _embed_patches(self, latents: torch.Tensor, plan: ContextPlan) -> torch.Tensor:
        """Tokens `(B, L, dim)`, those of the long frames first."""
        num_long = plan.num_long_frames
        short_tokens = self._linear("x_embedder", patchify(latents[:, num_long:], plan.patch_size))
        if num_long == 0:
            return short_tokens
        long_tokens = self._linear("context_embedder", patchify(latents[:, :num_long], plan.long_patch_size))
        return torch.cat([long_tokens, short_tokens], dim=1)

    def _embed_conditions(self, latents, timestep, actions, plan: ContextPlan) -> torch.Tensor:
        """Time and action of each frame, `(B, F, dim)`."""
        timestep = timestep.clone()
        timestep[:, : plan.num_long_frames] = LONG_TIMESTEP
        temb = get_timestep_embedding(timestep.flatten(), 256, flip_sin_to_cos=True, downscale_freq_shift=1)
        temb = F.silu(self._linear("timestep_embedder.linear_1", temb))
        temb = self._linear("timestep_embedder.linear_2", temb).unflatten(0, timestep.shape)
        return temb + F.embedding(actions, self.weights["action_embedder.embedding_table.weight"])

    def _rotary_embedding(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables of cosines and sines, `(L, D)` each."""
        axes = [
            get_1d_rotary_pos_embed(
                dim, positions[:, axis].double(), self.config.rope_theta, use_real=True, freqs_dtype=torch.float64
            )
            for axis, dim in enumerate(self.config.axes_dims_rope)
        ]
        return torch.cat([cos for cos, _ in axes], dim=-1), torch.cat([sin for _, sin in axes], dim=-1)

    def _project(self, attn: str, states: torch.Tensor, num_long: int) -> list[torch.Tensor]:
        """Query, key and value, `(B, N, L, D)`; long tokens have projections of their own."""
        projected = []
        for name in ("q", "k", "v"):
            heads = self._heads(f"{attn}.to_{name}", f"{attn}.norm_{name}", states[:, num_long:])
            if num_long:
                long_states = states[:, :num_long]
                long_heads = self._heads(f"{attn}.add_{name}_proj", f"{attn}.norm_added_{name}", long_states)
                heads = torch.cat([long_heads, heads], dim=2)
            projected.append(heads)
        return projected

    def _heads(self, projection: str, norm: str, states: torch.Tensor) -> torch.Tensor:
        heads = self._linear(projection, states).unflatten(-1, (self.config.num_attention_heads, -1))
        heads = heads.permute(0, 2, 1, 3).contiguous()
        weight = self.weights.get(f"{norm}.weight")  # values have no norm
        return heads if weight is None else F.rms_norm(heads, heads.shape[-1:], weight, eps=EPS)


def position_ids(plan: ContextPlan) -> torch.Tensor:
    """Frame, row and column of each token, `(L, 3)`; a long token stands where its patch starts."""
    kinds = [(plan.first_short_frame, plan.end_frame, plan.patch_size)]
    if plan.num_long_frames:
        kinds.insert(0, (plan.first_frame, plan.end_long_frame, plan.long_patch_size))
    grids = []
    for first_frame, end_frame, patch_size in kinds:
        rows, columns = (torch.arange(0, side, patch_size) // plan.patch_size for side in (plan.height, plan.width))
        grids.append(torch.cartesian_prod(torch.arange(first_frame, end_frame), rows, columns))
    return torch.cat(grids)


def dense_mask(frames: torch.Tensor, slope: float = 0.0) -> torch.Tensor:
    """`(1, L, L)`: minus infinity where a token may not see another, those of later frames; else minus `slope` for each
    frame between them, 0 without FlexRoPE.

    With an axis for the batch, as published: PyTorch's fused attention on the CPU takes masks of two or four axes, so with
    this one the scores of all heads are computed, and kept for the backward pass.
    """
    distance = frames[None, :] - frames[:, None]  # negative into the past
    is_future = distance > 0
    mask = torch.zeros(distance.shape).masked_fill_(is_future, float("-inf"))
    return mask.add_((slope * distance).masked_fill_(is_future, 0))[None]


def patchify(latents: torch.Tensor, patch_size: int) -> torch.Tensor:
    """`(B, F, C, H, W)` -> `(B, L, C * P * P)`."""
    batch_size, num_frames, channels, height, width = latents.shape
    rows, columns = height // patch_size, width // patch_size
    patches = latents.reshape(batch_size, num_frames, channels, rows, patch_size, columns, patch_size)
    return patches.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch_size, -1, channels * patch_size**2)


def unpatchify(patches: torch.Tensor, plan: ContextPlan) -> torch.Tensor:
    """Inverse of `patchify`, for short frames."""
    batch_size, size = patches.shape[0], plan.patch_size
    rows, columns = plan.height // size, plan.width // size
    patches = patches.reshape(batch_size, plan.num_short_frames, rows, columns, -1, size, size)
    return patches.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch_size, plan.num_short_frames, -1, plan.height, plan.width)


def denoise(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], noise: torch.Tensor, num_steps: int
) -> torch.Tensor:
    """A frame from noise; `velocity` is of latents and a timestep."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(num_steps)
    latents = noise
    for timestep in scheduler.timesteps:
        latents = scheduler.step(velocity(latents, timestep), timestep, latents, return_dict=False)[0]
    return latents
