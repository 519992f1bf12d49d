"""Sessions on disk: one safetensors file with all tensors, and JSON in its metadata.

A file may come from a stranger: whatever it says is held against its own tensors and the pipeline before it is believed.

B batch, C latent channels, H/W latent height/width, A action channels, G generators.
"""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers import SchedulerMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..checks import check_choice, check_count, fits
from ..files import tensors_sha256, written_whole
from ..hooks.flex_rope import applied_config
from ..models.frames import FrameBatch
from ..models.identity import model_identity, public_config
from ..models.kv_cache import CacheOptions, computing_dtype
from ..models.transformer_far import FARTransformer3DModel
from .inputs import OUTPUT_TYPES, check_action_values, check_class_labels, check_settings, rows_of_videos
from .latency import LatencyBudget
from .rollout import Rollout, check_scheduler
from .session_history import NoiseSource, NoiseState, SessionFrame, SessionHistory, check_max_history
from .settings import GenerationSettings


FORMAT = "diffusers_far.session"
VERSION = 3
SHA256 = "sha256"  # beside the facts: of these and the tensors
FACTS = (
    "version made_by config clock num_frames num_context_frames max_history noise_device frame_noise_devices latency "
    "output_type"
).split()


def save_session(
    path: str | os.PathLike,
    *,
    rollout: Rollout,
    history: SessionHistory,
    noise: NoiseSource,
    latency: LatencyBudget,
    output_type: str,
) -> None:
    """Write what a session is made of to a new file; see [`FARSession.save`]."""
    past, clock = rollout.state()
    tensors = {f"past.{name}": tensor for name, tensor in past.items()}
    for number, frame in enumerate(history.frames):
        tensors |= {f"frame.{number}.{name}": tensor for name, tensor in frame_tensors(frame).items()}
    if not history.frames:
        tensors["no_frame"] = torch.zeros(rollout.latent_shape, dtype=torch.uint8)
    if noise.state is not None:
        tensors["noise_states"] = noise.state.states
    if rollout.class_labels is not None:
        tensors["class_labels"] = rollout.class_labels
    facts = {
        "version": VERSION,
        "made_by": facts_of_models(
            rollout.transformer, rollout.scheduler, rollout.kv_cache and rollout.kv_cache.dtype
        ),
        "config": saved_settings(rollout.config),
        "clock": clock,
        "num_frames": history.num_frames,
        "num_context_frames": history.num_context_frames,
        "max_history": history.max_frames,
        "noise_device": None if noise.state is None else noise.state.device,
        "frame_noise_devices": [None if frame.noise is None else frame.noise.device for frame in history.frames],
        "latency": latency.state(),
        "output_type": output_type,
    }
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_session_file(tensors, json.dumps(facts, default=lambda number: number.item()), path)  # NumPy has its own


def write_session_file(tensors: dict[str, torch.Tensor], facts: str, path: str | os.PathLike) -> None:
    """Write a file that is not there yet, all of it or nothing."""
    with written_whole(path, overwrite=False) as unfinished:
        try:
            save_file(tensors, unfinished, metadata={FORMAT: facts, SHA256: content_sha256(tensors, facts)})
        except SafetensorError as error:  # so it names a full disk
            raise OSError(str(error)) from error


def content_sha256(tensors: dict[str, torch.Tensor], facts: str) -> str:
    """Sha256 (hex) of all that a file says."""
    return hashlib.sha256(f"{tensors_sha256(tensors)} {facts}".encode()).hexdigest()


def load_session(
    path: str | os.PathLike, transformer: FARTransformer3DModel, scheduler: SchedulerMixin, device: torch.device
) -> dict[str, Any]:
    """Read what a session is made of from a file; see [`FARSession.load`].

    Args:
        device (`torch.device`): Where the transformer runs.

    Returns:
        The arguments of `save_session`, by name.
    """
    tensors, facts = read_session_file(path)
    check_scheduler(scheduler)
    check_models(transformer, scheduler, device, facts, path)
    try:
        return stored_state(transformer, scheduler, device, tensors, facts)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} cannot be continued: {error}") from error


