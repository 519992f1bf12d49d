"""Int8 matrix products: near the float32 result, and refused where they cannot be."""

import pytest
import torch
from tiny_models import fill_cache, predict, predict_cached, random_clip, tiny_pipeline, tiny_transformer

from diffusers_far import FARPipeline


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize("long_patch_size", [None, 2])
def test_int8_is_near_float32_with_and_without_a_cache(long_patch_size):
    model, plain = (tiny_transformer(num_actions=3, long_patch_size=long_patch_size) for _ in range(2))
    clip = random_clip(model, 7).clean_but_last()
    model.quantize_int8()
    for run in (predict, predict_cached):
        expected = run(plain, clip)[:, -1:]
        error = (run(model, clip)[:, -1:] - expected).norm() / expected.norm()
        assert 0 < error < 0.1


def test_all_linear_layers_of_the_blocks_are_int8_and_no_others():
    model = tiny_transformer(num_actions=3, long_patch_size=2)
    linear_layers = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    model.quantize_int8()
    left = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert left == {name for name in linear_layers if not name.startswith("transformer_blocks")}
    assert "x_embedder" in left and "proj_out" in left


def test_a_quantised_model_is_refused_where_it_would_be_lost(tmp_path):
    pipe = tiny_pipeline(tiny_transformer())
    pipe.transformer.quantize_int8()
    pipe.transformer.quantize_int8()  # again: nothing happens
    with pytest.raises(ValueError, match="cannot be saved.*Keep the model that you loaded"):
        pipe.transformer.save_pretrained(tmp_path / "model")
    lora = {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 32),
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.zeros(32, 2),
    }
    with pytest.raises(ValueError, match="Load and fuse them before"):
        pipe.load_lora_weights(lora)


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(ValueError, match=r"torch.bfloat16 on cpu.*to\('cpu', torch.float32\)"):
        tiny_transformer().to(torch.bfloat16).quantize_int8()
    pipe = tiny_pipeline(tiny_transformer())
    lora = {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 32),
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.zeros(32, 2),
    }
    pipe.load_lora_weights(lora, adapter_name="look")
    with pytest.raises(ValueError, match=r"adapters \['look'\].*fuse_lora"):
        pipe.transformer.quantize_int8()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.transformer.quantize_int8()


def test_the_cache_of_a_quantised_model_is_float32():
    model = tiny_transformer()
    model.quantize_int8()
    kv_cache = fill_cache(model, random_clip(model, 3))
    assert kv_cache.dtype == torch.float32


def test_a_pipeline_is_made_of_the_components_of_an_int8_pipeline():
    pipe = tiny_pipeline(tiny_transformer())
    pipe.transformer.quantize_int8()
    again = FARPipeline(**pipe.components)
    again.set_progress_bar_config(disable=True)
    frames = [
        each(height=8, width=8, num_frames=1, num_inference_steps=1, output_type="pt", generator=torch.manual_seed(0))
        for each in (pipe, again)
    ]
    assert torch.equal(frames[0].frames, frames[1].frames)


@pytest.mark.parametrize(
    "move",
    [
        lambda pipe: pipe.to(torch.bfloat16),
        lambda pipe: pipe.to("cpu", torch.float16),
        lambda pipe: pipe.to(dtype=torch.float64),
        lambda pipe: pipe.to("meta"),
        lambda pipe: pipe.transformer.half(),
        lambda pipe: pipe.transformer.to(torch.bfloat16),
        lambda pipe: pipe.transformer.to_empty(device="meta"),
    ],
)
def test_a_quantised_model_is_refused_another_dtype_or_device_before_anything_moves(move):
    pipe = tiny_pipeline(tiny_transformer())
    pipe.transformer.quantize_int8()
    with pytest.raises(ValueError, match="This model cannot become .*Keep the model that you loaded"):
        move(pipe)
    assert {pipe.transformer.dtype, pipe.vae.dtype} == {torch.float32}
    assert {pipe.transformer.device.type, pipe.vae.device.type} == {"cpu"}
    pipe.to("cpu").to(torch.float32)
    pipe(height=8, width=8, num_frames=1, num_inference_steps=1)
