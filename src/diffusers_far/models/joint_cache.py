"""Caches whose samples have pasts of their own: several caches as one, and caches that go on from a past that they share.

b samples of one cache, which are 1, or 2 with a null half; n caches, so that B = b * n; L tokens, N heads, D head dim.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from .context_plan import ContextPlan
from .frames import FrameBatch
from .kv_cache import CachePass, ContextFeature, FARKVCache, LayerKVCache, QuerySpan


@dataclass(frozen=True)
class SharedContext:
    """Keys and values of clean frames that several caches go on from; never changed.

    Args:
        keys, values (`torch.Tensor` of shape `(layers, b, L, N, D)`): Long frames, latest first, then short ones, oldest first.
        plan (`ContextPlan`): Of these frames.
    """

    keys: torch.Tensor
    values: torch.Tensor
    plan: ContextPlan

    @classmethod
    def of(cls, cache: FARKVCache) -> "SharedContext":
        """A copy of what a cache holds."""
        tensors, clock = cache.state()
        plan = cache.plan

        def in_order(stored: torch.Tensor) -> torch.Tensor:
            long, short = stored[:, :, : plan.num_long_tokens], stored[:, :, plan.num_long_tokens :]
            if cache.options.is_rolling and plan.num_long_frames and plan.num_short_frames:
                oldest = (plan.first_short_frame - clock["_first_slot_frame"]) % plan.num_short_frames
                short = short.roll(-oldest * plan.tokens_per_short_frame, dims=2)
            return torch.cat([long, short], dim=2)

        return cls(in_order(tensors["keys"]), in_order(tensors["values"]), plan)

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True)
class BranchLayer(LayerKVCache):
    """The stores of one layer, and before them what is shared.

    Args:
        shared (`tuple`): Keys and values, of the long frames, `(b, L, N, D)` each, and of the short ones in view.
    """

    shared: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()

    def _seen(self, span: QuerySpan) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """A long frame sees long ones alone."""
        return self.shared[:1] if span.end <= self.cache_pass.num_long_tokens else self.shared

    def view(self, span: QuerySpan) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that a frame's queries see, as copies that are gone when they have been attended to."""
        parts = [*self._seen(span), super().view(span)]
        return tuple(torch.cat(each, dim=1) for each in zip(*parts))

    def columns(self, bias: torch.Tensor, span: QuerySpan) -> torch.Tensor:
        """Of a bias for all keys in view, `(..., L_view)`, what belongs to those that a frame's queries see."""
        num_shared, num_seen = (sum(key.shape[1] for key, _ in part) for part in (self.shared, self._seen(span)))
        return torch.cat([bias[..., :num_seen], super().columns(bias[..., num_shared:], span)], dim=-1)


