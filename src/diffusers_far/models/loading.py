"""Saving that loses nothing, and loading that fails where diffusers only warns; safetensors only."""

import inspect
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError

from ..files import UNFINISHED, flush_to_disk, free_space
from .int8 import SAVE_FIRST
from .internals import group_offloading, offloaded_weights


# What diffusers says when it cannot read weights, and what helps.
CURES = {
    "Unable to load weights from checkpoint file": (
        "The file is truncated or not safetensors: download or copy it again, and compare its size with the original."
    ),
    "no file named": (
        "Only safetensors are read: write the weights with `save_pretrained`, or fetch the missing file. A `variant` "
        "has files of its own, written with `save_pretrained(..., variant=...)`."
    ),
    "not appear to have a file named": "Only safetensors are read: push the weights with `push_to_hub`.",
    "Could not find the necessary `safetensors` weights": (
        "Only safetensors are read: load the weights where you trust them and write them with `save_pretrained`."
    ),
    "is not a valid JSON file": "Download or copy it again.",
}
# The files of one variant of a model's weights: the whole file, or shards and an index.
WEIGHTS_FILE = re.compile(r"(?P<stem>[^.]+?)(\.(?P<variant>.+?))?(-\d{5}-of-\d{5})?\.safetensors")
CONFIG_FILE = re.compile(r"model_index\.json|(.+_)?config\.json|.+\.index(\..+)?\.json")
INDEX_FILE = re.compile(r"(?P<stem>[^.]+)\.safetensors\.index(\.(?P<variant>.+))?\.json")


