"""What is saved loses nothing that was there, and what cannot be read is named."""

import inspect
import json
import os
import re

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from tiny_models import predict, random_clip, tiny_kl, tiny_pipeline, tiny_transformer

from diffusers_far import FARPipeline, FARTransformer3DModel, TokenARForVideo, VideoDiTPipeline
from diffusers_far.models import loading


WEIGHTS = "diffusion_pytorch_model"


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("cls", [FARTransformer3DModel, FARPipeline, VideoDiTPipeline, TokenARForVideo])
def test_an_override_has_the_arguments_of_what_it_overrides(cls):
    """diffusers asks the signature of a component what it can be told, such as `variant`."""
    # Of a call, and of a repo's subfolder, from which no pipeline can be loaded.
    excepted = {"forward": {"input"}, "push_to_hub": {"subfolder"}, "save_pretrained": set()}
    if issubclass(cls, DiffusionPipeline):
        excepted["save_pretrained"] = {"use_flashpack"}  # which is no safetensors
    for name in dir(cls):
        owners = [owner for owner in cls.__mro__ if name in vars(owner)]
        theirs = [owner for owner in owners if not owner.__module__.startswith("diffusers_far")]
        if name.startswith("_") or not theirs or owners[0] in theirs or not callable(getattr(theirs[0], name)):
            continue
        parameters = inspect.signature(getattr(theirs[0], name)).parameters.values()
        named = {each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
        missing = named - set(inspect.signature(getattr(cls, name)).parameters) - excepted.get(name, set())
        assert not missing, f"{cls.__name__}.{name} hides {missing}"


@pytest.mark.parametrize("max_shard_size", ["10GB", "50KB"], ids=["whole", "shards"])
def test_a_variant_is_saved_beside_the_float32_weights_and_both_load_to_the_bit(tmp_path, max_shard_size):
    pipe = tiny_pipeline(tiny_transformer(num_actions=3), tiny_kl())
    full = {name: weights_of(getattr(pipe, name)) for name in ("transformer", "vae")}
    pipe.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    pipe.to(torch.bfloat16)
    half = {name: weights_of(getattr(pipe, name)) for name in ("transformer", "vae")}
    pipe.save_pretrained(tmp_path, variant="bf16", max_shard_size=max_shard_size)
    if max_shard_size == "50KB":
        assert (tmp_path / "transformer" / f"{WEIGHTS}.safetensors.index.bf16.json").exists()
    for saved, arguments in ((full, {}), (half, {"variant": "bf16", "dtype": torch.bfloat16})):
        loaded = FARPipeline.from_pretrained(tmp_path, **arguments)
        for name, weights in saved.items():
            torch.testing.assert_close(getattr(loaded, name).state_dict(), weights, rtol=0, atol=0)


@pytest.mark.parametrize("sizes", [("50KB", "10GB"), ("10GB", "50KB"), ("50KB", "90KB")], ids=str)
def test_a_save_replaces_the_weights_of_its_variant_however_they_were_split(tmp_path, sizes):
    first, second, other = (tiny_transformer(seed) for seed in range(3))
    other.save_pretrained(tmp_path, variant="other", max_shard_size="50KB")
    first.save_pretrained(tmp_path, max_shard_size=sizes[0])
    second.save_pretrained(tmp_path, max_shard_size=sizes[1])
    for model, arguments in ((second, {}), (other, {"variant": "other"})):
        loaded = FARTransformer3DModel.from_pretrained(tmp_path, **arguments)
        torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_variant_that_is_missing_is_refused_by_its_name(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    with pytest.raises(OSError, match=rf"{WEIGHTS}.bf16.safetensors.* A `variant` has files of its own"):
        FARTransformer3DModel.from_pretrained(tmp_path / "transformer", variant="bf16")
    with pytest.raises(
        ValueError, match="`variant` is 'bf16', but transformer, vae in .* has no weights of that variant"
    ):
        FARPipeline.from_pretrained(tmp_path, variant="bf16")
    pipe.vae.save_pretrained(tmp_path / "vae", variant="bf16")
    with pytest.raises(ValueError, match="`variant` is 'bf16', but transformer in .* has no weights of that variant"):
        FARPipeline.from_pretrained(tmp_path, variant="bf16")
    FARPipeline.from_pretrained(tmp_path, variant="bf16", transformer=pipe.transformer)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: (os error 28)")]
)
@pytest.mark.parametrize("failing", ["transformer", "vae"])
def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch, failing, error):
    old, new = tiny_pipeline(tiny_transformer(0)), tiny_pipeline(tiny_transformer(1))
    old.save_pretrained(tmp_path / "pipe")
    before = {path: path.read_bytes() for path in (tmp_path / "pipe").rglob("*") if path.is_file()}
    save_file = loading.ModelMixin.save_pretrained.__globals__["safetensors"].torch.save_file

    def fail(tensors, path, metadata=None):
        if os.path.basename(os.path.dirname(path)) == failing or f"/{failing}/" in str(path):
            raise error
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="/pipe' was not written .*(os error 28|No space).*MiB are free.*is as it was"):
        new.save_pretrained(tmp_path / "pipe")
    assert {path: path.read_bytes() for path in (tmp_path / "pipe").rglob("*") if path.is_file()} == before
    with pytest.raises(OSError):
        new.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_kill_between_two_files_leaves_shards_that_are_not_taken_for_a_model(tmp_path, monkeypatch):
    old, new = tiny_transformer(0), tiny_transformer(1)
    old.save_pretrained(tmp_path, max_shard_size="50KB")
    replace, moves = loading.Path.replace, []

    def killed(path, target):
        moves.append(target)
        if len(moves) == 3:
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(loading.Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        new.save_pretrained(tmp_path, max_shard_size="50KB")
    with pytest.raises(OSError, match="no file named"):
        FARTransformer3DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("save", [tiny_transformer, tiny_pipeline], ids=["model", "pipeline"])
def test_a_file_where_the_folder_should_be_is_refused(tmp_path, save):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="`save_directory` is '.*file', which is a file"):
        save().save_pretrained(tmp_path / "file")


