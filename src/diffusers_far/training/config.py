"""The settings of a training: typed fields, from which the command line is made.

A script's settings are a dataclass that inherits from those here and adds fields of its own. A field says all that is known
of a setting: type, default, help, the least value, and whether a resumed run may have another value. So nothing else lists
them, and a new setting is two lines: its field, and where it is used.
"""

import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml
from transformers.hf_argparser import HfArgumentParser

from ..command_line import HelpWithDefaults
from ..data.rows import COMBINATION_RULES, ActionCombiner


if TYPE_CHECKING:  # a script reads its settings before it imports what takes seconds
    from .objective import TrainingObjective


OPTIMIZERS = ("adamw", "adam", "radam")
RECIPE_SUFFIXES = (".yaml", ".yml", ".json")
# Of separable models; those of their paper.
DECODER_DRAWS = 2
DECODER_RATE_RATIO = 2.0
OF_MODEL = {
    "learn_start": True,
    "flow_map": False,
}  # what an objective is told by the model's config, and for one without
# What `setting` says of a field that argparse does not know.
RULES = ("least", "free", "of_stream", "rule")


def setting(
    default: Any = MISSING,
    help: str | None = None,
    *,
    least: float | None = None,
    free: bool = False,
    of_stream: bool = False,
    secret: bool = False,
    rule: Callable[[str], None] | None = None,
) -> Any:
    """A field of the settings.

    Args:
        default: Its value where none is given. Left out: one must be given.
        help (`str`, *optional*): For the command line.
        least (`float`, *optional*): The smallest number that is allowed. For floats it is 0 if left out.
        free (`bool`): A resumed run may have another value. All other settings must be those that the run began with.
        of_stream (`bool`): It matters only where the data are streamed.
        secret (`bool`): It is never shown, logged or saved.
        rule (callable, *optional*): Raises a `ValueError` for a text that is not allowed.
    """
    metadata = {"help": help, "least": least, "free": free or secret, "of_stream": of_stream, "rule": rule}
    given = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**given, metadata=metadata, repr=not secret)


def require_license_id(text: str) -> None:
    """Refuse what is no licence as the Hub writes it."""
    if not re.fullmatch(r"[a-z0-9.\-]+", text):
        raise ValueError(f"{text!r} is no identifier of the Hub, such as apache-2.0")


