"""A pipeline as ONNX graphs, for runtimes without torch, such as a browser's: the very modules of its models, run through a
cache whose keys and values are handed in and out.

B batch, F frames, C latent channels, H/W latent height/width, L tokens, N heads, D head dim.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from ..hooks.flex_rope import applied_config
from ..models.codec import decode_video, encode_video
from ..models.context_plan import ContextPlan
from ..models.frames import CLEAN_TIMESTEP, FrameBatch
from ..models.kv_cache import CachePass, LayerKVCache, QuerySpan
from ..models.transformer_far import FARTransformer3DModel
from .rollout import Rollout
from .settings import GenerationRequest


OPSET = 23  # the first that has attention as one operator


def check_graphs(pipe) -> None:
    """Refuse a pipeline whose graphs would draw other frames than it does itself, or that nobody could steer.

    Raises:
        ValueError: Names the reason.
    """
    transformer, reason = pipe.transformer, None
    settings = GenerationRequest().settings(pipe)
    if not isinstance(transformer, FARTransformer3DModel):
        reason = f"`transformer` is a {type(transformer).__name__}; its graphs are made of a `FARTransformer3DModel`"
    elif transformer.config.num_actions is None or transformer.config.action_shift != 1:
        reason = (
            f"`num_actions` is {transformer.config.num_actions} and `action_shift` {transformer.config.action_shift}; keys "
            "stand for discrete actions that lead to the next frame, so train with `num_actions` and `action_shift=1`"
        )
    elif transformer.takes_labels:
        reason = f"`num_classes` is {transformer.config.num_classes}; no key stands for a class, so train without"
    elif settings.needs_null_half:
        reason = (
            f"`guidance_scale` is {settings.guidance_scale}; the graphs have no null half, so set it to 1 with "
            "`pipe.register_to_config(guidance_scale=1.0)`"
        )
    elif pipe.config.height is None or pipe.config.width is None:
        reason = "it knows no size of its frames; set it with `pipe.register_to_config(height=64, width=64)`"
    elif applied_config(transformer) is not None:
        reason = "FlexRoPE is enabled, and the graphs have plain attention; call `pipe.disable_flex_rope()` first"
    if reason is not None:
        raise ValueError(f"This pipeline cannot become graphs: {reason}.")


class HandedLayer:
    """Keys and values of one layer, for a pass of one short frame and at most one that turns long; what the attention of that
    layer works with, as [`LayerKVCache`].

    Args:
        long, short (sequence of two `torch.Tensor` of shape `(B, N, L, D)`): Keys and values of the frames before; `long` is
            empty where no frame is ever long. They stay as they are.
        cache_pass ([`CachePass`]): Its places in a store mean nothing here.
    """

    def __init__(self, long: Sequence[torch.Tensor], short: Sequence[torch.Tensor], cache_pass: CachePass):
        self.long, self.short, self.cache_pass = long, short, cache_pass

    attend = LayerKVCache.attend  # it needs no more than the pass and a view

    def write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Hold the keys and values of the pass, `(B, L, N, D)`, to be handed out."""
        num_long, states = self.cache_pass.num_long_tokens, [key.transpose(1, 2), value.transpose(1, 2)]
        self.new_long = [each[:, :, :num_long] for each in states]
        self.new_short = [each[:, :, num_long:] for each in states]

    def view(self, span: QuerySpan) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that a frame's queries see: a long frame those of long frames, a short one all."""
        parts = [self.long, self.new_long] if self.cache_pass.num_long_tokens else [self.long]
        if span.end > self.cache_pass.num_long_tokens:
            parts += [self.short, self.new_short]
        key, value = (torch.cat(states, dim=2).transpose(1, 2) for states in zip(*filter(len, parts)))
        return key, value


