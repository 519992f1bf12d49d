"""Private names of torch, diffusers and accelerate, each used in one place. Seen in torch 2.13.0, diffusers 0.42.1 and
accelerate 1.15.0; a test that fails here after an update says which name went, and where."""

import inspect
import re
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry
from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.models.attention_dispatch import AttentionBackendName
from tiny_models import random_clip, tiny_kl, tiny_pipeline, tiny_transformer, using_backend

import diffusers_far
from diffusers_far.models import internals
from diffusers_far.models.codec import decode_video, encode_video


CPU = torch.device("cpu")

# Their private names, by the module of ours that has them.
PRIVATE = {
    "models/internals.py": {
        "_AttentionBackendRegistry",
        "_attention_backend",
        "_mixed_precision",
        "_compiled_call_impl",
        "_call_impl",
        "_hf_hook",
        "_diffusers_hook",
    },
    "models/identity.py": {"_orig_mod"},
    "models/frame_network.py": {"_gradient_checkpointing_func"},
    "models/frame_transformer.py": {"_apply"},
    "loaders/lora.py": {"_fetch_state_dict"},
}


def test_private_names_of_other_libraries_are_in_one_place_each():
    package = Path(diffusers_far.__file__).parent
    texts = {str(path.relative_to(package)): path.read_text() for path in package.rglob("*.py")}
    code = "\n".join(texts.values())
    ours = set(re.findall(r"(?:def |class |self\.|cls\.|^\s*)(_[a-z]\w*)(?=\(| =|:| \+=|,)", code, re.MULTILINE))
    ours |= {"_execution_device", "_exit"}  # of a pipeline, for its authors; of `os`, where it is public
    for name, text in texts.items():
        used = re.findall(r"[\w)\]]\.(_[a-z]\w*)|(?:get|has)attr\([\w.]+, \"(_[a-z]\w*)\"|import .*?\b(_\w+)", text)
        private = {each for group in used for each in group if each} - ours - PRIVATE.get(name, set())
        assert not private, f"{name} uses {private}: find the public way, or put it into models/internals.py"


def test_torch_calls_a_compiled_module_as_it_is_with_its_hooks():
    """`Module._compiled_call_impl` and `Module._call_impl`, torch 2.13.0."""
    module, seen = torch.nn.Linear(2, 2), []
    module.register_forward_hook(lambda *arguments: seen.append("hook"))
    assert not internals.is_compiled(module)
    module.compile(backend=lambda graph, inputs: seen.append("compiled") or graph.forward)
    assert internals.is_compiled(module)
    internals.call_uncompiled(module, torch.zeros(1, 2))
    assert seen == ["hook"]


def test_diffusers_says_which_attention_backend_is_active():
    """`_AttentionBackendRegistry` and `processor._attention_backend`, diffusers 0.42.1."""
    model = tiny_transformer()
    attention = model.transformer_blocks[0].attn
    assert internals.attention_backend(attention) == AttentionBackendName.NATIVE
    with using_backend(model, "flex"):
        assert internals.attention_backend(attention) == AttentionBackendName.FLEX
    with using_backend(tiny_transformer(1), "flex"):
        assert internals.attention_backend(attention) == AttentionBackendName.FLEX


def test_accelerates_hooks_say_where_a_model_computes():
    """`module._hf_hook`, accelerate 1.15.0."""
    model = tiny_transformer()
    assert internals.execution_device(model) == CPU and not internals.offloaded_weights(model)
    cpu_offload(model, execution_device=CPU)
    assert model.device.type == "meta"
    assert internals.execution_device(model) == CPU
    assert internals.offloaded_weights(model) == set(model.state_dict())
    remove_hook_from_module(model, recurse=True)
    add_hook_to_module(model, accelerate.hooks.CpuOffload(execution_device=torch.device("meta")))
    assert internals.execution_device(model).type == "meta"


def test_diffusers_says_how_it_offloads_groups():
    """`module._diffusers_hook` and the hook named `group_offloading`, diffusers 0.42.1."""
    model = tiny_transformer()
    assert internals.group_offloading(model) == []
    model.enable_group_offload(CPU, CPU, offload_type="leaf_level")
    assert {group.onload_device for group in internals.group_offloading(model)} == {CPU}


