"""The multi-level KV cache: rotated keys and values of the clean frames, in one preallocated store per layer, and the
options by which it saves time or memory.

B batch, F frames, C latent channels, H/W latent height/width, L tokens, N heads, D head dim.
"""

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..checks import check_count, is_whole_number
from .context_plan import ContextPlan
from .frames import FrameBatch, blank_tensors, repeat_batch
from .functional import apply_rotary_embedding, rotary_embedding


@dataclass(frozen=True)
class CacheOptions:
    """How a cache saves time and memory.

    Args:
        short_cache (`str` or `int`, defaults to `"exact"`): What happens to the short frames when a frame turns long,
            which changes what they attended to. `"exact"`: they are encoded anew, at every write. An integer k: k frames
            turn long at once, every k frames, so that they are encoded anew only then; exact for a window that breathes
            by k frames. `"rolling"`: frames that are written one at a time leave the others as they were.
        max_long_frames (`int`, *optional*): Beyond so many, the oldest long frames but the sinks are forgotten, and there
            is no end to the video.
        num_sink_frames (`int`, defaults to 0): First frames of the video that are never forgotten.
    """

    short_cache: str | int = "exact"
    max_long_frames: int | None = None
    num_sink_frames: int = 0

    @property
    def rebuild_interval(self) -> int:
        return int(self.short_cache) if is_whole_number(self.short_cache) else 1

    @property
    def is_rolling(self) -> bool:
        return self.short_cache == "rolling"

    def check(self, short_window: int, has_long_frames: bool) -> None:
        """Refuse what a model with this window cannot do."""
        for name in ("max_long_frames", "num_sink_frames"):
            value = getattr(self, name)
            if value is not getattr(CacheOptions, name) and not is_whole_number(value):
                raise ValueError(f"`{name}` is {value!r}; it is a number of frames.")
        is_interval = is_whole_number(self.short_cache) and 1 <= self.short_cache < max(short_window, 2)
        if self.short_cache not in ("exact", "rolling") and not is_interval:
            raise ValueError(
                f"`short_cache` is {self.short_cache!r}; choose 'exact', 'rolling' or a number of frames from 1 to "
                f"{max(short_window - 1, 1)}, below the short window."
            )
        if self.max_long_frames is None:
            if self.num_sink_frames:
                raise ValueError(
                    f"`num_sink_frames` is {self.num_sink_frames} but `max_long_frames` is None: nothing is forgotten; "
                    "leave it at 0."
                )
        else:
            self._check_bound(has_long_frames)

    def _check_bound(self, has_long_frames: bool) -> None:
        if not has_long_frames:
            raise ValueError(
                f"`max_long_frames` is {self.max_long_frames} but this model has no long frames; leave it out."
            )
        if not 0 <= self.num_sink_frames < self.max_long_frames:
            raise ValueError(
                f"`num_sink_frames` is {self.num_sink_frames} and `max_long_frames` {self.max_long_frames}; the sinks "
                "must be at least 0 and fewer than all."
            )
        if self.rebuild_interval > 1 and self.max_long_frames - self.num_sink_frames < 3 * self.rebuild_interval:
            raise ValueError(
                f"`max_long_frames` is {self.max_long_frames}, {self.num_sink_frames} of them sinks, but `short_cache` "
                f"turns {self.rebuild_interval} frames long at once; keep at least {3 * self.rebuild_interval} beside "
                "the sinks."
            )


