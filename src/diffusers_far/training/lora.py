"""Low-rank adapters (LoRA) in training: which layers get one, what is trained, checkpointed and saved."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from ..models.loading import name_some
from ..pipelines.model_card import card_metadata, usage_example
from .shards import cut, gathered


LAYER_GROUPS = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    "mlp": ("mlp.net.0.proj", "mlp.net.2"),
}
TRAINED_WEIGHTS = "adapter.safetensors"  # of a checkpoint: its names are the model's, not those of a LoRA file

CARD = """---
{metadata}
---

# {title}

A LoRA for the frame-autoregressive (FAR) video model {base}: {num_trained:,} trained parameters beside the {num_base:,}
of its transformer, which stay as they are. For [diffusers](https://github.com/huggingface/diffusers), with the package
`diffusers-far`.

## Use

```bash
pip install diffusers-far peft
```

```python
{usage}
```

## Training

{facts}
"""


def lora_targets(transformer: torch.nn.Module, names: Sequence[str]) -> list[str]:
    """The layers that get an adapter, as PEFT's `target_modules`.

    Args:
        transformer ([`FARTransformer3DModel`]): Has the layers.
        names (sequence of `str`): Groups of `LAYER_GROUPS`, of which the layers are taken that the model has, or ends of
            layers' names, such as `norm1.linear`.

    Raises:
        ValueError: No layer's name ends like that.
    """
    layers = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]

    def exists(target: str) -> bool:
        return any(layer == target or layer.endswith(f".{target}") for layer in layers)

    targets = set()
    for name in names:
        found = {target for target in LAYER_GROUPS.get(name, (name,)) if exists(target)}
        if not found:
            raise ValueError(
                f"`target_modules` has {name!r}, but no linear layer of the transformer ends like that; give "
                f"{', '.join(LAYER_GROUPS)} or the end of a layer's name, such as {layers[-1]!r}."
            )
        targets |= found
    return sorted(targets)


def add_lora(
    transformer: torch.nn.Module, *, rank: int, alpha: float, dropout: float, targets: Sequence[str]
) -> list[torch.nn.Parameter]:
    """Freeze a transformer and add an adapter to it, `W + alpha / rank * B A`, which changes nothing before it is trained.

    Args:
        transformer ([`FARTransformer3DModel`]): Without adapters.
        rank (`int`): Rows of A, at least 1.
        alpha (`float`): Above 0.
        dropout (`float`): Share of the adapter's inputs that are dropped in training, at least 0 and below 1.
        targets (sequence of `str`): See `lora_targets`.

    Returns:
        The adapter's parameters, float32, to be trained.
    """
    if rank < 1:
        raise ValueError(f"`rank` is {rank}; an adapter has a rank of at least 1.")
    if not alpha > 0:
        raise ValueError(f"`lora_alpha` is {alpha}; it scales the adapter, so give a number above 0.")
    if not 0 <= dropout < 1:
        raise ValueError(f"`lora_dropout` is {dropout}; it is a share, at least 0 and below 1.")
    transformer.requires_grad_(False)
    transformer.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), bias="none")
    )
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def checkpoint_trained_only(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Let checkpoints hold the weights of `model` that are trained and no others: the frozen ones come from where they came
    from. Call it after `accelerator` got the model."""

    def trained_parameters() -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def save(models: list[torch.nn.Module], weights: list, folder: str) -> None:
        weights.clear()  # what Accelerate would write
        tensors = {name: parameter.detach() for name, parameter in trained_parameters().items()}
        tensors = gathered(tensors, accelerator.is_main_process)
        if accelerator.is_main_process:
            save_file(tensors, Path(folder) / TRAINED_WEIGHTS)

    def load(models: list[torch.nn.Module], folder: str) -> None:
        path = Path(folder) / TRAINED_WEIGHTS
        if not path.is_file():
            raise ValueError(f"it holds no {path.name!r}, so it is of no adapter's run")
        parameters, saved = trained_parameters(), load_file(path)
        models.clear()  # what Accelerate would load
        shapes, saved_shapes = (
            {(name, *tensor.shape) for name, tensor in part.items()} for part in (parameters, saved)
        )
        if shapes != saved_shapes:
            names = {name for name, *_ in shapes ^ saved_shapes}
            raise ValueError(
                f"its adapter does not fit this run's: {name_some(names)} are not the same in both; resume with the "
                "`--target_modules` and the `--rank` that it had."
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(cut(saved[name], parameter))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_lora(pipeline, folder: str | Path) -> None:
    """Write the adapter that `add_lora` added as `pytorch_lora_weights.safetensors`, which `load_lora_weights` loads."""
    transformer = pipeline.transformer
    pipeline.save_lora_weights(
        folder,
        get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )


def lora_card(
    pipeline, name: str, base_model: str, facts: Mapping[str, str], metadata: Mapping[str, Any] | None = None
) -> str:
    """The card of an adapter.

    Args:
        pipeline ([`FARPipeline`]): With the adapter.
        name (`str`): The repo or folder that the adapter will be loaded from.
        base_model (`str`): Where the pipeline came from: a folder, of which only the name is told, or a repo on the Hub.
        facts (`dict`): What the adapter was trained on and how, one line each.
        metadata (`dict`, *optional*): What the Hub is to know besides, such as `license` and `datasets`.

    Returns:
        Markdown with the Hub's metadata in front.
    """
    is_folder = Path(base_model).exists()
    base = Path(base_model).resolve().name if is_folder else base_model
    # A folder's name in the metadata would link to whatever repo on the Hub is called so.
    known_base = {} if is_folder else {"base_model": base, "base_model_relation": "adapter"}
    known = {**known_base, **(metadata or {})}
    parameters = [(parameter.numel(), parameter.requires_grad) for parameter in pipeline.transformer.parameters()]
    loading = f'pipe = FARPipeline.from_pretrained("{base}")'
    usage = usage_example(pipeline, base).replace(loading, f'{loading}\npipe.load_lora_weights("{name}")')
    return CARD.format(
        metadata=card_metadata(pipeline.transformer, tags=["lora"], **known),
        title=name.split("/")[-1],
        base=f"`{base}`" if is_folder else f"[{base}](https://huggingface.co/{base})",
        num_trained=sum(size for size, is_trained in parameters if is_trained),
        num_base=sum(size for size, is_trained in parameters if not is_trained),
        usage=usage,
        facts="\n".join(f"- {fact}: {text}" for fact, text in facts.items()),
    )
