"""Train a small model as it should be, and with mistakes that one meets, and draw their curves beside each other.

    python scripts/plot_failures.py --work_dir outputs/failures --json failures.json --plot failures.png

Plain mazes of 3 by 3 cells, the shipped VAE, a model of 1.3 million parameters: a free core takes about a minute for 150 steps.
Given again, it goes on with what is left; with more `--steps`, from where it was. `--from_json` draws anew; a plot needs
matplotlib (the `docs` extra).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from diffusers_far.command_line import HelpWithDefaults


ROOT = Path(__file__).parents[1]
VAE = ROOT / "checkpoints" / "far-maze" / "vae"
MODEL = {
    "in_channels": 8,
    "num_layers": 4,
    "num_attention_heads": 2,
    "patch_size": 2,
    "num_actions": 3,
    "action_shift": 1,
}
MAZES = "--look plain --cells 3 --num_frames 64 --num_train 64 --num_validation 8 --num_test 1"
TRAINING = (
    "--num_frames 8 --train_batch_size 8 --lr_warmup_steps 50 --use_ema --ema_decay 0.98 "
    "--validation_steps 75 --num_validation_clips 32 --num_validation_videos 16 --num_validation_frames 3 "
    "--num_validation_inference_steps 4"
)
RUNS = {  # label, whether the data's actions are late, and arguments of the training
    "healthy": ("healthy", False, "--learning_rate 2e-3"),
    "rate": ("rate ten times too high", False, "--learning_rate 2e-2"),
    "context": ("no clean context", False, "--learning_rate 2e-3 --clean_context_ratio 0"),
    "actions": ("actions one frame late", True, "--learning_rate 2e-3"),
}
KEPT = ("train/loss", "validation/loss", "validation/psnr_of_frame_1", "validation/repeated_psnr_of_frame_1")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--work_dir", type=Path, help="For data and trainings.")
    source.add_argument("--from_json", type=Path, help="What this script has written before.")
    parser.add_argument("--steps", type=int, default=150, help="Of each training.")
    parser.add_argument("--json", type=Path, help="Replaced.")
    parser.add_argument("--plot", type=Path, help="PNG or SVG; replaced.")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    args = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

from datasets import load_dataset
from plot_training import draw, training_log


def run(script: str, *words) -> None:
    """A script of `examples/`."""
    subprocess.run([sys.executable, str(ROOT / "examples" / f"{script}.py"), *map(str, words)], check=True)


def prepare(work_dir: Path) -> None:
    """Walks and their latents, and the same walks with each frame's action of the frame before; what is there is kept."""
    mazes, late = work_dir / "mazes", work_dir / "mazes-late"
    if not mazes.is_dir():
        run("make_maze_dataset", "--output_dir", mazes, *MAZES.split())
    for split in ("train", "validation"):
        walks = load_dataset(str(mazes), split=split)
        walks.map(delay_actions).to_parquet(late / "data" / f"{split}-00000.parquet")
        for dataset in (mazes, late):
            folders = ("--dataset_name", dataset, "--output_dir", work_dir / f"latents-{dataset.name}")
            run("cache_latents", *folders, "--dataset_split", split, "--vae", VAE)


def delay_actions(walk: dict) -> dict:
    """The action of each frame given to the next one, as a recorder does that writes it down too late."""
    return {"actions": [walk["actions"][0], *walk["actions"][:-1]]}


def train(work_dir: Path, num_steps: int) -> dict[str, dict[str, dict[int, float]]]:
    """The curves of each run, by name of what was logged and by step."""
    (work_dir / "model.json").write_text(json.dumps(MODEL))
    logs = {}
    for name, (_, is_late, words) in RUNS.items():
        latents = work_dir / ("latents-mazes-late" if is_late else "latents-mazes")
        folders = ("--latents_dir", latents, "--output_dir", work_dir / name, "--vae", VAE)
        model = ("--transformer_config", work_dir / "model.json", "--resume_from_checkpoint", "latest")
        run("train_far", *folders, *model, "--max_train_steps", num_steps, *TRAINING.split(), *words.split())
        log = training_log(work_dir / name)
        logs[name] = {key: log[key] for key in KEPT}
    return logs


def plot(logs: dict[str, dict[str, dict]], path: Path) -> None:
    """Training loss, held-out loss, and PSNR of the first predicted frame, a line for each run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    titles = ("Training loss", "Held-out loss, clean context", "Held-out PSNR of frame 1, dB")
    for axes, key, title in zip(panels, KEPT, titles):
        for name, log in logs.items():
            draw(axes, log[key], RUNS[name][0], linewidth=1.2)
        axes.set(xlabel="optimizer step", title=title)
        axes.grid(alpha=0.3)
    draw(panels[2], logs["healthy"][KEPT[3]], "last frame repeated", color="gray", linestyle="--")
    panels[0].legend(*panels[2].get_legend_handles_labels(), fontsize=8)  # where it hides no line
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(args: argparse.Namespace) -> None:
    if args.from_json is not None:
        logs = json.loads(args.from_json.read_text())
    else:
        prepare(args.work_dir)
        logs = train(args.work_dir, args.steps)
    if args.json is not None:
        args.json.write_text(json.dumps(logs, indent=1) + "\n")
    if args.plot is not None:
        plot(logs, args.plot)


if __name__ == "__main__":
    main(args)