def require_hub_id(text: str) -> None:
    """Refuse what cannot be a repo on the Hub."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise ValueError(f"{text!r} is no id of a repo on the Hub, such as org/mazes") from error


@dataclass(kw_only=True)
class RunSettings:
    """What every training has."""

    context_parallel_size = 1  # a setting of those that train on clips

    dataset_split: str = setting("train", free=True)
    validation_split: str = setting("validation", "Measured where there is one.", free=True)
    output_dir: str = setting(help="Must be empty or absent unless a run is resumed.", free=True)
    max_train_steps: int = setting(10_000, least=1)
    num_train_epochs: int | None = setting(
        None,
        "Instead of --max_train_steps: how often all clips or frames are seen. Not for streams.",
        least=1,
        free=True,
    )
    max_train_hours: float | None = setting(None, "Stop this launch with a checkpoint after so long.", free=True)
    dry_run: bool = setting(False, "Two steps; print what the run will cost.", free=True)
    train_batch_size: int = setting(16, "Clips per process and pass.", least=1)
    learning_rate: float = setting(1e-4)
    lr_scheduler: str = setting("constant_with_warmup", "Name known to `diffusers.optimization`.")
    lr_warmup_steps: int = setting(500, least=0)
    max_grad_norm: float = setting(1.0)
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] | None = setting(
        None,
        "Of the passes; the weights stay float32. auto: the fastest on this machine, of those near float32. If left out, what "
        "the launcher was told, else no.",
    )
    dataloader_num_workers: int = setting(0, least=0, free=True)
    seed: int = setting(0, least=0)

    validation_steps: int = setting(500, least=1, free=True)
    num_validation_frames: int = setting(8, "Frames that are predicted in each.", least=1, free=True)

    checkpointing_steps: int = setting(500, least=1, free=True)
    checkpoints_total_limit: int = setting(2, least=1, free=True)
    resume_from_checkpoint: str | None = setting(None, "'latest', the name of a checkpoint, or a path.", free=True)
    allow_changed_run: bool = setting(False, "Resume although data or settings changed.", free=True)

    report_to: str = setting(
        "tensorboard",
        "Trackers: tensorboard, trackio, wandb ..., several with commas between them, all that are installed, or none.",
        free=True,
    )
    logging_dir: str = setting("logs", "Of the trackers; a relative path is in --output_dir.", free=True)
    tracker_project_name: str | None = setting(
        None, "What the trackers call it; the script's name if left out.", free=True
    )
    logging_seconds: float = setting(30.0, "Between lines of the log, where stderr is no terminal.", free=True)

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Refuse numbers that are too small or not finite, texts that are not allowed, and what contradicts each other.

        Raises:
            ValueError: Names the setting, its value and the rule.
        """
        for each in fields(self):
            value, least, rule = getattr(self, each.name), each.metadata["least"], each.metadata["rule"]
            if isinstance(value, float):
                least = 0 if least is None else least
                if not (math.isfinite(value) and value >= least):
                    limit = "" if least == -math.inf else f" of at least {least}"
                    raise ValueError(f"`{each.name}` is {value}; pass a finite number{limit}.")
            elif least is not None and value is not None and not (type(value) is int and value >= least):
                raise ValueError(f"`{each.name}` is {value!r}; pass a whole number of at least {least}.")
            if rule is not None:
                for text in value if isinstance(value, list) else [value] if value is not None else []:
                    rule(text)

    def count_epochs(self, num_samples: int, samples_per_step: int) -> None:
        """Make `num_train_epochs` over so many clips or frames a number of steps, if it was given."""
        if self.num_train_epochs is not None:
            self.max_train_steps = math.ceil(self.num_train_epochs * num_samples / samples_per_step)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the run that it continues, for the result to be that of one uninterrupted
        run: all settings but the free ones. The length counts where the learning rate depends on it."""
        is_streamed = getattr(self, "streaming", False)
        names = [
            each.name
            for each in fields(self)
            if not each.metadata["free"] and (is_streamed or not each.metadata["of_stream"])
        ]
        if self.lr_scheduler.startswith("constant"):
            names.remove("max_train_steps")
        return {name: getattr(self, name) for name in names}

    def defaults(self) -> dict[str, Any]:
        """The default of each setting that has one: its value in a run of a version that did not know it."""
        return {
            each.name: each.default if each.default is not MISSING else each.default_factory()
            for each in fields(self)
            if each.default is not MISSING or each.default_factory is not MISSING
        }

    def shown(self) -> dict[str, Any]:
        """The settings that may be shown: all but secrets."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.repr}


@dataclass(kw_only=True)
class StreamSettings:
    """How a dataset is read."""

    video_column: str = setting("video")
    dataset_config_name: str | None = setting(None, "Of a dataset with several configurations.", free=True)
    streaming: bool = setting(False, "Read the dataset as it is needed; copy nothing.")
    shuffle_buffer_size: int = setting(128, "Of a stream: trajectories in memory, mixed.", least=1, of_stream=True)

    def check(self) -> None:
        super().check()
        if self.streaming and self.num_train_epochs is not None:
            raise ValueError(
                f"`num_train_epochs` is {self.num_train_epochs}, but the length of a stream is not known; give "
                "`--max_train_steps`."
            )


@dataclass(kw_only=True)
class FrameSettings(StreamSettings, RunSettings):
    """What a training on single frames has."""

    dataset_name: str = setting(help="Folder or Hub id that `load_dataset` opens.", free=True)