class BranchCache(FARKVCache):
    """A cache that goes on from what another one held, which all branches share; its stores hold the later frames alone.

    The short frames of a long model are shared until they turn long, or until the window is encoded anew. The stores are as
    large as what they hold, for there are many of them.

    Args:
        root ([`FARKVCache`]): Where it goes on from; with `max_long_frames` it forgets, and nothing is shared.
        shared ([`SharedContext`]): What it holds.
    """

    def __init__(self, root: FARKVCache, shared: SharedContext):
        dtype, device = root.dtype, root.device
        vars(self).update(vars(root))
        self.shared = shared
        self.num_shared_frames = self._first_slot_frame = shared.plan.end_frame
        self._first_long_frame = shared.plan.num_long_frames
        self._allocate(self.num_frames + 1, dtype, device)

    def _allocate(self, max_frames: int, dtype: torch.dtype, device: torch.device) -> None:
        self.max_frames = max_frames
        largest = self._largest_plan = self.plan_for_frames(max_frames)
        num_short_frames = max_frames - self._first_slot_frame
        if largest.long_patch_size is not None:
            is_rebuilt = not self.options.is_rolling or self._window_is_stale
            num_short_frames = min(max_frames if is_rebuilt else num_short_frames, self._short_window)
        num_tokens = self._boundary + num_short_frames * largest.tokens_per_short_frame
        num_layers, batch_size, *heads = self._store_sizes
        self._key_stores = torch.empty((num_layers, batch_size, num_tokens, *heads), dtype=dtype, device=device)
        self._value_stores = torch.empty_like(self._key_stores)

    def make_room(self, num_new_frames: int) -> None:
        """Let so many more clean frames, and the noisy one after them, fit, and no more."""
        if self.num_frames + num_new_frames + 1 > self.max_frames or self._window_is_stale:
            self._enlarge(self.num_frames + num_new_frames + 1)

    @property
    def _boundary(self) -> int:
        num_long_frames = self._largest_plan.num_long_frames - self._first_long_frame
        return num_long_frames * self._largest_plan.tokens_per_long_frame

    @property
    def _num_slots(self) -> int:
        return max(0, min(self.num_frames - self._first_slot_frame, self.plan.num_short_frames))

    @property
    def _shared_short_frames(self) -> range:
        """Those that are still in view: the short frames before the one in the first slot."""
        first_frame = self.plan.first_short_frame
        return range(first_frame, max(first_frame, min(self._first_slot_frame, self.num_shared_frames)))

    def layers(self, cache_pass: CachePass) -> list[LayerKVCache]:
        """The stores of every layer as this pass sees them, and what is shared."""
        plan, frames = self.shared.plan, self._shared_short_frames
        start = plan.num_tokens - (plan.end_frame - frames.start) * plan.tokens_per_short_frame
        parts = [slice(0, plan.num_long_tokens)]
        if frames:
            parts.append(slice(start, plan.num_tokens))
        stores = zip(self._key_stores, self._value_stores, self.shared.keys, self.shared.values)
        return [
            BranchLayer(key_store, value_store, cache_pass, tuple((keys[:, part], values[:, part]) for part in parts))
            for key_store, value_store, keys, values in stores
        ]

    def key_frames(self, cache_pass: CachePass) -> torch.Tensor:
        """Absolute frame index of every key that a pass has in view, in the order of the stores, after what is shared."""
        plan, frames = self.plan, self._shared_short_frames
        long = torch.arange(self._first_long_frame - 1, -1, -1, device=self.device)
        short = torch.arange(frames.start, frames.stop, device=self.device)
        shared = [long.repeat_interleave(plan.tokens_per_long_frame)]
        shared.append(short.repeat_interleave(plan.tokens_per_short_frame))
        return torch.cat([*shared, super().key_frames(cache_pass)])


@dataclass(frozen=True)
class JointPass:
    """One pass over frames that each belong to another cache.

    Args:
        plans (`tuple`), passes (`tuple`): Of each cache; the plans differ only in when they are.
    """

    plans: tuple[ContextPlan, ...]
    passes: tuple[CachePass, ...]

    def __post_init__(self):
        assert len({replace(plan, first_frame=0) for plan in self.plans}) == 1, "the passes encode unlike frames"

    @property
    def is_noisy(self) -> bool:
        return self.passes[0].is_noisy

    @property
    def delays(self) -> list[int]:
        """By how many frames each is later than the first."""
        return [plan.first_frame - self.plans[0].first_frame for plan in self.plans]


@dataclass(frozen=True)
class JointLayer:
    """The stores of one layer of several caches: every sample attends to its own, so that none is padded or copied.

    Args:
        layers (`tuple` of [`LayerKVCache`]): Of each cache.
    """

    layers: tuple[LayerKVCache, ...]

    def write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put the keys and values of the pass, `(B, L, N, D)`, in their places."""
        for layer, rows in zip(self.layers, rows_of_parts(len(self.layers))):
            layer.write(key[rows], value[rows])

    def attend(self, attend: Callable, query: torch.Tensor, biases: list[torch.Tensor | None] | None) -> torch.Tensor:
        """As [`LayerKVCache.attend`], with a bias for each cache."""
        output, biases = torch.empty_like(query), biases or [None] * len(self.layers)
        for layer, rows, bias in zip(self.layers, rows_of_parts(len(self.layers)), biases):
            output[rows] = layer.attend(attend, query[rows], bias)
        return output


def rows_of_parts(num_parts: int) -> Iterator[slice]:
    """The samples of each cache in a batch: its null half is among the null halves of all, which come first."""
    return (slice(part, None, num_parts) for part in range(num_parts))


def joined(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Of the samples of each cache, `(b, ...)`, those of the batch, `(B, ...)`."""
    return None if tensors[0] is None else torch.stack(tuple(tensors), dim=1).flatten(0, 1)


