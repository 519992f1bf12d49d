import copy
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from tiny_models import tiny_separable, tiny_transformer

from diffusers_far.training.config import OPTIMIZERS, FARSettings, setting
from diffusers_far.training.optimizers import MuonAdamW, build_optimizer, orthogonalized, rates_by_part


@dataclass(kw_only=True)
class Settings(FARSettings):
    optimizer: Literal[(*OPTIMIZERS, "muon")] = setting("adamw")


def given(**values) -> Settings:
    return Settings(output_dir="run", latents_dir="latents", **values)


@pytest.mark.parametrize("given_ratio, ratio", [(None, 2.0), (0.5, 0.5)])
def test_the_decoder_learns_at_a_rate_of_its_own(given_ratio, ratio):
    model, settings = tiny_separable(), given(learning_rate=0.5, decoder_learning_rate_ratio=given_ratio)
    encoder, decoder = build_optimizer(settings, model).param_groups
    assert (encoder["lr"], decoder["lr"]) == (0.5, 0.5 * ratio)
    assert {*map(id, decoder["params"])} == {*map(id, model.decoder.parameters())}
    assert len(encoder["params"]) + len(decoder["params"]) == len([*model.parameters()])
    model.encoder.requires_grad_(False)
    assert [len(group["params"]) for group in rates_by_part(settings, model)][0] == 1  # the start of frame 0
    assert len(rates_by_part(settings, tiny_transformer())) == 1


@pytest.mark.parametrize("name, kind", [("adamw", torch.optim.AdamW), ("radam", torch.optim.RAdam)])
def test_the_optimizer_has_the_parameters_and_settings_that_were_given(name, kind):
    network = torch.nn.Linear(2, 1)
    settings = given(optimizer=name, learning_rate=0.5, adam_beta2=0.9, adam_weight_decay=0.1)
    optimizer = build_optimizer(settings, network)
    (group,) = optimizer.param_groups
    assert type(optimizer) is kind and group["params"] == [*network.parameters()]
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.5, (0.9, 0.9), 0.1, 1e-8)


def test_an_optimizer_in_8_bits_is_that_of_bitsandbytes_or_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed: `pip install bitsandbytes`"):
        given(use_8bit_adam=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for name in ("radam", "muon"):
        with pytest.raises(ValueError, match=f"has no {name}"):
            given(use_8bit_adam=True, optimizer=name)

    class AdamW8bit(torch.optim.AdamW):
        pass

    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=SimpleNamespace(AdamW8bit=AdamW8bit)))
    optimizer = build_optimizer(given(use_8bit_adam=True), torch.nn.Linear(2, 1))
    assert type(optimizer) is AdamW8bit and optimizer.param_groups[0]["lr"] == 1e-4


@pytest.mark.parametrize("name", [*OPTIMIZERS, "muon"])
def test_what_can_be_chosen_is_what_there_is(name):
    optimizer = build_optimizer(given(optimizer=name), tiny_transformer())
    assert type(optimizer).__name__.lower().startswith(name)


def muon_run(make):
    """A model with gradients, its optimizer, and what makes a step."""
    torch.manual_seed(0)
    model = make()
    optimizer = build_optimizer(given(optimizer="muon", learning_rate=0.01, adam_weight_decay=0.1), model)
    gradients = torch.Generator().manual_seed(1)

    def step(model=model, optimizer=optimizer, generator=gradients):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    return model, optimizer, gradients, step


@pytest.mark.parametrize("make, num_parts", [(tiny_transformer, 1), (tiny_separable, 2)])
def test_muon_has_the_matrices_of_the_blocks_and_adamw_all_else(make, num_parts):
    model, optimizer, _, step = muon_run(make)
    step()
    names = {name for name, each in model.named_parameters() if "momentum_buffer" in optimizer.state[each]}
    assert names == {name for name, each in model.named_parameters() if each.ndim == 2 and "blocks." in name}
    assert all("exp_avg" in optimizer.state[each] for name, each in model.named_parameters() if name not in names)
    assert len(optimizer.param_groups) == 2 * num_parts and isinstance(optimizer, MuonAdamW)


def test_the_steps_of_muon_are_those_of_torch_within_its_rounding():
    model, optimizer, _, step = muon_run(tiny_transformer)
    block = model.transformer_blocks[0].attn.to_q
    weight, bias = (copy.deepcopy(each) for each in (block.weight, block.bias))
    start = weight.detach().clone()
    torchs = torch.optim.Muon([weight], 0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([bias], 0.01, weight_decay=0.1)
    for _ in range(3):
        step()
        weight.grad, bias.grad = block.weight.grad, block.bias.grad
        torchs.step()
        adamw.step()
    assert (weight - block.weight).norm() < 0.03 * (weight - start).norm()
    assert torch.equal(bias, block.bias)


def test_an_orthogonalized_matrix_has_singular_values_of_about_one():
    for shape in ((6, 9), (9, 6)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        left, values, right = torch.linalg.svd(orthogonalized(matrix), full_matrices=False)
        assert ((values > 0.6) & (values < 1.3)).all()


def test_a_rate_that_is_scheduled_holds_in_both_parts():
    model, optimizer, _, step = muon_run(tiny_transformer)
    before = copy.deepcopy(model.state_dict())
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_interrupted_run_with_muon_goes_on_to_the_bit():
    model, optimizer, gradients, step = muon_run(tiny_transformer)
    for _ in range(2):
        step()
    weights, state, drawn = copy.deepcopy((model.state_dict(), optimizer.state_dict(), gradients.get_state()))
    step()
    other, resumed, generator, other_step = muon_run(tiny_transformer)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    generator.set_state(drawn)
    other_step()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
