"""Dtypes that a machine computes slowly in."""

import functools
import platform

import torch
from diffusers.utils import logging


logger = logging.get_logger(__name__)


def has_half_precision_units(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies in a half precision; one that is not x86 gets the benefit of the doubt."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    unit = {torch.bfloat16: "avx512_bf16", torch.float16: "amx_fp16"}[dtype]
    return torch.cpu.get_capabilities().get(unit, True)


@functools.cache
def warn_of_slow_dtype(dtype: torch.dtype, device_type: str) -> None:
    """Say once that half precision saves memory but no time here. `dtype` is the transformer's."""
    if device_type != "cpu" or dtype not in (torch.bfloat16, torch.float16) or has_half_precision_units(dtype):
        return
    logger.warning(
        f"The transformer is in {dtype}, for which this CPU has no units: it is several times as slow as float32, which "
        "`pipe.to(torch.float32)` brings back. For speed, see `pipe.transformer.quantize_int8`."
    )
