import copy
import hashlib
import json

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from tiny_models import tiny_pipeline, tiny_transformer
from torch.testing._internal.two_tensor import TwoTensor

from diffusers_far.models.identity import model_identity, vae_hash


def with_lora(seed: int = 0, name: str = "walls", model=None, scale: float = 1.0):
    """A tiny model with an adapter of random layers."""
    model = model or tiny_transformer(num_actions=3)
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "proj_out"]), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if f".{name}." in path:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.set_adapters(name, scale)
    return model.eval()


def nudged(model, entry: int):
    with torch.no_grad():
        model.proj_out.weight.view(-1)[entry] += 1e-6
    return model


def int8(model):
    model.quantize_int8()
    return model


def weights_in_a_subclass(model, difference: float = 0.0):
    """As torchao keeps quantised weights: in a tensor that holds others."""
    weight = model.proj_out.weight.detach()
    model.proj_out.weight = torch.nn.Parameter(TwoTensor(weight, weight + difference))
    return model


def both_active(model):
    model.set_adapters(["walls", "light"])
    return model


def fused(model):
    model.fuse_lora()
    return model


OTHERS = {
    "the last weight": lambda: nudged(tiny_transformer(num_actions=3), -1),
    "config": lambda: tiny_transformer(num_actions=3, trained_frames=9),
    "dtype": lambda: tiny_transformer(num_actions=3).bfloat16(),
    "int8": lambda: int8(tiny_transformer(num_actions=3)),
    "int8 of other weights": lambda: int8(tiny_transformer(1, num_actions=3)),
    "weights in a subclass": lambda: weights_in_a_subclass(tiny_transformer(num_actions=3)),
    "others in a subclass": lambda: weights_in_a_subclass(tiny_transformer(num_actions=3), 0.1),
    "adapter": with_lora,
    "other adapter": lambda: with_lora(seed=1),
    "adapter at another scale": lambda: with_lora(scale=0.5),
    "two adapters": lambda: both_active(with_lora(1, "light", with_lora())),
    "fused": lambda: fused(with_lora()),
}


def test_whatever_changes_what_is_computed_makes_another_model():
    identities = {name: model_identity(build()) for name, build in OTHERS.items()}
    identities["itself"] = model_identity(tiny_transformer(num_actions=3))
    assert len(set(identities.values())) == len(identities), identities
    assert identities["int8"] == model_identity(OTHERS["int8"]())


def compiled_blocks(model, tmp_path):
    model.compile_repeated_blocks(backend="eager")


def compiled_block(model, tmp_path):
    model.transformer_blocks[0] = torch.compile(model.transformer_blocks[0], backend="eager")


def offloaded_layer_by_layer(model, tmp_path):
    accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    assert model.proj_out.weight.is_meta


def offloaded_to_disk(model, tmp_path):
    accelerate.disk_offload(model, str(tmp_path), torch.device("cpu"))


def grouped(model, tmp_path):
    device = torch.device("cpu")
    apply_group_offloading(
        model, device, device, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # what is in memory means nothing: the values are on the disk


@pytest.mark.parametrize("build", [lambda: tiny_transformer(num_actions=3), with_lora], ids=["plain", "lora"])
@pytest.mark.parametrize(
    "move", [compiled_blocks, compiled_block, offloaded_layer_by_layer, offloaded_to_disk, grouped]
)
def test_compiled_or_offloaded_it_is_the_same_model(build, move, tmp_path):
    model = build()
    expected = model_identity(model)
    move(model, tmp_path)
    assert model_identity(model) == expected
    assert model_identity(torch.compile(build())) == expected


def test_adapters_that_do_not_count_and_their_names_are_no_part_of_a_model():
    plain, lora = model_identity(tiny_transformer(num_actions=3)), model_identity(with_lora())
    assert model_identity(with_lora(name="light")) == lora
    model = with_lora()
    model.disable_lora()
    assert model_identity(model) == plain
    model = with_lora(1, "light", with_lora())
    model.set_adapters("walls")
    assert model_identity(model) == lora


def test_in_a_given_precision_the_one_a_model_is_stored_in_does_not_count():
    model = tiny_transformer().half()
    expected = model_identity(model, torch.float32)
    assert model_identity(copy.deepcopy(model).float(), torch.float32) == expected
    assert model_identity(tiny_transformer(trained_frames=9).half(), torch.float32) != expected
    assert model_identity(nudged(model.float(), -1), torch.float32) != expected


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = type(tiny_transformer())(num_layers=1)
    with pytest.raises(ValueError, match="is on the meta device and has no values"):
        model_identity(model)


def test_hashes_in_files_of_earlier_releases_stay_valid():
    pipe = tiny_pipeline()

    def by_hand(model, start, dtype=None):
        digest = hashlib.sha256(start.encode())
        for name, tensor in sorted(model.state_dict().items()):
            shown = f"{tensor.dtype} " if dtype is None else ""
            digest.update(f"{name} {shown}{tuple(tensor.shape)}".encode())
            digest.update(tensor.to(dtype or tensor.dtype).numpy().tobytes())
        return digest.hexdigest()

    def public(model):
        later = {"flow_map"}
        return {name: value for name, value in model.config.items() if not name.startswith("_") and name not in later}

    config = json.dumps(public(pipe.transformer), sort_keys=True, default=str)
    start = f"FARTransformer3DModel {hashlib.sha256(config.encode()).hexdigest()}"
    assert model_identity(pipe.transformer) == by_hand(pipe.transformer, start)
    start = json.dumps([type(pipe.vae).__name__, public(pipe.vae)], sort_keys=True)
    assert vae_hash(pipe.vae) == by_hand(pipe.vae, start, torch.float16)
