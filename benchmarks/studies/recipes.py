"""What the paper's recipes in `examples/recipes/*.sh` would cost, from the very commands that they run.

An estimate: the operations of training are counted, and the speed is assumed.
"""

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from accelerate.commands.launch import launch_command_parser

from diffusers_far import FARTransformer3DModel, preset_config
from diffusers_far.models.presets import PRESETS
from diffusers_far.training.config import FARSettings

from .flops import far_step_flops, meta_transformer
from .scripts import ROOT, load_script


RECIPES = ROOT / "examples" / "recipes"
PEAK = 312e12  # operations a second of an A100 in bfloat16, as its maker says
UTILISATIONS = (0.4, 0.2)  # shares of it that a training may reach: a good one, and a modest one
LATENT_CHANNELS, LATENT_SIZE = 32, 8  # of the paper's autoencoders, at every size of frame

# Ends each argument with a NUL and each call with a line feed.
RECORDER = """#!/bin/sh
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\n'; } >> "$CALLS"
"""


@dataclass(frozen=True)
class Recipe:
    """The training of a recipe.

    Args:
        name (`str`): Of its script.
        arguments (`FARSettings`): Of `train_far.py`.
        num_processes (`int`): That it is launched on.
    """

    name: str
    arguments: FARSettings
    num_processes: int

    @property
    def model_name(self) -> str:
        return Path(self.arguments.transformer_config).stem.split("_ucf")[0].replace("_", "-")

    @property
    def transformer(self) -> FARTransformer3DModel:
        """Without weights."""
        name = self.arguments.transformer_config
        config = preset_config(name) if name in PRESETS else json.loads((ROOT / name).read_text())
        return meta_transformer({"in_channels": LATENT_CHANNELS, **config})

    @property
    def num_clips(self) -> int:
        """Of a step, on all processes."""
        return self.arguments.train_batch_size * (self.arguments.gradient_accumulation_steps or 1) * self.num_processes

    @property
    def step_flops(self) -> float:
        return far_step_flops(
            self.transformer,
            num_frames=self.arguments.num_frames,
            latent_size=LATENT_SIZE,
            num_clips=self.num_clips,
            teacher_forcing=self.arguments.teacher_forcing,
        )

    @property
    def flops(self) -> float:
        """Of the whole training."""
        return self.step_flops * self.arguments.max_train_steps

    def hours(self, utilisation: float, num_gpus: int = 1) -> float:
        """At a share of `PEAK`."""
        return self.flops / (utilisation * PEAK * num_gpus) / 3600


def recorded_calls(script: Path, *steps: str, **environment: str) -> list[list[str]]:
    """What a recipe would call, in order; nothing of it is run.

    Args:
        script (`Path`): The recipe.
        steps (`str`): Of its steps these alone.
        environment (`str`): What else its environment says, such as `MACHINES`.

    Raises:
        subprocess.CalledProcessError: It calls something else than Python and Accelerate, or its syntax is wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        calls = Path(folder) / "calls"
        calls.touch()
        for name in ("python", "accelerate"):
            program = Path(folder) / name
            program.write_text(RECORDER)
            program.chmod(0o755)
        environment |= {"PATH": folder, "CALLS": str(calls)}
        command = ["/bin/bash", str(script), os.path.join(folder, "raw"), os.path.join(folder, "work"), *steps]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
        return [call.split("\0")[:-1] for call in calls.read_text().split("\n")[:-1]]


def read_recipe(script: Path) -> Recipe:
    """The training of a recipe's script."""
    (call,) = [call for call in recorded_calls(script) if "examples/train_far.py" in call]
    launch = launch_command_parser().parse_args(call[2:])  # after `accelerate launch`
    arguments = load_script("train_far").parse_args(launch.training_script_args)
    return Recipe(script.stem, arguments, launch.num_processes)


def read_recipes() -> list[Recipe]:
    return [read_recipe(script) for script in sorted(RECIPES.glob("*.sh"))]


def recipe_table() -> str:
    """Markdown: a row for each recipe."""
    shares = [f"{share:.0%}" for share in UTILISATIONS]
    titles = ["recipe", "model", "clips", "steps", "operations", *(f"hours on 8 GPUs, {share}" for share in shares)]
    rows = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for recipe in read_recipes():
        transformer = recipe.transformer
        tokens = transformer.context_plan(recipe.arguments.num_frames, LATENT_SIZE, LATENT_SIZE).num_tokens
        hours = " | ".join(f"{recipe.hours(utilisation, num_gpus=8):.1f}" for utilisation in UTILISATIONS)
        rows.append(
            f"| `{recipe.name}.sh` | {recipe.model_name}, {transformer.num_parameters() / 1e6:.0f} M | {recipe.num_clips} "
            f"of {recipe.arguments.num_frames} frames, at most {tokens:,} tokens | {recipe.arguments.max_train_steps:,} | "
            f"{recipe.flops:.1e} | {hours} |"
        )
    assumption = (
        f"Counted from operations, not measured: {' and '.join(shares)} of the {PEAK / 1e12:.0f} * 10^12 operations a second "
        "of an A100 in bfloat16 are assumed."
    )
    return "\n".join([assumption, "", *rows])
