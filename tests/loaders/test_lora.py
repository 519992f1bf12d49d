"""LoRA layers change a rollout, come back from a file, mix, fuse and leave without a trace."""

import re

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tiny_models import tiny_pipeline, tiny_transformer

from diffusers_far import FARPipeline
from diffusers_far.models.adapters import adapter_layers


TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "norm1.linear", "proj_out"]
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}  # weights that were added and subtracted, or read at another alignment


@pytest.fixture
def pipe():
    return tiny_pipeline(tiny_transformer(num_actions=3, long_patch_size=2))


@pytest.fixture(params=[True, False], ids=["cached", "uncached"])
def rollout(request):
    """A function that runs a pipeline over the edge of its short window."""

    def run(pipe, **kwargs):
        generator = torch.Generator().manual_seed(0)
        return pipe(
            video_latents=torch.randn(1, 3, 4, 4, 4, generator=generator),
            actions=torch.tensor([[0, 1, 2, 0, 1]]),
            num_frames=2,
            num_inference_steps=2,
            generator=generator,
            use_cache=request.param,
            output_type="latent",
            **kwargs,
        ).frames

    return run


def save_lora(folder, seed=0, rank=2, alpha=6, dropout=0.0):
    """A LoRA file with random layers, as a training script would write it."""
    transformer = tiny_transformer(num_actions=3, long_patch_size=2)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(seed)
    layers = {
        key: 0.3 * torch.randn(tensor.shape, generator=generator)
        for key, tensor in get_peft_model_state_dict(transformer).items()
    }
    FARPipeline.save_lora_weights(
        folder, layers, transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict()
    )
    return layers


def differs(left, right):
    return (left - right).abs().max().item() > 1e-2


