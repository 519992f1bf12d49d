"""Everything that is fixed before a study is run, read from its JSON file: models, budgets, frames, thresholds, seeds."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from diffusers_far.evaluation.protocols import MAX_DISTANCE, MAX_RECENT_AGE, MAX_TURN, MIN_REVISIT_AGE


CONFIGS = Path(__file__).parent / "configs"
SCRIPTS = ("train_far", "train_token_ar")
METHODS = ("plain", "interpolation", "window", "decay")
SPLITS = ("test", "validation")
MOST_REVISITS = "most_revisits"
METRICS = ("psnr", "psnr_first", "revisited", "unseen", "gain", "sharpness")


def build(kind: type, values: Mapping[str, Any], place: str):
    """An instance of a dataclass from JSON; `place` names it in errors.

    Raises:
        ValueError: A name is unknown or missing, or the dataclass refuses a value.
    """
    known = {each.name: each for each in fields(kind)}
    unknown = sorted(values.keys() - known.keys())
    if unknown:
        raise ValueError(f"`{place}` has {', '.join(unknown)}; it takes {', '.join(known)}.")
    needed = [name for name, each in known.items() if each.default is MISSING and each.default_factory is MISSING]
    missing = [name for name in needed if name not in values]
    if missing:
        raise ValueError(f"`{place}` lacks {', '.join(missing)}; give it.")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"`{place}`: {error}") from error


@dataclass(frozen=True)
class Variant:
    """A model and how it is trained.

    Args:
        label (`str`): For tables and plots.
        script (`str`, *optional*): `"train_far"` or `"train_token_ar"`, in `examples/`. `None`: nothing is trained, and
            each frame is the shown one that was seen from the nearest pose, unless there is a `checkpoint`.
        arguments (`dict`, *optional*): Of the script, over the study's own.
        model (`dict`, *optional*): Of the transformer's config, over the study's own; of the token model all of it.
        knows_pose (`bool`): It is told where the camera stands at each frame, instead of the action that led there.
        starts_from (`str`, *optional*): An earlier variant of the same model, or one of the study's `starts`, whose training
            it goes on from, with arguments of its own.
        checkpoint (`str`, *optional*): A pipeline's folder, from the repository's root, that is measured as it is.
    """

    label: str
    script: str | None = "train_far"
    arguments: dict | None = None
    model: dict | None = None
    knows_pose: bool = False
    starts_from: str | None = None
    checkpoint: str | None = None

    def __post_init__(self):
        if self.script not in (*SCRIPTS, None):
            raise ValueError(f"`script` is {self.script!r}; choose one of {', '.join(SCRIPTS)}.")
        if self.checkpoint is not None and self.script is not None:
            raise ValueError(
                f"`checkpoint` is {self.checkpoint!r} and `script` {self.script!r}; what is trained already has script null."
            )
        if self.knows_pose and self.script != "train_far":
            raise ValueError(f"`knows_pose` is True and `script` {self.script!r}; poses are for 'train_far' alone.")
        if self.starts_from is not None and self.script != "train_far":
            raise ValueError(
                f"`starts_from` is {self.starts_from!r} and `script` {self.script!r}; only 'train_far' goes on from a model."
            )


@dataclass(frozen=True)
class Budget:
    """How long each variant is trained.

    Args:
        steps (`int`): Optimizer steps, of `variant` where operations are made equal.
        shares (`list[float]`): Where in the training it is measured: above 0, rising, 1 last.
        variant (`str`, *optional*): Every variant gets the floating-point operations that this one's steps take. `None`:
            every variant takes the same steps.
    """

    steps: int
    shares: list[float]
    variant: str | None = None

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"`steps` is {self.steps}; train for 1 at least.")
        if not self.shares or sorted(set(self.shares)) != self.shares or self.shares[0] <= 0 or self.shares[-1] != 1:
            raise ValueError(f"`shares` is {self.shares}; give rising numbers above 0, the last of them 1.")


@dataclass(frozen=True)
class Task:
    """Frames that are shown and frames that are predicted.

    Args:
        label (`str`): For tables.
        num_context_frames (`int`), num_frames (`int`): Shown, and predicted after them.
        first_new_frame (`int` or `str`): Index in the walk of the first predicted frame; the context ends before it.
            `"most_revisits"`: in each walk the earliest start, after `history` frames, whose frames revisit most views.
        history (`int`): For `"most_revisits"`: frames of the walk that come before.
        length (`float`, *optional*): Where the task stands on a plot's axis.
    """

    label: str
    num_context_frames: int
    num_frames: int
    first_new_frame: int | str
    history: int = 0
    length: float | None = None

    def __post_init__(self):
        if self.num_context_frames < 1 or self.num_frames < 1:
            raise ValueError(
                f"`num_context_frames` is {self.num_context_frames} and `num_frames` {self.num_frames}; both are at "
                "least 1."
            )
        if isinstance(self.first_new_frame, str) and self.first_new_frame != MOST_REVISITS:
            raise ValueError(
                f"`first_new_frame` is {self.first_new_frame!r}; give a frame's index or {MOST_REVISITS!r}."
            )
        first = self.history if self.first_new_frame == MOST_REVISITS else self.first_new_frame
        if first < self.num_context_frames:
            raise ValueError(
                f"`num_context_frames` is {self.num_context_frames} but only {first} frames come before the first new "
                "one; show fewer, or predict later ones."
            )


@dataclass(frozen=True)
class Method:
    """What is done at inference to a model that was trained on shorter clips.

    Args:
        label (`str`): For tables and plots.
        kind (`str`): `"plain"`: nothing. `"interpolation"`: frame positions are scaled so that the longest is one of the
            training. `"window"`: each frame is predicted from the last frames alone, as many as the training had.
            `"decay"`: FlexRoPE.
        slope (`float`), schedule (`str`): For `"decay"`, see [`FlexRoPEConfig`].
    """

    label: str
    kind: str = "plain"
    slope: float = 0.0
    schedule: str = "beyond_training"

    def __post_init__(self):
        if self.kind not in METHODS:
            raise ValueError(f"`kind` is {self.kind!r}; choose one of {', '.join(METHODS)}.")
        if (self.slope > 0) != (self.kind == "decay"):
            raise ValueError(
                f"`kind` is {self.kind!r} and `slope` {self.slope}; a slope above 0 is for 'decay' alone."
            )


@dataclass(frozen=True)
class Evaluation:
    """How every model is measured.

    Args:
        num_walks (`int`): The first walks of the split.
        num_inference_steps (`int`): Denoising steps of a frame, or of a whole clip.
        num_first_frames (`int`): Predicted frames that `psnr_first` is the mean of.
        batch_size (`int`): Walks at once.
        seed (`int`): Walk k is predicted with noise from a generator of its own, seeded `seed + k`.
        max_distance (`float`), max_turn (`float`): Two views are near within this distance, in units of the pose, and
            this angle in degrees.
        min_revisit_age (`int`): A frame revisits a view if a near one was seen at least so many frames before,
        max_recent_age (`int`): and none since, but in the last so many frames, which led there. A frame that no near
            view came before, but in those last frames, is unseen.
        split (`str`): `"test"`; `"validation"` for what is chosen by it.
    """

    num_walks: int
    num_inference_steps: int
    num_first_frames: int = 8
    batch_size: int = 16
    seed: int = 0
    max_distance: float = MAX_DISTANCE
    max_turn: float = MAX_TURN
    min_revisit_age: int = MIN_REVISIT_AGE
    max_recent_age: int = MAX_RECENT_AGE
    split: str = "test"

    def __post_init__(self):
        for name in ("num_walks", "num_inference_steps", "num_first_frames", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it is at least 1.")
        if self.split not in SPLITS:
            raise ValueError(f"`split` is {self.split!r}; choose one of {', '.join(SPLITS)}.")
        if not 0 <= self.max_recent_age < self.min_revisit_age:
            raise ValueError(
                f"`max_recent_age` is {self.max_recent_age} and `min_revisit_age` {self.min_revisit_age}; the first is "
                "at least 0 and below the second."
            )


@dataclass(frozen=True)
class Comparison:
    """A claim: one side is expected to score higher than the other.

    Args:
        claim (`str`), paper (`str`): What is claimed, and the paper's figure for it.
        higher (`dict`), lower (`dict`): Which records: `variant`, `method`, `task` and `share`, where they differ.
        metric (`str`): One of `METRICS`.
        where (`dict`, *optional*): What both sides share.
        margin (`float`, *optional*): In units of the metric. With it the claim is that the higher side gains no more
            than this.
    """

    claim: str
    paper: str
    higher: dict
    lower: dict
    metric: str
    where: dict | None = None
    margin: float | None = None

    def __post_init__(self):
        if self.metric not in METRICS:
            raise ValueError(f"`metric` is {self.metric!r}; choose one of {', '.join(METRICS)}.")
        if self.margin is not None and self.margin < 0:
            raise ValueError(f"`margin` is {self.margin}; it is at least 0.")

    @property
    def sides(self) -> tuple[dict, dict]:
        """What the records of the higher and of the lower side must have."""
        common = {"share": 1, **(self.where or {})}
        return {**common, **self.higher}, {**common, **self.lower}


@dataclass(frozen=True)
class StudySettings:
    """A study of trained models.

    Args:
        name (`str`): Of the study.
        seeds (`list[int]`): Each variant is trained once with each.
        latent_size (`int`): Height and width of the latents, for the count of operations.
        transformer (`dict`): Config of the FAR transformers.
        training (`dict`): Arguments of the scripts that all variants share.
        variants, tasks, methods (`dict`): By name; every variant is measured on every task by every method.
        budget, evaluation, comparisons: See there.
        measures_cost (`bool`): Also what a training step costs in time and memory, in a process of its own.
        starts (`dict`, *optional*): Variants by name that others go on from, and that are not measured themselves.
    """

    name: str
    seeds: list[int]
    latent_size: int
    transformer: dict
    training: dict
    variants: dict[str, Variant]
    budget: Budget
    tasks: dict[str, Task]
    methods: dict[str, Method]
    evaluation: Evaluation
    comparisons: list[Comparison]
    measures_cost: bool = False
    starts: dict[str, Variant] = field(default_factory=dict)

    def __post_init__(self):
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"`seeds` is {self.seeds}; give at least one, each once.")
        for name in ("variants", "tasks", "methods"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is empty; name at least one.")
        if self.budget.variant is not None and self.budget.variant not in self.variants:
            raise ValueError(
                f"`budget.variant` is {self.budget.variant!r}; the variants are {', '.join(self.variants)}."
            )
        if self.budget.variant is not None and any(variant.script is None for variant in self.variants.values()):
            raise ValueError(
                f"`budget.variant` is {self.budget.variant!r}, but a variant that trains nothing has no equal budget; "
                "leave one of them out."
            )
        self._check_starts()
        for comparison in self.comparisons:
            for side in comparison.sides:
                self._check_side(side)

    @property
    def trainings(self) -> dict[str, Variant]:
        """All that is trained: `starts` and `variants`."""
        return {**self.starts, **self.variants}

    def _check_starts(self) -> None:
        twice = sorted(self.starts.keys() & self.variants.keys())
        if twice:
            raise ValueError(f"`starts` and `variants` both have {', '.join(twice)}; give each a name of its own.")
        earlier = {}
        for name, variant in self.trainings.items():
            start, place = variant.starts_from, f"{'starts' if name in self.starts else 'variants'}.{name}"
            if start is not None:
                if start not in earlier:
                    raise ValueError(f"`{place}` starts from {start!r}; those before it are {', '.join(earlier)}.")
                for what in ("model", "knows_pose", "script"):
                    if getattr(variant, what) != getattr(earlier[start], what):
                        raise ValueError(
                            f"`{place}` starts from {start!r}, whose `{what}` is another; give both the same."
                        )
            earlier[name] = variant

    def _check_side(self, side: dict) -> None:
        for key, choices in (
            ("variant", self.variants),
            ("method", self.methods),
            ("task", self.tasks),
            ("share", self.budget.shares),
        ):
            if side.get(key, next(iter(choices))) not in choices:
                raise ValueError(
                    f"`comparisons` names the {key} {side[key]!r}; there are {', '.join(map(str, choices))}."
                )
            if key not in side and len(choices) > 1:
                raise ValueError(f"`comparisons` leaves the {key} open; name one of {', '.join(map(str, choices))}.")
        unknown = side.keys() - {"variant", "method", "task", "share"}
        if unknown:
            raise ValueError(
                f"`comparisons` has {', '.join(sorted(unknown))}; it takes variant, method, task and share."
            )

    @classmethod
    def of(cls, name: str, values: Mapping[str, Any]) -> "StudySettings":
        """From JSON."""
        values = {"methods": {"plain": {"label": "plain"}}, **values, "name": name}
        kinds = {"starts": Variant, "variants": Variant, "tasks": Task, "methods": Method}
        built = {
            group: {key: build(kind, each, f"{group}.{key}") for key, each in values.get(group, {}).items()}
            for group, kind in kinds.items()
        }
        for group, kind in (("budget", Budget), ("evaluation", Evaluation)):
            built[group] = build(kind, values.get(group, {}), group)
        built["comparisons"] = [build(Comparison, each, "comparisons") for each in values.get("comparisons", [])]
        return build(cls, {**values, **built}, name)

    def to_json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class CacheMode:
    """One way to roll out.

    Args:
        label (`str`): For tables and plots.
        is_long (`bool`): `False`: the same network without long frames.
        use_cache (`bool`), short_cache (`str` or `int`): As of a pipeline's call.
    """

    label: str
    is_long: bool = True
    use_cache: bool = True
    short_cache: str | int = "exact"


@dataclass(frozen=True)
class SpeedClaim:
    """A claim that one mode is faster than another, on the longest video.

    Args:
        claim (`str`), paper (`str`): What is claimed, and the paper's figure for it.
        faster (`str`), slower (`str`): Names of modes.
    """

    claim: str
    paper: str
    faster: str
    slower: str


@dataclass(frozen=True)
class CacheSettings:
    """The study of cached rollouts, which trains nothing.

    Args:
        name (`str`): Of the study.
        model (`str`): Pipeline folder of a long model, from the repository's root.
        num_frames (`list[int]`): Frames of each rollout, from nothing.
        num_inference_steps (`int`), num_rounds (`int`): Of each rollout; how often each is timed.
        modes (`dict[str, CacheMode]`): By name.
        task, evaluation: What the long model's cached modes are measured on.
        speed_claims, comparisons: What is claimed of time, and of quality, with a mode as `variant`.
    """

    name: str
    model: str
    num_frames: list[int]
    num_inference_steps: int
    num_rounds: int
    modes: dict[str, CacheMode]
    task: Task
    evaluation: Evaluation
    speed_claims: list[SpeedClaim]
    comparisons: list[Comparison]

    def __post_init__(self):
        named = [name for each in self.speed_claims for name in (each.faster, each.slower)]
        named += [side.get("variant") for each in self.comparisons for side in each.sides]
        unknown = sorted({str(name) for name in named} - self.modes.keys())
        if unknown:
            raise ValueError(f"A claim names the mode {', '.join(unknown)}; there are {', '.join(self.modes)}.")
        if not self.num_frames or min(self.num_frames) < 1:
            raise ValueError(f"`num_frames` is {self.num_frames}; make 1 frame at least.")
        for name in ("num_inference_steps", "num_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it is at least 1.")

    @classmethod
    def of(cls, name: str, values: Mapping[str, Any]) -> "CacheSettings":
        """From JSON."""
        built = {
            "modes": {key: build(CacheMode, each, f"modes.{key}") for key, each in values.get("modes", {}).items()},
            "task": build(Task, values.get("task", {}), "task"),
            "evaluation": build(Evaluation, values.get("evaluation", {}), "evaluation"),
            "speed_claims": [build(SpeedClaim, each, "speed_claims") for each in values.get("speed_claims", [])],
            "comparisons": [build(Comparison, each, "comparisons") for each in values.get("comparisons", [])],
        }
        return build(cls, {**values, **built, "name": name}, name)

    def to_json(self) -> dict:
        return asdict(self)


def merge(values: Mapping, overrides: Mapping) -> dict:
    """`values` with `overrides` in their place, dictionaries key by key; a key whose override is `None` goes."""
    merged = dict(values)
    for key, override in overrides.items():
        if override is None:
            merged.pop(key, None)
        elif isinstance(override, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], override)
        else:
            merged[key] = override
    return merged


def read_settings(study: str, *, smoke: bool = False, folder: Path = CONFIGS) -> StudySettings | CacheSettings:
    """The committed settings of a study; with `smoke` shrunk to seconds, by the overrides in the same file.

    Raises:
        ValueError: The file is no study's, or a setting is out of its range.
    """
    values = json.loads((folder / f"{study}.json").read_text())
    overrides = values.pop("smoke", {})
    if smoke:
        values = merge(values, overrides)
    return (CacheSettings if "modes" in values else StudySettings).of(study, values)