WRITTEN_TOKENS = 1024  # at once; enough to keep matrix products busy
EVICTIONS_PER_MEMORY = 8  # the oldest eighth of the long frames goes at once, so that keys are seldom rotated anew


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
    latest frame first, the short ones from `short_start` on. Then each frame's queries see one contiguous view. A pass
    that `is_noisy` denoises the frame after the clean ones.
    """

    num_long_tokens: int
    tokens_per_long_frame: int
    long_start: int
    short_start: int
    queries: tuple[QuerySpan, ...]
    is_noisy: bool

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

    def attend(self, attend: Callable, query: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Frame by frame: each sees one contiguous view of the stores, so causality needs no mask.

        Args:
            attend (callable): `(query, key, value, bias) -> output`, each `(B, L, N, D)`.
            query (`torch.Tensor` of shape `(B, L, N, D)`): Of the pass, or of its last frames.
            bias (`torch.Tensor` of shape `(1, 1, F, L_view)`, *optional*): A row for each frame of the pass, a column for each
                key in view.
        """
        spans, outputs = self.cache_pass.queries, []
        num_unread = spans[-1].end - query.shape[1]  # of the first frames, nobody reads what they see
        for frame, span in enumerate(spans):
            if span.start >= num_unread:
                queries = query[:, span.start - num_unread : span.end - num_unread]
                row = None if bias is None else self.columns(bias[..., frame : frame + 1, :], span)
                outputs.append(attend(queries, *self.view(span), row))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def view(self, span: QuerySpan) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that a frame's queries see, as views."""
        window = slice(span.view_start, span.view_end)
        return self.key_store[:, window], self.value_store[:, window]

    def columns(self, bias: torch.Tensor, span: QuerySpan) -> torch.Tensor:
        """Of a bias for all keys in view, `(..., L_view)`, what belongs to those that a frame's queries see."""
        first_key = self.cache_pass.view_start
        return bias[..., span.view_start - first_key : span.view_end - first_key]


