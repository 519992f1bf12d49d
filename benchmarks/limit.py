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

from diffusers_far import ContextPlan, FARTransformer3DModel


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


def denoising_pass(transformer: FARTransformer3DModel, num_frames: int, size: int) -> BarePass:
    """A step of the last of `num_frames` frames, the others being cached, at latents of `size` x `size`."""
    plan = transformer.context_plan(num_frames, size, size)
    return _bare_pass(transformer, plan, num_frames - 1, num_frames)


def writing_pass(transformer: FARTransformer3DModel, num_cached: int, num_frames: int, size: int) -> BarePass:
    """A write of clean frames to a cache that has `num_cached` of `num_frames` frames; where frames turn long, they and all
    short ones are encoded."""
    before, plan = (transformer.context_plan(number + 1, size, size) for number in (num_cached, num_frames))
    first = num_cached if plan.num_long_frames == before.num_long_frames else before.num_long_frames
    return _bare_pass(transformer, plan, first, num_frames, is_write=True)


def clip_pass(transformer: FARTransformer3DModel, num_frames: int, size: int) -> BarePass:
    """A whole clip without a cache, as in training."""
    return _bare_pass(transformer, transformer.context_plan(num_frames, size, size), 0, num_frames)


def _bare_pass(
    transformer: FARTransformer3DModel, plan: ContextPlan, first: int, end: int, *, is_write: bool = False
) -> BarePass:
    """The frames of `plan` from `first` up to and without `end`; those before are cached."""
    part, num_layers = plan.segment(first, end), transformer.config.num_layers
    short, long, num_frames = part.num_short_tokens, part.num_long_tokens, part.num_frames
    products = [
        ("x_embedder", short),
        ("context_embedder", long),
        ("timestep_embedder.linear_1", num_frames),
        ("timestep_embedder.linear_2", num_frames),
    ]
    for layer in range(num_layers - 1):
        products += _layer_products(f"transformer_blocks.{layer}", num_frames, short, long)
    last = f"transformer_blocks.{num_layers - 1}"
    if is_write:  # of the last layer only keys and values are read
        products.append((f"{last}.norm1.linear", num_frames))
        products += [(f"{last}.attn.{name}", short) for name in ("to_k", "to_v")]
    else:  # and of the others only the short frames
        products += _layer_products(last, part.num_short_frames, short, 0)
        products += [("norm_out.linear", part.num_short_frames), ("proj_out", short)]
        products.append((f"{last}.norm1.linear", part.num_long_frames))
    products += [(f"{last}.attn.{name}", long) for name in ("add_k_proj", "add_v_proj")]

    spans = [(plan.segment(f, f + 1).num_tokens, plan.segment(0, f + 1).num_tokens) for f in range(first, end)]
    last_spans = () if is_write else tuple(spans[part.num_long_frames :])
    products = tuple(product for product in products if product[1])
    return BarePass(products, (*(tuple(spans),) * (num_layers - 1), last_spans))


def _layer_products(block: str, num_frames: int, short: int, long: int) -> list[tuple[str, int]]:
    products = [(f"{block}.{name}.linear", num_frames) for name in ("norm1", "norm2")]
    products += [(f"{block}.attn.{name}", short) for name in ("to_q", "to_k", "to_v", "to_out.0")]
    products += [(f"{block}.attn.{name}", long) for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")]
    return products + [(f"{block}.mlp.{name}", short + long) for name in ("net.0.proj", "net.2")]


class Limit:
    """Runs the arithmetic of some passes, one after the other.

    Args:
        transformer (`FARTransformer3DModel`): Lends its weights.
        passes (sequence of `BarePass`).
        has_backward (`bool`): Each product and attention call is differentiated too, as in training.

    Attributes:
        group_size (`int`): Of the attention calls, the fastest of `GROUP_SIZES`.
    """

    def __init__(self, transformer: FARTransformer3DModel, passes: Sequence[BarePass], *, has_backward: bool = False):
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