class JointCache:
    """Several caches of one model, each of one sample and, with guidance, its null half, that work as one in a pass.

    It has the verbs of [`FARKVCache`] that a rollout and a transformer call.

    Args:
        parts (`list` of [`FARKVCache`]): In the order of the batch. Those that are written to together must encode as many
            frames, see `encoded_by_write`.
    """

    def __init__(self, parts: list[FARKVCache]):
        self.parts = parts

    @classmethod
    def of_futures(cls, root: FARKVCache, num_futures: int) -> "JointCache":
        """Caches that go on from what another one holds, which is stored once."""
        if root.options.max_long_frames is not None:  # what is forgotten moves what is left
            return cls([root.clone() for _ in range(num_futures)])
        shared = SharedContext.of(root)
        return cls([BranchCache(root, shared) for _ in range(num_futures)])

    @property
    def num_frames(self) -> int:
        """Clean frames of the first cache."""
        return self.parts[0].num_frames

    @property
    def num_shared_frames(self) -> int:
        return self.parts[0].num_shared_frames

    @property
    def num_bytes(self) -> int:
        """Bytes of all stores; what is shared counts once."""
        shared = {id(part.shared): part.shared.num_bytes for part in self.parts if isinstance(part, BranchCache)}
        return sum(part.num_bytes for part in self.parts) + sum(shared.values())

    @property
    def feature(self) -> ContextFeature | None:
        """Of a separable model, of the frames to come."""
        features = [part.feature for part in self.parts]
        if features[0] is None:
            return None
        return ContextFeature(joined([each.states for each in features]), joined([each.gain for each in features]))

    def keep_feature(self, feature: ContextFeature | None) -> None:
        """Hold what the encoder of a separable model says of the frames to come, at the end of a write."""
        for part, rows in self._rows():
            part.keep_feature(feature and ContextFeature(feature.states[rows], feature.gain[rows]))

    def _rows(self) -> Iterator[tuple[FARKVCache, slice]]:
        return zip(self.parts, rows_of_parts(len(self.parts)))

    def check(self, model: torch.nn.Module, frames: FrameBatch, *, noisy: bool) -> None:
        """Refuse a call that these caches were not made for, before anything is computed or written."""
        for part, rows in self._rows():
            part.check(model, frames.samples(rows), noisy=noisy)

    def make_room(self, num_new_frames: int) -> None:
        """Let so many more clean frames, and the noisy one after them, fit."""
        for part in self.parts:
            part.make_room(num_new_frames)

    def clone(self) -> "JointCache":
        """An independent copy; what is shared stays so."""
        return JointCache([part.clone() for part in self.parts])

    def rewind(self, num_frames: int, window: FrameBatch) -> None:
        """Go back to an earlier moment, after what is shared; a write must follow."""
        for part, rows in self._rows():
            part.rewind(num_frames, window.samples(rows))

    def pieces(self, frames: FrameBatch) -> list[FrameBatch]:
        """The parts in which frames are to be written."""
        return self.parts[0].pieces(frames)

    def begin_noisy(self) -> tuple[ContextPlan, JointPass]:
        """The pass that denoises the frame after the clean ones of each cache."""
        joint = JointPass(*zip(*(part.begin_noisy() for part in self.parts)))
        return joint.plans[0], joint

    def begin_write(self, frames: FrameBatch) -> tuple[FrameBatch, ContextPlan, JointPass]:
        """Take new clean frames in and say which frames are to be encoded, as [`FARKVCache.begin_write`]."""
        encoded, plans, passes = zip(*(part.begin_write(frames.samples(rows)) for part, rows in self._rows()))
        encoded = FrameBatch(*(joined(each) for each in zip(*(vars(frames).values() for frames in encoded))))
        return encoded, plans[0], JointPass(plans, passes)

    def layers(self, joint: JointPass) -> list[JointLayer]:
        """The stores of every layer as this pass sees them."""
        return [JointLayer(each) for each in zip(*(part.layers(own) for part, own in zip(self.parts, joint.passes)))]
