"""Checkpoints that appear whole or not at all, and runs that refuse to go on as another run.

An output folder holds `checkpoint-N` folders. Each has Accelerate's state (models and optimizers), what was given to
`checkpoint_states`, and `run.json`: the step, the identity of the run, and the sha256 of every other file.

No file of a checkpoint runs code when it is loaded. Most are safetensors and JSON; optimizers and the loss scale are read by
torch with `weights_only=True`, and so are the states in checkpoints of earlier versions.
"""

import hashlib
import json
import logging
import pickle
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import UNFINISHED, file_sha256, flush_to_disk, free_space, written_whole
from ..models.loading import name_some
from .launch import LOCK_FILE
from .shards import gathered


logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
RUN_FORMAT = 2  # 1 had no checksums, and states that were pickled
REPLACED = "replaced-"  # what the name of a checkpoint begins with that a run left behind when it went back
_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
_UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    EOFError,
    SafetensorError,
    pickle.PickleError,
)
# What Accelerate is shown of a checkpoint: it would unpickle some of what else could lie there.
_SHOWN = re.compile(r".+\.(safetensors|json)|optimizer(_\d+)?\.bin|scaler\.pt")
_PICKLED_STATE = "custom_checkpoint_{}.pkl"  # of format 1
_TENSOR = "__tensor__"


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if _CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted((path for path in folders if (path / RUN_FILE).is_file()), key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    return int(_CHECKPOINT_NAME.fullmatch(checkpoint.name).group(1))


def find_checkpoint(output_dir: str | Path, resume_from_checkpoint: str | None) -> Path | None:
    """Decide where a run starts.

    Args:
        output_dir (`str` or `Path`): The run's folder; need not exist.
        resume_from_checkpoint (`str`, *optional*): `"latest"`, the name of a checkpoint in `output_dir`, or a path.

    Returns:
        `Path`, or `None` for a run from the start (`"latest"` in a folder without checkpoints starts anew; what lies there
        nevertheless is told).

    Raises:
        ValueError: If `output_dir` is in use and nothing is resumed, or the named checkpoint is not there.
    """
    output_dir = Path(output_dir)
    paths = output_dir.iterdir() if output_dir.is_dir() else ()
    present = sorted(path.name for path in paths if path.name != LOCK_FILE)
    if resume_from_checkpoint is not None:
        return _named_checkpoint(output_dir, resume_from_checkpoint, present)
    if present:
        raise ValueError(
            f"`output_dir` {str(output_dir)!r} is not empty and would be overwritten; pass another folder, or "
            "`--resume_from_checkpoint latest` to go on with the run that is in it."
        )
    return None


def _named_checkpoint(output_dir: Path, resume_from_checkpoint: str, present: list[str]) -> Path | None:
    """See [`find_checkpoint`]; `present` is what the folder holds."""
    checkpoints = list_checkpoints(output_dir)
    if resume_from_checkpoint == "latest":
        return checkpoints[-1] if checkpoints else _find_unfinished(output_dir, present)
    for candidate in (output_dir / resume_from_checkpoint, Path(resume_from_checkpoint)):
        if (candidate / RUN_FILE).is_file():
            return candidate
    names = [path.name for path in checkpoints] or "no checkpoint"
    raise ValueError(
        f"`resume_from_checkpoint` {resume_from_checkpoint!r} is not a finished checkpoint; "
        f"{str(output_dir)!r} holds {names}. Pass one of these or 'latest'."
    )


def _find_unfinished(output_dir: Path, present: list[str]) -> Path | None:
    """Where `"latest"` goes on in a folder without a finished checkpoint."""
    others = [name for name in present if _CHECKPOINT_NAME.search(name)]
    # `run.json` is written last: a checkpoint that has it is whole, though it was killed before it got its name.
    whole = [output_dir / name for name in others if (output_dir / name / RUN_FILE).is_file()]
    if whole:
        # One that this run replaced is of the run before it went back.
        newest = max(whole, key=lambda p: (p.name.startswith(UNFINISHED), int(_CHECKPOINT_NAME.search(p.name)[1])))
        logger.warning(
            f"{str(output_dir)!r} holds no finished checkpoint; the run goes on from {newest.name!r}, which is whole."
        )
        return newest
    if present:
        half = f"{', '.join(others)} was never finished" if others else f"there is only {', '.join(present[:5])}"
        logger.warning(f"{str(output_dir)!r} holds no checkpoint ({half}): the run begins at step 0.")
    return None


def checkpoint_states(accelerator: Accelerator, **states: Any) -> None:
    """Let the checkpoints of `accelerator` hold more than models and optimizers: as safetensors with JSON, not pickled as
    `register_for_checkpointing` does. Call it once, and always with the objects in the same order.

    Args:
        accelerator (`Accelerator`): Of the run.
        states: Objects with `state_dict` and `load_state_dict`, by the name of their file, the same on all processes.
            `None` is left out.
    """
    states = {name: state for name, state in states.items() if state is not None}

    def save(models: list, weights: list, folder: str) -> None:
        for name, state in states.items():
            values = gathered(state.state_dict(), accelerator.is_main_process)
            if accelerator.is_main_process:
                _write_state(Path(folder) / f"{name}.safetensors", values)

    def load(models: list, folder: str) -> None:
        for index, (name, state) in enumerate(states.items()):
            _load_state(Path(folder), name, index, state)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _load_state(folder: Path, name: str, index: int, state: Any) -> None:
    """Load the state that was given `name`, as the one of this `index`, from a folder of `_shown` files."""
    path, pickled = folder / f"{name}.safetensors", folder / f"old-{_PICKLED_STATE.format(index)}"
    if path.is_file():
        saved = _read_state(path)
    elif pickled.is_file():
        saved = torch.load(pickled, map_location="cpu", weights_only=True)
    else:
        raise ValueError(f"it holds no `{name}`; resume with the settings that the run had")
    own, found = _shapes(state.state_dict()), _shapes(saved)
    differences = [
        f"{key} {found.get(key, 'missing')}, in this run {own.get(key, 'missing')}"
        for key in own.keys() | found.keys()
        if own.get(key) != found.get(key)
    ]
    if differences:
        raise ValueError(f"its `{name}` has other tensors: {name_some(differences, limit=2)}")
    state.load_state_dict(saved)


def save_checkpoint(
    accelerator, output_dir: str | Path, step: int, identity: dict[str, Any], checkpoints_total_limit: int | None
) -> Path:
    """Save the run after `step` finished steps. Every process calls this.

    The folder is written under a temporary name, flushed to disk and renamed, so that a run killed at any moment
    leaves the earlier checkpoints and never a half-written one. Older checkpoints go only after that. Those of this step and
    of later ones, of a run that went back to an earlier checkpoint, are renamed to `replaced-checkpoint-N` and stay.

    Args:
        accelerator (`accelerate.Accelerator`): Holds everything that must be saved.
        output_dir (`str` or `Path`): The run's folder.
        step (`int`): Number of finished optimizer steps.
        identity (`dict`): What must be the same when the run resumes; JSON values.
        checkpoints_total_limit (`int`, *optional*): How many checkpoints to keep, at least 1; `None` keeps all.

    Raises:
        RuntimeError: The checkpoint could not be written, as on a full disk, or it has values that are not finite; names
            the last one that is intact.
    """
    checkpoint = Path(output_dir) / f"checkpoint-{step}"
    unfinished = checkpoint.with_name(f"{UNFINISHED}{checkpoint.name}")
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    not_finite = None
    # Safetensors reports a failed write as an error of its own, torch as a RuntimeError.
    try:
        accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for random_state in unfinished.glob("random_states_*.pkl"):
                random_state.unlink()  # what chance decides in a step is a function of the seed and the step
            not_finite = _find_not_finite(unfinished)
            if not_finite is None:
                _write_run(unfinished, step, identity)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise RuntimeError(
            f"The checkpoint of step {step} could not be written to {str(output_dir)!r} ({error}); "
            f"{free_space(Path(output_dir))} {way_back(output_dir)} Make room and go on from there."
        ) from error
    if not_finite is not None:
        shutil.rmtree(unfinished)
        raise RuntimeError(
            f"After step {step} {not_finite}, so no checkpoint is saved. {way_back(output_dir)} Lower `--learning_rate` or "
            "`--max_grad_norm`, and go on with `--allow_changed_run`."
        )
    if accelerator.is_main_process:
        _give_name(unfinished, checkpoint)
        if checkpoints_total_limit is not None:
            for old in list_checkpoints(output_dir)[:-checkpoints_total_limit]:
                (old / RUN_FILE).unlink()  # first, so that a kill leaves no half of it that looks whole
                shutil.rmtree(old)
        logger.info(f"Saved {checkpoint}")
    accelerator.wait_for_everyone()
    return checkpoint


def _give_name(unfinished: Path, checkpoint: Path) -> None:
    """From here on it is a checkpoint. Those that a run which went back replaces are moved aside."""
    folder, step = checkpoint.parent, checkpoint_step(checkpoint)
    # The one of this step last: until then a kill leaves a newest checkpoint.
    for replaced in reversed([path for path in list_checkpoints(folder) if checkpoint_step(path) >= step]):
        aside = replaced.with_name(f"{REPLACED}{replaced.name}")
        while aside.exists():
            aside = aside.with_name(f"{aside.name}-again")
        replaced.rename(aside)
        logger.warning(f"{replaced.name!r} is of the run before it went back; it is now {aside.name!r}.")
    shutil.rmtree(checkpoint, ignore_errors=True)  # half of one, whose deletion was interrupted
    unfinished.rename(checkpoint)
    flush_to_disk(folder)
    for left in folder.glob(f"{UNFINISHED}checkpoint-*"):
        shutil.rmtree(left, ignore_errors=True)


def load_checkpoint(
    accelerator,
    checkpoint: Path,
    identity: dict[str, Any],
    *,
    defaults: Mapping[str, Any] = MappingProxyType({}),
    allow_changes: bool = False,
) -> int:
    """Load a checkpoint into what `accelerator` holds. Nothing in it is run as code.

    Args:
        accelerator (`accelerate.Accelerator`): As for [`save_checkpoint`].
        checkpoint (`Path`): See [`find_checkpoint`].
        identity (`dict`): What must be the same as when it was saved.
        defaults (`dict`): Of the settings: what one was in a run of a version that did not know it.
        allow_changes (`bool`): Load it although `identity` differs.

    Returns:
        `int`: Number of optimizer steps that were finished when it was saved.

    Raises:
        ValueError: The checkpoint is damaged, not finite or another model's; names the file, and the newest checkpoint
            beside it that is intact. Or the run that is resumed differs from `identity`, unless `allow_changes`.
    """
    run = read_run(checkpoint)
    differences = describe_changes(run["identity"], json.loads(json.dumps(identity)), defaults)
    if differences and not allow_changes:
        raise ValueError(
            f"{str(checkpoint)!r} was saved by a different run: {'; '.join(differences)}. Give the values that it "
            "had, or pass `--allow_changed_run` if the change is meant."
        )
    damage = describe_damage(checkpoint) if accelerator.is_main_process else None
    if damage is not None:
        raise ValueError(f"{str(checkpoint)!r} cannot be resumed: {damage}. {way_back(checkpoint.parent)}")
    try:
        with _shown(checkpoint) as folder:
            accelerator.load_state(folder)
    except _UNREADABLE as error:
        hint = way_back(checkpoint.parent, but_for=checkpoint)
        if "files" in run:
            hint = "It is as it was saved, so it is not of this run's model, or not a checkpoint of these scripts."
        raise ValueError(f"{str(checkpoint)!r} cannot be loaded: {_first_line(error)}. {hint}") from error
    return run["step"]


def read_run(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of its run: `step` and `identity`, beside others.

    Raises:
        ValueError: It is damaged; names the newest checkpoint beside it that is intact.
    """
    try:
        return _read_run(checkpoint)
    except _UNREADABLE as error:
        raise ValueError(f"{str(checkpoint)!r} cannot be resumed: {error}. {way_back(checkpoint.parent)}") from error


def describe_changes(
    saved: dict[str, Any], current: dict[str, Any], defaults: Mapping[str, Any] = MappingProxyType({})
) -> list[str]:
    """One sentence for each name whose value differs. A setting that was not saved had its default; one that does not count
    in this run may be anything."""
    names = sorted(current.keys() | (saved.keys() - defaults.keys()))
    values = {name: (saved.get(name, defaults.get(name)), current.get(name)) for name in names}
    return [f"`{name}` was {was!r} and is {now!r}" for name, (was, now) in values.items() if was != now]


def way_back(output_dir: str | Path, but_for: Path | None = None) -> str:
    """A sentence for an error: the newest checkpoint of a run that is intact, finite and not `but_for`, and how to go on
    from it."""
    for checkpoint in reversed(list_checkpoints(output_dir)):
        if checkpoint != but_for and describe_damage(checkpoint) is None:
            flag = f"--resume_from_checkpoint {shlex.quote(str(checkpoint))}"
            return f"{checkpoint.name!r} is intact: `{flag}` takes it."
    other = "other " if but_for in list_checkpoints(output_dir) else ""
    return f"{str(output_dir)!r} holds no {other}intact checkpoint; the run can only begin anew."


def describe_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: a file that is missing or not as it was saved, a value that is not finite. It reads
    every byte. `None`: nothing; files of a checkpoint without checksums, of an earlier version, are only read."""
    try:
        for name, sha256 in _read_run(checkpoint).get("files", {}).items():
            if Path(name).name != name or not (checkpoint / name).is_file():
                return f"its file {name!r} is missing"
            if file_sha256(checkpoint / name) != sha256:
                return f"its file {name!r} is damaged: the SHA-256 is not the one of {RUN_FILE!r}"
        return _find_not_finite(checkpoint)
    except _UNREADABLE as error:
        return _first_line(error)


def _write_run(folder: Path, step: int, identity: dict[str, Any]) -> None:
    """Finish a checkpoint whose other files are all there."""
    paths = sorted(folder.iterdir())
    for path in [*paths, folder]:
        flush_to_disk(path)
    files = {path.name: file_sha256(path) for path in paths}
    run = {"format": RUN_FORMAT, "step": step, "identity": identity, "files": files}
    with written_whole(folder / RUN_FILE) as path:
        path.write_text(json.dumps(run | {"sha256": _run_sha256(run)}, indent=2, sort_keys=True))


def _read_run(checkpoint: Path) -> dict[str, Any]:
    try:
        run = json.loads((checkpoint / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"its {RUN_FILE!r} cannot be read ({error})") from error
    types = {"step": int, "identity": dict}
    if isinstance(run, dict) and "format" in run:
        if run["format"] != RUN_FORMAT:
            raise ValueError(
                f"its {RUN_FILE!r} has the format {run['format']!r}; this version of the library reads {RUN_FORMAT}"
            )
        types |= {"files": dict, "sha256": str}
    if not isinstance(run, dict) or any(not isinstance(run.get(name), kind) for name, kind in types.items()):
        raise ValueError(f"its {RUN_FILE!r} is damaged: it must have {', '.join(types)}")
    saved = run.pop("sha256", None)
    if saved is not None and saved != _run_sha256(run):
        raise ValueError(f"its {RUN_FILE!r} is damaged: the SHA-256 in it is not that of its values")
    return run


def _run_sha256(run: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()


def _find_not_finite(checkpoint: Path) -> str | None:
    """The first tensor of models, optimizers and states that has a NaN or an infinite value, in words."""
    for path in sorted(checkpoint.iterdir()):
        for name, tensor in _tensors(path):
            if tensor.is_floating_point() and not tensor.isfinite().all():
                return f"{name!r} in {path.name!r} is not finite"
    return None


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a file of a checkpoint by name, one after the other."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
    elif path.suffix == ".bin" and _SHOWN.fullmatch(path.name):
        yield from _flatten(torch.load(path, map_location="cpu", weights_only=True, mmap=True))


def _flatten(state: Any, name: str = "state") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(state, torch.Tensor):
        yield name, state
    elif isinstance(state, (dict, list, tuple)):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from _flatten(value, f"{name}.{key}")


def _shapes(state: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in _flatten(state)}


def _write_state(path: Path, state: dict[str, Any]) -> None:
    """A state of tensors and JSON values, nested as it may be, as one safetensors file."""

    def named(value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            return {_TENSOR: name}
        if isinstance(value, dict):
            return {key: named(item, f"{name}.{key}") for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [named(item, f"{name}.{index}") for index, item in enumerate(value)]
        return value

    tensors = {name: tensor.detach().contiguous() for name, tensor in _flatten(state)}
    save_file(tensors, path, metadata={"state": json.dumps(named(state, "state"))})


def _read_state(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:

        def filled(value: Any) -> Any:
            if isinstance(value, dict):
                if value.keys() == {_TENSOR}:
                    return file.get_tensor(value[_TENSOR])
                return {key: filled(item) for key, item in value.items()}
            return [filled(item) for item in value] if isinstance(value, list) else value

        return filled(json.loads((file.metadata() or {}).get("state", "")))


@contextmanager
def _shown(checkpoint: Path) -> Iterator[str]:
    """A folder with the files of a checkpoint that are safe to load, and no others."""
    with tempfile.TemporaryDirectory() as folder:
        for path in checkpoint.absolute().iterdir():
            if _SHOWN.fullmatch(path.name):
                (Path(folder) / path.name).symlink_to(path)
            elif path.match(_PICKLED_STATE.format("*")):
                (Path(folder) / f"old-{path.name}").symlink_to(path)
        yield folder


def _first_line(error: Exception) -> str:
    """An error of a library in one line; torch explains at length how to load pickled code after all."""
    if isinstance(error, pickle.UnpicklingError):
        return "a file of it is no torch file, or holds code instead of tensors; nothing of it was run"
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"its file {Path(error.filename).name!r} is missing"
    line = next(iter(str(error).strip().splitlines()), "").rstrip(".")
    return line if isinstance(error, ValueError) else f"{type(error).__name__}: {line}"
