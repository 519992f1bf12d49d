"""How [`FARPipeline`] is saved, pushed and loaded."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from huggingface_hub import create_repo, hf_hub_download, upload_folder
from huggingface_hub.errors import EntryNotFoundError

from ..files import UNFINISHED, written_whole
from ..hooks.flex_rope import applied_config
from ..models.internals import group_offloading
from ..models.loading import (
    explained_loading_errors,
    has_variant,
    name_some,
    require_in_memory,
    require_safetensors,
    saved_whole,
    unset_weights,
)
from .model_card import README, is_unedited, model_card


logger = logging.get_logger(__name__)

PACKAGE = __name__.split(".")[0]
# Of the folder of a training: what serves to go on with the run, not to use its result.
NOT_UPLOADED = ("checkpoint-*", "replaced-*", "unfinished-*", "validation/*", "*/.*", ".*")

# Written beside the weights, for people who have not imported this package; diffusers looks for exactly one pipeline
# class in it.
CUSTOM_PIPELINE = '''"""Loads this repo without importing diffusers_far first:

    DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)
"""

try:
    from diffusers_far import {pipeline}  # noqa: F401
except ImportError as error:
    raise ImportError("This model is made with diffusers-far; install it: pip install diffusers-far") from error
'''


class FARHubMixin:
    """Saves a pipeline with a model card and a `pipeline.py`, reads and writes safetensors only, and records our
    components where diffusers finds them."""

    def register_to_config(self, **kwargs):
        """Record our own components under `diffusers`, where importing this package puts them: diffusers imports no
        library that a repo on the Hub names."""
        for name, value in kwargs.items():
            if isinstance(value, (tuple, list)) and str(value[0]).startswith(PACKAGE):
                kwargs[name] = ("diffusers", value[1])
        super().register_to_config(**kwargs)

    def to_json_string(self) -> str:
        """The config as model_index.json keeps it: the names of the actions by index, since diffusers takes every list
        of strings in there for a component, `[library, class]`, and asks the Hub for it."""
        config = json.loads(super().to_json_string())
        if config.get("action_names") is not None:
            config["action_names"] = dict(enumerate(config["action_names"]))
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """As `DiffusionPipeline.from_pretrained`, from safetensors only.

        Raises:
            ValueError: Weights are incomplete or do not fit their config, a component has none in the `variant`, or
                `use_safetensors` is `False`.
            OSError: A file is missing, truncated or not what it should be.
        """
        require_safetensors("use_safetensors", kwargs.get("use_safetensors"))
        with explained_loading_errors(pretrained_model_name_or_path):
            if Path(pretrained_model_name_or_path).is_dir():
                require_variant(pretrained_model_name_or_path, **kwargs)
            return super().from_pretrained(pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True})

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str:
        """As `DiffusionPipeline.download`; a component without weights in the `variant` is an error."""
        folder = super().download(pretrained_model_name, **kwargs)
        require_variant(folder, **kwargs)
        return folder

    def to(self, *args, **kwargs):
        """As `DiffusionPipeline.to`, but the transformer comes first, since it may refuse, and it is not passed over where
        it is group-offloaded."""
        values = [value for value in (*args, kwargs.get("device"), kwargs.get("dtype")) if value is not None]
        changes_dtype = any(isinstance(value, torch.dtype) for value in values)
        transformer = self.transformer
        if transformer is not None and (transformer.is_int8 or (changes_dtype and group_offloading(transformer))):
            transformer.to(*values)
        return super().to(*args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        training_facts: Mapping[str, Any] | None = None,
        repo_id: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        **kwargs,
    ) -> None:
        """Save all components, the config, a model card and a `pipeline.py`.

        Args:
            save_directory (`str` or `os.PathLike`): Created if needed. A README.md in it stays as it is, and so do the
                weights of other variants; a save that fails changes nothing.
            safe_serialization (`bool`): `False` is refused.
            variant (`str`, *optional*), max_shard_size (`int` or `str`, *optional*): As in diffusers.
            push_to_hub (`bool`): Upload the folder to `repo_id`, by default its name in your namespace. A README.md that
                the repo has is kept, unless the folder had one of its own.
            training_facts (`dict`, *optional*): What the model was trained on and how, for the card, such as
                `{"Data": "..."}`.
            commit_message, private, token, create_pr: Of the upload.

        Raises:
            ValueError: The transformer has LoRA layers or is int8, or weights are offloaded.
            OSError: The disk is full, or the folder cannot be written.
        """
        require_safetensors("safe_serialization", safe_serialization)
        adapters = getattr(self.transformer, "peft_config", None)
        if adapters:
            raise ValueError(
                f"The transformer has LoRA layers ({name_some(adapters)}), with which the pipeline could not be loaded "
                "again. Save them with `save_lora_weights`; then call `unload_lora_weights()` to save the pipeline "
                "without them, or `fuse_lora()` before that to save it with them."
            )
        for name, component in self.components.items():
            if isinstance(component, torch.nn.Module):
                require_in_memory(f"`{name}`", component)
        folder = Path(save_directory)
        if push_to_hub:
            repo_id = create_repo(repo_id or folder.name, exist_ok=True, private=private, token=token).repo_id
        with saved_whole(folder) as unfinished:
            super().save_pretrained(unfinished, variant=variant, max_shard_size=max_shard_size, **kwargs)
            code = CUSTOM_PIPELINE.format(pipeline=type(self).__name__)
            (unfinished / "pipeline.py").write_text(code, encoding="utf-8")
        readme = folder / README
        card = card_on_hub(repo_id, token) if push_to_hub and not readme.exists() else None
        if training_facts and (readme.exists() or card is not None):
            logger.warning("There is a README.md, which is kept; `training_facts` are not written to it.")
        if not readme.exists():
            card = card or model_card(self, repo_id or folder.name, training_facts)
            with written_whole(readme) as unfinished:
                unfinished.write_text(card, encoding="utf-8")
        if push_to_hub:
            upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                token=token,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                create_pr=create_pr,
                ignore_patterns=[f"{UNFINISHED}*"],
            )

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        training_facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Upload the pipeline as `save_pretrained` saves it. A README.md that the repo has is kept."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(
                folder,
                safe_serialization=safe_serialization,
                variant=variant,
                push_to_hub=True,
                training_facts=training_facts,
                repo_id=repo_id,
                commit_message=commit_message,
                private=private,
                token=token,
                create_pr=create_pr,
            )


def card_on_hub(repo_id: str, token: str | bool | None) -> str | None:
    """The README.md of a repo, `None` where it has none."""
    try:
        return Path(hf_hub_download(repo_id, README, token=token)).read_text(encoding="utf-8")
    except EntryNotFoundError:
        return None


def push_folder(
    folder: str | Path, repo_id: str, *, commit_message: str, logging_dir: str = "logs", token: str | None = None
) -> str:
    """Upload the result of a run, a pipeline or an adapter, without its checkpoints and logs.

    A README.md that the repo has is replaced only where a run wrote it and nobody has edited it since.

    Args:
        folder (`str` or `Path`): The run's folder.
        repo_id (`str`): An existing repo.
        commit_message (`str`): Of the upload.
        logging_dir (`str`): Of the logs, which stay here.
        token (`str`, *optional*): As for `save_pretrained`.

    Returns:
        `str`: The commit's address.
    """
    ignored = [*NOT_UPLOADED, f"{os.path.relpath(Path(folder) / logging_dir, folder)}/*"]
    card = card_on_hub(repo_id, token=token)
    if card is not None and not is_unedited(card):
        ignored.append(README)
        logger.warning(f"The README.md of {repo_id!r} was edited and is kept; what this run has to say is not in it.")
    commit = upload_folder(
        repo_id=repo_id, folder_path=str(folder), ignore_patterns=ignored, commit_message=commit_message, token=token
    )
    return commit.commit_url


def require_variant(folder: str | os.PathLike, variant: str | None = None, **given) -> None:
    """Refuse a pipeline's folder where a component lacks weights in a variant that others have: diffusers would take those
    without a variant for it.

    Args:
        given: Components that are not loaded from the folder, among other arguments.
    """
    index = Path(folder) / "model_index.json"
    if variant is None or not index.is_file():
        return
    components = [name for name in json.loads(index.read_text(encoding="utf-8")) if given.get(name) is None]
    folders = [Path(folder) / name for name in components if (Path(folder) / name).is_dir()]
    lacking = [path.name for path in folders if not has_variant(path, variant)]
    if lacking and len(lacking) < len(folders):
        raise ValueError(
            f"`variant` is {variant!r}, but {name_some(lacking)} in {str(folder)!r} has no weights of that variant; write "
            f"them with `save_pretrained(..., variant={variant!r})`, or leave `variant` out."
        )


def check_components_complete(**components: torch.nn.Module) -> None:
    """Refuse a component that diffusers loaded from incomplete weights: it warns, and leaves the rest without values.

    Raises:
        ValueError: Names the component and the weights.
    """
    for name, component in components.items():
        if not isinstance(component, torch.nn.Module):
            continue
        unset = unset_weights(component)
        if unset and len(unset) < len(component.state_dict()):
            raise ValueError(
                f"`{name}` has no values for {name_some(unset)}: its checkpoint is incomplete or its config.json "
                "describes another model. Fetch its folder again."
            )


def applied_flex_rope(transformer: torch.nn.Module | None) -> dict[str, Any] | None:
    """The FlexRoPE of a transformer that came with one, as a pipeline's config keeps it."""
    config = None if transformer is None else applied_config(transformer)
    return None if config is None or callable(config.schedule) else asdict(config)
