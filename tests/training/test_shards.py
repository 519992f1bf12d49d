"""What is cut and made whole again, of one process; `tests/examples/test_several_processes.py` trains with two."""

import pytest
import torch
from diffusers.training_utils import EMAModel
from tiny_models import tiny_pipeline, tiny_transformer
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from diffusers_far.training.shards import ShardedAverage, Shards, cut, gathered, held_bytes, own_part


@pytest.fixture
def shard():
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)])
    destroy_process_group()


def test_what_is_gathered_and_cut_again_is_the_same_and_the_rest_stays_as_it_is(shard):
    whole = torch.randn(3, 2)
    state = {"weights": [shard(whole), whole], "betas": (0.9, 0.99), "step": 3}
    found = gathered(state)
    assert torch.equal(found["weights"][0], whole) and not isinstance(found["weights"][0], DTensor)
    assert found["weights"][1] is whole and found["betas"] == (0.9, 0.99) and found["step"] == 3
    again = cut(whole, shard(torch.zeros(3, 2)))
    assert isinstance(again, DTensor) and torch.equal(own_part(again), whole)
    assert cut(whole, whole) is whole and own_part(whole) is whole


def test_a_process_that_keeps_nothing_gets_no_whole_tensor(shard):
    assert gathered({"weight": shard(torch.ones(2)), "step": 3}, is_kept=False) == {"weight": None, "step": 3}


def test_averages_of_parts_are_saved_and_loaded_whole(shard):
    parameters = [torch.nn.Parameter(shard(torch.arange(6.0).view(3, 2))), torch.nn.Parameter(shard(torch.ones(2)))]
    expected = EMAModel([own_part(parameter).detach().requires_grad_() for parameter in parameters], decay=0.5)
    ema = EMAModel([], decay=0.5, foreach=True)
    average = ShardedAverage(ema, parameters)
    for _ in range(3):
        with torch.no_grad():
            for parameter in parameters:
                parameter += 1
        parts = [own_part(parameter) for parameter in parameters]
        ema.step(parts)
        expected.step([part.detach().requires_grad_() for part in parts])
    state = gathered(average.state_dict())
    torch.testing.assert_close(state["shadow_params"], expected.shadow_params)
    loaded = ShardedAverage(EMAModel([], decay=0.1), parameters)
    loaded.load_state_dict(state)
    assert loaded.ema.decay == 0.5 and loaded.ema.optimization_step == 3
    assert all(map(torch.equal, loaded.ema.shadow_params, expected.shadow_params))


def trained(has_average: bool) -> tuple[torch.nn.Module, torch.optim.Optimizer, int, int]:
    """A transformer after a step, of which not all is trained; its bytes, averages included, and those that are trained."""
    transformer = tiny_transformer(num_layers=3)
    transformer.proj_out.requires_grad_(False)
    parameters = [each for each in transformer.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    for each in parameters:
        each.grad = torch.ones_like(each)
    optimizer.step()
    kept = [*transformer.parameters(), *(each.grad for each in parameters)]
    kept += [each for states in optimizer.state.values() for each in states.values()]
    kept += EMAModel(transformer.parameters()).shadow_params if has_average else []
    return transformer, optimizer, sum(each.nbytes for each in kept), sum(each.nbytes for each in parameters)


@pytest.mark.parametrize("has_average", [False, True])
def test_a_whole_model_holds_all_and_beside_others_its_gradients_twice(has_average):
    transformer, optimizer, num_bytes, trained_bytes = trained(has_average)
    assert held_bytes(transformer, optimizer, has_average, 1) == num_bytes
    assert held_bytes(transformer, optimizer, has_average, 8) == num_bytes + trained_bytes


@pytest.mark.parametrize("has_average", [False, True])
def test_shards_hold_a_part_of_all_and_a_block_whole(has_average):
    transformer, optimizer, num_bytes, trained_bytes = trained(has_average)
    block = sum(each.nbytes for each in transformer.transformer_blocks[0].parameters())
    blocks = sum(each.nbytes for each in transformer.transformer_blocks.parameters())
    weights = sum(each.nbytes for each in transformer.parameters())
    whole = weights + trained_bytes - 2 * (blocks - block)
    counted = [held_bytes(transformer, optimizer, has_average, number, torch.float32) for number in (1, 2, 4)]
    assert counted[0] == num_bytes + whole
    for number, each in zip((2, 4), counted[1:]):
        assert num_bytes / number <= each - whole < num_bytes / number * 1.05  # what cannot be halved is small
    assert held_bytes(transformer, optimizer, has_average, 1, torch.bfloat16) == num_bytes + whole // 2


@pytest.mark.parametrize("is_main", [True, False])
def test_a_pipeline_has_the_whole_copy_inside_alone_and_the_network_elsewhere(is_main, monkeypatch):
    network, copy = tiny_transformer(), tiny_transformer()
    pipeline = tiny_pipeline(network)
    monkeypatch.setattr(Shards, "whole_copy", lambda self: copy if is_main else None)
    with pytest.raises(KeyError), Shards.__new__(Shards).whole_inside(pipeline):
        assert pipeline.transformer is (copy if is_main else network)
        raise KeyError
    assert pipeline.transformer is network
