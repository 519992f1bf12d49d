"""What a user names on the command line, opened: a pipeline, and actions in words, digits or JSON."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..command_line import shown
from ..pipelines import FARPipeline


Actions = list[int] | list[list[float]]


def load_pipeline(
    model: str, load: Callable[..., FARPipeline] = FARPipeline.from_pretrained, device: Any = None, **options: Any
) -> FARPipeline:
    """A pipeline without progress bars, from a folder or the Hub.

    Args:
        model (`str`): Folder or Hub id.
        load (callable): A `from_pretrained`, which also gets `options`.
        device (`str` or `torch.device`, *optional*): By default the GPU where there is one.

    Raises:
        ValueError: There is none, or it is damaged or of another kind.
    """
    # A misspelt folder must not be looked for on the Hub.
    is_path = os.path.exists(model) or model.startswith((".", "/", "~")) or os.path.isdir(model.split("/")[0])
    if is_path and not os.path.isfile(os.path.join(model, "model_index.json")):
        raise ValueError(f"`--model` {shown(model)} is no pipeline's folder: it has no model_index.json; name one.")
    try:
        pipe = load(model, **options)
    except Exception as error:  # whatever a broken folder or a Hub out of reach leads the loaders to
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(f"`--model` {shown(model)} cannot be loaded ({reason}); name a FAR pipeline.") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


@dataclass(frozen=True)
class ActionSpace:
    """The actions that a model takes, and how people write them.

    Args:
        num_actions (`int`, *optional*): Of a model of discrete actions.
        action_dim (`int`, *optional*): Numbers in an action of a model of continuous ones.
        names (`tuple` of `str`): Of discrete actions, the first ones at least.
    """

    num_actions: int | None = None
    action_dim: int | None = None
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, pipe: FARPipeline) -> "ActionSpace":
        config = pipe.transformer.config
        return cls(config.num_actions, config.action_dim, tuple(pipe.config.action_names or ()))

    @property
    def is_empty(self) -> bool:
        """Whether the model takes no actions."""
        return self.num_actions is None and self.action_dim is None

    @property
    def first(self) -> int | list[float]:
        """The first discrete action, or zeros."""
        return [0.0] * self.action_dim if self.action_dim else 0

    def name_of(self, index: int) -> str:
        return self.names[index] if index < len(self.names) else f"action {index}"

    def read(self, argument: str, text: str) -> Actions:
        """Actions as a user wrote them, as numbers.

        Args:
            argument (`str`): Name of the argument, for messages.
            text (`str`): See [`parse_generate`].

        Returns:
            Integers below `num_actions`, or for continuous actions lists of `action_dim` finite numbers.

        Raises:
            ValueError: What it cannot be read as; names the place in the list.
        """
        if self.is_empty:
            raise ValueError(f"`{argument}` was given but this model takes no actions; leave it out.")
        if text.lower().endswith(".json") or (re.search(r"[./\\]", text) and os.path.isfile(text)):
            values = read_json_list(argument, text)
        elif self.action_dim is not None:
            raise ValueError(
                f"`{argument}` is {shown(text)} but this model's actions are {self.action_dim} numbers each; give a JSON "
                "file with a list of such lists."
            )
        else:
            values = self._split(text)
        if not values:
            raise ValueError(f"`{argument}` is {shown(text)}, which holds no actions; give one for each frame.")
        read_one = self._read_discrete if self.action_dim is None else self._read_continuous
        return [read_one(f"`{argument}[{place}]` is {shown(value)}", value) for place, value in enumerate(values)]

    def _split(self, text: str) -> list[str]:
        """Words where there are commas or spaces between them, else single characters, unless the whole is a name."""
        if text.strip().lower() in [name.lower() for name in self.names]:
            return [text.strip()]
        words = re.split(r"[\s,]+", text.strip(" ,\t\n"))
        return words if len(words) > 1 else list(words[0])

    def _read_discrete(self, given: str, value: object) -> int:
        """The index of an action that is given as one, as a name or as the first letter of a name."""
        known = ", ".join(f"{index} {name}" for index, name in enumerate(self.names)) or f"0 to {self.num_actions - 1}"
        wrong = f"{given}, but this model's actions are {known}"
        if isinstance(value, str) and not re.fullmatch("[0-9]{1,9}", value):
            wanted = value.lower()
            matching = [index for index, name in enumerate(self.names) if name.lower() == wanted]
            if not matching and len(wanted) == 1:
                matching = [index for index, name in enumerate(self.names) if name.lower().startswith(wanted)]
            if len(matching) > 1:
                raise ValueError(f"{wrong}: several begin so; give the number or the whole name, with commas between.")
            if not matching:
                raise ValueError(f"{wrong}; give their numbers{', names or first letters' if self.names else ''}.")
            return matching[0]
        index = int(value) if isinstance(value, str) else value
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < self.num_actions:
            raise ValueError(f"{wrong}; give one of these.")
        return index

    def _read_continuous(self, given: str, value: object) -> list[float]:
        """An action that is a list of numbers."""
        rule = f"{given}, but this model's actions are lists of {self.action_dim} finite numbers"
        if not isinstance(value, list) or len(value) != self.action_dim:
            raise ValueError(f"{rule}; give as many.")
        for channel in value:
            # Beyond float32's range a number would turn infinite.
            if isinstance(channel, bool) or not isinstance(channel, (int, float)) or not abs(channel) <= 1e38:
                raise ValueError(f"{rule}.")
        return [float(channel) for channel in value]


def read_json_list(argument: str, path: str) -> list:
    """The list in a JSON file."""
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
        raise ValueError(f"`{argument}` {shown(path)} is not a file; name a JSON file with a list.")
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"`{argument}` {shown(path)} is not a JSON file that can be read: {reason}.") from error
    if not isinstance(values, list):
        raise ValueError(f"`{argument}` {shown(path)} holds a {type(values).__name__}; it must be a JSON list.")
    return values