@dataclass(kw_only=True)
class OptimizerSettings(RunSettings):
    """What a training has whose steps are made of several passes."""

    gradient_accumulation_steps: int | None = setting(
        None, "Passes of a step; if left out, the launcher's, else 1.", least=1
    )
    optimizer: Literal[OPTIMIZERS] = setting("adamw")
    use_8bit_adam: bool = setting(False, "Optimizer states in 8 bits, by bitsandbytes.")
    adam_beta1: float = setting(0.9)
    adam_beta2: float = setting(0.999)
    adam_weight_decay: float = setting(0.0)
    adam_epsilon: float = setting(1e-8)
    gradient_checkpointing: bool = setting(False, free=True)

    def check(self) -> None:
        super().check()
        if self.use_8bit_adam and self.optimizer not in ("adamw", "adam"):
            raise ValueError(f"`use_8bit_adam` has no {self.optimizer}; give `--optimizer adamw` or adam.")
        if self.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("`use_8bit_adam` needs bitsandbytes, which is not installed: `pip install bitsandbytes`.")


@dataclass(kw_only=True)
class EMASettings:
    """Whether the weights are averaged."""

    use_ema: bool = setting(False, "Average the weights; the result gets the average.")
    ema_decay: float = setting(0.9999)


@dataclass(kw_only=True)
class HubSettings:
    """Whether and where the result is uploaded, and what its card says."""

    push_to_hub: bool = setting(False, "Upload the result, without checkpoints and logs.", free=True)
    hub_model_id: str | None = setting(
        None, "Repo to upload to; the name of --output_dir in your namespace if left out.", free=True
    )
    hub_token: str | None = setting(
        None,
        "To upload with; better left to `hf auth login` or HF_TOKEN: others can read a command line.",
        secret=True,
    )
    license: str | None = setting(
        None, "Of the result, as the Hub calls it: apache-2.0. For the card.", free=True, rule=require_license_id
    )
    dataset_ids: list[str] | None = setting(
        None, "Ids on the Hub of what is trained on, for the card; folders have none.", free=True, rule=require_hub_id
    )
    base_model_id: str | None = setting(
        None,
        "Id on the Hub of what training starts from, for the card, if that is a folder.",
        free=True,
        rule=require_hub_id,
    )
    pretrained_model_name_or_path: str | None = setting(
        None, "Pipeline or transformer to start from instead.", free=True
    )
    revision: str | None = setting(None, "Of the pretrained model on the Hub: branch, tag or commit.", free=True)


