"""LoRA for [`FARPipeline`], through PEFT, as diffusers' own pipelines have it; safetensors only."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.loaders.lora_base import LoraBaseMixin, _fetch_state_dict
from diffusers.utils import require_peft_backend
from huggingface_hub.utils import validate_hf_hub_args

from ..models.adapters import check_weight_name
from ..models.loading import (
    describe_key_errors,
    explained_loading_errors,
    name_some,
    require_finite,
    require_safetensors,
    saved_whole,
)


class FARLoraLoaderMixin(LoraBaseMixin):
    """Load, save and fuse LoRA layers of [`FARTransformer3DModel`]. `set_adapters`, `delete_adapters`, `disable_lora`
    and the like are those of every diffusers pipeline."""

    _lora_loadable_modules = ["transformer"]
    transformer_name = "transformer"

    @classmethod
    @validate_hf_hub_args
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | Mapping[str, torch.Tensor],
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool | None = None,
        proxies: Mapping[str, str] | None = None,
        use_safetensors: bool | None = None,
        return_lora_metadata: bool = False,
    ) -> dict[str, torch.Tensor] | tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
        """The LoRA layers in a repo on the Hub, a folder or a file, or those given.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`): A repo, a folder, a file, or the
                layers themselves, `transformer.` in front of each key.
            weight_name (`str`, *optional*): A file of the repo or folder; its LoRA file by default.
            subfolder, revision, token, cache_dir, force_download, local_files_only, proxies: As for `from_pretrained`.
            use_safetensors (`bool`, *optional*): `False` is refused.
            return_lora_metadata (`bool`): Also return the adapter's config, `None` where the file has none.

        Raises:
            ValueError: The weights are pickled, not finite, or no LoRA layers of a FAR transformer.
            OSError: The file is missing, truncated or not safetensors.
        """
        require_safetensors("use_safetensors", use_safetensors)
        check_weight_name(weight_name)
        source = pretrained_model_name_or_path_or_dict
        with (
            explained_loading_errors("the given dict" if isinstance(source, Mapping) else source),
            readable_metadata(),
        ):
            # Of diffusers there is no public way to a LoRA file in a folder or repo whose name is not known.
            state_dict, metadata = _fetch_state_dict(
                pretrained_model_name_or_path_or_dict=source,
                weight_name=weight_name,
                use_safetensors=True,
                local_files_only=local_files_only,
                cache_dir=cache_dir,
                force_download=force_download,
                proxies=proxies,
                token=token,
                revision=revision,
                subfolder=subfolder,
                user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
                allow_pickle=False,
            )
        foreign = [key for key in state_dict if not key.startswith(f"{cls.transformer_name}.") or "lora" not in key]
        if foreign or not state_dict:
            raise ValueError(
                f"The LoRA weights have {'the keys ' + name_some(foreign) if foreign else 'no keys'}; those of a FAR "
                f"pipeline are LoRA layers and start with `{cls.transformer_name}.`. Save them with "
                "`FARPipeline.save_lora_weights`."
            )
        require_finite("The LoRA weights", state_dict)
        if metadata is not None:
            check_metadata(metadata)
        return (state_dict, metadata) if return_lora_metadata else state_dict

    @require_peft_backend
    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | Mapping[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        low_cpu_mem_usage: bool = True,
        **kwargs,
    ) -> None:
        """Load LoRA layers into the transformer and make them active.

        Args:
            pretrained_model_name_or_path_or_dict: See `lora_state_dict`, which also takes the `kwargs`.
            adapter_name (`str`, *optional*): A name to call them by; `default_0` and so on by default.
            hotswap (`bool`): Replace the adapter of this name in place, without recompiling.
            low_cpu_mem_usage (`bool`): Do not initialise the layers before they are loaded.
        """
        kwargs["return_lora_metadata"] = True
        state_dict, metadata = self.lora_state_dict(pretrained_model_name_or_path_or_dict, **kwargs)
        self.load_lora_into_transformer(
            state_dict,
            self.transformer,
            adapter_name=adapter_name,
            metadata=metadata,
            low_cpu_mem_usage=low_cpu_mem_usage,
            hotswap=hotswap,
            _pipeline=self,
        )

    @classmethod
    def load_lora_into_transformer(
        cls,
        state_dict: dict[str, torch.Tensor],
        transformer: torch.nn.Module,
        adapter_name: str | None = None,
        metadata: dict[str, Any] | None = None,
        low_cpu_mem_usage: bool = False,
        hotswap: bool = False,
        _pipeline=None,
    ) -> None:
        """Load what `lora_state_dict` returned into a transformer."""
        check_lora_fits(state_dict, transformer, cls.transformer_name)
        transformer.load_lora_adapter(
            state_dict,
            prefix=cls.transformer_name,
            adapter_name=adapter_name,
            metadata=metadata,
            low_cpu_mem_usage=low_cpu_mem_usage,
            hotswap=hotswap,
            _pipeline=_pipeline,
        )
        # PEFT adds layers in training mode, where a LoRA that was trained with dropout drops at inference too.
        transformer.train(transformer.training)

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        transformer_lora_layers: Mapping[str, torch.nn.Module | torch.Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
    ) -> None:
        """Save LoRA layers as a file that `load_lora_weights` loads.

        Args:
            save_directory (`str` or `os.PathLike`): Created if needed.
            transformer_lora_layers (`dict[str, torch.Tensor]`): What PEFT's `get_peft_model_state_dict` returns.
            is_main_process (`bool`): `False` in processes that save nothing.
            weight_name (`str`, *optional*): `pytorch_lora_weights.safetensors` by default.
            save_function (callable, *optional*): `(weights, path)`, instead of writing the file.
            safe_serialization (`bool`): `False` is refused.
            transformer_lora_adapter_metadata (`dict`, *optional*): The adapter's config, kept in the file, such as
                `transformer.peft_config["default"].to_dict()`. Without it `lora_alpha` is taken to be the rank.
        """
        if not is_main_process:
            return
        require_safetensors("safe_serialization", safe_serialization)
        if not transformer_lora_layers:
            raise ValueError(
                f"`transformer_lora_layers` is {transformer_lora_layers!r}: nothing to save; pass "
                "`get_peft_model_state_dict(transformer)`."
            )
        metadata = transformer_lora_adapter_metadata or {}
        with saved_whole(save_directory) as folder:
            cls.write_lora_layers(
                state_dict=cls.pack_weights(transformer_lora_layers, cls.transformer_name),
                save_directory=folder,
                is_main_process=True,
                weight_name=weight_name,
                save_function=save_function,
                safe_serialization=True,
                lora_adapter_metadata={f"{cls.transformer_name}.{name}": value for name, value in metadata.items()},
            )

    def fuse_lora(
        self,
        components: list[str] = ["transformer"],
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs,
    ) -> None:
        """Add the LoRA layers, times `lora_scale`, to the weights beneath them: as fast as a model without LoRA.

        Raises:
            ValueError: `lora_scale` is no finite number.
        """
        super().fuse_lora(components, lora_scale, safe_fusing, adapter_names, **kwargs)

    def unfuse_lora(self, components: list[str] = ["transformer"], **kwargs) -> None:
        """Subtract what `fuse_lora` added; the layers then count as they did before."""
        with self.transformer.scales_as_fused():
            super().unfuse_lora(components, **kwargs)


BROKEN_METADATA = (
    "The adapter's config in the LoRA file is no JSON object of finite numbers ({problem}); fetch the file again, or save "
    "its weights anew with `FARPipeline.save_lora_weights`."
)


@contextmanager
def readable_metadata() -> Iterator[None]:
    """Say what is wrong with a LoRA file whose adapter config diffusers cannot parse."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise ValueError(BROKEN_METADATA.format(problem=error)) from error


def check_metadata(metadata: Any) -> None:
    """Refuse an adapter's config that is no config, or would make every frame NaN."""
    if not isinstance(metadata, dict):
        raise ValueError(BROKEN_METADATA.format(problem=metadata))
    for name, value in metadata.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(BROKEN_METADATA.format(problem=f"{name} {value}"))


def check_lora_fits(state_dict: Mapping[str, torch.Tensor], transformer: torch.nn.Module, prefix: str) -> None:
    """Refuse layers of another model before any of them is added; `prefix` is in front of their names.

    Raises:
        ValueError: A layer is not in the transformer, lacks one of its two matrices, or has one of another shape.
    """
    layers = dict(transformer.named_modules())
    names = {key.removeprefix(f"{prefix}.").rpartition(".lora_")[0] for key in state_dict if ".lora_" in key}
    unknown, wrong = [name for name in names if name not in layers], []
    for name in names - set(unknown):
        down, up = (state_dict.get(f"{prefix}.{name}.lora_{side}.weight") for side in "AB")
        if not isinstance(layers[name], torch.nn.Linear) and not hasattr(layers[name], "in_features"):
            continue
        sizes = (layers[name].in_features, layers[name].out_features)
        if down is None or up is None or (down.shape[-1], up.shape[0]) != sizes or down.shape[0] != up.shape[-1]:
            shapes = " and ".join("none" if matrix is None else str(tuple(matrix.shape)) for matrix in (down, up))
            wrong.append(f"{name} {shapes} for (rank, {sizes[0]}) and ({sizes[1]}, rank)")
    problems = describe_key_errors(unknown=unknown, wrong=wrong)
    if problems:
        raise ValueError(
            f"The LoRA weights do not fit this transformer: {problems}. Load them into the model that they were trained for."
        )
