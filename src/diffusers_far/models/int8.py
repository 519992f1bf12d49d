"""Matrix products in int8 on the CPU: weights are rounded once, activations as they come ("dynamic quantisation")."""

import warnings
from functools import wraps

import torch
from diffusers.loaders import PeftAdapterMixin


SAVE_FIRST = (
    "its blocks were rounded to int8 by `quantize_int8`. Keep the model that you loaded, and quantise a copy that you load "
    "for speed."
)


class Int8Mixin:
    """`quantize_int8` for a transformer with `transformer_blocks`."""

    is_int8 = False

    def quantize_int8(self) -> None:
        """Run the linear layers of the blocks in int8, on the CPU, from now on; there is no way back.

        Weights are rounded per layer and activations per call, so a batch is no longer bit-equal to its members. LoRA
        layers have to be fused before, and the model can no longer be trained or saved. Embeddings and the output layer
        stay in float32. The speed and the loss in quality are in docs/speed.md.

        Raises:
            ValueError: The model is not in float32 on the CPU, or has LoRA layers beside its own.
            RuntimeError: This torch cannot round a model eagerly.
        """
        if self.is_int8:
            return
        if self.device.type != "cpu" or self.dtype != torch.float32:
            raise ValueError(
                f"The model is in {self.dtype} on {self.device}; int8 is for the CPU and starts from float32: call "
                "`.to('cpu', torch.float32)` first."
            )
        if getattr(self, "peft_config", None):
            raise ValueError(
                f"The model has the LoRA adapters {sorted(self.peft_config)}; call `fuse_lora()` and `unload_lora_weights()` "
                "on the pipeline first."
            )
        quantize_dynamic = getattr(getattr(torch, "ao", None), "quantization", None)
        quantize_dynamic = getattr(quantize_dynamic, "quantize_dynamic", None)
        if quantize_dynamic is None:
            raise RuntimeError(
                f"torch {torch.__version__} has no `torch.ao.quantization.quantize_dynamic`; install torch 2.13."
            )
        layers = {
            name
            for name, module in self.named_modules()
            if ".transformer_blocks." in f".{name}" and isinstance(module, torch.nn.Linear)
        }
        with warnings.catch_warnings():
            # torch announces that it goes to torchao one day, whose eager int8 on the CPU is 20 times as slow today.
            warnings.simplefilter("ignore")
            quantize_dynamic(self, qconfig_spec=layers, dtype=torch.qint8, inplace=True)
        self.is_int8 = True

    def check_int8_move(self, moved: torch.Tensor) -> None:
        """Refuse to leave what int8 computes in.

        Args:
            moved (`torch.Tensor`): A float32 tensor of the CPU, after the same move.
        """
        if moved.dtype != torch.float32 or moved.device.type != "cpu":
            raise ValueError(
                f"This model cannot become {moved.dtype} on {moved.device}: {SAVE_FIRST} Int8 is for the CPU and float32."
            )

    # This signature is read by diffusers, so it must be the one underneath.
    @wraps(PeftAdapterMixin.load_lora_adapter, assigned=())
    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict, *args, **kwargs):
        """As `PeftAdapterMixin.load_lora_adapter`.

        Raises:
            ValueError: The model is int8.
        """
        if self.is_int8:
            raise ValueError(f"LoRA layers cannot be added to this model: {SAVE_FIRST} Load and fuse them before.")
        return super().load_lora_adapter(pretrained_model_name_or_path_or_dict, *args, **kwargs)