@dataclass(kw_only=True)
class FARSettings(HubSettings, StreamSettings, OptimizerSettings):
    """What a training of a FAR transformer has, of all its weights or of an adapter: clips, objective, validation."""

    latents_dir: str | None = setting(None, "Folder that cache_latents.py wrote.", free=True)
    dataset_name: str | None = setting(
        None, "Instead: a dataset's folder or Hub id, encoded again at every step.", free=True
    )
    clips_per_trajectory: int = setting(
        1, "Of a stream: clips of a trajectory each time it is read.", least=1, of_stream=True
    )

    objective: Literal["far", "video_dit"] = setting("far")
    num_frames: int = setting(16, "Longest clip, long frames included.", least=1)
    frame_interval: int = setting(1, least=1)
    combine_actions: Literal[tuple(COMBINATION_RULES)] | None = setting(
        None, "What becomes of the actions of skipped frames."
    )
    num_actions: int | None = setting(None, "Discrete actions in the data: to stream, or combine jointly.")
    clean_context_ratio: float = setting(0.1, "Share of frames that are clean.")
    clean_prefix_ratio: float = setting(0.0, "Share of clips with a clean start.")
    teacher_forcing: bool = setting(False, "All frames noisy, all context clean.")
    condition_dropout: float = setting(0.1)
    logit_mean: float = setting(0.0, "Of the noise levels; above 0: more noise.", least=-math.inf)
    logit_std: float = setting(1.0)
    repeat_ratio: float = setting(0.0, "Share of clips that repeat a stretch of theirs.")
    decoder_draws: int | None = setting(
        None, f"Of a separable model: noise draws for one pass of its encoder; {DECODER_DRAWS} if left out.", least=1
    )
    decoder_learning_rate_ratio: float | None = setting(
        None,
        f"Of a separable model: its decoder's learning rate, in rates of its encoder; {DECODER_RATE_RATIO:g} if left out.",
    )
    flow_map_guidance: float | None = setting(
        None, "Of a flow map: learn the velocities that guidance of this scale gives; above 1.", least=1
    )

    context_parallel_size: int = setting(
        1,
        "Processes that share each clip, for clips that are too long for one; each takes some of the frames.",
        least=1,
    )

    num_validation_clips: int = setting(64, "Clips of the held-out loss.", least=1, free=True)
    num_validation_videos: int = setting(8, "Clips that are continued; 0: none.", least=0, free=True)
    num_validation_inference_steps: int | None = setting(
        None, "Steps of each; if left out, as many as the pipeline takes.", least=1, free=True
    )
    validation_dataset_name: str | None = setting(
        None,
        "With --latents_dir: the dataset that the latents are of. Its held-out frames are encoded anew, and then what "
        "the VAE loses is measured too.",
        free=True,
    )

    def check(self) -> None:
        super().check()
        if (self.latents_dir is None) == (self.dataset_name is None):
            raise ValueError("give `--latents_dir` or `--dataset_name`, one of the two.")
        if self.streaming and self.latents_dir is not None:
            raise ValueError(
                "`--streaming` is for `--dataset_name`: cached latents are read from where they lie as it is."
            )

    def action_combiner(self) -> ActionCombiner | None:
        """What makes one action of those of skipped frames; `None` where `combine_actions` was left out."""
        if self.combine_actions is None:
            return None
        # A stream needs the number of actions in any case; the combiner needs it only to join them.
        is_for_stream = self.streaming and self.combine_actions != "joint"
        return ActionCombiner(self.combine_actions, None if is_for_stream else self.num_actions)

    def num_fed_actions(self, num_actions: int | None) -> int | None:
        """Discrete actions that the model is fed: the `num_actions` of the data, or their sequences where they are
        joined."""
        return self.num_actions**self.frame_interval if self.combine_actions == "joint" else num_actions

    def training_objective(self, transformer_config: Mapping[str, Any] = MappingProxyType({})) -> "TrainingObjective":
        """The objective that was asked for, of the transformer with this config; of a FAR if it is left out.

        Raises:
            ValueError: A share is not between 0 and 1, the settings contradict each other, or one is of another kind of model.
        """
        from .objective import TrainingObjective

        is_separable = "num_decoder_layers" in transformer_config
        conditions = [transformer_config.get(name) for name in ("num_actions", "action_dim", "num_classes")]
        if self.flow_map_guidance is not None and conditions == [None] * 3:
            raise ValueError(
                f"`flow_map_guidance` is {self.flow_map_guidance}, but no condition guides this model; leave it out."
            )
        self._refuse_other_models_settings(is_separable)
        # By the names that both have; what is left out has its default there, and of the model its config tells.
        names = {each.name for each in fields(TrainingObjective)} & {each.name for each in fields(self)}
        told = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        told |= {name: transformer_config.get(name, default) for name, default in OF_MODEL.items()}
        if is_separable:
            draws = self.decoder_draws or DECODER_DRAWS
            told |= {"clean_context_ratio": 0.0, "teacher_forcing": True, "decoder_draws": draws}
        return TrainingObjective(self.objective, **told)

    def _refuse_other_models_settings(self, is_separable: bool) -> None:
        """Refuse what was given, as far as one can see, but has no meaning for the model."""
        reason = "only a separable model has a decoder"
        names = ["decoder_draws", "decoder_learning_rate_ratio"]
        if is_separable:
            reason = "the context of a separable model is always clean, and its frames are noisy one by one"
            names = ["objective", "clean_context_ratio", "clean_prefix_ratio"]
        defaults = self.defaults()
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, but {reason}; leave it out.")