class CompleteWeightsMixin:
    """A model that is saved whole, and whose weights must all be in the checkpoint that is loaded.

    diffusers warns of missing weights and leaves them unset: they would hold whatever was in memory.
    """

    # diffusers reads this signature to know what a save may be asked for, so it must be the one underneath.
    @wraps(ModelMixin.save_pretrained, assigned=())
    def save_pretrained(self, save_directory, *args, **kwargs):
        """As `ModelMixin.save_pretrained`, as safetensors only; other variants in the folder stay.

        Raises:
            ValueError: `safe_serialization` is `False`, weights are offloaded, or the model is int8.
            OSError: The disk is full, or the folder cannot be written; what was in it is as it was.
        """
        if getattr(self, "is_int8", False):
            raise ValueError(f"This model cannot be saved: {SAVE_FIRST}")
        given = inspect.signature(ModelMixin.save_pretrained).bind(self, save_directory, *args, **kwargs).arguments
        require_safetensors("safe_serialization", given.get("safe_serialization"))
        require_in_memory("The model", self)
        kwargs.setdefault("repo_id", Path(save_directory).resolve().name)  # of `push_to_hub`
        with saved_whole(save_directory) as folder:
            return super().save_pretrained(folder, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """As `ModelMixin.from_pretrained`, from safetensors only.

        Raises:
            ValueError: The weights lack keys of the model or have others, or `use_safetensors` is `False`.
            OSError: A file is missing, truncated or not what it should be.
        """
        require_safetensors("use_safetensors", kwargs.get("use_safetensors"))
        kwargs["use_safetensors"] = True
        output_loading_info = kwargs.pop("output_loading_info", False)
        with explained_loading_errors(pretrained_model_name_or_path):
            model, loading_info = super().from_pretrained(
                pretrained_model_name_or_path, output_loading_info=True, **kwargs
            )
        missing, unknown = loading_info.get("missing_keys"), loading_info.get("unexpected_keys")
        if missing or unknown:
            raise ValueError(
                f"The weights in {str(pretrained_model_name_or_path)!r} do not fit the config beside them: "
                f"{describe_key_errors(missing, unknown)}. Fetch the folder again, or correct its config.json. To start "
                "from a part of the weights, build the model with `from_config` and use "
                "`load_state_dict(..., strict=False)`."
            )
        return (model, loading_info) if output_loading_info else model


@contextmanager
def saved_whole(folder: str | os.PathLike) -> Iterator[Path]:
    """Let a save write into an empty folder, and bring its files to their places when all of them are on the disk.

    Of the weights that were there, only those of the variant that is saved go; a failed save leaves all as it was.

    Args:
        folder (`str` or `os.PathLike`): Created if needed.

    Yields:
        `Path`: The empty folder, inside of the other.

    Raises:
        ValueError: `folder` is a file.
        OSError: The disk is full, or the folder cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`save_directory` is {str(folder)!r}, which is a file; give a folder.")
    is_new, unfinished = not folder.exists(), None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder))
        yield unfinished
        for source in sorted({path.parent for path in unfinished.rglob("*") if path.is_file()}):
            _replace_files(source, folder / source.relative_to(unfinished))
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:  # not of the disk, but of the Hub
            raise
        if folder.parent.name.startswith(UNFINISHED):  # a part of a pipeline, whose folder is to be named
            raise
        room = free_space(folder) if folder.is_dir() else "it could not be created."
        raise OSError(f"{str(folder)!r} was not written ({error}); {room} What was in it is as it was.") from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _replace_files(source: Path, target: Path) -> None:
    """Move the files of a folder over those of another. A kill in between leaves weights that load whole, or not at all:
    old shards lose their index before new ones come, and new shards get theirs last."""
    target.mkdir(parents=True, exist_ok=True)
    saved = {path.name for path in source.iterdir() if path.is_file()}
    variants = {_variant_of(name) for name in saved} - {None}
    outdated = [path for path in target.iterdir() if _variant_of(path.name) in variants and path.name not in saved]
    for name in sorted(saved, key=_is_index):
        flush_to_disk(source / name)
        if _is_index(name):
            (target / name).unlink(missing_ok=True)
    for name in sorted(saved, key=_is_index):
        (source / name).replace(target / name)
    for path in sorted(outdated, key=lambda path: not _is_index(path.name)):
        path.unlink()
    flush_to_disk(target)


def _is_index(name: str) -> bool:
    return INDEX_FILE.fullmatch(name) is not None


def _variant_of(name: str) -> tuple[str, str | None] | None:
    """Which weights a file holds a part of, and in which variant; `None` for other files."""
    match = INDEX_FILE.fullmatch(name) or WEIGHTS_FILE.fullmatch(name)
    return match and (match["stem"], match["variant"])


def has_variant(folder: Path, variant: str) -> bool:
    """Whether a model's folder has weights in this variant; `True` for a folder without weights."""
    variants = {_variant_of(path.name) for path in folder.iterdir()} - {None}
    return not variants or any(name == variant for _, name in variants)


def unset_weights(module: torch.nn.Module) -> list[str]:
    """Weights without values: on the meta device, and not because they are offloaded. (A quantised layer's state has
    values that are no tensors.)"""
    state = {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    unset = {name for name, tensor in state.items() if tensor.is_meta}
    return sorted(unset - offloaded_weights(module)) if unset else []


def require_in_memory(name: str, module: torch.nn.Module) -> None:
    """Refuse to save a model whose weights wait elsewhere: in the model itself they have no values."""
    are_on_disk = any(group.offload_to_disk_path is not None for group in group_offloading(module))
    if are_on_disk or any(isinstance(value, torch.Tensor) and value.is_meta for value in module.state_dict().values()):
        raise ValueError(
            f"{name} has weights that are offloaded, and cannot be saved: call `pipe.remove_all_hooks()` after sequential "
            "offloading, or load it again without `device_map` and without offloading groups to the disk."
        )


@contextmanager
def explained_loading_errors(folder: str | os.PathLike) -> Iterator[None]:
    """Add the cure to diffusers' errors about files, and to those of the libraries below it the file too."""
    require_configs(folder)
    try:
        yield
    except OSError as error:
        for symptom, cure in CURES.items():
            if symptom in str(error) and cure not in str(error):
                raise OSError(f"{error} {cure}") from error
        raise
    except SafetensorError as error:
        cure = CURES["Unable to load weights from checkpoint file"]
        raise OSError(f"Weights in {str(folder)!r} cannot be read ({error}). {cure}") from error


def require_configs(folder: str | os.PathLike) -> None:
    """Refuse a local folder, of a model or a pipeline, where a JSON file is not what diffusers takes it for."""
    folders = [Path(folder), *Path(folder).iterdir()] if Path(folder).is_dir() else []
    for path in (path for each in folders if not each.name.startswith(UNFINISHED) for path in each.glob("*.json")):
        problem = _config_problem(path) if CONFIG_FILE.fullmatch(path.name) else None
        if problem is not None:
            raise OSError(f"{str(path)!r} {problem}; download or copy it again.")


def _config_problem(path: Path) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return "is not JSON"
    if not isinstance(content, dict):
        return "is no JSON object, as a config is"
    if path.name == "model_index.json" and "_class_name" not in content:
        return "has no `_class_name`, the class of the pipeline"
    if _is_index(path.name):
        shards = content.get("weight_map")
        is_map = isinstance(shards, dict) and isinstance(content.get("metadata"), dict)
        if not is_map or any(not isinstance(name, str) or Path(name).name != name for name in shards.values()):
            return "has no `weight_map` of weights to files of its folder"
    return None


def require_safetensors(name: str, value: bool | None) -> None:
    """Refuse an argument that asks for pickled weights; `None` leaves the choice to us."""
    if value is False:
        raise ValueError(
            f"`{name}` is False, but pickled weights can run code when they are loaded; this package reads and writes "
            "safetensors only, so leave it out."
        )


def require_finite(name: str, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights of which one number would make every frame NaN."""
    damaged = [
        key
        for key, value in state_dict.items()
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not bool(value.isfinite().all())
    ]
    if damaged:
        raise ValueError(
            f"{name} have NaN or infinite values in {name_some(damaged)}, with which every frame would be "
            "NaN; fetch them again, or load those of an intact training."
        )


def describe_key_errors(
    missing: Iterable[str] | None = None, unknown: Iterable[str] | None = None, wrong: Iterable[str] | None = None
) -> str:
    """The keys of a state dict that do not fit a model, in words; empty where all fit."""
    groups = {"lacks": missing, "has unknown": unknown, "has wrong shapes:": wrong}
    return "; ".join(f"it {problem} {name_some(keys)}" for problem, keys in groups.items() if keys)


def name_some(names: Iterable[str], limit: int = 8) -> str:
    """The first names, in order, and how many more there are."""
    names = sorted(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
