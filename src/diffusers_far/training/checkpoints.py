"""Checkpoints that appear whole or not at all, and runs that refuse to go on as another run.

An output folder holds `checkpoint-N` folders. Each has Accelerate's state (models, optimizers, and what was registered
for checkpointing) and `run.json`: the step and the identity of the run.
"""

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


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
        `Path`, or `None` for a run from the start (`"latest"` in a folder without checkpoints starts anew).

    Raises:
        ValueError: If `output_dir` is in use and nothing is resumed, or the named checkpoint is not there.
    """
    output_dir = Path(output_dir)
    if resume_from_checkpoint is None:
        if output_dir.is_dir() and any(output_dir.iterdir()):
            raise ValueError(
                f"`output_dir` {str(output_dir)!r} is not empty and would be overwritten; pass another folder, or "
                "`--resume_from_checkpoint latest` to go on with the run that is in it."
            )
        return None
    checkpoints = list_checkpoints(output_dir)
    if resume_from_checkpoint == "latest":
        return checkpoints[-1] if checkpoints else None
    for candidate in (output_dir / resume_from_checkpoint, Path(resume_from_checkpoint)):
        if (candidate / RUN_FILE).is_file():
            return candidate
    names = [path.name for path in checkpoints] or "no checkpoint"
    raise ValueError(
        f"`resume_from_checkpoint` {resume_from_checkpoint!r} is not a finished checkpoint; "
        f"{str(output_dir)!r} holds {names}. Pass one of these or 'latest'."
    )


def save_checkpoint(
    accelerator, output_dir: str | Path, step: int, identity: dict[str, Any], checkpoints_total_limit: int | None
) -> Path:
    """Save the run after `step` finished steps. Every process calls this.

    The folder is written under a temporary name, flushed to disk and renamed, so that a run killed at any moment
    leaves the earlier checkpoints and never a half-written one. Older checkpoints go only after that.

    Args:
        accelerator (`accelerate.Accelerator`): Holds everything that must be saved.
        output_dir (`str` or `Path`): The run's folder.
        step (`int`): Number of finished optimizer steps.
        identity (`dict`): What must be the same when the run resumes; JSON values.
        checkpoints_total_limit (`int`, *optional*): How many checkpoints to keep, at least 1; `None` keeps all.

    Raises:
        RuntimeError: The checkpoint could not be written, as on a full disk; names the last one that is whole.
    """
    checkpoint = Path(output_dir) / f"checkpoint-{step}"
    unfinished = Path(output_dir) / f"unfinished-checkpoint-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    # Safetensors reports a failed write as an error of its own, torch as a RuntimeError.
    try:
        accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            run = json.dumps({"step": step, "identity": identity}, indent=2, sort_keys=True)
            (unfinished / RUN_FILE).write_text(run)
            _flush_to_disk(unfinished)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise RuntimeError(_explain_failed_write(Path(output_dir), step, error)) from error
    if accelerator.is_main_process:
        shutil.rmtree(checkpoint, ignore_errors=True)
        unfinished.rename(checkpoint)
        _flush_to_disk(checkpoint.parent, recurse=False)
        if checkpoints_total_limit is not None:
            for old in list_checkpoints(output_dir)[:-checkpoints_total_limit]:
                shutil.rmtree(old)
        logger.info(f"Saved {checkpoint}")
    accelerator.wait_for_everyone()
    return checkpoint


def load_checkpoint(accelerator, checkpoint: Path, identity: dict[str, Any], *, allow_changes: bool = False) -> int:
    """Load a checkpoint into what `accelerator` holds.

    Returns:
        `int`: Number of optimizer steps that were finished when it was saved.

    Raises:
        ValueError: If the run that is resumed differs from `identity`, unless `allow_changes`.
    """
    run = json.loads((checkpoint / RUN_FILE).read_text())
    differences = describe_changes(run["identity"], json.loads(json.dumps(identity)))
    if differences and not allow_changes:
        raise ValueError(
            f"{str(checkpoint)!r} was saved by a different run: {'; '.join(differences)}. Give the values that it "
            "had, or pass `--allow_changed_run` if the change is meant."
        )
    accelerator.load_state(str(checkpoint))
    return run["step"]


def describe_changes(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """One sentence for each key whose value differs."""
    names = sorted(saved.keys() | current.keys())
    return [
        f"`{name}` was {saved.get(name)!r} and is {current.get(name)!r}"
        for name in names
        if saved.get(name) != current.get(name)
    ]


def _explain_failed_write(output_dir: Path, step: int, error: Exception) -> str:
    checkpoints = list_checkpoints(output_dir)
    last = f"{checkpoints[-1].name!r} is intact" if checkpoints else "there is no earlier one"
    free = shutil.disk_usage(output_dir).free / 2**20
    return (
        f"The checkpoint of step {step} could not be written to {str(output_dir)!r} ({error}); {free:.0f} MiB are free "
        f"there, and {last}. Make room and go on with `--resume_from_checkpoint latest`."
    )


def _flush_to_disk(path: Path, *, recurse: bool = True) -> None:
    """Make what was written survive a power cut: a rename may reach the disk before the files' content does."""
    for entry in [*(path.rglob("*") if recurse else ()), path]:
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
