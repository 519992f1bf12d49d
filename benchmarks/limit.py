"""The arithmetic limit: the matrix products and attention calls of a case, same shapes, and nothing between them.

Products are of the transformer's own weights, in every layer with the same inputs, which so stay in the processor's caches.
Attention is computed only over what may be seen, frame by frame or in groups of frames, whichever this machine does
fastest; a group is given no mask, so its first frames see a little too much.

L tokens, N heads, D head dim.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F

from diffusers_far import ContextPlan
from diffusers_far.models.transformer_far import FrameNetwork, FrameTransformer


GROUP_SIZES = (1, 128, 256, 512, 1024)  # tokens of the queries of an attention call, at least
EMBEDDERS = ("x_embedder", "context_embedder", "timestep_embedder.linear_1")  # their inputs need no gradient


@dataclass(frozen=True)
class BarePass:
    """The arithmetic of one pass of the network.

    Args:
        products (`tuple`): Name of the weight and rows that it is multiplied with.
        spans (`tuple`): For each layer, queries and keys of each frame.
    """

    products: tuple[tuple[str, int], ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]


def denoising_pass(transformer: FrameTransformer, num_frames: int, size: int) -> BarePass:
    """A step of the last of `num_frames` frames, the others being cached, at latents of `size` x `size`."""
    plan = transformer.context_plan(num_frames, size, size)
    if transformer.is_separable:
        return _decoding_pass(transformer, plan.tokens_per_short_frame)
    return _bare_pass(transformer, plan, num_frames - 1, num_frames)


def writing_pass(transformer: FrameTransformer, num_cached: int, num_frames: int, size: int) -> BarePass:
    """A write of clean frames to a cache that has `num_cached` of `num_frames` frames; where frames turn long, they and all
    short ones are encoded. Of the last layer only keys and values are read; of a separable model what it says at the last
    frame, too."""
    before, plan = (transformer.context_plan(number + 1, size, size) for number in (num_cached, num_frames))
    first = num_cached if plan.num_long_frames == before.num_long_frames else before.num_long_frames
    return _bare_pass(transformer, plan, first, num_frames, num_read_frames=int(transformer.is_separable))


def clip_pass(transformer: FrameTransformer, num_frames: int, size: int) -> BarePass:
    """A whole clip without a cache, as in training."""
    return _bare_pass(transformer, transformer.context_plan(num_frames, size, size), 0, num_frames)


def _bare_pass(
    transformer: FrameTransformer, plan: ContextPlan, first: int, end: int, num_read_frames: int | None = None
) -> BarePass:
    """The frames of `plan` from `first` up to and without `end`; those before are cached. Of the last layer the last
    `num_read_frames` are read, by default all short ones."""
    part, network = plan.segment(first, end), transformer.context_network
    short, long, num_frames = part.num_short_tokens, part.num_long_tokens, part.num_frames
    num_read = part.num_short_frames if num_read_frames is None else num_read_frames
    read = num_read * part.tokens_per_short_frame
    products = [("x_embedder", short), ("context_embedder", long), *_time_products(network, num_frames)]
    *blocks, last = (f"transformer_blocks.{layer}" for layer in range(len(network.transformer_blocks)))
    for block in blocks:
        products += _layer_products(block, (num_frames, num_frames), (short, short), (long, long))
    products += _layer_products(last, (num_frames, num_read), (short, read), (long, 0))
    products += [("norm_out.linear", num_read), ("proj_out", 0 if transformer.is_separable else read)]

    spans = [(plan.segment(f, f + 1).num_tokens, plan.segment(0, f + 1).num_tokens) for f in range(first, end)]
    layer_spans = (tuple(spans),) * len(blocks) + (tuple(spans[len(spans) - num_read :]),)
    return BarePass(_named(transformer, network, products), layer_spans)


def _decoding_pass(transformer: FrameTransformer, num_tokens: int) -> BarePass:
    """A frame and its feature, which see each other; of the last layer the frame alone is read."""
    network, both = transformer.denoising_network, 2 * num_tokens
    products = [("x_embedder", num_tokens), *_time_products(network, 1)]
    *blocks, last = (f"transformer_blocks.{layer}" for layer in range(len(network.transformer_blocks)))
    for block in blocks:
        products += _layer_products(block, (1, 1), (both, both), (0, 0))
    products += _layer_products(last, (1, 1), (both, num_tokens), (0, 0))
    products += [("norm_out.linear", 1), ("proj_out", num_tokens)]
    layer_spans = (((both, both),),) * len(blocks) + (((num_tokens, both),),)
    return BarePass(_named(transformer, network, products), layer_spans)


def _time_products(network: FrameNetwork, num_frames: int) -> list[tuple[str, int]]:
    embedders = [name for name in ("timestep_embedder", "r_timestep_embedder") if hasattr(network, name)]
    return [(f"{name}.{linear}", num_frames) for name in embedders for linear in ("linear_1", "linear_2")]


def _layer_products(
    block: str, frames: tuple[int, int], short: tuple[int, int], long: tuple[int, int]
) -> list[tuple[str, int]]:
    """Of each pair the first is what has keys and values, the second what asks and goes on."""
    products = [(f"{block}.{name}.linear", number) for name, number in zip(("norm1", "norm2"), frames)]
    products += [(f"{block}.attn.{name}", short[0]) for name in ("to_k", "to_v")]
    products += [(f"{block}.attn.{name}", long[0]) for name in ("add_k_proj", "add_v_proj")]
    products += [(f"{block}.attn.{name}", short[1]) for name in ("to_q", "to_out.0")]
    products += [(f"{block}.attn.{name}", long[1]) for name in ("add_q_proj", "to_add_out")]
    return products + [(f"{block}.mlp.{name}", short[1] + long[1]) for name in ("net.0.proj", "net.2")]


def _named(
    transformer: FrameTransformer, network: FrameNetwork, products: list[tuple[str, int]]
) -> tuple[tuple[str, int], ...]:
    """Those that have rows, by the names that the whole model has for their weights."""
    (prefix,) = (name for name, module in transformer.named_modules() if module is network)
    return tuple((f"{prefix}.{name}".lstrip("."), rows) for name, rows in products if rows)


class Limit:
    """Runs the arithmetic of some passes, one after the other.

    Args:
        transformer (`FARTransformer3DModel` or `SCDTransformer3DModel`): Lends its weights.
        passes (sequence of `BarePass`).
        has_backward (`bool`): Each product and attention call is differentiated too, as in training.

    Attributes:
        group_size (`int`): Of the attention calls, the fastest of `GROUP_SIZES`.
    """

    def __init__(self, transformer: FrameTransformer, passes: Sequence[BarePass], *, has_backward: bool = False):
        self.passes = passes
        self.has_backward = has_backward
        self.layers = {}
        for name in dict.fromkeys(name for bare_pass in passes for name, _ in bare_pass.products):
            layer = (transformer.get_parameter(f"{name}.{kind}").detach() for kind in ("weight", "bias"))
            self.layers[name] = tuple(parameter.requires_grad_(has_backward) for parameter in layer)
        num_rows = max(rows for bare_pass in passes for _, rows in bare_pass.products)
        widths = {weight.shape[1] for weight, _ in self.layers.values()}
        self.inputs = {width: torch.randn(num_rows, width) for width in widths}
        num_keys = max(keys for bare_pass in passes for _, keys in chain(*bare_pass.spans))
        heads = (transformer.config.num_attention_heads, transformer.config.attention_head_dim)
        self.query, self.key, self.value = (torch.randn(1, heads[0], num_keys, heads[1]) for _ in range(3))
        self.group_size = self._fastest_group_size()

    def __call__(self) -> None:
        with torch.set_grad_enabled(self.has_backward):
            for bare_pass in self.passes:
                for name, num_rows in bare_pass.products:
                    self._multiply(name, num_rows)
                for spans in bare_pass.spans:
                    self._attend(spans, self.group_size)

    @property
    def num_flops(self) -> int:
        """Floating point operations, of attention over exactly what may be seen; backward counts twice the forward."""
        flops, dim = 0, self.query.shape[1] * self.query.shape[3]
        for bare_pass in self.passes:
            flops += sum(2 * num_rows * self.layers[name][0].numel() for name, num_rows in bare_pass.products)
            flops += sum(4 * queries * keys * dim for queries, keys in chain(*bare_pass.spans))
        return flops * (3 if self.has_backward else 1)

    def _multiply(self, name: str, num_rows: int) -> None:
        weight, bias = self.layers[name]
        inputs = self.inputs[weight.shape[1]][:num_rows]
        if not self.has_backward:
            F.linear(inputs, weight, bias)
            return
        inputs = inputs.detach().requires_grad_(name not in EMBEDDERS)
        outputs = F.linear(inputs, weight, bias)
        torch.autograd.grad(outputs, [each for each in (inputs, weight) if each.requires_grad], outputs.detach())

    def _attend(self, spans: Iterable[tuple[int, int]], group_size: int) -> None:
        for num_queries, num_keys in grouped(spans, group_size):
            inputs = [self.query[:, :, :num_queries], self.key[:, :, :num_keys], self.value[:, :, :num_keys]]
            if self.has_backward:
                inputs = [each.detach().requires_grad_() for each in inputs]
            outputs = F.scaled_dot_product_attention(*inputs)
            if self.has_backward:
                torch.autograd.grad(outputs, inputs, outputs.detach())

    def _fastest_group_size(self) -> int:
        """Which is fastest in the first layers of all passes."""
        first_layers = [bare_pass.spans[0] for bare_pass in self.passes]
        if all(len(spans) == 1 for spans in first_layers):
            return GROUP_SIZES[0]
        seconds = {}
        with torch.set_grad_enabled(self.has_backward):
            for group_size in GROUP_SIZES:
                for _ in range(2):  # the first time is to warm up
                    start = time.perf_counter()
                    for spans in first_layers:
                        self._attend(spans, group_size)
                    seconds[group_size] = time.perf_counter() - start
        return min(seconds, key=seconds.get)


def grouped(spans: Iterable[tuple[int, int]], group_size: int) -> list[tuple[int, int]]:
    """Queries and keys of frames in a row, taken together until there are `group_size` queries: they see what the last of
    them sees."""
    groups, num_queries, num_keys = [], 0, 0
    for frame_queries, frame_keys in spans:
        num_queries, num_keys = num_queries + frame_queries, frame_keys
        if num_queries >= group_size:
            groups.append((num_queries, num_keys))
            num_queries = 0
    return groups if num_queries == 0 else [*groups, (num_queries, num_keys)]
