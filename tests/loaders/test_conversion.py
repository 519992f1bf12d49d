"""Released checkpoints, converted, compute what the public implementation computed from them."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC
from released_models import (
    BASE_CONFIG,
    LABEL_CONFIG,
    LONG_CONFIG,
    RELEASED_AUTOENCODERS,
    UNCONDITIONAL_CONFIG,
    narrow_autoencoder,
    released,
    without,
)
from safetensors import safe_open
from tiny_models import predict, random_clip, tiny_pipeline, tiny_separable, tiny_taesd, tiny_transformer

from diffusers_far import (
    FARPipeline,
    FARTransformer3DModel,
    convert_original_far_autoencoder,
    convert_original_far_transformer,
    convert_original_scd_transformer,
)
from diffusers_far.loaders.conversion import autoencoder_config


REPOSITORY = Path(__file__).parents[2]
GOLDEN = Path(os.environ.get("FAR_GOLDEN", REPOSITORY.parent / "shared" / "golden"))
ABSENT = pytest.mark.skip(f"no reference cases in {GOLDEN}; set FAR_GOLDEN to their folder")
ABSENT_CASES = [pytest.param(None, id="absent", marks=ABSENT)]
SCD_CASES = sorted(GOLDEN.glob("scd_*.safetensors")) or ABSENT_CASES
FAR_CASES = [path for path in sorted(GOLDEN.glob("*.safetensors")) if path not in SCD_CASES] or ABSENT_CASES
GOLDEN_CASES = list(dict.fromkeys([*FAR_CASES, *SCD_CASES]))


def golden_case(path):
    """The tensors and the metadata of a reference case."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def golden_model(tensors, metadata):
    weights = {key.removeprefix("weights."): tensor for key, tensor in tensors.items() if key.startswith("weights.")}
    names = ("original_config", "original_encoder_config", "original_decoder_config")
    configs = [json.loads(metadata[name]) for name in names if name in metadata]
    convert = convert_original_far_transformer if len(configs) == 1 else convert_original_scd_transformer
    return convert(weights, *configs)


def worst_error(actual, expected):
    return (actual - expected).abs().max().item()


@pytest.mark.parametrize("path", FAR_CASES, ids=lambda path: path.stem)
def test_a_converted_model_predicts_as_the_public_implementation(path):
    tensors, metadata = golden_case(path)
    model = golden_model(tensors, metadata)
    with torch.no_grad():
        sample = model(
            tensors["forward.hidden_states"],
            tensors["forward.timestep"],
            actions=tensors.get("forward.actions"),
            class_labels=tensors.get("forward.labels"),
        ).sample
    assert worst_error(sample, tensors["forward.expected_short_frames"]) < 1e-4


@pytest.mark.parametrize("path", SCD_CASES, ids=lambda path: path.stem)
def test_a_converted_separable_model_predicts_as_the_public_implementation(path):
    tensors, metadata = golden_case(path)
    model = golden_model(tensors, metadata)
    with torch.no_grad():
        sample = model(
            tensors["forward.hidden_states"],
            tensors["forward.timestep"],
            actions=tensors["forward.actions"],
            clean_hidden_states=tensors["forward.clean_hidden_states"],
        ).sample
    assert worst_error(sample[:, 1:], tensors["forward.expected_frames_from_1"]) < 1e-4


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("path", GOLDEN_CASES, ids=lambda path: path.stem)
def test_a_converted_pipeline_rolls_out_as_the_public_implementation(path, use_cache):
    tensors, metadata = golden_case(path)
    pipe = tiny_pipeline(golden_model(tensors, metadata), tiny_taesd())
    frames = pipe(
        video_latents=tensors.get("rollout.context_latents"),
        actions=tensors.get("rollout.actions"),
        class_labels=tensors.get("rollout.labels"),
        num_frames=tensors["rollout.noise"].shape[1],
        num_inference_steps=int(metadata["num_inference_steps"]),
        guidance_scale=float(metadata["guidance_scale"]),
        latents=tensors["rollout.noise"],
        use_cache=use_cache,
        output_type="latent",
    ).frames
    assert worst_error(frames, tensors["rollout.expected"]) < 1e-4


def separable_release(**config):
    """A separable model, and what its release would be: weights and the two configs."""
    source = tiny_separable(**{"num_actions": 3, "learn_start": False, **config})
    configs = {"encoder": {**BASE_CONFIG}, "decoder": {**BASE_CONFIG, "num_layers": 1}}
    return source, source.state_dict(), configs


