"""Loading that fails where diffusers only warns: incomplete weights are an error, and only safetensors are read."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


# What diffusers says when it cannot read weights, and what helps.
CURES = {
    "Unable to load weights from checkpoint file": (
        "The file is truncated or not safetensors: download or copy it again, and compare its size with the original."
    ),
    "no file named": "Only safetensors are read: write the weights with `save_pretrained`, or fetch the missing file.",
    "not appear to have a file named": "Only safetensors are read: push the weights with `push_to_hub`.",
    "Could not find the necessary `safetensors` weights": (
        "Only safetensors are read: load the weights where you trust them and write them with `save_pretrained`."
    ),
}


class CompleteWeightsMixin:
    """`from_pretrained` for a model whose weights must all be in the checkpoint.

    diffusers warns of missing weights and leaves them unset: they would hold whatever was in memory.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """As `ModelMixin.from_pretrained`, from safetensors only.

        Raises:
            ValueError: The weights lack keys of the model or have others, or `use_safetensors` is `False`.
            OSError: A file is missing, truncated or not safetensors.
        """
        require_safetensors("use_safetensors", kwargs.get("use_safetensors"))
        kwargs["use_safetensors"] = True
        output_loading_info = kwargs.pop("output_loading_info", False)
        with explained_loading_errors():
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
def explained_loading_errors() -> Iterator[None]:
    """Add the cure to diffusers' errors about weight files, which name the file only."""
    try:
        yield
    except OSError as error:
        for symptom, cure in CURES.items():
            if symptom in str(error) and cure not in str(error):
                raise OSError(f"{error} {cure}") from error
        raise


def require_safetensors(name: str, value: bool | None) -> None:
    """Refuse an argument that asks for pickled weights; `None` leaves the choice to us."""
    if value is False:
        raise ValueError(
            f"`{name}` is False, but pickled weights can run code when they are loaded; this package reads and writes "
            "safetensors only, so leave it out."
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
