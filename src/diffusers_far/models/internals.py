"""What torch, diffusers and accelerate know but do not say publicly: private names of theirs that we read."""

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry


def attention_backend(attention: torch.nn.Module) -> AttentionBackendName:
    """The backend that an attention module computes with: its own, else the one that is active everywhere."""
    return attention.processor._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether `module.compile()` was called."""
    return module._compiled_call_impl is not None


def call_uncompiled(module: torch.nn.Module, *inputs):
    """Call a module with its hooks, but as if it were not compiled. (`torch.compiler.set_stance` does so for all threads.)"""
    return module._call_impl(*inputs)


def offloading_hooks(module: torch.nn.Module) -> list:
    """Accelerate's hooks on a module and its parts, the outer ones first."""
    hooks = []
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        hooks += getattr(hook, "hooks", [hook])  # a `SequentialHook` has several
    return [hook for hook in hooks if hook is not None]


def execution_device(module: torch.nn.Module) -> torch.device:
    """Where a model computes. With offloading its weights wait elsewhere, and `module.device` tells where they wait."""
    for hook in offloading_hooks(module):
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    return module.device


def bring_to_device(module: torch.nn.Module) -> None:
    """Have a model that accelerate offloads as a whole come to its device, as a call of it would."""
    if getattr(module, "_hf_hook", None) is not None:
        module._hf_hook.pre_forward(module)


def offloaded_weights(module: torch.nn.Module) -> set[str]:
    """Names of the weights that accelerate keeps in memory or on the disk: in the model they are on the meta device."""
    return {name for hook in offloading_hooks(module) for name in getattr(hook, "weights_map", None) or ()}


def group_offloading(module: torch.nn.Module) -> list:
    """The groups of weights that diffusers offloads, its `ModuleGroup`s; empty where it does not."""
    registries = (getattr(part, "_diffusers_hook", None) for part in module.modules())
    hooks = (registry.get_hook("group_offloading") for registry in registries if registry is not None)
    return [hook.group for hook in hooks if hook is not None]


def set_mixed_precision(accelerator, mixed_precision: str) -> None:
    """Have an `Accelerator` that has prepared nothing yet compute as if it had been made with "no", "fp16" or "bf16"."""
    accelerator.state._mixed_precision = mixed_precision
    accelerator.native_amp = mixed_precision != "no"
    accelerator.scaler = torch.amp.GradScaler(accelerator.device.type) if mixed_precision == "fp16" else None