class HandedKVCache:
    """A [`FARKVCache`] for one pass, with `short_cache="rolling"`, whose keys and values come from outside and go there. The
    frames that they are of are counted by their tokens, so the clock needs no number.

    Args:
        model ([`FARTransformer3DModel`]).
        long, short (list of `torch.Tensor` of shape `(B, N, L, D)`): Keys and values of layer after layer, of the long frames
            and of the short ones, in any order of the frames. `long` is empty for a model without long frames.
        height (`int`), width (`int`): Of the latents.
        oldest (`FrameBatch`, *optional*): The short frame that turns long in this write; not among the `short` ones any more.
    """

    def __init__(
        self,
        model: FARTransformer3DModel,
        long: list[torch.Tensor],
        short: list[torch.Tensor],
        height: int,
        width: int,
        oldest: FrameBatch | None = None,
    ):
        config = model.config
        self.long, self.short, self.oldest = long, short, oldest
        self._plan = ContextPlan(0, 1, height, width, config.patch_size, config.long_patch_size)
        self._num_long = long[0].shape[2] // self._plan.tokens_per_long_frame if long else 0
        self._num_short = short[0].shape[2] // self._plan.tokens_per_short_frame

    def check(self, model, frames, *, noisy: bool) -> None:
        """Nothing: a graph is made for one shape."""

    def pieces(self, frames: FrameBatch) -> list[FrameBatch]:
        return [frames]

    def keep_feature(self, feature: None) -> None:
        """Nothing: the model is not separable."""

    def begin_noisy(self) -> tuple[ContextPlan, CachePass]:
        return self._pass(num_turning_long=0, is_noisy=True)

    def begin_write(self, frames: FrameBatch) -> tuple[FrameBatch, ContextPlan, CachePass]:
        if self.oldest is None:
            return frames, *self._pass(num_turning_long=0, is_noisy=False)
        return self.oldest.append(frames), *self._pass(num_turning_long=1, is_noisy=False)

    def _pass(self, num_turning_long: int, is_noisy: bool) -> tuple[ContextPlan, CachePass]:
        plan = ContextPlan(
            num_turning_long,
            1,
            self._plan.height,
            self._plan.width,
            self._plan.patch_size,
            self._plan.long_patch_size,
            first_frame=self._num_long + (0 if num_turning_long else self._num_short),
            num_skipped_frames=self._num_short if num_turning_long else 0,
        )
        edges = [0, plan.num_long_tokens, plan.num_tokens] if num_turning_long else [0, plan.num_tokens]
        queries = tuple(QuerySpan(start, end, 0, 0) for start, end in zip(edges, edges[1:]))
        return plan, CachePass(plan.num_long_tokens, plan.tokens_per_long_frame, 0, 0, queries, is_noisy)

    def layers(self, cache_pass: CachePass) -> list[HandedLayer]:
        parts = [range(start, start + 2) for start in range(0, len(self.short), 2)]
        self._layers = [
            HandedLayer(
                [self.long[part] for part in pair if self.long], [self.short[part] for part in pair], cache_pass
            )
            for pair in parts
        ]
        return self._layers

    def written(self) -> tuple[torch.Tensor, ...]:
        """What the pass wrote: keys and values of layer after layer, `(2 * layers, N, L, D)`, of the frame that turned long, if
        any, and of the new one."""
        kinds = ["new_short"] if self.oldest is None else ["new_long", "new_short"]
        return tuple(torch.cat([state for layer in self._layers for state in getattr(layer, kind)]) for kind in kinds)


