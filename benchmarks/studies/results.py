"""The file of a study's raw numbers, `docs/results/STUDY.json`: what plots and tables are made from."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers_far.files import written_whole

from ..timing import describe_machine
from .analysis import select
from .cache import CacheStudy
from .data import DataFolder
from .identity import check_settings
from .settings import CacheSettings, StudySettings
from .study import Study, StudyPart


STUDIES = ("learning_rate", "convergence", "clean_context", "extrapolation", "memory", "compression", "cache")


def run_study(settings: StudySettings | CacheSettings, data: DataFolder, path: Path, folder: Path, **facts) -> Path:
    """Do all that is left of a study, and write its numbers: those of trained models whenever a variant of a seed is done.

    Args:
        settings ([`StudySettings`] or [`CacheSettings`]), data ([`DataFolder`]), path (`Path`): Of a [`Study`].
        folder (`Path`): For the file of numbers. What it holds of the study is not made again, wherever it was made.
        facts: Written beside the numbers.

    Returns:
        The file.

    Raises:
        ValueError: The file holds numbers of other settings.
    """
    known = known_numbers(settings, folder)
    results = {"study": settings.name, **facts, **machines(known), "settings": settings.to_json()}
    if isinstance(settings, CacheSettings):
        study = CacheStudy(settings, data, path, known["records"])
        results |= {"records": study.run(), "timings": known.get("timings", [])}
        write_results(results, folder)  # what is timed on a machine that does nothing else may have to wait
        return write_results({**results, "timings": results["timings"] or study.timings()}, folder)
    study, costs = Study(settings, data, path, known["records"]), known["costs"]
    records = study.run(lambda records: write_results({**results, "records": records, "costs": costs}, folder))
    return write_results({**results, "records": records, "costs": costs or study.costs()}, folder)


def run_part(settings: StudySettings, data: DataFolder, path: Path, folder: Path, part: StudyPart) -> None:
    """Do what is left of some of a study's runs. Their numbers stay in the work folder, where [`run_study`] finds them, so
    that several parts can run side by side.

    Raises:
        ValueError: The file of numbers holds those of other settings, or the study has no such runs.
    """
    Study(settings, data, path, known_numbers(settings, folder)["records"]).run(part=part)


def machines(known: Mapping[str, Any]) -> dict[str, Any]:
    """`machine`, this one, and `earlier_machines`: others that made some of the numbers that are `known`."""
    machine = describe_machine()
    others = [*known.get("earlier_machines", ()), *([known["machine"]] if "machine" in known else [])]
    return {"machine": machine, "earlier_machines": [each for each in others if hardware(each) != hardware(machine)]}


def hardware(machine: Mapping[str, Any]) -> str:
    """What a machine computes on, in words."""
    return machine.get("accelerator") or f"{machine['processor']}, {machine['cores']} cores"


def known_numbers(settings: StudySettings, folder: Path) -> Mapping[str, Any]:
    """A study's file of numbers: `records`, and `costs` or `timings`; empty where there is no file.

    Raises:
        ValueError: The file holds numbers of other settings.
    """
    results = read_results(settings.name, folder)
    if results is None:
        return {"records": [], "costs": {}}
    check_settings(results["settings"], settings, str(folder / f"{settings.name}.json"))
    return results


def complete_seeds(results: Mapping[str, Any]) -> list[int]:
    """The seeds for which every variant has all its records."""
    settings = results["settings"]
    groups = (settings["variants"], settings["budget"]["shares"], settings["tasks"], settings["methods"])
    num_records = math.prod(map(len, groups))
    return [seed for seed in settings["seeds"] if len(select(results["records"], seed=seed)) == num_records]


def write_results(results: dict[str, Any], folder: Path) -> Path:
    """One file, a line for each record, so that it stays readable and its changes do too."""
    parts = []
    for name, value in results.items():
        if isinstance(value, list):
            lines = ",\n".join("  " + json.dumps(each) for each in value)
            parts.append(f'"{name}": [\n{lines}\n]')
        else:
            parts.append(f'"{name}": {json.dumps(value, indent=1)}')
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{results['study']}.json"
    with written_whole(path) as unfinished:
        unfinished.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    return path


def read_results(study: str, folder: Path) -> dict[str, Any] | None:
    """A study's numbers; `None` where it was not run yet."""
    path = folder / f"{study}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def finished_results(study: str, folder: Path) -> dict[str, Any] | None:
    """What can be shown of a study: its numbers, of the seeds alone that are complete. `None` where none is."""
    results = read_results(study, folder)
    if results is None or "timings" in results:
        return results
    seeds = complete_seeds(results)
    if not seeds:
        return None
    records = [record for record in results["records"] if record["seed"] in seeds]
    return {**results, "settings": {**results["settings"], "seeds": seeds}, "records": records}