Settings = TypeVar("Settings", bound=RunSettings)


def parse_settings(
    settings_class: type[Settings], description: str | None = None, arguments: Sequence[str] | None = None
) -> Settings:
    """Settings from a command line, which may begin with a recipe: a YAML or JSON file with settings by name. Flags win over
    it. What is not allowed ends the program with the rule.

    Args:
        settings_class (`type`): A dataclass of this module, or one that inherits from it.
        description (`str`, *optional*): For the help.
        arguments (sequence of `str`, *optional*): Of the command line, the program's own by default.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _SettingsParser(
        settings_class,
        description=description,
        usage="%(prog)s [recipe.yaml] [--flag value ...]",
        formatter_class=HelpWithDefaults,
    )
    try:
        if words and words[0].endswith(RECIPE_SUFFIXES):
            words[:1] = _words_of_recipe(words[0], {each.name for each in fields(settings_class)})
        return settings_class(**vars(parser.parse_args(words)))
    except ValueError as error:
        parser.error(str(error))


class _SettingsParser(HfArgumentParser):
    """Makes one flag of each field, spelled as the field; what else `setting` says of it is not for argparse."""

    def add_argument(self, *names, **options):
        flags = [name for name in names if "-" not in name.lstrip("-")]
        return super().add_argument(*flags, **{name: value for name, value in options.items() if name not in RULES})


def _words_of_recipe(path: str, names: set[str]) -> list[str]:
    """A recipe as words of a command line, so that its values are read and checked as flags are."""
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"the recipe {path!r} cannot be read: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"the recipe {path!r} has no settings by name.")
    unknown = sorted(str(name) for name in recipe.keys() - names)
    if unknown:
        raise ValueError(f"the recipe {path!r} has {', '.join(unknown)}, which this script does not know; see --help.")
    words = []
    for name, value in recipe.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def check_context_parallel(settings: RunSettings, num_processes: int, transformer_config=None) -> None:
    """Refuse to share clips among processes where it cannot be done, or was never tried.

    Args:
        settings ([`RunSettings`]): Of a script that was asked to share them.
        num_processes (`int`): That were launched.
        transformer_config (*optional*): Of the transformer, where it is known.

    Raises:
        ValueError: Says why, and what to do instead.
    """
    size, config = settings.context_parallel_size, transformer_config
    compiles, drops = (getattr(settings, name, False) for name in ("compile", "lora_dropout"))
    refused = [
        (num_processes % size, f"{num_processes} processes were launched", f"launch a multiple of {size}"),
        (compiles, "`--compile` was never tried with it", "leave out one of them"),
        (drops, "`--lora_dropout` would be the same for different frames", "leave out one of them"),
    ]
    if config is not None:
        heads = config.num_attention_heads
        frames = min(settings.num_frames, config.short_window) if config.long_patch_size else settings.num_frames
        frames -= "num_decoder_layers" in config  # an encoder does not see the last frame
        refused += [
            (heads % size, f"the transformer has {heads} `num_attention_heads`", f"give a divisor of {heads}"),
            (frames < size, f"there are {frames} short frames to share in a pass", f"give at most {max(1, frames)}"),
        ]
    for is_refused, reason, cure in refused:
        if is_refused:
            raise ValueError(f"`context_parallel_size` is {size}, but {reason}; {cure}.")


def read_config(name: str, path: str) -> dict[str, Any]:
    """The JSON object in the file that the argument `name` gives.

    Raises:
        ValueError: There is none.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"`--{name}` {path!r} cannot be read as JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"`--{name}` {path!r} holds no JSON object; give a model's arguments by name.")
    return config
