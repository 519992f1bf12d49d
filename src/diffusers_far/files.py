"""Files that appear whole or not at all, and the sums by which a damaged one is told."""

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch


UNFINISHED = "unfinished-"  # what the name of a file or folder begins with until all of it is written


@contextmanager
def written_whole(path: str | os.PathLike, *, overwrite: bool = True) -> Iterator[Path]:
    """Write a file aside, and give it its name when all of it is on the disk.

    Whatever happens in between, a kill or a full disk, leaves what stood at `path` before.

    Args:
        path (`str` or `os.PathLike`): Of the file; its folder must exist.
        overwrite (`bool`): `False` refuses a path where something is.

    Yields:
        `Path`: Where to write it: in the same folder, with the same suffix.

    Raises:
        ValueError: There is something at `path`, and `overwrite` is `False`; it is left as it is.
        OSError: The folder is missing or the write failed; names the file, the reason and the room that is left.
    """
    path = Path(path)
    _require_free(path, overwrite)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{str(path)!r} cannot be written: {str(path.parent)!r} is no folder; create it first."
        )
    unfinished = path.with_name(f"{UNFINISHED}{os.getpid()}-{path.name}")
    try:
        yield unfinished
        flush_to_disk(unfinished)
        _require_free(path, overwrite)
        unfinished.replace(path)
        flush_to_disk(path.parent)
    except OSError as error:
        raise OSError(error.errno, f"{str(path)!r} was not written ({error}); {free_space(path.parent)}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _require_free(path: Path, overwrite: bool) -> None:
    if not overwrite and path.exists():
        raise ValueError(f"{str(path)!r} exists and would be overwritten; choose another name, or delete it first.")


def flush_to_disk(path: Path) -> None:
    """Make a file, or the list of files of a folder, survive a power cut: a rename may reach the disk before the content
    does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_space(folder: Path) -> str:
    """How much room is left there, as a sentence for an error."""
    return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB are free in {str(folder)!r}."


def file_sha256(path: str | os.PathLike) -> str:
    """Sha256 (hex) of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Sha256 (hex) of tensors with their names, shapes and dtypes, wherever they lie."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # Squeezed, for a tensor of one element counts as contiguous with any stride, and is then not viewed as bytes.
        digest.update(tensor.detach().cpu().contiguous().squeeze().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