class WriteFrame(torch.nn.Module):
    """Keys and values of a finished frame; where two are given, the first turns long."""

    def __init__(self, transformer: FARTransformer3DModel):
        super().__init__()
        self.transformer = transformer

    def forward(
        self, latents, actions, long: list[torch.Tensor], short: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """`latents` (1, F, C, H, W) and the `actions` that they are fed (1, F), of one frame or two; the null action is
        `num_actions`."""
        frames = FrameBatch(latents, actions)
        oldest = frames.between(0, 1) if frames.num_frames == 2 else None
        new, cache = frames.last(1), HandedKVCache(self.transformer, long, short, *latents.shape[-2:], oldest)
        self.transformer(new.latents, CLEAN_TIMESTEP, new.actions, kv_cache=cache, update_cache=True)
        return cache.written()


class TracedRollout(Rollout):
    """A rollout whose scheduler is told where it stands: looking it up would depend on values, which a graph does not know."""

    def _set_timesteps(self, num_inference_steps: int | None = None) -> torch.Tensor:
        timesteps = super()._set_timesteps(num_inference_steps)
        self.scheduler.set_begin_index(0)
        return timesteps


class DenoiseFrame(torch.nn.Module):
    """All denoising steps of the next frame."""

    def __init__(self, pipe, latent_shape: tuple[int, int, int, int]):
        super().__init__()
        self.transformer, settings = pipe.transformer, GenerationRequest().settings(pipe)
        device = torch.device("cpu")
        self.rollout = TracedRollout(
            pipe.transformer, pipe.scheduler, latent_shape=latent_shape, max_frames=1, device=device, config=settings
        )

    def forward(self, noise, actions, long: list[torch.Tensor], short: list[torch.Tensor]) -> torch.Tensor:
        """`noise` (1, 1, C, H, W) and the action that the frame is fed, (1, 1), to latents (1, 1, C, H, W)."""
        self.rollout.kv_cache = HandedKVCache(self.transformer, long, short, *noise.shape[-2:])
        return self.rollout.denoise(FrameBatch(noise, actions))


class DecodeFrame(torch.nn.Module):
    """Latents (1, 1, C, H, W) to a picture (1, 3, height, width) in [0, 1]."""

    def __init__(self, vae: torch.nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return decode_video(self.vae, latents[0])


class EncodeFrame(torch.nn.Module):
    """The inverse of [`DecodeFrame`]."""

    def __init__(self, vae: torch.nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        return encode_video(self.vae, picture)[None]


def frame_graphs(pipe) -> dict[str, tuple[torch.nn.Module, tuple]]:
    """The modules that become graphs, each with inputs of the right shapes: `write`, `roll` (a write that turns the oldest short
    frame long, where frames turn long), `denoise`, `decode` and `encode`.

    Args:
        pipe ([`FARPipeline`]): On the CPU, in float32; see `check_graphs`.
    """
    check_graphs(pipe)
    transformer, config = pipe.transformer.eval(), pipe.transformer.config
    picture = torch.rand(1, 3, pipe.config.height, pipe.config.width)
    latents = encode_video(pipe.vae.eval(), picture)[None]
    plan = transformer.context_plan(1, *latents.shape[-2:])
    heads, num_parts = (1, config.num_attention_heads), 2 * config.num_layers

    def context(num_frames: int, num_tokens: int) -> list[torch.Tensor]:
        return [torch.zeros(*heads, num_frames * num_tokens, config.attention_head_dim) for _ in range(num_parts)]

    long = [] if config.long_patch_size is None else context(2, plan.tokens_per_long_frame)
    short, action = context(3, plan.tokens_per_short_frame), torch.zeros(1, 1, dtype=torch.int64)
    write = WriteFrame(transformer)
    graphs = {
        "write": (write, (latents, action, long, short)),
        "denoise": (DenoiseFrame(pipe, (1, *latents.shape[2:])), (latents, action, long, short)),
        "decode": (DecodeFrame(pipe.vae), (latents,)),
        "encode": (EncodeFrame(pipe.vae), (picture,)),
    }
    if long:
        graphs["roll"] = (write, (latents.repeat(1, 2, 1, 1, 1), action.repeat(1, 2), long, short))
    return graphs


@torch.no_grad()
def export_graph(module: torch.nn.Module, inputs: tuple, path: Path) -> None:
    """Write one of the `frame_graphs` as an ONNX file. Keys and values may be of any number of frames, none included."""
    from onnx_ir.passes.common import DeduplicateInitializersPass
    from onnxscript.optimizer import fold_constants

    grows = {2: torch.export.Dim.DYNAMIC}
    shapes = tuple([grows] * len(each) if isinstance(each, list) else None for each in inputs)
    program = torch.onnx.export(
        module.eval(), inputs, dynamo=True, dynamic_shapes=shapes, opset_version=OPSET, verbose=False
    )
    # A weight that several steps share is transposed once, here.
    fold_constants(program.model, should_fold=lambda node: node.op_type == "Transpose" or None)
    DeduplicateInitializersPass(size_limit=2**30)(program.model)
    program.save(path)
