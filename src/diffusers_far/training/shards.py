"""A model in shards (FSDP2): each process holds a part of every weight, and has one block of them whole at a time.

Only the loop over the steps meets shards. What leaves it is whole, as one process would have it: the files of a checkpoint,
which any number of processes resumes, in shards or not; and a copy of the model on the main process, to be measured and saved.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor


OPTIMIZER_FILE = "optimizer.bin"  # of a checkpoint, as Accelerate names it


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: all of one that is not in shards."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(state: Any, is_kept: bool = True) -> Any:
    """A state, nested as it may be, with all of each tensor that is in shards, in the main memory. Every process calls it;
    one that does not keep it gets `None` for such a tensor, so that it never has them all."""
    if isinstance(state, DTensor):
        whole = state.detach().full_tensor()
        return whole.cpu() if is_kept else None
    if isinstance(state, dict):
        return {name: gathered(each, is_kept) for name, each in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(gathered(each, is_kept) for each in state)
    return state


def cut(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which every process has, in the shards of another of its shape; as it is where that has none."""
    if not isinstance(like, DTensor):
        return tensor
    whole = tensor.to(like.device, like.dtype)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def held_bytes(
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    has_average: bool,
    num_processes: int,
    sharded_in: torch.dtype | None = None,
) -> int:
    """Bytes of weights, gradients, averages and the optimizer's state that each of so many processes holds, after a step.

    Whole models on several processes have their gradients twice, once more as DDP sends them. In shards the largest part of each
    tensor is counted, and whole the weights and gradients of the largest block and of what is in no block.

    Args:
        network (`nn.Module`), optimizer (`torch.optim.Optimizer`): As they are, whole or in shards.
        has_average (`bool`): Whether the weights are averaged.
        num_processes (`int`): At least 1.
        sharded_in (`torch.dtype`, *optional*): In shards, gathered in this dtype; `None` for whole models.
    """
    weights = list(network.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    state = [each for states in optimizer.state.values() for each in states.values() if isinstance(each, torch.Tensor)]
    held = weights + trained + state + (weights if has_average else [])
    if sharded_in is None:
        return sum(each.nbytes for each in held + (trained if num_processes > 1 else []))

    def gathered_bytes(module: torch.nn.Module) -> int:
        return sum(each.numel() * sharded_in.itemsize * (1 + each.requires_grad) for each in module.parameters())

    names = {f"{prefix}{name}" for name in network._no_split_modules for prefix in ("", "FSDP")}
    blocks = [gathered_bytes(module) for module in network.modules() if type(module).__name__ in names]
    num_rows = [(len(each) if each.ndim else 1, each.nbytes) for each in held]
    parts = sum(-(-number // num_processes) * (num_bytes // number) for number, num_bytes in num_rows)
    return parts + gathered_bytes(network) - sum(blocks) + max(blocks)


class ShardedWeights:
    """A model in shards, for those who load whole weights.

    Args:
        network (`nn.Module`): In shards.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}  # Safetensors asks which of its weights are the same tensor, and cannot ask shards: none

    def load_state_dict(self, weights: dict[str, torch.Tensor], strict: bool = True) -> Any:
        own = self.network.state_dict()
        cut_weights = {name: cut(whole, own[name]) if name in own else whole for name, whole in weights.items()}
        return self.network.load_state_dict(cut_weights, strict)


class ShardedAverage:
    """An `EMAModel` of the parts that this process holds, as checkpoints know it: whole.

    Args:
        ema (`EMAModel`): Of the model before it was cut; from here on of this process's parts.
        parameters (`list[nn.Parameter]`): In shards, and not yet trained.
    """

    def __init__(self, ema: EMAModel, parameters: list[torch.nn.Parameter]) -> None:
        self.ema, self.parameters = ema, parameters
        ema.shadow_params = [own_part(parameter).detach().clone() for parameter in parameters]

    def state_dict(self) -> dict[str, Any]:
        shards = [
            DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
            for part, like in zip(self.ema.shadow_params, self.parameters)
        ]
        return self.ema.state_dict() | {"shadow_params": shards}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parts = [own_part(cut(whole, like)) for whole, like in zip(state["shadow_params"], self.parameters)]
        self.ema.load_state_dict(state | {"shadow_params": parts})


class Shards:
    """The training of one model in shards: what Accelerate cuts, and how it becomes whole again.

    Args:
        accelerator (`Accelerator`): With FSDP2. Its checkpoints are from here on those of whole models.
        network (`nn.Module`): To be cut; of float32, the same on all processes.
        optimizer (`torch.optim.Optimizer`): Of its parameters.
        ema (`EMAModel`, *optional*): Of its parameters.

    Attributes:
        network (`nn.Module`), optimizer (`torch.optim.Optimizer`): As given, in shards.
        average ([`ShardedAverage`], *optional*): Of the `ema`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        network: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: EMAModel | None = None,
    ) -> None:
        self.accelerator = accelerator
        self._outline = deepcopy(network).to("meta") if accelerator.is_main_process else None
        if accelerator.mixed_precision == "bf16":
            # Autocast rounds the inputs of single layers. Rounded before them all, timesteps above 512 would be 4 apart. Gradients
            # of many processes are added in float32.
            accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        self.network, self.optimizer = accelerator.prepare(network, optimizer)
        accelerator.free_memory()  # or it saved shards
        # Nothing is done in place with what they return.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        self.average = None if ema is None else ShardedAverage(ema, list(self.network.parameters()))
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    def whole_copy(self) -> torch.nn.Module | None:
        """The model in `eval` mode, with its averaged weights where there are any, as no process has it in training. Every
        process calls this; others than the main one get `None`."""
        weights = self.network.state_dict()
        if self.average is not None:
            names = [name for name, _ in self.network.named_parameters()]
            weights |= zip(names, self.average.state_dict()["shadow_params"])
        weights = gathered(weights, self.accelerator.is_main_process)
        if self._outline is None:
            return None
        copy = deepcopy(self._outline)
        copy.load_state_dict(weights, assign=True)
        return copy.to(self.accelerator.device).eval()

    @contextmanager
    def whole_inside(self, pipeline: DiffusionPipeline) -> Iterator[None]:
        """Inside, the pipeline has the `whole_copy`, where there is one. Every process calls this."""
        network, copy = pipeline.transformer, self.whole_copy()
        pipeline.register_modules(transformer=network if copy is None else copy)
        try:
            yield
        finally:
            pipeline.register_modules(transformer=network)

    def _save(self, models: list, weights: list, folder: str) -> None:
        is_main = self.accelerator.is_main_process
        weights.append(gathered(self.network.state_dict(), is_main))
        state = gathered(self.optimizer.state_dict(), is_main)
        if is_main:
            torch.save(state, Path(folder) / OPTIMIZER_FILE)

    def _load(self, models: list, folder: str) -> None:
        models.append(ShardedWeights(self.network))
        state = torch.load(Path(folder) / OPTIMIZER_FILE, map_location="cpu", weights_only=True, mmap=True)
        parameters = [each for group in self.optimizer.param_groups for each in group["params"]]
        for number, figures in state["state"].items():
            own = parameters[number]
            state["state"][number] = {
                name: cut(figure, own) if getattr(figure, "shape", None) == own.shape else figure
                for name, figure in figures.items()
            }
        self.optimizer.load_state_dict(state)