@pytest.mark.parametrize("is_pipeline", [False, True], ids=["model", "pipeline"])
def test_a_model_whose_groups_are_offloaded_to_the_disk_is_not_saved_without_its_values(is_pipeline, tmp_path):
    pipe = tiny_pipeline()
    pipe.transformer.enable_group_offload(
        torch.device("cpu"), num_blocks_per_group=1, offload_to_disk_path=str(tmp_path / "groups")
    )
    with pytest.raises(ValueError, match="weights that are offloaded, and cannot be saved"):
        (pipe if is_pipeline else pipe.transformer).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_pickled_weights_of_a_transformer_alone_are_not_written(tmp_path):
    for arguments, options in (((), {"safe_serialization": False}), ((True, None, False), {})):
        with pytest.raises(ValueError, match="`safe_serialization` is False"):
            tiny_transformer().save_pretrained(tmp_path / "model", *arguments, **options)
    assert not (tmp_path / "model").exists()


def test_offloaded_weights_are_neither_called_missing_nor_saved_as_nothing(tmp_path):
    pipe = tiny_pipeline(tiny_transformer())
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    again = FARPipeline(**pipe.components)
    with pytest.raises(ValueError, match="`transformer` has weights that are offloaded.*remove_all_hooks"):
        again.save_pretrained(tmp_path / "pipe")
    with pytest.raises(ValueError, match="The model has weights that are offloaded"):
        again.transformer.save_pretrained(tmp_path / "model")
    again.remove_all_hooks()
    again.save_pretrained(tmp_path / "pipe")
    expected = tiny_transformer().state_dict()
    torch.testing.assert_close(
        FARPipeline.from_pretrained(tmp_path / "pipe").transformer.state_dict(), expected, rtol=0, atol=0
    )


def test_a_model_that_lies_partly_on_the_disk_computes_the_same(tmp_path):
    model = tiny_transformer(num_actions=3, num_layers=3)
    model.save_pretrained(tmp_path)
    places = {name: "cpu" for name, _ in model.named_children() if name != "transformer_blocks"}
    places |= {f"transformer_blocks.{layer}": "disk" if layer else "cpu" for layer in range(3)}
    loaded = FARTransformer3DModel.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    assert any(parameter.is_meta for parameter in loaded.parameters())
    pipe = tiny_pipeline(loaded)
    clip = random_clip(model, 5)
    assert torch.equal(predict(pipe.transformer, clip), predict(model, clip))


@pytest.mark.parametrize(
    "name, content",
    [
        ("model_index.json", b"{"),
        ("model_index.json", b"null"),
        ("transformer/config.json", b"[]"),
        ("transformer/config.json", b""),
        ("vae/config.json", b"3"),
        ("scheduler/scheduler_config.json", b"\xff\xfe"),
        ("scheduler/scheduler_config.json", b"null"),
    ],
)
def test_a_config_that_is_no_json_object_is_named(tmp_path, name, content):
    tiny_pipeline().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OSError, match=f"{re.escape(name)}' is (not JSON|no JSON object.*); download or copy it again"):
        FARPipeline.from_pretrained(tmp_path)


def test_a_pipeline_without_a_class_is_named(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(OSError, match="model_index.json' has no `_class_name`"):
        FARPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "index",
    [{}, {"weight_map": 3}, {"metadata": {}, "weight_map": {"a": 1}}, {"metadata": {}, "weight_map": {"a": "../x"}}],
)
def test_a_broken_index_of_shards_is_named(tmp_path, index):
    tiny_transformer().save_pretrained(tmp_path, max_shard_size="50KB")
    (tmp_path / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(OSError, match=r"index.json' has no `weight_map` of weights to files of its folder"):
        FARTransformer3DModel.from_pretrained(tmp_path)
