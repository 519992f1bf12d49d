"""The benchmarks at sizes that take no time."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.cases import CASES
from benchmarks.measurement import Measurement, Row
from benchmarks.models import CONDITIONS, BenchmarkModel
from diffusers_far import SCDTransformer3DModel


CONFIG = {
    "in_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": (4, 6, 6),
    "short_window": 3,
    **CONDITIONS,
}
BASE = BenchmarkModel("tiny", CONFIG, latent_size=4)
LONG = BenchmarkModel("tiny-long", {**CONFIG, "long_patch_size": 2}, latent_size=4)
FLOW_MAPS = tuple(replace(model, config={**model.config, "flow_map": True}) for model in (BASE, LONG))
LAYERS = {"num_encoder_layers": 2, "num_decoder_layers": 2}
SCD_CONFIG = {**{name: value for name, value in CONFIG.items() if name != "num_layers"}, **LAYERS, "flow_map": True}
SCD = BenchmarkModel("tiny-scd", SCD_CONFIG, latent_size=4, transformer_class=SCDTransformer3DModel)
PLACES = ((BASE, (3, 5)), (LONG, (3, 8)))

SIZES: dict[str, dict[str, Any]] = {
    "step": {"places": PLACES},
    "frame": {"models": (FLOW_MAPS[1], SCD), "frame_counts": (3, 5), "step_counts": (3, 1)},
    "rollout": {"models": (BASE, LONG), "num_frames": 7},
    "prefill": {"places": PLACES},
    "training": {"places": ((BASE, 5), (LONG, 8))},
    "loading": {"model": BASE},
    "growth": {
        "step_model": LONG,
        "step_frames": (4, 8),
        "bounded_model": LONG,
        "bounded_frames": (12, 20),
        "max_long_frames": 6,
    },
    "int8": {"model": BASE, "frame_counts": (3,)},
}
TINY_CASES: dict[str, Callable[[int], Iterator[Row]]] = {
    name: partial(run, **SIZES[name]) for name, run in CASES.items()
}


def call_here(function: Callable[..., Any], *arguments: Any) -> Any:
    """In place of `in_fresh_process`."""
    return function(*arguments)


def peak_here(function: Callable[..., Any], *arguments: Any) -> Measurement:
    """In place of `peak_memory_of`: the function must at least run."""
    function(*arguments)
    return Measurement((2**20,), "bytes")
