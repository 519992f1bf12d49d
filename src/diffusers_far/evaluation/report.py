"""From the results of cases to the figures of a protocol, ready for JSON, and to a row for people.

V videos, S seeds, T trajectories, F frames.
"""

from dataclasses import asdict

import torch
from PIL import Image

from .metrics import Estimate, Gaussian, best_trajectory, frechet_distance, scores_by_view
from .protocols import Case, ContinuationProtocol, RolloutProtocol, Task
from .results import ResultFolder
from .rollouts import MetricNetworks


NO_WEIGHTS = {"missing": "no weights"}
FRAME_METRICS = {"psnr": True, "ssim": True, "lpips": False}  # whether higher is better


def summarize(protocol: RolloutProtocol, networks: MetricNetworks, folder: ResultFolder) -> dict:
    """The figures of all tasks.

    Args:
        networks ([`MetricNetworks`]): Those that the cases were run with.
        folder ([`ResultFolder`]): With every case that can be measured.

    Returns:
        `dict` by task. Frames: `psnr`, `ssim` and `lpips`, each of the best trajectory, of all, and of repeating the last
        frame, by video and `by_horizon`; `views` where there are poses. Distributions: `frechet_distance` and `fvd`, mean
        and deviation over seeds and trajectories. What has no weights is `{"missing": "no weights"}`.
    """
    scores = {}
    for task in protocol.tasks:
        figures = asdict(task)
        if task.compares_frames:
            figures |= summarize_frames(protocol, task, networks, folder)
        if task.compares_distributions:
            figures |= summarize_distributions(protocol, task, networks, folder)
        scores[task.name] = figures
    return scores


def summarize_frames(protocol: RolloutProtocol, task: Task, networks: MetricNetworks, folder: ResultFolder) -> dict:
    """Scores of frames: the best trajectory of each video, then the mean over seeds, then over videos."""
    results = {
        (seed, video): [folder.read(Case(task.name, seed, video, t)) for t in range(task.num_trajectories)]
        for seed in protocol.seeds
        for video in range(protocol.num_videos)
    }

    def stacked(name: str, *, first_only: bool = False) -> torch.Tensor:
        """(S, V, T, F), or (S, V, F) of the first trajectory."""
        rows = [
            [
                results[seed, video][0][name]
                if first_only
                else torch.stack([trajectory[name] for trajectory in results[seed, video]])
                for video in range(protocol.num_videos)
            ]
            for seed in protocol.seeds
        ]
        return torch.stack([torch.stack(row) for row in rows])

    figures = {}
    for metric, higher_is_better in FRAME_METRICS.items():
        if metric == "lpips" and networks.lpips is None:
            figures[metric] = NO_WEIGHTS
            continue
        scores = stacked(metric)
        best = torch.stack([best_trajectory(each, higher_is_better=higher_is_better) for each in scores])
        by_kind = {
            "best": best.mean(dim=0),
            "mean": scores.mean(dim=(0, 2)),
            "repeated": stacked(f"repeated_{metric}", first_only=True).mean(dim=0),
        }  # each (V, F)
        figures[metric] = {name: Estimate.of(values.mean(dim=1)).to_json() for name, values in by_kind.items()}
        figures[metric]["by_horizon"] = {
            name: [Estimate.of(values[:, frame]).to_json() for frame in range(task.num_frames)]
            for name, values in by_kind.items()
        }
        if metric == "psnr" and "revisited" in results[protocol.seeds[0], 0][0]:
            masks = {view: stacked(view, first_only=True)[0] for view in ("revisited", "unseen")}
            gain = by_kind["best"] - by_kind["repeated"]
            figures["views"] = scores_by_view(by_kind["best"], gain, masks)
    return figures