def computing_dtype(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """What keys and values come out in, of a model in `dtype`: another one under autocast."""
    device_type = torch.device(device).type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else dtype


@dataclass(frozen=True)
class ContextFeature:
    """What the encoder of a separable model says of the frames after those that it has seen.

    Args:
        states (`torch.Tensor` of shape `(B, F, T, dim)`): With the modulation of the last norm.
        gain (`torch.Tensor` of shape `(B, F, 1, dim)`): What that modulation multiplied them by, and multiplies noise by.
    """

    states: torch.Tensor
    gain: torch.Tensor

    @classmethod
    def joined(cls, features: list["ContextFeature"]) -> "ContextFeature":
        """Features of frames that follow each other."""
        return cls(*(torch.cat(each, dim=1) for each in zip(*((each.states, each.gain) for each in features))))

    def repeated(self, num_times: int) -> "ContextFeature":
        """For a batch that follows itself."""
        return ContextFeature(repeat_batch(self.states, num_times), repeat_batch(self.gain, num_times))


class FARKVCache:
    """Keys and values of the clean frames of a rollout. Made by [`FARTransformer3DModel.init_kv_cache`].

    Each layer has one store of `(B, L_store, N, D)` for keys and one for values, laid out as

        | free | long frames, latest first | short frames, oldest first | the noisy frame | free |

    so that whatever one frame may see is one contiguous view: no mask, no concatenation, and nothing moves when the
    video grows, for the long frames grow to the left from a fixed boundary. (The order of keys does not matter to
    attention.) Long entries are append-only. Keys are rotated before they are stored; positions never change. Short
    frames are appended while no frame is long. After that each new clean frame turns the oldest short frame into a
    long one, which changes what all other short frames attend to, and they are encoded again from their latents,
    which the cache keeps for that purpose. [`CacheOptions`] make this cheaper, or memory bounded.

    Args:
        model (`torch.nn.Module`): The transformer that fills the cache; another one is refused.
        batch_size (`int`), height (`int`), width (`int`): B, H and W.
        max_frames (`int`): Frames that fit, the noisy one included.
        dtype (`torch.dtype`), device (`torch.device`): Of the stores.
        options (`CacheOptions`).

    Attributes:
        feature ([`ContextFeature`], *optional*): Of a separable model, of the frame to come; `None` before the first write,
            and after a rewind until the next one.
        num_frames (`int`): Clean frames on the cache's clock. Forgotten frames leave the clock, so that positions stay
            within what the model was trained on.
        num_shared_frames (`int`): First frames that other caches hold too, and that cannot be rewound.

    Source: FAR, arXiv:2503.19325v2, "multi-level KV cache".
    """

    _CLOCK = ("num_frames", "_first_slot_frame", "_window_is_stale", "_has_forgotten")
    _first_long_frame = 0  # the long frame at the boundary
    num_shared_frames = 0

    def __init__(
        self,
        model: torch.nn.Module,
        batch_size: int,
        height: int,
        width: int,
        max_frames: int,
        dtype: torch.dtype,
        device: torch.device,
        options: CacheOptions,
    ):
        check_count("batch_size", batch_size, "a cache needs at least 1")
        check_count("max_frames", max_frames, "a cache needs at least 1")
        config = model.config
        options.check(config.short_window, has_long_frames=config.long_patch_size is not None)
        self.plan_for_frames = partial(
            model.context_plan, height=height, width=width, rebuild_interval=options.rebuild_interval
        )
        self.batch_size, self.options = batch_size, options
        self.num_frames = 0
        self.feature: ContextFeature | None = None
        self._model, self._short_window = weakref.ref(model), config.short_window
        self._kept_frames: FrameBatch | None = None
        self._first_slot_frame = 0  # the frame at the start of the short region
        self._window_is_stale = False  # after a rewind, until the next write
        self._has_forgotten = False
        num_layers = len(model.context_network.transformer_blocks)
        self._store_sizes = (num_layers, batch_size, config.num_attention_heads, config.attention_head_dim)
        self._allocate(max_frames, dtype, device)

    def _allocate(self, max_frames: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make empty stores with room for `max_frames` frames, the noisy one included, or as many as there ever are."""
        max_frames = self.max_frames = min(max_frames, self._most_frames)
        largest = self._largest_plan = self.plan_for_frames(max_frames)
        num_short_frames = largest.num_frames
        if largest.long_patch_size is not None:
            num_short_frames = min(num_short_frames, self._short_window)
        num_tokens = largest.num_long_tokens + num_short_frames * largest.tokens_per_short_frame
        num_layers, batch_size, num_heads, head_dim = self._store_sizes
        self._key_stores = torch.empty(
            (num_layers, batch_size, num_tokens, num_heads, head_dim), dtype=dtype, device=device
        )
        self._value_stores = torch.empty_like(self._key_stores)

    @property
    def dtype(self) -> torch.dtype:
        return self._key_stores.dtype

    @property
    def device(self) -> torch.device:
        return self._key_stores.device

    @property
    def num_bytes(self) -> int:
        """Bytes of the stores: 2 x layers x width x tokens x bytes per element, for each sample of the batch; and of the
        feature of the frame to come, where there is one."""
        feature_bytes = sum(tensor.nbytes for tensor in self._feature_tensors.values())
        return 2 * self._key_stores.numel() * self._key_stores.element_size() + feature_bytes

    @property
    def _feature_tensors(self) -> dict[str, torch.Tensor]:
        return {} if self.feature is None else {f"feature_{name}": each for name, each in vars(self.feature).items()}

    def keep_feature(self, feature: ContextFeature | None) -> None:
        """Hold what the encoder of a separable model says of the frame to come, at the end of a write."""
        self.feature = feature

    @property
    def plan(self) -> ContextPlan:
        """The layout of the clean frames: what is long and short when the next frame is the noisy one."""
        return self.plan_for_frames(self.num_frames + 1).segment(0, self.num_frames)

    def check(self, model: torch.nn.Module, frames: FrameBatch, *, noisy: bool) -> None:
        """Refuse a call that this cache was not made for, before anything is computed or written.

        Raises:
            ValueError: Another model, batch size, latent size or dtype; frames beyond `max_frames`; or more than one
                noisy frame.
        """
        batch_size, num_frames, _, height, width = frames.latents.shape
        dtype = computing_dtype(frames.latents.dtype, frames.latents.device)
        is_another = self._model() is not model
        fits = (batch_size, height, width, dtype) == (self.batch_size, *self._latent_size, self.dtype)
        num_clean = self.num_frames + (0 if noisy else num_frames)
        is_full = self.options.max_long_frames is None and num_clean + 1 > self.max_frames
        if is_another or not fits or is_full or (noisy and num_frames != 1):
            raise ValueError(self._misfit(is_another, frames, dtype, noisy, num_clean))

    def _misfit(self, is_another: bool, frames: FrameBatch, dtype: torch.dtype, noisy: bool, num_clean: int) -> str:
        """Why a call does not fit, the first reason."""
        batch_size, num_frames, _, height, width = frames.latents.shape
        if is_another:
            return (
                f"`kv_cache` was made by another {type(self._model()).__name__}; keys of one model mean nothing to "
                "another. Make a cache with `init_kv_cache` of the model that you call."
            )
        if batch_size != self.batch_size:
            return (
                f"`hidden_states` has a batch of {batch_size} but `kv_cache` was made for {self.batch_size}; "
                f"make one with `init_kv_cache(batch_size={batch_size}, ...)`."
            )
        if (height, width) != self._latent_size:
            return (
                f"`hidden_states` has latents of {height}x{width} but `kv_cache` was made for "
                f"{'x'.join(map(str, self._latent_size))}; make one for this size."
            )
        if dtype != self.dtype:
            return (
                f"The model computes in {dtype} but `kv_cache` holds {self.dtype}; "
                f"make one with `init_kv_cache(..., dtype={dtype})`."
            )
        if noisy and num_frames != 1:
            return (
                f"`hidden_states` has {num_frames} frames but exactly one frame is denoised against `kv_cache`; "
                "pass one noisy frame, or clean frames with `update_cache=True`."
            )
        return (
            f"`kv_cache` has room for `max_frames` {self.max_frames}, the noisy frame included; {num_clean} clean "
            f"frames need {num_clean + 1}. Make one with a larger `max_frames`."
        )

    @property
    def _latent_size(self) -> tuple[int, int]:
        return self._largest_plan.height, self._largest_plan.width

    @property
    def _most_frames(self) -> float:
        """Frames that are ever held at once, the noisy one included."""
        is_bounded = self.options.max_long_frames is not None
        return self.options.max_long_frames + self._short_window if is_bounded else float("inf")

    def make_room(self, num_new_frames: int) -> None:
        """Let so many more clean frames, and the noisy one after them, fit: where they do not, the stores are replaced
        by larger ones, half as large again at least."""
        num_frames = min(self.num_frames + num_new_frames + 1, self._most_frames)
        if num_frames <= self.max_frames:
            return
        self._enlarge(max(num_frames, self.max_frames * 3 // 2))

    def _enlarge(self, max_frames: int) -> None:
        """Move what is held into stores with room for so many frames."""
        used, old_stores = self._used, (self._key_stores, self._value_stores)
        self._allocate(max_frames, self.dtype, self.device)
        for old, new in zip(old_stores, (self._key_stores, self._value_stores)):
            new[:, :, self._used] = old[:, :, used]

    @property
    def _used(self) -> slice:
        """Where the clean frames lie in the stores, in tokens."""
        plan = self.plan
        num_long_frames = plan.num_long_frames - self._first_long_frame
        start = self._boundary - num_long_frames * plan.tokens_per_long_frame
        return slice(start, self._boundary + self._num_slots * plan.tokens_per_short_frame)

    @property
    def _num_slots(self) -> int:
        """Clean short frames in the stores."""
        return self.plan.num_short_frames

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, int | bool]]:
        """All that the cache holds, as tensors and numbers, for [`restore`] in another process."""
        tensors = {"keys": self._key_stores[:, :, self._used], "values": self._value_stores[:, :, self._used]}
        if self._kept_frames is not None and self._kept_frames.num_frames:
            for name, tensor in vars(self._kept_frames).items():
                if tensor is not None:
                    tensors[f"kept_{name}"] = tensor
        tensors |= self._feature_tensors
        return tensors, {name: getattr(self, name) for name in self._CLOCK}

    def state_form(self, clock: dict[str, int | bool]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor that a `state` at this clock has, where actions are fed with masks; the
        feature may lack.

        Raises:
            ValueError: No cache with these options ever shows this clock.
        """
        kinds = dict.fromkeys(self._CLOCK, bool) | {"num_frames": int, "_first_slot_frame": int}
        if not isinstance(clock, dict) or {name: type(value) for name, value in clock.items()} != kinds:
            raise ValueError(f"the cache's clock is {clock!r}; it has whole numbers and booleans: {list(kinds)}")
        num_frames, bound = clock["num_frames"], self.options.max_long_frames
        plan = self.plan_for_frames(max(num_frames, 0) + 1).segment(0, max(num_frames, 0))
        is_long, is_stale = plan.long_patch_size is not None, clock["_window_is_stale"]
        if (
            num_frames < 0
            or (bound is None and clock["_has_forgotten"])
            or (bound is not None and plan.num_long_frames > bound)
            or (is_stale and not is_long)
            # Slots are numbered from the oldest short frame on, unless they are written over one by one.
            or not (is_stale or self.options.is_rolling or clock["_first_slot_frame"] == plan.first_short_frame)
        ):
            raise ValueError(f"the cache's clock is {clock!r}, which a cache with {self.options} never shows")
        num_layers, batch_size, num_heads, head_dim = self._store_sizes
        model = self._model()
        stored = ((num_layers, batch_size, plan.num_tokens, num_heads, head_dim), self.dtype)
        form = {"keys": stored, "values": stored}
        if is_long and plan.num_short_frames:
            kept = FrameBatch.form(model, batch_size, plan.num_short_frames, plan.height, plan.width)
            form |= {f"kept_{name}": each for name, each in kept.items()}
        if model.is_separable and num_frames:
            shape = model.feature_shape(batch_size, plan.height, plan.width)
            form |= {"feature_states": (shape, self.dtype)}
            form |= {"feature_gain": ((batch_size, 1, 1, model.inner_dim), self.dtype)}
        return form

    def restore(self, tensors: dict[str, torch.Tensor], clock: dict[str, int | bool]) -> None:
        """Hold what another cache of the same model, batch and latent size held when its `state` was taken."""
        self.make_room(clock["num_frames"] - self.num_frames)
        for name in self._CLOCK:
            setattr(self, name, clock[name])
        start = self._boundary - self.plan.num_long_tokens
        for store, states in ((self._key_stores, tensors["keys"]), (self._value_stores, tensors["values"])):
            store[:, :, start : start + states.shape[2]] = states
        kept = {name.removeprefix("kept_"): value for name, value in tensors.items() if name.startswith("kept_")}
        self._kept_frames = FrameBatch(**kept) if kept else None
        if "feature_states" in tensors:
            self.feature = ContextFeature(tensors["feature_states"], tensors["feature_gain"])

    def outline(self, writes: Sequence[int], max_frames: int | None = None) -> "FARKVCache":
        """What this cache becomes by some writes, but for the values: sizes, clock and `num_bytes` are those that come, and the
        stores, on the meta device, take no memory.

        Args:
            writes (sequence of `int`): Clean frames of one write after the other.
            max_frames (`int`, *optional*): As if the cache had been made with room for so many.
        """
        twin, kept = copy.copy(self), self._kept_frames
        blank = partial(FrameBatch.blank, self._model(), self.batch_size, device="meta")
        twin._allocate(max_frames or self.max_frames, self.dtype, torch.device("meta"))
        twin._kept_frames = kept and blank(kept.num_frames, *self._latent_size)
        for num_frames in writes:
            twin.make_room(num_frames)
            for piece in twin.pieces(blank(num_frames, *self._latent_size)):
                twin.begin_write(piece)
        clock = twin.state()[1]
        twin.restore(blank_tensors(twin.state_form(clock), "meta"), clock)
        return twin

    def clone(self) -> "FARKVCache":
        """An independent copy of the stores, for another continuation of the same context."""
        twin = copy.copy(self)
        twin._key_stores, twin._value_stores = self._key_stores.clone(), self._value_stores.clone()
        return twin

    def rewind(self, num_frames: int, window: FrameBatch) -> None:
        """Go back to an earlier moment, at least one clean frame before now; a write must follow.

        Long frames depend on earlier long frames only, so those that were long then stay as they are. Short frames that
        have since turned long are encoded anew, by the next write.

        Args:
            num_frames (`int`): Clean frames of that moment, on the cache's clock.
            window (`FrameBatch`): The frames before it, as the transformer was fed them; as many as were short then, or
                more.
        """
        old = self.plan
        self.num_frames, self.feature = num_frames, None
        new = self.plan
        if self._has_forgotten and num_frames <= self.options.num_sink_frames:
            raise ValueError(
                f"`num_frames` is {num_frames}, but of the first frames only the sinks are remembered; go back less far."
            )
        if new.long_patch_size is None:
            return
        if new.num_short_frames > window.num_frames:
            raise ValueError(
                f"`window` has {window.num_frames} frames but {new.num_short_frames} were short after {num_frames} "
                "frames; pass at least these."
            )
        self._kept_frames = window.last(new.num_short_frames).copy()
        self._window_is_stale = self._window_is_stale or new.num_long_frames < old.num_long_frames

    def pieces(self, frames: FrameBatch) -> list[FrameBatch]:
        """The parts in which frames are to be written: so few that what is forgotten never has to be stored first, and
        that a long context needs no more memory for activations than a short one."""
        if self.options.max_long_frames is not None:
            size = self._eviction_size
        elif self._largest_plan.long_patch_size is None:
            size = max(1, WRITTEN_TOKENS // self._largest_plan.tokens_per_short_frame)
        else:  # each part would encode the short window anew
            return [frames]
        return [frames.between(start, start + size) for start in range(0, frames.num_frames, size)]

    def begin_noisy(self) -> tuple[ContextPlan, CachePass]:
        """The pass that denoises the frame after the clean ones. It uses the slot after them as scratch space."""
        assert not self._window_is_stale, "a write must follow a rewind"
        plan = self.plan_for_frames(self.num_frames + 1).segment(self.num_frames)
        return plan, self._pass_for(plan, first_slot=self._num_slots, is_noisy=True)

    def begin_write(self, frames: FrameBatch) -> tuple[FrameBatch, ContextPlan, CachePass]:
        """Take new clean frames in and say which frames are to be encoded: the new ones and those that change.

        Returns:
            The frames to encode, their plan, and where their keys and values go. The pass must then run through every
            layer; the cache counts the new frames from now on.
        """
        self.feature = None
        if self.options.max_long_frames is not None:
            self._forget_for(frames.num_frames)
        self.make_room(frames.num_frames)
        old, num_new_frames = self.plan, frames.num_frames
        self.num_frames += num_new_frames
        new = self.plan
        if self._kept_frames is not None:
            frames = self._kept_frames.append(frames)
        if new.long_patch_size is not None:
            self._kept_frames = frames.last(new.num_short_frames).copy()

        window_is_full = new.num_long_frames > old.num_long_frames
        was_stale, self._window_is_stale = self._window_is_stale, False
        rolls = window_is_full and self.options.is_rolling and num_new_frames == 1 and old.num_short_frames
        if rolls and not was_stale:
            return self._begin_rolling_write(frames, old, new)
        if window_is_full or was_stale:  # the frames that turn long, and the short window anew
            self._first_slot_frame = new.first_short_frame
            plan = new.segment(old.num_long_frames)
        else:
            plan = new.segment(old.num_frames)
        first_slot = plan.first_short_frame - self._first_slot_frame
        return frames.last(plan.num_frames), plan, self._pass_for(plan, first_slot=first_slot)

    def _begin_rolling_write(
        self, frames: FrameBatch, old: ContextPlan, new: ContextPlan
    ) -> tuple[FrameBatch, ContextPlan, CachePass]:
        """The oldest short frame turns long and the newest takes its slot; the others stay as they are."""
        oldest, newest = frames.between(0, 1), frames.last(1)
        plan = replace(new.segment(old.num_long_frames), num_short_frames=1)
        plan = replace(plan, num_skipped_frames=new.end_frame - 1 - plan.end_long_frame)
        slot = (new.end_frame - 1 - self._first_slot_frame) % new.num_short_frames
        return oldest.append(newest), plan, self._pass_for(plan, first_slot=slot, sees_all_slots=True)

    def encoded_by_write(self) -> tuple[int, int]:
        """How many long and short frames the write of one more clean frame encodes."""
        old, new = self.plan, self.plan_for_frames(self.num_frames + 2).segment(0, self.num_frames + 1)
        num_turning = new.num_long_frames - old.num_long_frames
        if self._window_is_stale or (num_turning and not (self.options.is_rolling and old.num_short_frames)):
            return num_turning, new.num_short_frames
        return num_turning, 1

    def layers(self, cache_pass: CachePass) -> list[LayerKVCache]:
        """The stores of every layer as this pass sees them."""
        return [LayerKVCache(*stores, cache_pass) for stores in zip(self._key_stores, self._value_stores)]

    def key_frames(self, cache_pass: CachePass) -> torch.Tensor:
        """Absolute frame index of every key that a pass has in view, in the order of the stores.

        Returns:
            `torch.Tensor` of shape `(L_view,)`, int64.
        """
        plan = self.plan
        long = torch.arange(plan.num_long_frames - 1, self._first_long_frame - 1, -1, device=self.device)
        first_frame = max(plan.first_short_frame, self._first_slot_frame)
        short = torch.arange(first_frame, plan.end_frame, device=self.device)
        if self.options.is_rolling and plan.num_long_frames:
            short = short.roll((first_frame - self._first_slot_frame) % plan.num_short_frames)
        if cache_pass.is_noisy:
            short = torch.cat([short, short.new_tensor([plan.end_frame])])
        return torch.cat(
            [
                long.repeat_interleave(plan.tokens_per_long_frame),
                short.repeat_interleave(plan.tokens_per_short_frame),
            ]
        )

    @property
    def _boundary(self) -> int:
        """Where the long frames end and the short frames start, in tokens."""
        return self._largest_plan.num_long_tokens

    def _pass_for(
        self, plan: ContextPlan, *, first_slot: int, sees_all_slots: bool = False, is_noisy: bool = False
    ) -> CachePass:
        """Places and views of the frames of `plan`, in the layout that the class describes.

        Args:
            plan (`ContextPlan`): The pass.
            first_slot (`int`): Where its first short frame lies, in frames from the boundary.
            sees_all_slots (`bool`): Frames in later slots are older ones, as in a rolling cache.
            is_noisy (`bool`): The frame is the one being denoised.
        """
        long_size, short_size = plan.tokens_per_long_frame, plan.tokens_per_short_frame
        context_start = self._boundary - (self.plan.num_long_frames - self._first_long_frame) * long_size
        queries = []
        for frame in range(plan.num_long_frames):
            end = self._boundary - (plan.first_frame + frame - self._first_long_frame) * long_size
            queries.append(QuerySpan(frame * long_size, (frame + 1) * long_size, end - long_size, self._boundary))
        for frame in range(plan.num_short_frames):
            start = plan.num_long_tokens + frame * short_size
            num_slots = self._num_slots if sees_all_slots else first_slot + frame + 1
            view_end = self._boundary + num_slots * short_size
            queries.append(QuerySpan(start, start + short_size, context_start, view_end))
        return CachePass(
            num_long_tokens=plan.num_long_tokens,
            tokens_per_long_frame=long_size,
            long_start=context_start,
            short_start=self._boundary + first_slot * short_size,
            queries=tuple(queries),
            is_noisy=is_noisy,
        )

    @property
    def _eviction_size(self) -> int:
        return max(1, (self.options.max_long_frames - self.options.num_sink_frames) // EVICTIONS_PER_MEMORY)

    def _forget_for(self, num_new_frames: int) -> None:
        """Forget the oldest long frames but the sinks where the new ones would not fit, some at once.

        The frames after them move up, in the store and in time: rotations compose, so their keys are rotated once more.
        """
        num_long_frames = self.plan_for_frames(self.num_frames + num_new_frames + 1).num_long_frames
        num_excess = num_long_frames - self.options.max_long_frames
        if num_excess <= 0:
            return
        num_stored, sinks = self.plan.num_long_frames, self.options.num_sink_frames
        interval = self.options.rebuild_interval
        num_forgotten = -(-max(num_excess, self._eviction_size) // interval) * interval
        long_size = self.plan.tokens_per_long_frame
        start = self._boundary - num_stored * long_size
        kept_end = self._boundary - (sinks + num_forgotten) * long_size
        moved = slice(start + num_forgotten * long_size, kept_end + num_forgotten * long_size)
        short = slice(self._boundary, self._boundary + self.plan.num_short_tokens)

        config, shift = self._model().config, torch.tensor([[-num_forgotten, 0, 0]], device=self.device)
        rotation = rotary_embedding(shift, config.axes_dims_rope, config.rope_theta)
        for keys in self._key_stores:
            keys[:, moved] = apply_rotary_embedding(keys[:, start:kept_end], rotation)
            keys[:, short] = apply_rotary_embedding(keys[:, short], rotation)
        for values in self._value_stores:
            values[:, moved] = values[:, start:kept_end].clone()
        self.num_frames -= num_forgotten
        self._has_forgotten = True
        self._first_slot_frame -= num_forgotten
