"""Results on disk, a file for each case, so that an interrupted evaluation goes on where it stopped."""

import json
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file, save

from ..data.loading import dataset_fingerprint
from ..files import UNFINISHED, written_whole
from ..models.identity import model_identity, settings_hash
from .protocols import Case


IDENTITY_FILE = "identity.json"


class ResultFolder:
    """The cases of one evaluation that are finished.

    Args:
        path (`str` or `Path`): Folder; made where it does not exist.
        identity (`dict`): What the results depend on, ready for JSON: protocol, model, dataset, weights of the metrics.

    Raises:
        ValueError: The folder holds something else, or results of another identity.
    """

    def __init__(self, path: str | Path, identity: dict) -> None:
        self.path = Path(path)
        identity = json.loads(json.dumps(identity))  # as it reads back: lists for tuples
        file = self.path / IDENTITY_FILE
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"`output` {str(path)!r} is a file; name a folder.")
        if file.exists():
            check_same(_read_identity(file), identity, str(path))
        elif self.path.exists() and any(not path.name.startswith(UNFINISHED) for path in self.path.iterdir()):
            raise ValueError(f"`output` {str(path)!r} holds other things than an evaluation; name a new folder.")
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            with written_whole(file) as unfinished:
                unfinished.write_text(json.dumps(identity, indent=2) + "\n")
        (self.path / "cases").mkdir(exist_ok=True)

    def has(self, case: Case) -> bool:
        return self._file(case).exists()

    def add(self, case: Case, result: dict[str, torch.Tensor]) -> None:
        """Keep a case's result; it appears whole or not at all."""
        with written_whole(self._file(case)) as unfinished:
            # As bytes: what safetensors raises where the disk is full is no OSError.
            unfinished.write_bytes(save({name: tensor.contiguous() for name, tensor in result.items()}))

    def read(self, case: Case) -> dict[str, torch.Tensor]:
        """The result of a case.

        Raises:
            ValueError: It is not finished, or its file is damaged.
        """
        try:
            return load_file(self._file(case))
        except Exception as error:  # safetensors' own error has no public base class
            raise ValueError(
                f"{str(self._file(case))!r} cannot be read ({error}); delete it and evaluate again, which makes it anew."
            ) from error

    def _file(self, case: Case) -> Path:
        return self.path / "cases" / f"{case.name}.safetensors"


def _read_identity(file: Path) -> dict:
    try:
        identity = json.loads(file.read_text())
    except ValueError as error:  # also bytes that are no text
        raise ValueError(f"{str(file)!r} is damaged ({error}); name a new folder, or delete this one.") from error
    if not isinstance(identity, dict):
        raise ValueError(f"{str(file)!r} is damaged (it is no object); name a new folder, or delete this one.")
    return identity


def check_same(found: dict, wanted: dict, path: str) -> None:
    """Refuse to mix results of two identities; says in what they differ."""
    changed = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if not changed:
        return
    name = changed[0]
    there, here = found.get(name), wanted.get(name)
    if isinstance(there, dict) and isinstance(here, dict):
        key = next(key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key))
        name, there, here = f"{name}.{key}", there.get(key), here.get(key)
    raise ValueError(
        f"`output` {path!r} holds results of another evaluation: `{name}` was {there!r} and is {here!r}; name a new "
        "folder, or repeat what the first run was given."
    )


def evaluation_identity(
    pipe, dataset: Dataset, protocol_settings: dict, metric_weights: dict[str, str | None]
) -> dict:
    """What results depend on: they may be continued only where all of it is the same.

    Args:
        pipe ([`FARPipeline`]): See [`pipeline_identity`].
        dataset (`datasets.Dataset`): Its content counts.
        protocol_settings (`dict`): All settings, `batch_size` apart, which changes no more than rounding.
        metric_weights (`dict[str, str | None]`): Hash of each network's file, by metric; `None` where there is none.
    """
    return {
        "protocol": {name: value for name, value in protocol_settings.items() if name != "batch_size"},
        "model": pipeline_identity(pipe),
        "dataset": dataset_fingerprint(dataset),
        "metric_weights": metric_weights,
    }


def pipeline_identity(pipe) -> dict:
    """What predictions of a pipeline depend on: weights, scheduler, FlexRoPE and, of a [`VideoDiTPipeline`], context mode; not
    where they lie."""
    return {
        "transformer": model_identity(pipe.transformer),
        "vae": model_identity(pipe.vae),
        "scheduler": type(pipe.scheduler).__name__ + " " + settings_hash(pipe.scheduler.config),
        "flex_rope": getattr(pipe.config, "flex_rope", None),
        "context_mode": getattr(pipe.config, "context_mode", None),
    }