def summarize_distributions(
    protocol: RolloutProtocol, task: Task, networks: MetricNetworks, folder: ResultFolder
) -> dict:
    """Distances between all true videos and all made ones, one for each seed and trajectory."""
    used = {
        "frechet_distance": ("image_features", networks.image_features),
        "fvd": ("video_features", networks.video_features),
    }
    figures = {}
    for metric, (name, network) in used.items():
        if network is None:
            figures[metric] = NO_WEIGHTS
            continue

        def gaussian(seed: int, trajectory: int, prefix: str = "") -> Gaussian:
            cases = [Case(task.name, seed, video, trajectory) for video in range(protocol.num_videos)]
            features = [torch.atleast_2d(folder.read(case)[prefix + name]) for case in cases]
            return Gaussian.of_samples(torch.cat(features))

        truth = gaussian(protocol.seeds[0], 0, "true_")
        distances = [
            frechet_distance(gaussian(seed, trajectory), truth)
            for seed in protocol.seeds
            for trajectory in range(task.num_trajectories)
        ]
        values = torch.tensor(distances, dtype=torch.float64)
        figures[metric] = {
            "network": network.name,
            "mean": values.mean().item(),
            "deviation": values.std().item() if len(values) > 1 else None,
            "values": distances,
            "num_samples": truth.num_samples,  # of each side: frames, or videos
            "num_features": len(truth.mean),
        }
    return figures


def markdown_table(scores: dict, protocol: RolloutProtocol, model: str, dataset: str) -> str:
    """A table of one row; the best trajectory's scores of frames, with 95% intervals over videos."""
    tasks = scores["tasks"].values()
    frames = next((task for task in tasks if task["compares_frames"]), {})
    distributions = next((task for task in tasks if task["compares_distributions"]), {})
    lengths = ", ".join(f"{task['num_context_frames']} -> {task['num_frames']}" for task in tasks)
    views = frames.get("views", {})
    columns = {
        "protocol": f"{protocol.name}, {lengths}",
        "model": model,
        "dataset": dataset,
        "videos": f"{protocol.num_videos:,}",
    }
    if frames:
        columns |= {
            "SSIM": show_estimate(frames["ssim"], "best", 3),
            "PSNR": show_estimate(frames["psnr"], "best", 2),
            "LPIPS": show_estimate(frames["lpips"], "best", 3),
            "PSNR of repeating": show_estimate(frames["psnr"], "repeated", 2),
        }
        if isinstance(protocol, ContinuationProtocol):
            for view in ("revisited", "unseen"):
                columns[f"PSNR, {view}"] = show_estimate(views[view], "psnr", 2) if views else "no poses"
    if distributions:
        columns["Fréchet distance of frames"] = show_distance(distributions["frechet_distance"], "frames")
        columns["FVD"] = show_distance(distributions["fvd"], "videos")
    rows = [columns.keys(), ["---"] * len(columns), columns.values()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def show_estimate(figures: dict, name: str, digits: int) -> str:
    if "missing" in figures:
        return figures["missing"]
    mean, half_width = figures[name]["mean"], figures[name]["half_width"]
    if mean is None:
        return "no frames"
    return f"{mean:.{digits}f}" + ("" if half_width is None else f" ± {half_width:.{digits}f}")


def show_distance(figures: dict, unit: str) -> str:
    if "missing" in figures:
        return figures["missing"]
    deviation = "" if figures["deviation"] is None else f" (deviation {figures['deviation']:.2f})"
    return f"{figures['mean']:.2f}{deviation}, {figures['network']}, {figures['num_samples']:,} {unit}"


def join_sheets(folder: ResultFolder, gap: int = 8) -> None:
    """All samples of an evaluation on one contact sheet, `samples/contact_sheet.png`."""
    paths = sorted((folder.path / "samples").glob("*-video*.png"))
    if not paths:
        return
    sheets = [Image.open(path).convert("RGB") for path in paths]
    size = (max(sheet.width for sheet in sheets), sum(sheet.height + gap for sheet in sheets) - gap)
    joined = Image.new("RGB", size, "white")
    top = 0
    for sheet in sheets:
        joined.paste(sheet, (0, top))
        top += sheet.height + gap
    joined.save(folder.path / "samples" / "contact_sheet.png")
