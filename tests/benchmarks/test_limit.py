"""The limit has exactly the arithmetic that FAR cannot do without."""

import pytest
import torch
from tiny_benchmarks import BASE, FLOW_MAPS, LONG, SCD
from tiny_models import spy_attention
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.limit import Limit, clip_pass, denoising_pass, grouped, writing_pass


NUM_FRAMES = 7
MODELS = [BASE, LONG, *FLOW_MAPS, SCD]


def product_flops(run) -> int:
    """Of all matrix products, with a bias or without."""
    with FlopCounterMode(display=False) as counter:
        run()
    flops = counter.get_flop_counts()["Global"]
    return sum(flops.get(operator, 0) for operator in (torch.ops.aten.addmm, torch.ops.aten.mm))


def far_calls(model, transformer):
    """What FAR runs, and the pass that the limit makes of it: a write, a step, a later write of one frame, a clip."""
    clip, size = model.clip(NUM_FRAMES), model.latent_size
    kv_cache = transformer.init_kv_cache(1, size, size, NUM_FRAMES)

    def write(first: int, end: int):
        window = slice(first, end)
        inputs = {"actions": clip.fed_actions[:, window], "kv_cache": kv_cache, "update_cache": True}
        if transformer.is_separable:
            inputs["next_action"] = clip.fed_actions[:, end]
        return lambda: transformer(clip.latents[:, window], -1, **inputs)

    noisy = {"actions": clip.fed_actions[:, :1], "kv_cache": kv_cache}
    yield write(0, NUM_FRAMES - 2), writing_pass(transformer, 0, NUM_FRAMES - 2, size)
    yield write(NUM_FRAMES - 2, NUM_FRAMES - 1), writing_pass(transformer, NUM_FRAMES - 2, NUM_FRAMES - 1, size)
    yield lambda: transformer(clip.noise[:, :1], 500, **noisy), denoising_pass(transformer, NUM_FRAMES, size)
    if transformer.is_separable:
        return  # its clips are two networks'
    timestep = torch.full((1, NUM_FRAMES), 500.0)
    whole = clip_pass(transformer, NUM_FRAMES, size)
    yield lambda: transformer(clip.latents, timestep, actions=clip.fed_actions), whole


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model.name} {model.config.get('flow_map')}")
@torch.no_grad()
def test_products_are_those_of_the_network(model):
    transformer = model.build()
    for far, bare_pass in far_calls(model, transformer):
        assert product_flops(Limit(transformer, [bare_pass])) == product_flops(far)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model.name} {model.config.get('flow_map')}")
@torch.no_grad()
def test_attention_is_over_what_each_frame_may_see(model):
    transformer = model.build()
    for number, (far, bare_pass) in enumerate(far_calls(model, transformer)):
        with spy_attention() as calls:
            far()
        spans = [span for layer in bare_pass.spans for span in layer]
        if number < 3:  # against a cache FAR too attends frame by frame
            assert [(query.shape[1], key.shape[1]) for query, key, *_ in calls] == spans
        assert sum(query.shape[1] for query, *_ in calls) == sum(num_queries for num_queries, _ in spans)
        # A mask has a True for each pair that may be seen.
        masks = [query.shape[1] * key.shape[1] if mask is None else mask.sum().item() for query, key, _, mask in calls]
        assert sum(masks) == sum(num_queries * num_keys for num_queries, num_keys in spans)


@pytest.mark.parametrize("model", [BASE, LONG], ids=lambda model: model.name)
def test_a_step_has_as_many_operations_as_the_formula_of_the_page(model):
    transformer = model.build()
    plan = transformer.context_plan(NUM_FRAMES, model.latent_size, model.latent_size)
    n, d, p = transformer.config.num_layers, transformer.inner_dim, transformer.x_embedder.in_features
    T, K = plan.tokens_per_short_frame, plan.num_tokens
    formula = 24 * n * T * d**2 + 4 * n * T * K * d + 12 * n * d**2 + 4 * T * p * d + 6 * d**2 + 512 * d
    assert Limit(transformer, [denoising_pass(transformer, NUM_FRAMES, model.latent_size)]).num_flops == formula


def test_groups_hold_all_queries_and_see_what_their_last_frame_sees():
    spans = [(4, 4), (4, 8), (16, 24), (16, 40)]
    assert grouped(spans, 1) == spans
    assert grouped(spans, 8) == [(8, 8), (16, 24), (16, 40)]
    assert grouped(spans, 20) == [(24, 24), (16, 40)]
    assert grouped(spans, 1000) == [(40, 40)]


def test_a_backward_pass_differentiates_every_product():
    transformer = LONG.build()
    passes = [clip_pass(transformer, NUM_FRAMES, LONG.latent_size)]
    forward, both = Limit(transformer, passes), Limit(transformer, passes, has_backward=True)
    assert both.num_flops == 3 * forward.num_flops

    embedders = 2 * sum(
        rows * both.layers[name][0].numel()
        for name, rows in passes[0].products
        if name in ("x_embedder", "context_embedder", "timestep_embedder.linear_1")
    )
    assert product_flops(both) == 3 * product_flops(forward) - embedders
    assert all(parameter.grad is None for parameter in transformer.parameters())
