"""Running a study of trained models: every variant under every seed, measured where its settings say.

The work folder holds a folder for each run, and in it a file for each measurement that is done. What is done is not done
again; what was interrupted goes on.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers_far.files import written_whole

from .analysis import select
from .data import DataFolder
from .identity import keep_settings
from .measure import measure
from .predictors import Predictor, checkpoint_hash, load_predictor
from .settings import StudySettings
from .training import TrainingRun, num_steps
from .walks import HeldOutWalks


@dataclass(frozen=True)
class StudyPart:
    """Some of a study's runs.

    Args:
        variants (sequence of `str`, *optional*), seeds (sequence of `int`, *optional*): Which; `None`: all.
    """

    variants: Sequence[str] | None = None
    seeds: Sequence[int] | None = None

    @property
    def is_whole(self) -> bool:
        return self.variants is None and self.seeds is None

    def runs_of(self, settings: StudySettings) -> list[tuple[str, int]]:
        """Variants and seeds, in the order in which they run: all variants once, then all once more.

        Raises:
            ValueError: The study has no such variant or seed.
        """
        for name, wanted, known in (
            ("variants", self.variants, list(settings.variants)),
            ("seeds", self.seeds, settings.seeds),
        ):
            unknown = sorted(set(wanted or ()) - set(known))
            if unknown:
                raise ValueError(
                    f"`--{name}` has {', '.join(map(str, unknown))}; {settings.name} has {', '.join(map(str, known))}."
                )
        return [
            (variant, seed)
            for seed in settings.seeds
            for variant in settings.variants
            if (self.seeds is None or seed in self.seeds) and (self.variants is None or variant in self.variants)
        ]


@dataclass(frozen=True)
class Study:
    """A study in its work folder.

    Args:
        settings ([`StudySettings`]): What it is.
        data ([`DataFolder`]): On what.
        path (`Path`): Its work folder.
        known (sequence of `dict`): Records of an earlier run, maybe on another machine, which are not made again.
    """

    settings: StudySettings
    data: DataFolder
    path: Path
    known: Sequence[dict] = ()

    def run(
        self, on_run_end: Callable[[list[dict]], None] | None = None, *, part: StudyPart = StudyPart()
    ) -> list[dict]:
        """Do all that is left to do.

        Args:
            on_run_end (`Callable`, *optional*): Called with the records so far after each variant of each seed.
            part ([`StudyPart`]): The runs that are wanted; all by default.

        Returns:
            The records: a `dict` for each variant, seed, share of the training, task and method, with its scores.

        Raises:
            ValueError: Data are missing, the folder holds a study of other settings, or the part is none of this study.
        """
        self._check()
        records = []
        for variant, seed in part.runs_of(self.settings):
            run = self.training_run(variant, seed)
            for share in self.settings.budget.shares:
                records += self._measured(run, variant, share)
            if on_run_end is not None:
                on_run_end(records)
        return records

    def costs(self) -> dict[str, dict]:
        """What a training step of each variant costs, by its name, see [`TrainingRun.measure_cost`]; nothing where the
        settings do not ask for it."""
        if not self.settings.measures_cost:
            return {}
        costs = {}
        for variant, each in self.settings.variants.items():
            if each.script is None:
                continue
            run = self.training_run(variant, self.settings.seeds[0])
            file = run.path / "cost.json"
            if not file.exists():
                with written_whole(file) as unfinished:
                    unfinished.write_text(json.dumps(run.measure_cost()))
            costs[variant] = {**json.loads(file.read_text()), "seconds_in_training": run.seconds_per_step}
        return costs

    def training_run(self, variant: str, seed: int) -> TrainingRun:
        each, folder = self.settings.trainings[variant], self.path / f"{variant}-seed{seed}"
        start = None if each.starts_from is None else self.training_run(each.starts_from, seed)
        return TrainingRun(folder, self.settings, each, seed, self.data, start)

    def _check(self) -> None:
        variants = self.settings.variants.values()
        folders = {self.data.encoded(variant) for variant in variants}
        if any(variant.script == "train_token_ar" for variant in variants):
            folders.add(self.data.vq)
        self.data.require(self.data.mazes, *sorted(folders))
        keep_settings(self.settings, self.path)

    def _measured(self, run: TrainingRun, variant: str, share: float) -> list[dict]:
        """The records of a run at one share of its training; trained and measured as far as it is not yet."""
        checkpoint = run.variant.checkpoint
        source = {} if checkpoint is None else {"pipeline": checkpoint_hash(checkpoint)}
        known = select(self.known, variant=variant, seed=run.seed, share=share, **source)
        if len(known) == len(self.settings.tasks) * len(self.settings.methods):
            return known
        steps = num_steps(self.settings, run.variant, share)
        files = {
            (task, method): run.measurements(steps) / source.get("pipeline", "") / f"{task}-{method}.json"
            for task in self.settings.tasks
            for method in self.settings.methods
        }
        missing = {cell: file for cell, file in files.items() if not file.exists()}
        if missing:
            print(f"{self.settings.name}: {run.path.name}, up to step {steps}", flush=True)
            run.train(steps)
            self._measure(run, missing)
        facts = {"variant": variant, "seed": run.seed, "share": share, "steps": steps, **source}
        facts["flops"] = run.flops(steps)
        return [
            {**facts, "task": task, "method": method, **json.loads(file.read_text())}
            for (task, method), file in files.items()
        ]

    def _measure(self, run: TrainingRun, files: Mapping[tuple[str, str], Path]) -> None:
        """Measure what a run has saved, a file for each task and method."""
        predictor, walks = self._load(run), self._walks(run)
        for (task, method), file in files.items():
            scores = measure(
                predictor, walks, self.settings.tasks[task], self.settings.methods[method], self.settings.evaluation
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(file) as unfinished:
                unfinished.write_text(json.dumps(scores))

    def _load(self, run: TrainingRun) -> Predictor:
        return load_predictor(run.variant, run.model_dir, self.data.vae, self.settings.evaluation)

    def _walks(self, run: TrainingRun) -> HeldOutWalks:
        return HeldOutWalks(self.data.mazes, self.data.encoded(run.variant), self.settings.evaluation)
