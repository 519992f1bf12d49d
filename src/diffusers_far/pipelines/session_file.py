"""Sessions on disk: one safetensors file with all tensors, and JSON in its metadata.

B batch, F frames, C latent channels, H/W latent height/width, A action channels.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..models.cache_options import CacheOptions
from .rollout import Rollout, RolloutConfig


if TYPE_CHECKING:
    from .pipeline_far import FARPipeline
    from .session import FARSession


FORMAT = "diffusers_far.session"
VERSION = 1


@dataclass
class SessionFrame:
    """A finished frame. `latents` (B, C, H, W); the action that led to it and the one taken at it, `(B,)` or `(B, A)`,
    `None` where there is none (yet); and the states of the generators that drew its noise, `None` for context."""

    latents: torch.Tensor
    led_by: torch.Tensor | None = None
    action: torch.Tensor | None = None
    generator_states: list[torch.Tensor] | None = None


def save_session(session: "FARSession", path: str | os.PathLike) -> None:
    """Write a session to a new file; see [`FARSession.save`]."""
    path = Path(path)
    if path.exists():
        raise ValueError(f"`path` {str(path)!r} exists and would be overwritten; name a new file, or move it away.")
    rollout = session.rollout
    tensors = {}
    for number, frame in enumerate(session._history):
        tensors[f"frame.{number}.latents"] = frame.latents
        for name in ("led_by", "action"):
            if getattr(frame, name) is not None:
                tensors[f"frame.{number}.{name}"] = getattr(frame, name)
        if frame.generator_states is not None:
            tensors[f"frame.{number}.generator_states"] = torch.stack(frame.generator_states)
    if session.generators:
        tensors["generator_states"] = torch.stack([generator.get_state() for generator in session.generators])
    if rollout.class_labels is not None:
        tensors["class_labels"] = rollout.class_labels
    clock = None
    if rollout.kv_cache is not None:
        cached, clock = rollout.kv_cache.state()
        tensors |= {f"cache.{name}": tensor for name, tensor in cached.items()}
    facts = {
        "version": VERSION,
        "transformer": transformer_facts(rollout.transformer),
        "config": asdict(rollout.config),
        "latent_shape": rollout.latent_shape,
        "max_frames": rollout.max_frames,
        "clock": clock,
        "num_frames": session.num_frames,
        "num_remembered": len(session._history),
        "num_unwritten": session._num_unwritten,
        "max_history": session.max_history,
        "output_type": session.output_type,
        "has_generator_list": isinstance(session.generator, (list, tuple)),
    }
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={FORMAT: json.dumps(facts)})


def load_session(session_class: type, pipe: "FARPipeline", path: str | os.PathLike) -> "FARSession":
    """Read a session from a file; see [`FARSession.load`]."""
    tensors, facts = read_session_file(path)
    if facts.get("version") != VERSION:
        raise ValueError(
            f"{str(path)!r} is a session of version {facts.get('version')}, but this release reads {VERSION}; load it "
            "with the release that wrote it."
        )
    ours, theirs = transformer_facts(pipe.transformer), facts["transformer"]
    different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if different:
        raise ValueError(
            f"{str(path)!r} is a session of another transformer: {', '.join(different)} differ; load it with the pipeline "
            "that it was started with."
        )
    device = pipe._execution_device
    tensors = {
        name: tensor if name.endswith("generator_states") else tensor.to(device) for name, tensor in tensors.items()
    }
    config = facts["config"]
    config["cache_options"] = CacheOptions(**config["cache_options"])
    rollout = Rollout(
        pipe.transformer,
        pipe.scheduler,
        latent_shape=tuple(facts["latent_shape"]),
        max_frames=facts["max_frames"],
        device=device,
        class_labels=tensors.get("class_labels"),
        config=RolloutConfig(**config),
    )
    if rollout.kv_cache is not None:
        cached = {name.removeprefix("cache."): value for name, value in tensors.items() if name.startswith("cache.")}
        rollout.kv_cache.restore(cached, facts["clock"])
    generators = [torch.Generator(device) for _ in tensors.get("generator_states", ())]
    for generator, state in zip(generators, tensors.get("generator_states", ())):
        generator.set_state(state.clone())  # of a view torch reads the storage from its start
    session = session_class(
        pipe,
        rollout,
        generator=generators if facts["has_generator_list"] else next(iter(generators), None),
        max_history=facts["max_history"],
        output_type=facts["output_type"],
    )
    session._history = [stored_frame(tensors, number) for number in range(facts["num_remembered"])]
    session.num_frames, session._num_unwritten = facts["num_frames"], facts["num_unwritten"]
    return session


def read_session_file(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and facts of a session file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"{str(path)!r} is truncated or not safetensors ({error}); save the session again."
        ) from error
    if FORMAT not in metadata:
        raise ValueError(f"{str(path)!r} holds no session; pass a file that `FARSession.save` wrote.")
    return tensors, json.loads(metadata[FORMAT])


def stored_frame(tensors: dict[str, torch.Tensor], number: int) -> SessionFrame:
    """The frame of this number in a session's file."""
    states = tensors.get(f"frame.{number}.generator_states")
    return SessionFrame(
        tensors[f"frame.{number}.latents"],
        tensors.get(f"frame.{number}.led_by"),
        tensors.get(f"frame.{number}.action"),
        None if states is None else [state.clone() for state in states],
    )


def transformer_facts(transformer: torch.nn.Module) -> dict:
    """What a transformer must share with the one that filled a cache, as JSON values."""
    config = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
    return json.loads(json.dumps(config | {"dtype": str(transformer.dtype)}))