@pytest.mark.parametrize("slope", [0.0, 0.3])
def test_a_separable_release_comes_back_as_the_model_it_was_made_from(slope):
    source, weights, configs = separable_release()
    configs["encoder"]["slope_scale"] = slope
    converted = convert_original_scd_transformer(weights, configs["encoder"], configs["decoder"])
    clip = random_clip(source, num_frames=5)
    expected, actual = (predict(model, clip, clean_hidden_states=clip.latents) for model in (source, converted))
    assert torch.equal(actual, expected) == (slope == 0)
    assert converted.config.action_shift == 0 and not converted.config.learn_start and not converted.training
    weights["decoder.proj_out.bias"] += 1
    assert not torch.equal(converted.decoder.proj_out.bias, weights["decoder.proj_out.bias"])


@pytest.mark.parametrize(
    "part, change, named",
    [
        ("encoder", {"heads": 2}, "`encoder_config` has unknown keys heads"),
        ("decoder", {"heads": 2}, "`decoder_config` has unknown keys heads"),
        ("decoder", {"decoder_input_combine": "add"}, "`decoder_input_combine` is 'add'"),
        ("decoder", {"num_attention_heads": 4}, "differ in num_attention_heads"),
        ("encoder", {"num_layers": 3}, "lacks encoder.transformer_blocks.2."),
    ],
)
def test_a_separable_release_that_does_not_fit_is_refused(part, change, named):
    _, weights, configs = separable_release()
    configs[part] |= change
    with pytest.raises(ValueError, match=re.escape(named)):
        convert_original_scd_transformer(weights, configs["encoder"], configs["decoder"])


SOURCES = {
    "long": (LONG_CONFIG, {"num_actions": 3, "long_patch_size": 2}),
    "base": (BASE_CONFIG, {"num_actions": 3}),
    "unconditional": (UNCONDITIONAL_CONFIG, {}),
    "label": (LABEL_CONFIG, {"num_classes": 3}),
}


@pytest.mark.parametrize("original_config, config", SOURCES.values(), ids=SOURCES)
def test_every_kind_of_release_comes_back_as_the_model_it_was_made_from(original_config, config):
    source = tiny_transformer(**config)
    converted = convert_original_far_transformer(released(source), original_config)
    clip = random_clip(source, num_frames=5)
    assert torch.equal(predict(converted, clip), predict(source, clip))
    assert not converted.training
    assert converted.config.short_window == 3 and converted.config.action_shift == 0
    is_trained = [[parameter.requires_grad for parameter in model.parameters()] for model in (converted, source)]
    assert is_trained[0] == is_trained[1]


@pytest.mark.parametrize("slope", [0.0, 0.3])
def test_a_converted_long_model_rolls_out_alike_with_and_without_cache(slope):
    source = tiny_transformer(num_actions=3, long_patch_size=2)
    pipe = tiny_pipeline(convert_original_far_transformer(released(source), {**LONG_CONFIG, "slope_scale": slope}))
    clip = random_clip(source, num_frames=4)
    arguments = {
        "video_latents": clip.latents,
        "actions": torch.zeros(2, 8, dtype=torch.int64),
        "num_frames": 4,
        "num_inference_steps": 3,
        "guidance_scale": 1.5,
        "latents": torch.randn(2, 4, 4, 4, 6, generator=torch.Generator().manual_seed(1)),
        "output_type": "latent",
    }
    assert worst_error(pipe(**arguments).frames, pipe(**arguments, use_cache=False).frames) < 1e-4


def test_a_slope_becomes_a_constant_flex_rope_that_a_saved_pipeline_keeps(tmp_path):
    source = tiny_transformer(num_actions=3)
    clip = random_clip(source, num_frames=3)
    converted = convert_original_far_transformer(released(source), {**BASE_CONFIG, "slope_scale": 0.3})
    expected = predict(converted, clip)
    assert not torch.equal(expected, predict(source, clip))

    tiny_pipeline(converted).save_pretrained(tmp_path / "saved")
    loaded = FARPipeline.from_pretrained(tmp_path / "saved")
    assert loaded.config.flex_rope == {"slope": 0.3, "schedule": "constant", "trained_frames": None}
    assert torch.equal(predict(loaded.transformer, clip), expected)


def test_the_long_patch_size_is_read_from_the_weights_where_the_config_leaves_it_out():
    source = tiny_transformer(num_actions=3, long_patch_size=3)
    assert convert_original_far_transformer(released(source), BASE_CONFIG).config.long_patch_size == 3


def test_the_config_may_leave_out_what_the_release_has_as_default():
    with torch.device("meta"):
        source = FARTransformer3DModel(num_layers=2, out_channels=32)
    converted = convert_original_far_transformer(source.state_dict(), {"num_layers": 2})
    assert own_config(converted) == own_config(source)