def test_saved_layers_come_back_with_their_alpha(pipe, rollout, tmp_path):
    layers = save_lora(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    plain = rollout(pipe)
    pipe.load_lora_weights(tmp_path)
    assert pipe.get_active_adapters() == ["default_0"]
    loaded = get_peft_model_state_dict(pipe.transformer, adapter_name="default_0")
    assert loaded.keys() == layers.keys() and all(torch.equal(loaded[key], layers[key]) for key in layers)

    # W + alpha / rank * B A, written into a plain model.
    merged = tiny_transformer(num_actions=3, long_patch_size=2)
    for key in layers:
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            delta = 6 / 2 * layers[f"{name}.lora_B.weight"] @ layers[key]
            merged.get_submodule(name).weight.data += delta
    changed = rollout(pipe)
    assert differs(changed, plain)
    torch.testing.assert_close(changed, rollout(tiny_pipeline(merged)), **ROUNDING)


def test_layers_that_were_trained_with_dropout_drop_nothing_in_a_rollout(pipe, rollout, tmp_path):
    save_lora(tmp_path, dropout=0.5)
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(rollout(pipe), rollout(pipe))


def test_layers_given_as_a_dict_are_left_as_they_are(pipe, tmp_path):
    save_lora(tmp_path)
    state_dict = FARPipeline.lora_state_dict(tmp_path)
    keys = list(state_dict)
    pipe.load_lora_weights(state_dict, adapter_name="walls")
    assert list(state_dict) == keys and pipe.get_list_adapters() == {"transformer": ["walls"]}


def test_the_scale_of_a_call_scales_the_layers_in_that_call_only(pipe, rollout, tmp_path):
    plain = rollout(pipe)
    save_lora(tmp_path)
    pipe.load_lora_weights(tmp_path)
    full = rollout(pipe)
    assert torch.equal(rollout(pipe, attention_kwargs={"scale": 0.0}), plain)
    half = rollout(pipe, attention_kwargs={"scale": 0.5})
    assert differs(half, plain) and differs(half, full)
    assert torch.equal(rollout(pipe), full)
    pipe.set_adapters("default_0", 0.5)
    torch.testing.assert_close(half, rollout(pipe), **ROUNDING)


def test_two_adapters_add_up_by_their_weights(pipe, rollout, tmp_path):
    plain = rollout(pipe)
    for seed, name in enumerate(("walls", "light")):
        save_lora(tmp_path / name, seed)
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
    pipe.set_adapters(["walls", "light"], [1.0, 0.0])
    only_walls = rollout(pipe)
    pipe.set_adapters("walls")
    torch.testing.assert_close(only_walls, rollout(pipe), **ROUNDING)
    pipe.set_adapters(["walls", "light"], [1.0, 0.7])
    assert differs(rollout(pipe), only_walls) and differs(only_walls, plain)
    pipe.disable_lora()
    assert torch.equal(rollout(pipe), plain)


def scales(pipe):
    return [dict(layer.scaling) for layer in adapter_layers(pipe.transformer).values()]


@pytest.fixture
def weighted(pipe, tmp_path):
    """A pipeline with an adapter whose weight is not 1, and cannot be told from the file."""
    save_lora(tmp_path)
    pipe.load_lora_weights(tmp_path, adapter_name="walls")
    pipe.set_adapters("walls", 0.3)
    return pipe


def run_session(pipe, **kwargs):
    session = pipe.start_session(
        height=8, width=8, num_inference_steps=1, output_type="latent", generator=torch.Generator(), **kwargs
    )
    session.step()
    session.step(0)


@pytest.mark.parametrize("scale", [0, 0.0, -1, 0.7, 1e-30])
def test_every_way_of_running_leaves_the_weights_of_adapters_exactly(weighted, rollout, scale):
    expected, before = rollout(weighted), scales(weighted)
    kwargs = {"attention_kwargs": {"scale": scale}}
    rollout(weighted, **kwargs)
    assert scales(weighted) == before
    run_session(weighted, **kwargs)
    list(weighted.stream(height=8, width=8, actions=[0, 1], num_frames=2, num_inference_steps=1, **kwargs))
    weighted.transformer(torch.zeros(1, 1, 4, 4, 4), 0, actions=torch.zeros(1, 1, dtype=torch.int64), **kwargs)
    # An error in the middle, in a layer that runs while the scales are others.
    hook = weighted.transformer.proj_out.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rollout(weighted, **kwargs)
    hook.remove()
    assert scales(weighted) == before and torch.equal(rollout(weighted), expected)


@pytest.mark.parametrize(
    "kwargs",
    [{"scale": float("nan")}, {"scale": float("inf")}, {"scale": "1"}, {"scale": True}, {"scales": 0.5}, [0.5]],
)
def test_scales_that_are_no_finite_number_and_unknown_keys_are_refused_before_any_work(weighted, kwargs, monkeypatch):
    before = scales(weighted)
    monkeypatch.setattr(weighted.vae, "encode", lambda *_: pytest.fail("the context was encoded"))
    video = torch.rand(1, 2, 3, 8, 8)
    calls = [
        lambda: weighted(video=video, actions=[0, 1, 2], num_frames=1, attention_kwargs=kwargs),
        lambda: weighted.stream(video=video, actions=[0, 1, 2], num_frames=1, attention_kwargs=kwargs),
        lambda: weighted.start_session(video=video, actions=[0], attention_kwargs=kwargs),
        lambda: weighted.transformer(torch.zeros(1, 1, 4, 4, 4), 0, attention_kwargs=kwargs),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="attention_kwargs"):
            call()
    assert scales(weighted) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1"])
def test_weights_and_scales_of_adapters_are_finite_and_so_are_their_values(weighted, value, tmp_path):
    before = scales(weighted)
    for refused in (
        lambda: weighted.fuse_lora(lora_scale=value),
        lambda: weighted.transformer.fuse_lora(value),
        lambda: weighted.set_adapters("walls", value),
        lambda: weighted.transformer.set_adapters(["walls"], [{"transformer_blocks": value}]),
    ):
        with pytest.raises(ValueError, match="finite number"):
            refused()
    assert scales(weighted) == before and not weighted.fused_loras
    layers = FARPipeline.lora_state_dict(tmp_path)
    next(iter(layers.values()))[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite values in transformer"):
        weighted.load_lora_weights(layers)
    save_lora(tmp_path / "config", alpha=float("nan"))
    with pytest.raises(ValueError, match="no JSON object of finite numbers"):
        weighted.load_lora_weights(tmp_path / "config")


@pytest.mark.parametrize("through", [lambda pipe: pipe, lambda pipe: pipe.transformer], ids=["pipeline", "model"])
def test_fusing_at_a_scale_and_unfusing_leaves_the_adapters_and_the_weights_beneath(weighted, rollout, through):
    expected, before = rollout(weighted), scales(weighted)
    for _ in range(2):
        through(weighted).fuse_lora(lora_scale=0.5)
        assert differs(rollout(weighted), expected) and scales(weighted) == before
        through(weighted).fuse_lora(lora_scale=0.5)  # nothing is left to fuse
        weighted.set_adapters("walls", 0.9)  # for later: what is fused stays as it is
        weighted.set_adapters("walls", 0.3)
        weighted.set_adapters("walls", 0.9)
        through(weighted).unfuse_lora()
        weighted.set_adapters("walls", 0.3)
    assert scales(weighted) == before
    torch.testing.assert_close(rollout(weighted), expected, **ROUNDING)
    weighted.disable_lora()
    plain = rollout(weighted)
    weighted.enable_lora()
    through(weighted).fuse_lora(lora_scale=0.5)
    through(weighted).disable_lora()
    torch.testing.assert_close(rollout(weighted), plain, **ROUNDING)


def test_fused_layers_compute_the_same_and_unfusing_takes_them_out(pipe, rollout, tmp_path):
    plain = rollout(pipe)
    save_lora(tmp_path)
    pipe.load_lora_weights(tmp_path)
    changed = rollout(pipe)
    pipe.fuse_lora()
    torch.testing.assert_close(rollout(pipe), changed, **ROUNDING)
    pipe.unfuse_lora()
    torch.testing.assert_close(rollout(pipe), changed, **ROUNDING)
    pipe.unload_lora_weights()
    torch.testing.assert_close(rollout(pipe), plain, **ROUNDING)


def test_a_pipeline_with_fused_layers_is_saved_and_loaded_as_a_plain_one(pipe, rollout, tmp_path):
    save_lora(tmp_path / "lora")
    pipe.load_lora_weights(tmp_path / "lora")
    with pytest.raises(ValueError, match="LoRA layers .default_0., with which the pipeline could not be loaded"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()

    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "saved")
    loaded = FARPipeline.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(rollout(loaded), rollout(pipe), **ROUNDING)


def test_unloading_restores_every_bit(pipe, rollout, tmp_path):
    plain = rollout(pipe)
    save_lora(tmp_path)
    pipe.load_lora_weights(tmp_path)
    pipe.unload_lora_weights()
    assert torch.equal(rollout(pipe), plain)


def test_only_the_layers_of_an_added_adapter_are_trained():
    transformer = tiny_transformer(num_actions=3)
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    trained = [name for name, parameter in transformer.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * transformer.config.num_layers and all(".lora_" in name for name in trained)


@pytest.mark.parametrize(
    "state_dict, named",
    [
        ({"unet.to_q.lora_A.weight": torch.zeros(2, 2)}, "the keys unet.to_q.lora_A.weight"),
        ({"transformer.to_q.weight": torch.zeros(2, 2)}, "the keys transformer.to_q.weight"),
        ({}, "no keys"),
    ],
)
def test_what_is_no_lora_of_this_pipeline_is_refused(pipe, state_dict, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        pipe.load_lora_weights(state_dict)


A, B = (f"transformer.transformer_blocks.0.attn.to_q.lora_{side}.weight" for side in "AB")
LAYER = {A: torch.zeros(2, 32), B: torch.zeros(32, 2)}


@pytest.mark.parametrize(
    "changed, message",
    [
        ({A: torch.full((2, 32), float("nan"))}, f"NaN or infinite values in {A}"),
        ({B: torch.full((32, 2), float("-inf"))}, f"NaN or infinite values in {B}"),
        ({B: 3}, f"NaN or infinite values in {B}"),
        ({A: torch.zeros(2, 31)}, r"to_q \(2, 31\) and \(32, 2\) for \(rank, 32\) and \(32, rank\)"),
        ({A: torch.zeros(3, 32)}, r"wrong shapes: transformer_blocks.0.attn.to_q \(3, 32\) and"),
        ({B: None}, r"to_q \(2, 32\) and none for"),
        ({A.replace("blocks.0", "blocks.9"): LAYER[A]}, "has unknown transformer_blocks.9.attn.to_q"),
    ],
)
def test_layers_that_would_spoil_the_model_are_refused_by_their_names(pipe, changed, message):
    state_dict = {key: tensor for key, tensor in (LAYER | changed).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(state_dict)
    assert not hasattr(pipe.transformer, "peft_config")


def test_a_transformer_alone_refuses_layers_that_are_not_finite(pipe):
    damaged = {**LAYER, A: torch.full((2, 32), float("nan"))}
    with pytest.raises(ValueError, match=f"NaN or infinite values in {A}"):
        pipe.transformer.load_lora_adapter(damaged, prefix="transformer")


def test_a_transformer_alone_keeps_nothing_of_a_file_that_is_not_finite_and_reads_no_pickles(pipe, tmp_path):
    save_file({**LAYER, A: torch.full((2, 32), float("nan"))}, tmp_path / "pytorch_lora_weights.safetensors")
    pipe.transformer.load_lora_adapter(LAYER, prefix="transformer", adapter_name="intact")
    with pytest.raises(ValueError, match="NaN or infinite values in transformer_blocks.0"):
        pipe.transformer.load_lora_adapter(tmp_path, prefix="transformer")
    assert set(pipe.transformer.peft_config) == {"intact"}
    for pickled in ({"weight_name": "lora.bin"}, {"use_safetensors": False}):
        with pytest.raises(ValueError, match="safetensors"):
            pipe.transformer.load_lora_adapter(tmp_path, prefix="transformer", **pickled)


@pytest.mark.parametrize("metadata", ["{", "[]", '{"transformer.lora_alpha": NaN}'])
def test_a_lora_file_with_a_broken_adapter_config_is_refused(pipe, metadata, tmp_path):
    save_file(LAYER, tmp_path / "lora.safetensors", metadata={"format": "pt", "lora_adapter_metadata": metadata})
    with pytest.raises(ValueError, match="The adapter's config in the LoRA file"):
        pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")


@pytest.mark.parametrize("content", [b"", b"text", 40])
def test_a_damaged_lora_file_is_named_with_the_cure(pipe, content, tmp_path):
    save_lora(tmp_path)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    with pytest.raises(OSError, match=f"{tmp_path}.*download or copy it again"):
        pipe.load_lora_weights(tmp_path)


def test_pickled_layers_are_neither_read_nor_written(pipe, tmp_path):
    layers = save_lora(tmp_path / "safe")
    torch.save({f"transformer.{key}": tensor for key, tensor in layers.items()}, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(OSError, match="no file named pytorch_lora_weights.safetensors"):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="`weight_name` is 'pytorch_lora_weights.bin'"):
        pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.bin")
    with pytest.raises(ValueError, match="`use_safetensors` is False"):
        pipe.load_lora_weights(tmp_path, use_safetensors=False)
    with pytest.raises(ValueError, match="`safe_serialization` is False"):
        FARPipeline.save_lora_weights(tmp_path, layers, safe_serialization=False)
    with pytest.raises(ValueError, match="nothing to save"):
        FARPipeline.save_lora_weights(tmp_path, {})
