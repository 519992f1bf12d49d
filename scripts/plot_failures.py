"""Train a small model as it should be, and with mistakes that one meets, and draw their curves beside each other.

    python scripts/plot_failures.py --work_dir outputs/failures --json failures.json --plot failures.png

Walks through Crafter (extra `worlds`), the VAE of the shipped model, a model of a million parameters. Given again, it goes on
with what is left; with more `--steps`, from where it was. A plot needs matplotlib (extra `docs`).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from diffusers_far.command_line import HelpWithDefaults


ROOT = Path(__file__).parents[1]
VAE = ROOT / "checkpoints" / "far-crafter" / "vae"
MODEL = {
    "in_channels": 8,
    "num_layers": 3,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "axes_dims_rope": [8, 12, 12],
    "patch_size": 2,
    "short_window": 16,
    "num_actions": 5,
    "action_shift": 1,
}
WALKS = "--num_frames 64 --area 32 --walk mixed --start anywhere --num_train 64 --num_validation 16 --num_test 1"
TRAINING = (
    "--num_frames 8 --train_batch_size 8 --lr_warmup_steps 20 --logit_mean 1 --use_ema --ema_decay 0.98 --seed 0 "
    "--validation_steps 50 --num_validation_clips 32 --num_validation_videos 16 --num_validation_frames 4 "
    "--num_validation_inference_steps 4"
)
RUNS = {  # label, what differs in the model, and arguments of the training
    "healthy": ("healthy", {}, "--learning_rate 2e-3"),
    "rate": ("rate ten times too high", {}, "--learning_rate 2e-2"),
    "context": ("no clean context", {}, "--learning_rate 2e-3 --clean_context_ratio 0"),
    "actions": ("actions one frame late", {"action_shift": 0}, "--learning_rate 2e-3"),
}
PANELS = {
    "train/loss": "Training loss",
    "validation/loss": "Held-out loss, clean context",
    "validation/psnr_of_frame_1": "PSNR of new frame 1, dB",
    "validation/psnr_of_frame_4": "PSNR of new frame 4, dB",
}
REPEATED = {key: key.replace("psnr", "repeated_psnr") for key in PANELS if "psnr" in key}
DRIFTED = list(PANELS)[-1]  # where the frame before is far enough from what comes
KEPT = (*PANELS, *REPEATED.values())


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--work_dir", type=Path, help="For data and trainings.")
    source.add_argument("--from_json", type=Path, help="What this script has written before.")
    parser.add_argument("--steps", type=int, default=1000, help="Of each training.")
    parser.add_argument("--json", type=Path, help="Replaced.")
    parser.add_argument("--plot", type=Path, help="PNG or SVG; replaced.")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    args = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

from plot_training import draw, training_log


def run(script: str, *words) -> None:
    """A script of `examples/`."""
    subprocess.run([sys.executable, str(ROOT / "examples" / f"{script}.py"), *map(str, words)], check=True)


def prepare(work_dir: Path) -> None:
    """Walks and their latents; what is there is kept."""
    walks = work_dir / "walks"
    if not walks.is_dir():
        run("make_crafter_dataset", "--output_dir", walks, *WALKS.split())
    for split in ("train", "validation"):
        folders = ("--dataset_name", walks, "--output_dir", work_dir / "latents")
        run("cache_latents", *folders, "--dataset_split", split, "--vae", VAE)


def train(work_dir: Path, num_steps: int) -> dict[str, dict[str, dict[int, float]]]:
    """The curves of each run, by name of what was logged and by step."""
    logs = {}
    for name, (_, changes, words) in RUNS.items():
        config = work_dir / f"{name}.json"
        config.write_text(json.dumps(MODEL | changes))
        folders = ("--latents_dir", work_dir / "latents", "--output_dir", work_dir / name, "--vae", VAE)
        model = ("--transformer_config", config, "--resume_from_checkpoint", "latest")
        run("train_far", *folders, *model, "--max_train_steps", num_steps, *TRAINING.split(), *words.split())
        log = training_log(work_dir / name)
        logs[name] = {key: log[key] for key in KEPT}
    return logs


def plot(logs: dict[str, dict[str, dict]], path: Path) -> None:
    """A panel for each curve of `PANELS`, a line in it for each run; in the last what repeating a frame has."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 4, figsize=(13, 3.3), layout="constrained")
    for axes, (key, title) in zip(panels, PANELS.items()):
        for name, log in logs.items():
            draw(axes, log[key], RUNS[name][0], linewidth=1.2)
        if key == DRIFTED:
            draw(axes, logs["healthy"][REPEATED[key]], "last frame repeated", color="gray", linestyle="--")
        axes.set(xlabel="optimizer step", title=title)
        axes.grid(alpha=0.3)
    panels[0].legend(*panels[-1].get_legend_handles_labels(), fontsize=8)  # where it hides no line
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


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
