"""The multi-level KV cache: rotated keys and values of the clean frames, in one preallocated store per layer.

B batch, F frames, C latent channels, H/W latent height/width, L tokens, N heads, D head dim.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .context_plan import ContextPlan


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

    def last(self, num_frames: int) -> "FrameBatch":
        """The last `num_frames` frames, as views."""
        start = self.num_frames - num_frames
        tensors = (self.latents, self.actions, self.action_mask)
        return FrameBatch(*(None if tensor is None else tensor[:, start:] for tensor in tensors))

    def copy(self) -> "FrameBatch":
        """Copies that do not change with the caller's tensors."""
        tensors = (self.latents, self.actions, self.action_mask)
        return FrameBatch(*(None if tensor is None else tensor.clone() for tensor in tensors))

    def _full_mask(self) -> torch.Tensor:
        if self.action_mask is not None:
            return self.action_mask
        return torch.ones(self.latents.shape[:2], dtype=torch.bool, device=self.latents.device)


@dataclass(frozen=True)
class QuerySpan:
    """The queries of one frame in a pass, and the part of the stores that they see; all in tokens."""

    start: int
    end: int
    view_start: int
    view_end: int


@dataclass(frozen=True)
class CachePass:
    """Where one pass of the transformer writes and reads in the stores; all sizes in tokens.

    The pass brings `num_long_tokens` long tokens, then short ones. The long ones are written from `long_start` on, the
    latest frame first, the short ones from `short_start` on. Then each frame's queries see one contiguous view.
    """

    num_long_tokens: int
    tokens_per_long_frame: int
    long_start: int
    short_start: int
    queries: tuple[QuerySpan, ...]

    @property
    def view_start(self) -> int:
        return min(span.view_start for span in self.queries)


@dataclass(frozen=True)
class LayerKVCache:
    """The stores of one layer, as one pass sees them; what the attention of that layer works with.

    Args:
        key_store, value_store (`torch.Tensor` of shape `(B, L_store, N, D)`).
        cache_pass (`CachePass`).
    """

    key_store: torch.Tensor
    value_store: torch.Tensor
    cache_pass: CachePass

    def write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put the keys and values of the pass, `(B, L, N, D)`, in their places."""
        num_long, long_start = self.cache_pass.num_long_tokens, self.cache_pass.long_start
        short_start = self.cache_pass.short_start
        for store, states in ((self.key_store, key), (self.value_store, value)):
            if num_long:
                long_frames = states[:, :num_long].unflatten(1, (-1, self.cache_pass.tokens_per_long_frame))
                store[:, long_start : long_start + num_long] = long_frames.flip(1).flatten(1, 2)
            store[:, short_start : short_start + states.shape[1] - num_long] = states[:, num_long:]

    def view(self, span: QuerySpan) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that a frame's queries see, as views."""
        window = slice(span.view_start, span.view_end)
        return self.key_store[:, window], self.value_store[:, window]


