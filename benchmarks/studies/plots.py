"""A plot of each study, drawn from its numbers; needs matplotlib, which the extra `docs` brings."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from .analysis import estimate, select


def plot_convergence(results: Mapping, figure) -> None:
    """PSNR over the operations that training took."""
    settings = results["settings"]
    tasks = settings["tasks"]
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks):
        for name, variant in settings["variants"].items():
            groups = by_place(select(results["records"], variant=name, task=task), "flops")
            draw_curve(axes, groups, "psnr", variant["label"])
        decorate(axes, "operations in training", f"PSNR in dB, {tasks[task]['label']}", is_log=True)


def plot_clean_context(results: Mapping, figure) -> None:
    """PSNR over the steps of the training, a panel for each task."""
    settings = results["settings"]
    tasks = settings["tasks"]
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks):
        for name, variant in settings["variants"].items():
            groups = by_place(select(results["records"], variant=name, task=task), "steps")
            draw_curve(axes, groups, "psnr", variant["label"])
        decorate(axes, "optimizer steps", f"PSNR in dB, {tasks[task]['label']}")


def plot_extrapolation(results: Mapping, figure) -> None:
    """PSNR of all frames, of the first ones and of revisited views over the length of the video."""
    plot_over_lengths(results, figure, "methods", "method", ("psnr", "psnr_first", "revisited"), "frames of the video")


def plot_memory(results: Mapping, figure) -> None:
    """PSNR of revisited and of unseen views over the frames that are shown."""
    plot_over_lengths(results, figure, "variants", "variant", ("revisited", "unseen"), "frames of context")


def plot_over_lengths(results: Mapping, figure, group: str, key: str, metrics: tuple[str, ...], label: str) -> None:
    """A curve for each entry of a group of the settings over the tasks' lengths, a panel for each metric."""
    settings = results["settings"]
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics):
        for name, entry in settings[group].items():
            records = select(results["records"], share=1, **{key: name})
            groups = {task["length"]: select(records, task=task_name) for task_name, task in settings["tasks"].items()}
            draw_curve(axes, groups, metric, entry["label"])
        lengths = [task["length"] for task in settings["tasks"].values()]
        decorate(axes, label, f"PSNR in dB, {METRIC_LABELS[metric]}", ticks=lengths)


def plot_cache(results: Mapping, figure) -> None:
    """Seconds over the frames of a video."""
    axes = figure.subplots()
    for name, mode in results["settings"]["modes"].items():
        timings = select(results["timings"], mode=name)
        places = [timing["num_frames"] for timing in timings]
        axes.plot(places, [statistics.median(each["seconds"]) for each in timings], marker="o", label=mode["label"])
    axes.set_yscale("log")
    decorate(axes, "frames", "seconds", ticks=results["settings"]["num_frames"])


METRIC_LABELS = {
    "psnr": "all new frames",
    "psnr_first": "the first new frames",
    "revisited": "revisited views",
    "unseen": "unseen views",
}
PLOTS: dict[str, Callable] = {
    "convergence": plot_convergence,
    "clean_context": plot_clean_context,
    "extrapolation": plot_extrapolation,
    "memory": plot_memory,
    "compression": plot_memory,
    "cache": plot_cache,
}


def draw(results: Mapping, path: Path) -> None:
    """Write a study's plot, PNG or SVG.

    Raises:
        RuntimeError: There is no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("Plots need matplotlib: `pip install -r docs/requirements.txt`.") from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    PLOTS[results["study"]](results, figure)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def by_place(records: Iterable[Mapping], name: str) -> dict[float, list[Mapping]]:
    """Records by a value that they share between seeds, in its order."""
    groups = {}
    for record in sorted(records, key=lambda record: record[name]):
        groups.setdefault(record[name], []).append(record)
    return groups


def draw_curve(axes, groups: Mapping[float, list[Mapping]], metric: str, label: str) -> None:
    """Means over seeds and walks with their 95% intervals; places without a number are left out."""
    points = {place: estimate(records, metric) for place, records in groups.items() if records}
    points = {place: point for place, point in points.items() if point.num_samples}
    axes.errorbar(
        list(points),
        [point.mean for point in points.values()],
        yerr=[point.half_width for point in points.values()],
        marker="o",
        capsize=2,
        label=label,
    )


def decorate(axes, x_label: str, y_label: str, *, is_log: bool = False, ticks: Sequence[float] = ()) -> None:
    """Labels and grid; with `ticks` a logarithmic axis has these alone, as plain numbers."""
    axes.set(xlabel=x_label, ylabel=y_label)
    if is_log or ticks:
        axes.set_xscale("log")
    if ticks:
        axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.grid(alpha=0.3)
