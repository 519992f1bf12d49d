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
from huggingface_hub import create_repo, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ..hooks.flex_rope import applied_config
from ..models.loading import explained_loading_errors, name_some, require_safetensors
from .model_card import model_card


logger = logging.get_logger(__name__)

PACKAGE = __name__.split(".")[0]

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
            ValueError: Weights are incomplete or do not fit their config, or `use_safetensors` is `False`.
            OSError: A file is missing, truncated or not safetensors.
        """
        require_safetensors("use_safetensors", kwargs.get("use_safetensors"))
        with explained_loading_errors():
            return super().from_pretrained(pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True})

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
            save_directory (`str` or `os.PathLike`): Created if needed. A README.md in it stays as it is.
            safe_serialization (`bool`): `False` is refused.
            variant (`str`, *optional*), max_shard_size (`int` or `str`, *optional*): As in diffusers.
            push_to_hub (`bool`): Upload the folder to `repo_id`, by default its name in your namespace. A README.md that
                the repo has is kept, unless the folder had one of its own.
            training_facts (`dict`, *optional*): What the model was trained on and how, for the card, such as
                `{"Data": "..."}`.
            commit_message, private, token, create_pr: Of the upload.
        """
        require_safetensors("safe_serialization", safe_serialization)
        adapters = getattr(self.transformer, "peft_config", None)
        if adapters:
            raise ValueError(
                f"The transformer has LoRA layers ({name_some(adapters)}), with which the pipeline could not be loaded "
                "again. Save them with `save_lora_weights`; then call `unload_lora_weights()` to save the pipeline "
                "without them, or `fuse_lora()` before that to save it with them."
            )
        folder = Path(save_directory)
        if push_to_hub:
            repo_id = create_repo(repo_id or folder.name, exist_ok=True, private=private, token=token).repo_id
        super().save_pretrained(folder, variant=variant, max_shard_size=max_shard_size, **kwargs)

        (folder / "pipeline.py").write_text(CUSTOM_PIPELINE.format(pipeline=type(self).__name__), encoding="utf-8")
        readme = folder / "README.md"
        card = card_on_hub(repo_id, token) if push_to_hub and not readme.exists() else None
        if training_facts and (readme.exists() or card is not None):
            logger.warning("There is a README.md, which is kept; `training_facts` are not written to it.")
        if not readme.exists():
            card = card or model_card(self, repo_id or folder.name, training_facts)
            readme.write_text(card, encoding="utf-8")
        if push_to_hub:
            self._upload_folder(folder, repo_id, token=token, commit_message=commit_message, create_pr=create_pr)

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
        return Path(hf_hub_download(repo_id, "README.md", token=token)).read_text(encoding="utf-8")
    except EntryNotFoundError:
        return None


def check_components_complete(**components: torch.nn.Module) -> None:
    """Refuse a component that diffusers loaded from incomplete weights: it warns, and leaves the rest without values.

    Raises:
        ValueError: Names the component and the weights.
    """
    for name, component in components.items():
        state_dict = component.state_dict() if isinstance(component, torch.nn.Module) else {}
        unset = [key for key, tensor in state_dict.items() if tensor.is_meta]
        if unset and len(unset) < len(state_dict):
            raise ValueError(
                f"`{name}` has no values for {name_some(unset)}: its checkpoint is incomplete or its config.json "
                "describes another model. Fetch its folder again."
            )


def applied_flex_rope(transformer: torch.nn.Module | None) -> dict[str, Any] | None:
    """The FlexRoPE of a transformer that came with one, as a pipeline's config keeps it."""
    config = None if transformer is None else applied_config(transformer)
    return None if config is None or callable(config.schedule) else asdict(config)