def read_session_file(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and facts of a session file of this version.

    Raises:
        ValueError: It is none, of another version, or damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{str(path)!r} is no file; pass one that `FARSession.save` wrote.")
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
    try:
        facts = json.loads(metadata[FORMAT], parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is damaged: its metadata are no JSON ({error}).") from error
    version = facts.get("version") if isinstance(facts, dict) else None
    if version != VERSION:
        raise ValueError(
            f"{str(path)!r} is a session of version {version!r}, but this release reads {VERSION}; load it with the "
            "release that wrote it."
        )
    if metadata.get(SHA256) != content_sha256(tensors, metadata[FORMAT]):
        raise ValueError(
            f"{str(path)!r} is damaged: its content is not what was saved, by its sha256; copy it again, or take another "
            "save of the session."
        )
    for name in FACTS:
        if name not in facts:
            raise ValueError(f"{str(path)!r} lacks {name!r}; it was changed after it was saved.")
    return tensors, facts


def refuse_constant(constant: str) -> NoReturn:
    """Refuse what Python's JSON knows beside numbers: NaN and infinities."""
    raise ValueError(f"{constant} is no number of JSON")


def stored_state(
    transformer: FARTransformer3DModel,
    scheduler: SchedulerMixin,
    device: torch.device,
    tensors: dict[str, torch.Tensor],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """What the session of a file is made of; everything is checked before it takes memory.

    Raises:
        ValueError: No session of this transformer is saved so.
    """
    config = stored_config(transformer, facts)
    latent_shape = stored_latent_shape(transformer, tensors, facts)
    labels = check_class_labels(tensors.get("class_labels"), transformer.config.num_classes)
    labels = rows_of_videos("class_labels", labels, latent_shape[0])
    latency = LatencyBudget.from_state(facts["latency"], device=device)

    form = session_form(transformer, latent_shape, facts)
    if labels is not None:
        form["class_labels"] = ((latent_shape[0],), torch.int64)
    # Grows to its place only when all tensors are known to fit.
    rollout = Rollout(
        transformer,
        scheduler,
        latent_shape=latent_shape,
        max_frames=1,
        device=device,
        class_labels=labels,
        config=config,
    )
    of_past = {f"past.{name}": each for name, each in rollout.state_form(facts["clock"]).items()}
    feature = {name for name in of_past if name.startswith("past.feature_")}
    form |= {f"{name}?" if name in feature else name: each for name, each in of_past.items()}
    num_unwritten = facts["num_frames"] - facts["clock"]["num_frames"]
    if not 0 <= num_unwritten <= len(facts["frame_noise_devices"]):
        raise ValueError(f"{num_unwritten} of {facts['num_frames']} frames are still to be written")
    if num_unwritten == 0 and facts["clock"].get("cache", {}).get("_window_is_stale"):
        raise ValueError("the short window is to be encoded anew, but no frame is to be written")
    check_tensors(tensors, form, transformer)
    num_given = len(feature & tensors.keys())
    if num_given < len(feature) and (num_given or num_unwritten == 0):
        raise ValueError("the feature of the frame to come is not whole")

    tensors = {
        name: tensor if name.endswith("noise_states") else tensor.to(device) for name, tensor in tensors.items()
    }
    noise = NoiseSource.from_state(stored_noise(tensors, "noise_states", facts["noise_device"]), device)
    history = stored_history(tensors, facts)
    past = {name.removeprefix("past."): value for name, value in tensors.items() if name.startswith("past.")}
    rollout.restore(past, facts["clock"])
    return {
        "rollout": rollout,
        "history": history,
        "noise": noise,
        "latency": latency,
        "output_type": facts["output_type"],
    }


def saved_settings(settings: GenerationSettings) -> dict[str, Any]:
    """Settings as a file holds them: no session has noise levels of its own, and most are guided by the condition."""
    left_out = {"sigmas"} | ({"guidance_mode"} if settings.guidance_mode == "condition" else set())
    return {name: value for name, value in asdict(settings).items() if name not in left_out}


def stored_config(transformer: FARTransformer3DModel, facts: dict[str, Any]) -> GenerationSettings:
    """How the session's frames are made."""
    mode = {"guidance_mode"} & facts["config"].keys() if isinstance(facts["config"], dict) else ()
    fields = dict_with("config", facts["config"], {*saved_settings(GenerationSettings()), *mode})
    options = CacheOptions(**dict_with("cache_options", fields["cache_options"], asdict(CacheOptions())))
    if not isinstance(fields["use_cache"], bool):
        raise ValueError(f"`use_cache` is {fields['use_cache']!r}; it is true or false")
    config = GenerationSettings(**{**fields, "cache_options": options})
    check_settings(transformer, config)
    check_choice("output_type", facts["output_type"], OUTPUT_TYPES)
    return config


def dict_with(name: str, value: Any, keys) -> dict[str, Any]:
    """`value`, if it is a dict with exactly these keys."""
    if not isinstance(value, dict) or value.keys() != set(keys):
        raise ValueError(f"`{name}` is {value!r}; it has {', '.join(sorted(keys))}")
    return value


def stored_latent_shape(
    transformer: FARTransformer3DModel, tensors: dict[str, torch.Tensor], facts: dict[str, Any]
) -> tuple[int, int, int, int]:
    """`(B, C, H, W)` of the session's frames, from the file's own tensors, whose size bounds the memory that is taken."""
    num_frames, devices, max_history = facts["num_frames"], facts["frame_noise_devices"], facts["max_history"]
    if not isinstance(devices, list):
        raise ValueError(f"`frame_noise_devices` is {devices!r}; it is a list")
    check_count("num_frames", num_frames, least=min(1, len(devices)))
    check_count("num_context_frames", facts["num_context_frames"], least=0, most=num_frames)
    check_max_history(max_history, transformer)
    if len(devices) > num_frames or (num_frames and not devices):
        raise ValueError(f"`num_frames` is {num_frames}, of which {len(devices)} are remembered")
    frame = tensors.get("frame.0.latents" if devices else "no_frame")
    if frame is None or frame.ndim != 4 or 0 in frame.shape or frame.shape[1] != transformer.config.in_channels:
        raise ValueError("the first frame is missing, or no frame of this transformer")
    transformer.context_plan(1, *frame.shape[2:])  # raises where its patches do not fit
    return tuple(frame.shape)


# Shape and dtype of each tensor that a file must have, by name; a shape with `None` fits any size, a name with `?` may lack.
Form = dict[str, tuple[tuple[int | None, ...], torch.dtype]]


def session_form(
    transformer: FARTransformer3DModel, latent_shape: tuple[int, int, int, int], facts: dict[str, Any]
) -> Form:
    """The tensors of a session's file, but for those of the rollout."""
    batch_size, _, height, width = latent_shape
    fed = FrameBatch.form(transformer, batch_size, 0, height, width)
    form: Form = {} if facts["frame_noise_devices"] else {"no_frame": (latent_shape, torch.uint8)}
    if facts["noise_device"] is not None:
        form["noise_states"] = ((None, None), torch.uint8)
    for number, noise_device in enumerate(facts["frame_noise_devices"]):
        form[f"frame.{number}.latents"] = (latent_shape, torch.float32)
        if "actions" in fed:
            (_, _, *action_shape), dtype = fed["actions"]
            form |= dict.fromkeys(
                (f"frame.{number}.led_by?", f"frame.{number}.action?"), ((batch_size, *action_shape), dtype)
            )
        if noise_device is not None:
            form[f"frame.{number}.noise_states"] = ((None, None), torch.uint8)
    return form


def check_tensors(tensors: dict[str, torch.Tensor], form: Form, transformer: FARTransformer3DModel) -> None:
    """Refuse tensors that are missing, unknown, of another shape or dtype, not finite, or actions that there are not."""
    missing = {name for name in form if not name.endswith("?")} - tensors.keys()
    unknown = tensors.keys() - {name.removesuffix("?") for name in form}
    if missing or unknown:
        raise ValueError(f"it lacks the tensors {sorted(missing)} and has the unknown ones {sorted(unknown)}")
    for name, tensor in tensors.items():
        shape, dtype = form.get(name) or form[f"{name}?"]
        if not fits(tensor, shape) or tensor.dtype != dtype:
            raise ValueError(f"`{name}` is {tuple(tensor.shape)}, {tensor.dtype}; it must be {shape}, {dtype}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"`{name}` has NaN or infinite values")
        if name.rpartition(".")[2] in ("led_by", "action", "actions", "kept_actions"):
            check_action_values(tensor, transformer.config)


def stored_history(tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> SessionHistory:
    """The history of a session's file."""
    history = SessionHistory(facts["max_history"])
    for number, noise_device in enumerate(facts["frame_noise_devices"]):
        noise = stored_noise(tensors, f"frame.{number}.noise_states", noise_device)
        if noise is not None and noise.device == "cpu":
            NoiseSource.from_state(noise, torch.device("cpu"))  # raises now, not when the session goes back
        frame = SessionFrame(
            tensors[f"frame.{number}.latents"],
            tensors.get(f"frame.{number}.led_by"),
            tensors.get(f"frame.{number}.action"),
            noise,
        )
        history.frames.append(frame)
    history.num_frames, history.num_context_frames = facts["num_frames"], facts["num_context_frames"]
    return history


def stored_noise(tensors: dict[str, torch.Tensor], name: str, device: str | None) -> NoiseState | None:
    """The generators of a moment, one, or one for each sample."""
    if device is None:
        return None
    batch_size = len(tensors.get("frame.0.latents", tensors.get("no_frame")))
    if not isinstance(device, str) or len(tensors[name]) not in (1, batch_size):
        raise ValueError(
            f"`{name}` holds {len(tensors[name])} generators of {device!r}; there is one, or one for each of {batch_size}"
        )
    return NoiseState(tensors[name], device)


def frame_tensors(frame: SessionFrame) -> dict[str, torch.Tensor]:
    """What a file holds of a frame."""
    tensors = {"latents": frame.latents, "led_by": frame.previous_action, "action": frame.action}
    if frame.noise is not None:
        tensors["noise_states"] = frame.noise.states
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


CURES = {
    "transformer": "load it with the pipeline that it was started with, with the same weights, LoRA and dtype",
    "scheduler": "give the pipeline the scheduler that it was started with",
    "FlexRoPE": "call `enable_flex_rope` or `disable_flex_rope` of the pipeline before; it can be changed afterwards",
}


def check_models(
    transformer: FARTransformer3DModel,
    scheduler: SchedulerMixin,
    device: torch.device,
    facts: dict[str, Any],
    path: str | os.PathLike,
) -> None:
    """Refuse a transformer or a scheduler that would make the next frames of a session in another way.

    Raises:
        ValueError: Names what differs.
    """
    is_cached = isinstance(facts["config"], dict) and facts["config"].get("use_cache") is True
    dtype = computing_dtype(transformer.dtype, device) if is_cached else None
    ours, theirs = facts_of_models(transformer, scheduler, dtype), facts["made_by"]
    for name, cure in CURES.items():
        their_facts = theirs.get(name) if isinstance(theirs, dict) else None
        if not isinstance(their_facts, dict):
            raise ValueError(f"{str(path)!r} lacks what is known of its {name}; it was changed after it was saved.")
        if ours[name] != their_facts:
            raise ValueError(
                f"{str(path)!r} is a session of another {name}: {differences(ours[name], their_facts)}; {cure}."
            )


def facts_of_models(
    transformer: FARTransformer3DModel, scheduler: Any, cached_dtype: torch.dtype | None
) -> dict[str, dict[str, Any]]:
    """The models that make a session's frames, as JSON values: with others the next frames would be different."""
    flex_rope, flex_rope_facts = applied_config(transformer), {}
    if flex_rope is not None:
        schedule = "a function" if callable(flex_rope.schedule) else flex_rope.schedule
        flex_rope_facts = {**vars(flex_rope), "schedule": schedule}
    facts = {
        "transformer": {
            **public_config(transformer.config),
            "dtype": str(transformer.dtype),
            "weights": model_identity(transformer),
            "cached dtype": None if cached_dtype is None else str(cached_dtype),  # autocast changes it
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
