"""LoRA layers in a model: which there are, and how strongly they count."""

import math
import numbers
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from diffusers.loaders import PeftAdapterMixin

from .loading import require_finite, require_safetensors


def adapter_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers of a model that PEFT put adapters into, by their names."""
    if not getattr(model, "peft_config", None):  # so that only who uses PEFT imports it
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def lora_scale(attention_kwargs: dict[str, Any] | None) -> float:
    """The scale of LoRA layers that a call asks for; 1 where it does not.

    Raises:
        ValueError: `attention_kwargs` is no dict, has another key than `scale`, or the scale is no finite number.
    """
    if attention_kwargs is None:
        return 1.0
    if not isinstance(attention_kwargs, dict) or not attention_kwargs.keys() <= {"scale"}:
        raise ValueError(
            f"`attention_kwargs` is {attention_kwargs!r}; it is a dict, in which only `scale` is known, the scale of LoRA "
            "layers."
        )
    scale = attention_kwargs.get("scale", 1.0)
    check_scale("attention_kwargs['scale']", scale)
    return scale


def check_scale(name: str, scale: Any) -> None:
    """Refuse what is no finite number."""
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(
            f"`{name}` is {scale!r}; LoRA layers are scaled by a finite number, 1 leaves them as they are."
        )


def scaled_adapters(model: torch.nn.Module, attention_kwargs: dict[str, Any] | None) -> AbstractContextManager[None]:
    """Let the active adapters count as often for a while as a call asks for; then all scales are again what they were.

    Raises:
        ValueError: See [`lora_scale`].
    """
    scale = lora_scale(attention_kwargs)
    return nullcontext() if scale == 1 else _scaled(list(adapter_layers(model).values()), scale)


@contextmanager
def _scaled(layers: list[torch.nn.Module], scale: float) -> Iterator[None]:
    scales = [
        dict(layer.scaling) for layer in layers
    ]  # kept, for dividing by 0 or by rounded numbers restores nothing
    try:
        for layer in layers:
            layer.scale_layer(scale)
        yield
    finally:
        for layer, scaling in zip(layers, scales):
            layer.scaling.update(scaling)


class AdapterMixin(PeftAdapterMixin):
    """As `PeftAdapterMixin`, but scales are finite, and fusing leaves those of the adapters as they were.

    A layer remembers at which scale its adapters were fused: they are taken out again at the same one, whatever
    `set_adapters` says meanwhile.
    """

    # This signature is read by diffusers, so it must be the one underneath.
    @wraps(PeftAdapterMixin.load_lora_adapter, assigned=())
    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict, *args, **kwargs):
        """As `PeftAdapterMixin.load_lora_adapter`, from safetensors only.

        Raises:
            ValueError: A weight is no tensor of finite numbers, or the file is pickled.
        """
        if isinstance(pretrained_model_name_or_path_or_dict, Mapping):
            require_finite("The LoRA weights", pretrained_model_name_or_path_or_dict)
            return super().load_lora_adapter(pretrained_model_name_or_path_or_dict, *args, **kwargs)
        require_safetensors("use_safetensors", kwargs.get("use_safetensors"))
        check_weight_name(kwargs.get("weight_name"))
        known = set(getattr(self, "peft_config", {}))
        super().load_lora_adapter(pretrained_model_name_or_path_or_dict, *args, **{**kwargs, "use_safetensors": True})
        try:
            require_finite("The LoRA weights", {k: v for k, v in self.state_dict().items() if ".lora_" in k})
        except ValueError:
            self.delete_adapters(sorted(set(self.peft_config) - known))
            raise

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """Add the LoRA layers, times `lora_scale`, to the weights beneath them.

        Raises:
            ValueError: `lora_scale` is no finite number.
        """
        check_scale("lora_scale", lora_scale)
        layers = list(adapter_layers(self).values())
        before = [(dict(layer.scaling), set(layer.merged_adapters)) for layer in layers]
        try:
            super().fuse_lora(lora_scale, safe_fusing, adapter_names)
        finally:
            for layer, (scaling, merged) in zip(layers, before):
                fused = {name: layer.scaling[name] for name in layer.merged_adapters if name not in merged}
                layer.fused_scaling = getattr(layer, "fused_scaling", {}) | fused
                layer.scaling.update(scaling)

    def unfuse_lora(self) -> None:
        """Subtract what `fuse_lora` added."""
        with self.scales_as_fused():
            super().unfuse_lora()

    @contextmanager
    def scales_as_fused(self) -> Iterator[None]:
        """Give the layers the scales at which they were fused, to take them out again."""
        layers = [layer for layer in adapter_layers(self).values() if getattr(layer, "fused_scaling", None)]
        scales = [dict(layer.scaling) for layer in layers]
        try:
            for layer in layers:
                layer.scaling.update(layer.fused_scaling)
            yield
        finally:
            for layer, scaling in zip(layers, scales):
                layer.scaling.update(scaling)
                layer.fused_scaling = {name: layer.fused_scaling[name] for name in layer.merged_adapters}

    def disable_lora(self) -> None:
        """Run the model without its LoRA layers, fused ones too, until `enable_lora`."""
        self._unfuse_if_fused()
        super().disable_lora()

    def disable_adapters(self) -> None:
        """As `disable_lora`, for adapters of every kind."""
        self._unfuse_if_fused()
        super().disable_adapters()

    def _unfuse_if_fused(self) -> None:
        # PEFT would do so in the next pass, at the scale of then.
        if any(layer.merged for layer in adapter_layers(self).values()):
            self.unfuse_lora()

    def set_adapters(
        self,
        adapter_names: list[str] | str,
        weights: float | dict | list[float] | list[dict] | list[None] | None = None,
    ) -> None:
        """Make adapters active, each with a weight.

        Raises:
            ValueError: A weight is no finite number.
        """
        check_weights(weights)
        super().set_adapters(adapter_names, weights)


def check_weight_name(weight_name: str | None) -> None:
    """Refuse a file of LoRA layers that is pickled."""
    if weight_name is not None and not weight_name.endswith(".safetensors"):
        raise ValueError(f"`weight_name` is {weight_name!r}; LoRA layers are read from .safetensors files only.")


def check_weights(weights: Any) -> None:
    """Refuse adapter weights that are not finite, in every form that `set_adapters` takes."""
    if isinstance(weights, (list, tuple, dict)):
        for weight in weights.values() if isinstance(weights, dict) else weights:
            check_weights(weight)
    elif weights is not None:
        check_scale("weights", weights)
