"""Make a training's log small enough to keep, and draw it.

    python scripts/plot_training.py --output_dir far-maze --json training_log.json --plot training.png

Reads the tensorboard files of a run of train_far.py. The JSON holds the training loss, averaged over stretches of steps, and
every validation figure; `--plot` needs matplotlib (the `docs` extra).
"""

import argparse
import json
from pathlib import Path

from diffusers_far.command_line import HelpWithDefaults


NUM_POINTS = 200  # of the training loss


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--output_dir", type=Path, help="Of the training.")
    source.add_argument("--from_json", type=Path, help="A log that this script has written before.")
    parser.add_argument("--json", type=Path, help="Must not exist.")
    parser.add_argument("--plot", type=Path, help="PNG or SVG; replaced.")
    args = parser.parse_args(arguments)
    if args.json is not None and args.json.exists():
        parser.error(f"--json {args.json} exists; name another file, or move it away.")
    return args


if __name__ == "__main__":
    args = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_scalars(output_dir: Path) -> dict[str, dict[int, float]]:
    """Every logged scalar by name and step; where a resumed run logged a step again, the later value."""
    scalars = {}
    for path in sorted(output_dir.rglob("events*"), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for name in events.Tags()["scalars"]:
            scalars.setdefault(name, {}).update({event.step: event.value for event in events.Scalars(name)})
    if not scalars:
        raise SystemExit(f"error: `--output_dir` {str(output_dir)!r} holds no tensorboard files; name a run's folder.")
    return scalars


def thin_out(curve: dict[int, float], num_points: int = NUM_POINTS) -> dict[int, float]:
    """Means over stretches of steps, each under its last step."""
    steps, values = np.array(sorted(curve)), np.array([curve[step] for step in sorted(curve)])
    parts = np.array_split(np.arange(len(steps)), min(num_points, len(steps)))
    return {int(steps[part[-1]]): round(float(values[part].mean()), 5) for part in parts}


def training_log(output_dir: Path) -> dict[str, dict[int, float]]:
    """What is kept: the thinned training loss, and the validation figures as they are."""
    scalars = read_scalars(output_dir)
    log = {"train/loss": thin_out(scalars["train/loss"])}
    for name, curve in sorted(scalars.items()):
        if name.startswith("validation/"):
            log[name] = {step: round(value, 4) for step, value in sorted(curve.items())}
    return log


def plot(log: dict[str, dict], path: Path) -> None:
    """Loss on the left, held-out PSNR of some predicted frames on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss_axes, psnr_axes) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")

    draw(loss_axes, log.get("train/loss"), "training", linewidth=1)
    draw(loss_axes, log.get("validation/loss"), "held out, clean context", marker="o")
    for horizon in (1, 2, 4, 8):
        draw(psnr_axes, log.get(f"validation/psnr_of_frame_{horizon}"), f"predicted frame {horizon}", marker="o")
    for axes, title in ((loss_axes, "Loss"), (psnr_axes, "Held-out PSNR, dB")):
        axes.set(xlabel="optimizer step", title=title)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def draw(axes, curve: dict | None, label: str, **style) -> None:
    """A line over the steps of `curve`; nothing where the run did not measure it."""
    if curve:
        axes.plot([int(step) for step in curve], list(curve.values()), label=label, **style)


def main(args: argparse.Namespace) -> None:
    log = json.loads(args.from_json.read_text()) if args.from_json else training_log(args.output_dir)
    if args.json is not None:
        args.json.write_text(json.dumps(log, indent=1) + "\n")
    if args.plot is not None:
        plot(log, args.plot)


if __name__ == "__main__":
    main(args)
