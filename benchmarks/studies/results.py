"""The file of a study's raw numbers, `docs/results/STUDY.json`: what plots and tables are made from."""

import json
from pathlib import Path
from typing import Any

from diffusers_far.evaluation.results import write_whole

from ..timing import describe_machine
from .cache import CacheStudy
from .settings import CacheSettings
from .study import Study


STUDIES = ("convergence", "clean_context", "extrapolation", "memory", "cache")


def run_study(study: Study | CacheStudy, *, smoke: bool = False) -> dict[str, Any]:
    """Do all that is left of a study, and gather its numbers."""
    records = study.run()
    results = {
        "study": study.settings.name,
        "smoke": smoke,
        "machine": describe_machine(),
        "settings": study.settings.to_json(),
        "records": records,
    }
    if isinstance(study.settings, CacheSettings):
        return {**results, "timings": study.timings()}
    return {**results, "costs": study.costs()}


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
    write_whole(path, "{\n" + ",\n".join(parts) + "\n}\n")
    return path


def read_results(study: str, folder: Path) -> dict[str, Any] | None:
    """A study's numbers; `None` where it was not run yet."""
    path = folder / f"{study}.json"
    return json.loads(path.read_text()) if path.is_file() else None
