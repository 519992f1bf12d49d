"""The tables of `docs/results.md`, rewritten between their marks from the numbers of the studies.

<!-- study: NAME -->
...
<!-- end of NAME -->
"""

import re
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers_far.evaluation.metrics import Estimate

from .analysis import Verdict, compare, estimate, judge_speed, select
from .flops import meta_transformer
from .recipes import recipe_table
from .results import STUDIES, finished_results, hardware
from .settings import Comparison, build


COMMAND = "python -m benchmarks.studies {study} --data_dir outputs/studies-data --work_dir outputs/studies"
HORIZONS = (1, 2, 4, 8, 16, 32)
Columns = Mapping[str, Mapping[str, Any]]  # a selection of records by its title


def rewrite(page: str, sections: Mapping[str, str]) -> str:
    """A page with the text between each section's marks replaced.

    Raises:
        ValueError: A section has no marks, or several.
    """
    for name, text in sections.items():
        pattern = re.compile(rf"(<!-- study: {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        if len(pattern.findall(page)) != 1:
            raise ValueError(
                f"The page needs the marks of {name!r} once: `<!-- study: {name} -->`, `<!-- end of {name} -->`."
            )
        page = pattern.sub(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", page)
    return page


def all_sections(results_dir: Path, images_dir: Path) -> dict[str, str]:
    """The text of every section."""
    sections = {name: study_section(name, finished_results(name, results_dir), images_dir) for name in STUDIES}
    return {**sections, "recipes": recipe_table()}


def study_section(name: str, results: Mapping | None, images_dir: Path) -> str:
    """What a study has found, or that no seed of it is finished."""
    if results is None:
        return f"Not run yet: `{COMMAND.format(study=name)}`."
    claims = [verdict_table(results)] if results["settings"]["comparisons"] else []
    parts = [describe(results), *claims, *TABLES[name](results)]
    image = images_dir / f"study-{name}.png"
    if image.is_file():
        parts.append(f"![The numbers of the study {name}]({images_dir.name}/{image.name})")
    return "\n\n".join(parts)


def describe(results: Mapping) -> str:
    """Where, when and at what size the numbers were made."""
    machine, settings = results["machine"], results["settings"]
    made_on = [*results.get("earlier_machines", ()), machine]
    devices, versions = dict.fromkeys(map(hardware, made_on)), dict.fromkeys(each["torch"] for each in made_on)
    facts = [f"Measured {machine['date']}, {' and '.join(devices)}, torch {' and '.join(versions)}"]
    if "transformer" in settings:
        model = meta_transformer(settings["transformer"])
        facts.append(
            f"{model.num_parameters() / 1e6:.1f} M parameters, clips of {settings['training']['num_frames']} frames, "
            f"{settings['budget']['steps']:,} steps of {settings['training']['train_batch_size']} clips, seeds "
            f"{', '.join(map(str, settings['seeds']))}"
        )
    evaluation = settings["evaluation"]
    facts.append(
        f"{evaluation['num_walks']} walks of the split {evaluation['split']}; means with 95% intervals over walks"
    )
    prefix = "**A smoke test, whose figures mean nothing.** " if results["smoke"] else ""
    text = prefix + "; ".join(facts) + f". Numbers: `docs/results/{results['study']}.json`."
    return textwrap.fill(text, 119, break_long_words=False, break_on_hyphens=False)


def verdict_table(results: Mapping) -> str:
    """A row for each claim: what the paper found, what was found here, and whether it holds."""
    settings, rows = results["settings"], []
    for each in settings.get("speed_claims", []) if results.get("timings") else []:
        ratios = speed_ratios(results, each["slower"], each["faster"])
        here = f"{statistics.median(ratios):.1f} times ({min(ratios):.1f} to {max(ratios):.1f})"
        rows.append([each["claim"], each["paper"], here, judge_speed(ratios)])
    for each in settings["comparisons"]:
        comparison = build(Comparison, each, "comparisons")
        verdict = compare(results["records"], comparison)
        rows.append([comparison.claim, comparison.paper, show_difference(verdict, comparison), verdict.text])
    return table(["claim", "the paper", "here", "verdict"], rows)


def speed_ratios(results: Mapping, slower: str, faster: str) -> list[float]:
    """How many times faster one mode was than another, round by round, on the longest video."""
    longest = max(results["settings"]["num_frames"])
    seconds = [select(results["timings"], mode=mode, num_frames=longest)[0]["seconds"] for mode in (slower, faster)]
    return [slow / fast for slow, fast in zip(*seconds)]


def show_difference(verdict: Verdict, comparison: Comparison) -> str:
    unit = "" if comparison.metric == "sharpness" else " dB"
    views = f" on {comparison.metric} views" if comparison.metric in ("revisited", "unseen") else ""
    if not verdict.difference.num_samples:
        return f"no such frames{views}"
    seeds = ", ".join(f"{value:+.2f}" for value in verdict.by_seed)
    seeds = f" (by seed {seeds})" if len(verdict.by_seed) > 1 else ""
    return f"{verdict.difference.mean:+.2f} ± {verdict.difference.half_width:.2f}{unit}{views}{seeds}"


def convergence_tables(results: Mapping) -> list[str]:
    settings = results["settings"]
    rows = {each["label"]: {"variant": name} for name, each in settings["variants"].items()}
    parts = []
    for task, each in settings["tasks"].items():
        columns = {f"{share:.0%}": {"task": task, "share": share} for share in settings["budget"]["shares"]}
        parts.append(f"PSNR in dB by share of the budget, {each['label']}:")
        parts.append(grid(results["records"], rows, columns, "psnr"))
    last = {"share": 1, "task": next(iter(settings["tasks"]))}
    costs = []
    for label, selection in rows.items():
        records = select(results["records"], **selection, **last)
        ceiling = show(estimate(records, "codec"))
        costs.append([label, f"{records[0]['steps']:,}", f"{records[0]['flops'] / 1e12:.1f}", ceiling])
    return [*parts, table(["", "steps", "operations, 10^12", "its autoencoder alone, dB"], costs)]


def extrapolation_tables(results: Mapping) -> list[str]:
    settings = results["settings"]
    rows = {each["label"]: {"method": name} for name, each in settings["methods"].items()}
    columns = {f"{each['label']} frames": {"task": name, "share": 1} for name, each in settings["tasks"].items()}
    titles = {
        "psnr": "PSNR in dB of all new frames:",
        "psnr_first": "PSNR in dB of the first new ones:",
        "revisited": "PSNR in dB of revisited views:",
        "sharpness": "Gradient magnitude, relative to the autoencoder's:",
    }
    return [
        part for metric, title in titles.items() for part in (title, grid(results["records"], rows, columns, metric))
    ]


def memory_tables(results: Mapping) -> list[str]:
    settings = results["settings"]
    rows = {each["label"]: {"variant": name} for name, each in settings["variants"].items()}
    columns = {f"{each['label']} frames": {"task": name, "share": 1} for name, each in settings["tasks"].items()}
    parts = []
    for metric, frames in (("revisited", "revisited views"), ("unseen", "unseen views"), ("psnr", "all new frames")):
        parts.append(f"PSNR in dB of {frames} by frames of context:")
        parts.append(grid(results["records"], rows, columns, metric))
    return [*parts, cost_table(results) if results["costs"] else "What a step costs was not measured yet."]


def cost_table(results: Mapping) -> str:
    variants, rows = results["settings"]["variants"], []
    for name, cost in results["costs"].items():
        in_training = cost["seconds_in_training"]
        rows.append(
            [
                variants[name]["label"],
                f"{cost['tokens']:,.0f}",
                f"{cost['seconds']:.2f}",
                "not known" if in_training is None else f"{in_training:.2f}",
                f"{cost['gib']:.2f}",
            ]
        )
    titles = [
        "",
        "tokens of the longest clip",
        "seconds a step of them",
        "seconds a step of the training",
        "GiB at the peak, the process included",
    ]
    return table(titles, rows)


def cache_tables(results: Mapping) -> list[str]:
    return [quality_table(results), time_table(results) if results["timings"] else "Not timed yet."]


def quality_table(results: Mapping) -> str:
    """How good the kinds of multi-level cache are, over all new frames and at some of them."""
    settings, rows = results["settings"], []
    num_frames = settings["task"]["num_frames"]
    horizons = [frame for frame in HORIZONS if frame <= num_frames]
    for record in results["records"]:
        label = settings["modes"][record["variant"]]["label"]
        by_frame = [f"{record['psnr_by_frame'][frame - 1]:.2f}" for frame in horizons]
        rows.append([label, show(estimate([record], "psnr")), *by_frame])
    titles = ["", f"PSNR in dB, {settings['task']['label']}", *(f"frame {frame}" for frame in horizons)]
    return table(titles, rows)


def time_table(results: Mapping) -> str:
    settings, rows = results["settings"], []
    slowest = next(iter(settings["modes"]))
    for name, mode in settings["modes"].items():
        cells = []
        for num_frames in settings["num_frames"]:
            seconds, rival = (median_seconds(results, each, num_frames) for each in (name, slowest))
            cells.append(f"{seconds:.1f} s ({rival / seconds:.1f}x)")
        rows.append([mode["label"], *cells])
    return table(["", *(f"{num_frames} frames" for num_frames in settings["num_frames"])], rows)


def median_seconds(results: Mapping, mode: str, num_frames: int) -> float:
    (timing,) = select(results["timings"], mode=mode, num_frames=num_frames)
    return statistics.median(timing["seconds"])


TABLES: dict[str, Callable[[Mapping], list[str]]] = {
    "learning_rate": convergence_tables,
    "convergence": convergence_tables,
    "clean_context": convergence_tables,
    "extrapolation": extrapolation_tables,
    "memory": memory_tables,
    "compression": memory_tables,
    "cache": cache_tables,
}


def grid(records: Sequence[Mapping], rows: Columns, columns: Columns, metric: str) -> str:
    """A table of a metric: a row and a column for each selection of records."""
    body = [
        [title, *(show(estimate(select(records, **row, **column), metric)) for column in columns.values())]
        for title, row in rows.items()
    ]
    return table(["", *columns], body)


def show(value: Estimate) -> str:
    if not value.num_samples:
        return "none"
    return str(value) if value.num_samples > 1 else f"{value.mean:.2f}"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