def test_diffusers_reads_a_lora_file_with_the_arguments_that_it_is_given():
    """`_fetch_state_dict`, diffusers 0.42.1."""
    given = (
        "pretrained_model_name_or_path_or_dict weight_name use_safetensors local_files_only cache_dir force_download"
    )
    given += " proxies token revision subfolder user_agent allow_pickle"
    assert list(inspect.signature(_fetch_state_dict).parameters)[:12] == given.split()


def test_torch_moves_a_model_through_apply():
    """`Module._apply`, torch 2.13.0: `to`, `half` and the like all call it on the model itself."""
    calls = []

    class Spy(torch.nn.Linear):
        def _apply(self, fn, recurse=True):
            calls.append(fn(torch.empty(0)).dtype)
            return super()._apply(fn, recurse)

    Spy(1, 1).to(torch.float16).half().bfloat16().double()
    assert calls == [torch.float16, torch.float16, torch.bfloat16, torch.float64]


def test_hooks_are_kept_by_name():
    """`HookRegistry.hooks`, diffusers 0.42.1, from which a copy of a model takes its hooks."""
    assert HookRegistry(torch.nn.Identity()).hooks == {}


@pytest.mark.parametrize("max_long_frames", [None, 2])
def test_a_sequentially_offloaded_model_makes_the_same_frames(max_long_frames):
    frames = []
    for is_offloaded in (False, True):
        pipe = tiny_pipeline(tiny_transformer(long_patch_size=2), tiny_kl())
        if is_offloaded:
            cpu_offload(pipe.transformer, execution_device=CPU)
            cpu_offload(pipe.vae, execution_device=CPU)
        generator = torch.Generator().manual_seed(0)
        arguments = {"video": torch.rand(1, 2, 3, 8, 8, generator=generator), "output_type": "pt"}
        frames.append(
            pipe(
                **arguments,
                num_frames=6,
                num_inference_steps=1,
                max_long_frames=max_long_frames,
                generator=generator,
            ).frames
        )
    assert torch.equal(*frames)


def test_an_offloaded_vae_encodes_and_decodes_without_being_told_where():
    video = torch.rand(2, 3, 8, 8)
    expected = encode_video(tiny_kl(), video)
    vae = tiny_kl()
    cpu_offload(vae, execution_device=CPU)
    assert torch.equal(encode_video(vae, video), expected)
    assert torch.equal(decode_video(vae, expected), decode_video(tiny_kl(), expected))


def test_a_kv_cache_of_an_offloaded_model_lies_where_it_computes():
    model = tiny_transformer()
    cpu_offload(model, execution_device=CPU)
    assert model.init_kv_cache(1, 4, 4, 4).device == CPU


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
@pytest.mark.parametrize("order", ["cast first", "offload first"])
def test_a_float32_model_with_group_offloading_computes_in_bfloat16(offload_type, order):
    model, expected = tiny_transformer(num_actions=3), tiny_transformer(num_actions=3).bfloat16()
    groups = {"offload_type": offload_type, "num_blocks_per_group": 1}
    if order == "offload first":
        model.enable_group_offload(CPU, CPU, **groups)
    model.enable_layerwise_casting(storage_dtype=torch.float32, compute_dtype=torch.bfloat16)
    if order == "cast first":
        model.enable_group_offload(CPU, CPU, **groups)
    clip = random_clip(model, 3)
    latents = clip.latents.bfloat16()
    outputs = [each(latents, clip.timestep, actions=clip.actions).sample for each in (model, expected)]
    assert torch.equal(*outputs)


def test_a_pipeline_whose_transformer_is_group_offloaded_takes_another_dtype():
    pipe = tiny_pipeline()
    pipe.transformer.enable_group_offload(CPU, CPU, offload_type="leaf_level")
    pipe.to(torch.bfloat16)
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.bfloat16}
    pipe(height=8, width=8, num_frames=1, num_inference_steps=1)


def test_a_model_whose_groups_lie_on_the_disk_is_refused_another_dtype(tmp_path):
    pipe = tiny_pipeline()
    pipe.transformer.enable_group_offload(CPU, CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    for move in (lambda: pipe.transformer.to(torch.bfloat16), pipe.transformer.half, lambda: pipe.to(torch.bfloat16)):
        with pytest.raises(ValueError, match="group-offloaded, with copies.*dtype before `enable_group_offload`"):
            move()
    assert pipe.vae.dtype == torch.float32
    pipe(height=8, width=8, num_frames=1, num_inference_steps=1)
