"""Two released files become a folder that `FARPipeline.from_pretrained` loads, or an error that says why not."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler
from released_models import LONG_CONFIG, RELEASED_AUTOENCODERS, narrow_autoencoder, released, without
from tiny_models import predict, random_clip, tiny_separable, tiny_transformer

from diffusers_far import FARPipeline, FARTransformer3DModel, preset_config


SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_far_to_diffusers.py"
specification = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(script)

LONG = {**LONG_CONFIG, "in_channels": 32, "out_channels": 32}


@pytest.fixture
def transformer():
    return tiny_transformer(in_channels=32, num_actions=3, long_patch_size=2)


@pytest.fixture
def vae(monkeypatch):
    vae = narrow_autoencoder(monkeypatch)
    vae(torch.rand(2, 3, 16, 16))  # the batch norms learn statistics
    return vae.eval()


@pytest.fixture
def convert(transformer, vae, tmp_path):
    """A function that runs the script on released files of `transformer` and `vae`; returns its output folder."""
    torch.save(released(transformer), tmp_path / "transformer.pth")
    torch.save(vae.state_dict(), tmp_path / "vae.pth")
    (tmp_path / "config.json").write_text(json.dumps(LONG))

    def run(**changes):
        options = {"vae": tmp_path / "vae.pth", "transformer": tmp_path / "transformer.pth"}
        options |= {"transformer_config": tmp_path / "config.json", "output_dir": tmp_path / "converted", **changes}
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        script.main(script.parse_args(arguments))
        return Path(options["output_dir"])

    return run


def test_the_folder_loads_as_the_pipeline_of_the_released_models(convert, transformer, vae):
    pipe = FARPipeline.from_pretrained(convert(fps=15, trained_frames=300))
    clip = random_clip(transformer, num_frames=5)
    assert torch.equal(predict(pipe.transformer, clip), predict(transformer, clip))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(pipe.vae(images).sample, vae(images).sample)
    assert pipe.vae.config.scaling_factor == 0.2889
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    assert torch.equal(pipe.scheduler.sigmas, FlowMatchEulerDiscreteScheduler().sigmas)
    assert (pipe.config.fps, pipe.config.height, pipe.config.width) == (15, 64, 64)
    assert pipe.transformer.config.trained_frames == 300


def test_a_separable_model_is_told_by_the_two_configs_in_the_file(convert, tmp_path):
    source = tiny_separable(in_channels=32, num_actions=3, learn_start=False)
    torch.save(source.state_dict(), tmp_path / "separable.pth")
    part = {key: value for key, value in LONG.items() if key != "context_patch_size"}
    configs = {"encoder": part, "decoder": {**part, "num_layers": 1, "decoder_input_combine": "token_concat"}}
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    folder = convert(transformer=tmp_path / "separable.pth", transformer_config=tmp_path / "configs.json")
    loaded, clip = FARPipeline.from_pretrained(folder).transformer, random_clip(source, num_frames=4)
    expected, actual = (predict(model, clip, clean_hidden_states=clip.latents) for model in (source, loaded))
    assert torch.equal(actual, expected)


def test_the_pipeline_continues_a_video(convert):
    pipe = FARPipeline.from_pretrained(convert())
    pipe.set_progress_bar_config(disable=True)
    video = torch.rand(1, 3, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    frames = pipe(video, actions=[[0, 1, 2, 0, 1]], num_frames=2, num_inference_steps=2, output_type="pt").frames
    assert frames.shape == (1, 2, 3, 32, 48) and frames.isfinite().all()


def test_the_card_says_what_was_converted(convert):
    card = (convert() / "README.md").read_text()
    assert "converted from `transformer.pth` and `vae.pth`" in card


def test_a_slope_is_kept_as_flex_rope(convert, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**LONG, "slope_scale": 0.2}))
    assert FARPipeline.from_pretrained(convert()).config.flex_rope["slope"] == 0.2


def test_weights_are_saved_in_the_dtype_asked_for(convert):
    pipe = FARPipeline.from_pretrained(convert(dtype="bfloat16"), dtype=torch.bfloat16)
    saved = (pipe.name_or_path / Path("transformer/diffusion_pytorch_model.safetensors")).stat().st_size
    assert saved < 2.5 * sum(parameter.numel() for parameter in pipe.transformer.parameters())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"ema": weights, "model": {key: 0 * weights[key] for key in weights}, "step": 3},
        lambda weights: {"params": {f"module.{key}": tensor for key, tensor in weights.items()}},
        lambda weights: {"state_dict": {"params_ema": weights}},
    ],
)
def test_training_checkpoints_are_unwrapped_to_their_averaged_weights(convert, transformer, tmp_path, wrap):
    torch.save(wrap(released(transformer)), tmp_path / "wrapped.pth")
    loaded = FARTransformer3DModel.from_pretrained(convert(transformer=tmp_path / "wrapped.pth") / "transformer")
    assert torch.equal(loaded.proj_out.weight, transformer.proj_out.weight)


@pytest.mark.parametrize("name", ["far-b", "far-m", "far-l", "far-xl", "far-b-long", "far-m-long"])
def test_a_size_stands_for_the_config_of_the_released_model(name):
    original_config = script.read_original_config(name, num_actions=4, num_classes=None)
    with torch.device("meta"):
        expected = FARTransformer3DModel(**preset_config(name, num_actions=4, out_channels=32))
    converted = script.convert_original_far_transformer(released(expected), original_config)
    assert {**converted.config, "_use_default_values": None} == {**expected.config, "_use_default_values": None}


def test_classes_complete_a_size():
    config = script.read_original_config("far-l", num_actions=None, num_classes=101)
    assert config["condition_cfg"] == {"type": "label", "num_classes": 101}


def test_a_folder_that_is_not_empty_is_left_alone(convert, tmp_path):
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="`--output_dir` .*converted' is not an empty folder"):
        convert()
    assert [path.name for path in (tmp_path / "converted").iterdir()] == ["notes.txt"]


class Malicious:
    def __reduce__(self):
        return (Path("was_run").touch, ())


def test_a_file_that_cannot_be_read_is_named_and_nothing_is_written(convert, transformer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = (tmp_path / "transformer.pth").read_bytes()
    (tmp_path / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    torch.save({"model": Malicious()}, tmp_path / "malicious.pth")
    for name in ("truncated.pth", "empty.pth", "page.pth", "malicious.pth"):
        with pytest.raises(ValueError, match=f"{name}' is truncated or no checkpoint"):
            convert(transformer=tmp_path / name)
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({"optimizer": {"lr": 1.0}}, tmp_path / "optimizer.pth")
    for name in ("list.pth", "optimizer.pth"):
        with pytest.raises(ValueError, match=f"{name}' holds .* in which no state dict was found"):
            convert(vae=tmp_path / name)
    with pytest.raises(FileNotFoundError, match="absent.pth' is not a file"):
        convert(vae=tmp_path / "absent.pth")
    assert not (tmp_path / "converted").exists() and not (tmp_path / "was_run").exists()


def test_weights_that_do_not_fit_are_named_and_nothing_is_written(convert, transformer, vae, tmp_path):
    torch.save(without(released(transformer), "proj_out.bias"), tmp_path / "incomplete.pth")
    with pytest.raises(ValueError, match="lacks proj_out.bias"):
        convert(transformer=tmp_path / "incomplete.pth")
    torch.save({**vae.state_dict(), "extra": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="unknown extra"):
        convert(vae=tmp_path / "other.pth")
    with pytest.raises(ValueError, match="`spatial_compression` is 32"):
        convert(vae_compression=32)
    assert not (tmp_path / "converted").exists()


def test_a_config_that_cannot_be_read_is_named(convert, tmp_path):
    for text in ("{", "[1]"):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(ValueError, match=re.escape("broken.json")):
            convert(transformer_config=tmp_path / "broken.json")
    with pytest.raises(ValueError, match="`--transformer_config` is 'far-s', which is neither a size"):
        convert(transformer_config="far-s")
    with pytest.raises(ValueError, match="`--num_actions` and `--num_classes` complete one of these"):
        convert(num_actions=3)


@pytest.mark.full
def test_the_released_sizes_convert(tmp_path):
    """FAR-B-Long with 4 actions and the 8x autoencoder, random weights in half precision."""
    with torch.device("meta"):
        transformer = FARTransformer3DModel(**preset_config("far-b-long", num_actions=4))
        vae = AutoencoderDC(**RELEASED_AUTOENCODERS[8])
    for name, state_dict in (("transformer", released(transformer)), ("vae", vae.state_dict())):
        weights = {
            key: (0.02 * torch.randn(tensor.shape)).to(torch.float16 if tensor.is_floating_point() else tensor.dtype)
            for key, tensor in state_dict.items()
        }
        torch.save(weights, tmp_path / f"{name}.pth")
    arguments = f"--transformer {tmp_path}/transformer.pth --transformer_config far-b-long --num_actions 4 "
    arguments += f"--vae {tmp_path}/vae.pth --vae_compression 8 --dtype float16 --output_dir {tmp_path}/converted"
    script.main(script.parse_args(arguments.split()))
    pipe = FARPipeline.from_pretrained(tmp_path / "converted", dtype=torch.float16)
    assert 150e6 < sum(parameter.numel() for parameter in pipe.transformer.parameters()) < 165e6
    assert torch.equal(pipe.vae.state_dict()["encoder.conv_out.weight"], weights["encoder.conv_out.weight"])
