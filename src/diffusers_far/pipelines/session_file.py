"""Sessions on disk: one safetensors file with all tensors, and JSON in its metadata.

B batch, C latent channels, H/W latent height/width, A action channels.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..hooks.flex_rope import applied_config
from ..models.cache_options import CacheOptions
from ..models.identity import model_identity, public_config
from .latency import LatencyBudget
from .noise import NoiseSource, NoiseState
from .rollout import Rollout, RolloutConfig
from .session_history import SessionFrame, SessionHistory


if TYPE_CHECKING:
    from .pipeline_far import FARPipeline
    from .session import FARSession


FORMAT = "diffusers_far.session"
VERSION = 2


def save_session(session: "FARSession", path: str | os.PathLike) -> None:
    """Write a session to a new file; see [`FARSession.save`]."""
    rollout, history, noise = session.rollout, session.history, session.noise.state
    past, clock = rollout.state()
    tensors = {f"past.{name}": tensor for name, tensor in past.items()}
    for number, frame in enumerate(history.frames):
        tensors |= {f"frame.{number}.{name}": tensor for name, tensor in frame_tensors(frame).items()}
    if noise is not None:
        tensors["noise_states"] = noise.states
    if rollout.class_labels is not None:
        tensors["class_labels"] = rollout.class_labels
    facts = {
        "version": VERSION,
        "made_by": maker_facts(rollout),
        "config": asdict(rollout.config),
        "latent_shape": rollout.latent_shape,
        "max_frames": rollout.max_frames,
        "clock": clock,
        "num_frames": history.num_frames,
        "num_context_frames": history.num_context_frames,
        "num_remembered": len(history.frames),
        "max_history": history.max_frames,
        "noise_device": None if noise is None else noise.device,
        "frame_noise_devices": [None if frame.noise is None else frame.noise.device for frame in history.frames],
        "latency": session.latency.state(),
        "output_type": session.output_type,
    }
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_new_file(tensors, {FORMAT: json.dumps(facts)}, Path(path))


def write_new_file(tensors: dict[str, torch.Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write a file that is not there yet, all of it or nothing.

    Raises:
        ValueError: There is one.
    """
    try:
        path.touch(exist_ok=False)  # claims the name, against another process too
    except FileExistsError:
        raise ValueError(
            f"`path` {str(path)!r} exists and would be overwritten; name a new file, or move it away."
        ) from None
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        save_file(tensors, unfinished, metadata=metadata)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        path.unlink()
        raise


def load_session(session_class: type, pipe: "FARPipeline", path: str | os.PathLike) -> "FARSession":
    """Read a session from a file; see [`FARSession.load`]."""
    tensors, facts = read_session_file(path)
    device = pipe._execution_device
    tensors = {
        name: tensor if name.endswith("noise_states") else tensor.to(device) for name, tensor in tensors.items()
    }
    try:
        rollout = stored_rollout(pipe, device, tensors, facts, path)
        history = stored_history(tensors, facts)
        noise = stored_noise(tensors, "noise_states", facts["noise_device"])
        return session_class(
            pipe,
            rollout,
            history=history,
            noise=NoiseSource.from_state(noise, device),
            latency=LatencyBudget.from_state(facts["latency"], device=device),
            output_type=facts["output_type"],
        )
    except KeyError as error:
        raise ValueError(f"{str(path)!r} lacks {error}; it was changed after it was saved.") from error


def read_session_file(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and facts of a session file of this version."""
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
    facts = json.loads(metadata[FORMAT])
    if facts.get("version") != VERSION:
        raise ValueError(
            f"{str(path)!r} is a session of version {facts.get('version')}, but this release reads {VERSION}; load it "
            "with the release that wrote it."
        )
    return tensors, facts


def stored_rollout(
    pipe: "FARPipeline", device: torch.device, tensors: dict[str, torch.Tensor], facts: dict, path: str | os.PathLike
) -> Rollout:
    """The rollout of a session's file.

    Raises:
        ValueError: The pipeline would go on with it in another way.
    """
    config = {**facts["config"], "cache_options": CacheOptions(**facts["config"]["cache_options"])}
    rollout = Rollout(
        pipe.transformer,
        pipe.scheduler,
        latent_shape=tuple(facts["latent_shape"]),
        max_frames=facts["max_frames"],
        device=device,
        class_labels=tensors.get("class_labels"),
        config=RolloutConfig(**config),
    )
    ours, theirs = maker_facts(rollout), facts["made_by"]
    for name, cure in CURES.items():
        if ours[name] != theirs[name]:
            raise ValueError(
                f"{str(path)!r} is a session of another {name}: {differences(ours[name], theirs[name])}; {cure}."
            )
    past = {name.removeprefix("past."): value for name, value in tensors.items() if name.startswith("past.")}
    rollout.restore(past, facts["clock"])
    return rollout


def stored_history(tensors: dict[str, torch.Tensor], facts: dict) -> SessionHistory:
    """The history of a session's file."""
    history = SessionHistory(facts["max_history"])
    for number, noise_device in enumerate(facts["frame_noise_devices"]):
        frame = SessionFrame(
            tensors[f"frame.{number}.latents"],
            tensors.get(f"frame.{number}.led_by"),
            tensors.get(f"frame.{number}.action"),
            stored_noise(tensors, f"frame.{number}.noise_states", noise_device),
        )
        history.frames.append(frame)
    history.num_frames, history.num_context_frames = facts["num_frames"], facts["num_context_frames"]
    return history


def stored_noise(tensors: dict[str, torch.Tensor], name: str, device: str | None) -> NoiseState | None:
    return None if device is None else NoiseState(tensors[name], device)


def frame_tensors(frame: SessionFrame) -> dict[str, torch.Tensor]:
    """What a file holds of a frame."""
    tensors = {"latents": frame.latents, "led_by": frame.led_by, "action": frame.action}
    if frame.noise is not None:
        tensors["noise_states"] = frame.noise.states
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


CURES = {
    "transformer": "load it with the pipeline that it was started with, with the same weights, LoRA and dtype",
    "scheduler": "give the pipeline the scheduler that it was started with",
    "FlexRoPE": "call `enable_flex_rope` or `disable_flex_rope` of the pipeline before; it can be changed afterwards",
}


def maker_facts(rollout: Rollout) -> dict[str, dict]:
    """What makes a session's frames, as JSON values: with other makers it would go on in another way."""
    transformer, scheduler, flex_rope = rollout.transformer, rollout.scheduler, applied_config(rollout.transformer)
    flex_rope_facts = {}
    if flex_rope is not None:
        schedule = "a function" if callable(flex_rope.schedule) else flex_rope.schedule
        flex_rope_facts = {**vars(flex_rope), "schedule": schedule}
    facts = {
        "transformer": {
            **public_config(transformer.config),
            "dtype": str(transformer.dtype),
            "weights": model_identity(transformer),
            "cached dtype": None if rollout.kv_cache is None else str(rollout.kv_cache.dtype),  # autocast changes it
        },
        "scheduler": {**public_config(scheduler.config), "class": type(scheduler).__name__},
        "FlexRoPE": flex_rope_facts,
    }
    return json.loads(json.dumps(facts, default=str))


def differences(ours: dict, theirs: dict) -> str:
    """Names and values that differ, theirs first; of two classes with fields of their own, the class alone."""
    names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    names = ["class"] if "class" in names else names
    return ", ".join(f"{name} {theirs.get(name)!r}, here {ours.get(name)!r}" for name in names)