class FARKVCache:
    """Keys and values of the clean frames of a rollout. Made by [`FARTransformer3DModel.init_kv_cache`].

    Each layer has one store of `(B, L_store, N, D)` for keys and one for values, laid out as

        | free | long frames, latest first | short frames, oldest first | the noisy frame | free |

    so that whatever one frame may see is one contiguous view: no mask, no concatenation, and nothing moves when the
    video grows, for the long frames grow to the left from a fixed boundary. (The order of keys does not matter to
    attention.) Long entries are append-only. Keys are rotated before they are stored; positions never change. Short
    frames are appended while no frame is long. After that each new clean frame turns the oldest short frame into a
    long one, which changes what all other short frames attend to, and they are encoded again from their latents,
    which the cache keeps for that purpose.

    Args:
        plan_for_frames (`Callable[[int], ContextPlan]`): The window rule of the model at this latent size.
        model (`torch.nn.Module`): The transformer that fills the cache; another one is refused.
        num_layers (`int`), num_heads (`int`), head_dim (`int`): Of the transformer's attention.
        batch_size (`int`): B.
        max_frames (`int`): Frames that fit, the noisy one included.
        dtype (`torch.dtype`), device (`torch.device`): Of the stores.

    Source: FAR, arXiv:2503.19325v2, "multi-level KV cache".
    """

    def __init__(
        self,
        plan_for_frames: Callable[[int], ContextPlan],
        model: torch.nn.Module,
        *,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        batch_size: int,
        max_frames: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        for name, value in (("batch_size", batch_size), ("max_frames", max_frames)):
            if value < 1:
                raise ValueError(f"`{name}` is {value}; a cache needs at least 1.")
        self.plan_for_frames = plan_for_frames
        self.batch_size = batch_size
        self.max_frames = max_frames
        self.num_frames = 0
        self._model = weakref.ref(model)
        self._kept_frames: FrameBatch | None = None

        self._largest_plan = plan_for_frames(max_frames)
        store_shape = (num_layers, batch_size, self._largest_plan.num_tokens, num_heads, head_dim)
        self._key_stores = torch.empty(store_shape, dtype=dtype, device=device)
        self._value_stores = torch.empty_like(self._key_stores)

    @property
    def dtype(self) -> torch.dtype:
        return self._key_stores.dtype

    @property
    def device(self) -> torch.device:
        return self._key_stores.device

    @property
    def num_bytes(self) -> int:
        """Bytes of the stores: 2 x layers x width x tokens x bytes per element, for each sample of the batch."""
        return 2 * self._key_stores.numel() * self._key_stores.element_size()

    @property
    def plan(self) -> ContextPlan:
        """The layout of the clean frames: what is long and short when the next frame is the noisy one."""
        return self.plan_for_frames(self.num_frames + 1).segment(0, self.num_frames)

    def check(self, model: torch.nn.Module, frames: FrameBatch, dtype: torch.dtype, *, noisy: bool) -> None:
        """Refuse a call that this cache was not made for, before anything is computed or written.

        Raises:
            ValueError: Another model, batch size, latent size or dtype; frames beyond `max_frames`; or more than one
                noisy frame.
        """
        if self._model() is not model:
            raise ValueError(
                f"`kv_cache` was made by another {type(self._model()).__name__}; keys of one model mean nothing to "
                "another. Make a cache with `init_kv_cache` of the model that you call."
            )
        batch_size, num_frames, _, height, width = frames.latents.shape
        if batch_size != self.batch_size:
            raise ValueError(
                f"`hidden_states` has a batch of {batch_size} but `kv_cache` was made for {self.batch_size}; "
                f"make one with `init_kv_cache(batch_size={batch_size}, ...)`."
            )
        if (height, width) != (self._largest_plan.height, self._largest_plan.width):
            raise ValueError(
                f"`hidden_states` has latents of {height}x{width} but `kv_cache` was made for "
                f"{self._largest_plan.height}x{self._largest_plan.width}; make one for this size."
            )
        if dtype != self.dtype:
            raise ValueError(
                f"The model computes in {dtype} but `kv_cache` holds {self.dtype}; "
                f"make one with `init_kv_cache(..., dtype={dtype})`."
            )
        if noisy and num_frames != 1:
            raise ValueError(
                f"`hidden_states` has {num_frames} frames but exactly one frame is denoised against `kv_cache`; "
                "pass one noisy frame, or clean frames with `update_cache=True`."
            )
        num_clean = self.num_frames + (0 if noisy else num_frames)
        if num_clean + 1 > self.max_frames:
            raise ValueError(
                f"`kv_cache` has room for `max_frames` {self.max_frames}, the noisy frame included; {num_clean} clean "
                f"frames need {num_clean + 1}. Make one with a larger `max_frames`."
            )

    def begin_noisy(self) -> tuple[ContextPlan, CachePass]:
        """The pass that denoises the frame after the clean ones. It uses the slot after them as scratch space."""
        plan = self.plan_for_frames(self.num_frames + 1).segment(self.num_frames)
        return plan, self._pass_for(plan)

    def begin_write(self, frames: FrameBatch) -> tuple[FrameBatch, ContextPlan, CachePass]:
        """Take new clean frames in and say which frames are to be encoded: the new ones and those that change.

        Returns:
            The frames to encode, their plan, and where their keys and values go. The pass must then run through every
            layer; the cache counts the new frames from now on.
        """
        old, num_new_frames = self.plan, frames.num_frames
        self.num_frames += num_new_frames
        new = self.plan
        if new.num_long_frames == 0:
            first_encoded = old.num_frames  # append
        else:
            first_encoded = old.num_long_frames  # frames that turn long, and the short window anew
        if self._kept_frames is not None:
            frames = self._kept_frames.append(frames)
        if new.long_patch_size is not None:
            self._kept_frames = frames.last(new.num_short_frames).copy()
        plan = new.segment(first_encoded)
        return frames.last(plan.num_frames), plan, self._pass_for(plan)

    def layers(self, cache_pass: CachePass) -> list[LayerKVCache]:
        """The stores of every layer as this pass sees them."""
        return [LayerKVCache(*stores, cache_pass) for stores in zip(self._key_stores, self._value_stores)]

    def key_frames(self, *, noisy: bool) -> torch.Tensor:
        """Absolute frame index of every key in view, in the order of the stores.

        Args:
            noisy (`bool`): Whether the noisy frame's own tokens are in view, at the end.

        Returns:
            `torch.Tensor` of shape `(L_view,)`, int64.
        """
        plan = self.plan
        short_end = plan.end_frame + 1 if noisy else plan.end_frame
        long = torch.arange(plan.num_long_frames - 1, -1, -1, device=self.device)
        short = torch.arange(plan.first_short_frame, short_end, device=self.device)
        return torch.cat(
            [
                long.repeat_interleave(plan.tokens_per_long_frame),
                short.repeat_interleave(plan.tokens_per_short_frame),
            ]
        )

    def _pass_for(self, plan: ContextPlan) -> CachePass:
        """Places and views of the frames of `plan`, in the layout that the class describes."""
        boundary = self._largest_plan.num_long_tokens  # long frames end here, short frames start here
        long_size, short_size = plan.tokens_per_long_frame, plan.tokens_per_short_frame
        num_long_frames = self.plan.num_long_frames  # of the whole context, cached ones included
        context_start = boundary - num_long_frames * long_size
        first_short = plan.first_short_frame - num_long_frames  # frames of the window that stay as they are

        queries = []
        for frame in range(plan.num_long_frames):
            end = boundary - (plan.first_frame + frame) * long_size
            queries.append(QuerySpan(frame * long_size, (frame + 1) * long_size, end - long_size, boundary))
        for frame in range(plan.num_short_frames):
            start = plan.num_long_tokens + frame * short_size
            view_end = boundary + (first_short + frame + 1) * short_size
            queries.append(QuerySpan(start, start + short_size, context_start, view_end))
        return CachePass(
            num_long_tokens=plan.num_long_tokens,
            tokens_per_long_frame=long_size,
            long_start=context_start,
            short_start=boundary + first_short * short_size,
            queries=tuple(queries),
        )