def test_the_given_weights_are_neither_changed_nor_shared():
    state_dict = released(tiny_transformer(num_actions=3, long_patch_size=2))
    before = {key: tensor.clone() for key, tensor in state_dict.items()}
    converted = convert_original_far_transformer(state_dict, LONG_CONFIG)
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.zero_()
    assert list(state_dict) == list(before)
    assert all(torch.equal(state_dict[key], before[key]) for key in before)


def test_the_weights_keep_their_dtype():
    state_dict = {key: tensor.bfloat16() for key, tensor in released(tiny_transformer(num_actions=3)).items()}
    assert convert_original_far_transformer(state_dict, BASE_CONFIG).dtype == torch.bfloat16


def test_dropped_weights_are_listed(caplog):
    convert_original_far_transformer(released(tiny_transformer(num_actions=3, long_patch_size=2)), LONG_CONFIG)
    assert "context_proj_out.bias, context_proj_out.weight" in caplog.text


def own_config(model):
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda weights: without(weights, "proj_out.bias"), "lacks proj_out.bias"),
        (lambda weights: {**weights, "extra.weight": torch.zeros(1)}, "unknown extra.weight"),
        (
            lambda weights: {**weights, "x_embedder.weight": torch.zeros(32, 5)},
            "x_embedder.weight (32, 5) instead of (32, 4)",
        ),
        (lambda weights: {"ema": weights}, "unknown ema"),
        (lambda weights: {**weights, "context_proj_out.bias": torch.zeros(1)}, "unknown context_proj_out.bias"),
        (
            lambda weights: without(weights, "label_embedder.embedding_table.weight"),
            "lacks label_embedder.embedding_table.weight",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named_as_the_release_calls_them(change, named):
    state_dict = released(tiny_transformer(num_classes=3))
    with pytest.raises(ValueError, match=re.escape(named)):
        convert_original_far_transformer(change(state_dict), LABEL_CONFIG)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"num_heads": 2}, "unknown keys num_heads"),
        ({"condition_cfg": {"type": "text"}}, "'label' or 'action'"),
        ({"condition_cfg": {"type": "action", "num_classes": 3}}, "num_action_classes"),
        ({"context_patch_size": 4}, "no `context_embedder.weight`"),
        ({"condition_cfg": None}, "unknown action_embedder.embedding_table.weight"),
        ({"num_layers": 1}, "unknown transformer_blocks.1."),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        convert_original_far_transformer(released(tiny_transformer(num_actions=3)), {**BASE_CONFIG, **change})


def test_a_long_patch_that_is_no_square_is_refused():
    state_dict = released(tiny_transformer(num_actions=3, long_patch_size=2))
    state_dict["context_embedder.weight"] = torch.zeros(32, 4 * 5)
    with pytest.raises(ValueError, match=re.escape("(32, 20), which is no square patch of `in_channels` 4")):
        convert_original_far_transformer(state_dict, BASE_CONFIG)


@pytest.mark.parametrize("compression", RELEASED_AUTOENCODERS)
def test_an_autoencoder_has_the_config_of_the_release(compression):
    with torch.device("meta"):
        source = AutoencoderDC(**RELEASED_AUTOENCODERS[compression])
    assert autoencoder_config(source.state_dict()) == RELEASED_AUTOENCODERS[compression]
    converted = convert_original_far_autoencoder(source.state_dict(), compression)
    assert own_config(converted) == own_config(source)
    assert converted.spatial_compression_ratio == compression


def test_a_converted_autoencoder_encodes_and_decodes_as_the_one_it_was_made_from(monkeypatch):
    source = narrow_autoencoder(monkeypatch)
    source(torch.rand(4, 3, 32, 32))  # in training mode: the batch norms learn statistics, which must come along
    converted = convert_original_far_autoencoder(source.state_dict())
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(converted.encode(images).latent, source.eval().encode(images).latent)
        assert torch.equal(converted(images).sample, source(images).sample)


def test_an_autoencoder_that_does_not_fit_is_refused(monkeypatch):
    state_dict = narrow_autoencoder(monkeypatch).state_dict()
    with pytest.raises(ValueError, match="`spatial_compression` is 16 and the weights' encoder compresses 8x"):
        convert_original_far_autoencoder(state_dict, 16)
    with pytest.raises(ValueError, match="lacks decoder.norm_out.bias"):
        convert_original_far_autoencoder(without(state_dict, "decoder.norm_out.bias"))
    with pytest.raises(ValueError, match="`spatial_compression` is 1 "):
        convert_original_far_autoencoder(released(tiny_transformer()))
