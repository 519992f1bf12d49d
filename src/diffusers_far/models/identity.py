"""What a model is, by what it computes: class, config, weights, adapters and quantisation, wherever they lie."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import align_module_device
from safetensors import safe_open

from .adapters import adapter_layers
from .internals import group_offloading


COMPILED = "_orig_mod."  # what `torch.compile` puts into the names of weights


def model_identity(model: torch.nn.Module, rounded_to: torch.dtype | None = None) -> str:
    """Sha256 (hex) of what a model computes: class, public config, every bit of the weights, adapters that count with their
    scales, quantisation. Compiled, offloaded or on another device it is the same model; so it is with adapters that are
    switched off.

    Args:
        model (`torch.nn.Module`): With a `config`.
        rounded_to (`torch.dtype`, *optional*): Compare the weights as if stored so, whatever they are stored in; with
            `float16` a model is the same in half and in full precision. By default dtypes count, for a model computes
            something else in another.

    Raises:
        ValueError: A weight has no values: the model was built on the meta device, and nothing was loaded.
    """
    model = getattr(model, "_orig_mod", model)
    name, config = type(model).__name__, public_config(model.config)
    # Two beginnings, for the hashes in files that were written by the releases before.
    start = f"{name} {settings_hash(config)}" if rounded_to is None else json.dumps([name, config], **_JSON)
    digest = hashlib.sha256(start.encode())
    disk_groups = _disk_groups(model)
    for name, path, value in sorted(_computing_values(model), key=lambda entry: entry[0]):
        if isinstance(value, torch.Tensor) and (value.is_meta or id(value) in disk_groups):
            value = _offloaded_values(model, name, path, value, disk_groups)
        _add(digest, name, value, rounded_to)
    return digest.hexdigest()


def vae_hash(vae: torch.nn.Module) -> str:
    """What latents are known to be made by: a VAE's [`model_identity`], the same in float32 and in float16."""
    return model_identity(vae, rounded_to=torch.float16)


# Arguments of models that earlier versions did not know, with what they mean where they are left out.
LATER_ARGUMENTS = {"flow_map": False}


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what diffusers notes for itself, such as where it came from, and as an earlier version wrote it where
    that knew the model."""
    later = LATER_ARGUMENTS.items()
    return {name: value for name, value in config.items() if not name.startswith("_") and (name, value) not in later}


_JSON = {"sort_keys": True, "default": str}


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Sha256 (hex) of settings, private ones apart."""
    return hashlib.sha256(json.dumps(public_config(settings), **_JSON).encode()).hexdigest()


def _computing_values(model: torch.nn.Module) -> Iterator[tuple[str, str, Any]]:
    """What a model computes with: names, as they are without adapters and compilation, the names that the model has for the
    values, and these."""
    layers = adapter_layers(model) if getattr(model, "peft_config", None) else {}
    for own_path, value in model.state_dict(keep_vars=True).items():
        path = own_path
        owner = next((name for name in layers if path.startswith(f"{name}.")), None)
        if owner is not None:
            path = _name_in_layer(layers[owner], path.removeprefix(f"{owner}."))
            if path is None:
                continue
            path = f"{owner}.{path}"
        yield path.replace(COMPILED, ""), own_path, value
    for owner, layer in layers.items():
        for number, adapter in enumerate(_counting_adapters(layer)):
            if adapter in layer.scaling:
                yield f"{owner}.scaling.{number}".replace(COMPILED, ""), owner, layer.scaling[adapter]


def _counting_adapters(layer: torch.nn.Module) -> list[str]:
    """Adapters that a layer adds to its own weights; those that are fused are in the weights already."""
    return [] if layer.disable_adapters or layer.merged else list(layer.active_adapters)


def _name_in_layer(layer: torch.nn.Module, path: str) -> str | None:
    """A weight's name within a layer that has adapters, whatever these are called; `None` where it does not count."""
    kind, _, rest = path.partition(".")
    if kind == "base_layer":
        return rest
    if kind not in layer.adapter_layer_names:
        return path
    adapter, _, rest = rest.partition(".")
    counting = _counting_adapters(layer)
    return f"{kind}.{counting.index(adapter)}.{rest}" if adapter in counting else None


def _offloaded_values(
    model: torch.nn.Module, name: str, path: str, tensor: torch.Tensor, disk_groups: dict[int, Any]
) -> torch.Tensor:
    """The values of a weight that are not in the model, brought from where offloading put them.

    Raises:
        ValueError: There are none.
    """
    group = disk_groups.get(id(tensor))
    if group is not None:
        with safe_open(group.safetensors_file_path, framework="pt") as file:
            return file.get_tensor(group.tensor_to_key[tensor])
    parent, _, attribute = path.rpartition(".")
    try:
        module = model.get_submodule(parent)
    except AttributeError:  # a state dict has levels of its own, as that of a quantised layer does
        module = None
    if module is not None:
        with align_module_device(module):
            tensor = getattr(module, attribute)
    if tensor.is_meta:
        raise ValueError(
            f"The weight `{name}` is on the meta device and has no values; load the model's weights before."
        )
    return tensor


def _disk_groups(model: torch.nn.Module) -> dict[int, Any]:
    """The groups of weights that diffusers offloads to disk, by the id of each weight."""
    groups = [group for group in group_offloading(model) if group.offload_to_disk_path is not None]
    return {id(tensor): group for group in groups for tensor in group.tensor_to_key}


def _add(digest, name: str, value: Any, rounded_to: torch.dtype | None) -> None:
    """Take one value of a state dict in."""
    if isinstance(value, (tuple, list)):
        for number, part in enumerate(value):
            _add(digest, f"{name}.{number}", part, rounded_to)
    elif not isinstance(value, torch.Tensor):
        digest.update(f"{name} {value!r}".encode())
    elif value.is_quantized:
        _add(digest, name, (value.int_repr(), value.dequantize()), None)
    elif hasattr(value, "__tensor_flatten__"):  # a subclass that holds other tensors, as quantised weights do
        names, facts = value.__tensor_flatten__()
        _add(digest, f"{name} {type(value).__name__} {facts}", [getattr(value, each) for each in names], None)
    else:
        value = value.detach()
        dtype = f"{value.dtype} " if rounded_to is None else ""
        digest.update(f"{name} {dtype}{tuple(value.shape)}".encode())
        value = value.to("cpu", rounded_to or value.dtype).contiguous()
        digest.update(value.squeeze().flatten().view(torch.uint8).numpy())  # as in `tensors_sha256`
