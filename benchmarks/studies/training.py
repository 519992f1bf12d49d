"""One variant under one seed, trained in a folder of its own and stopped at given steps, so that it can be measured there.

A run that stopped goes on from its checkpoint as if it had not: that is what the training scripts promise. So a run that was
killed is resumed by the same call, and a curve over training is a run that is continued between measurements.
"""

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from diffusers_far.files import written_whole
from diffusers_far.training.checkpoints import checkpoint_step, list_checkpoints

from .data import DataFolder
from .flops import far_step_flops, meta_transformer, token_ar_step_flops
from .scripts import EXAMPLES, ROOT, command_line, run_script
from .settings import StudySettings, Variant, merge


DRY_RUN = re.compile(
    r"(?P<tokens>\d+) tokens per clip .*?(?P<parameters>[\d.]+) M parameters[^\n]*\s+"
    r"(?P<gib>[\d.]+) GiB of memory at the peak, (?P<seconds>[\d.]+) s per step",
    re.DOTALL,
)


def model_config(settings: StudySettings, variant: Variant) -> dict:
    """The config that a variant's script is given."""
    base = settings.transformer if variant.script == "train_far" else {}
    return merge(base, variant.model or {})


def training_arguments(settings: StudySettings, variant: Variant) -> dict:
    """Arguments of a variant's script that do not say where anything lies."""
    return {**settings.training, **(variant.arguments or {})}


def step_flops(settings: StudySettings, variant: Variant) -> float:
    """Floating-point operations of one of a variant's training steps; 0 where nothing is trained."""
    if variant.script is None:
        return 0.0
    arguments, config = training_arguments(settings, variant), model_config(settings, variant)
    num_frames, num_clips = arguments["num_frames"], arguments["train_batch_size"]
    if variant.script == "train_token_ar":
        num_codes = json.loads((ROOT / "examples" / "configs" / "vq_maze.json").read_text())["num_vq_embeddings"]
        return token_ar_step_flops(
            config["decoder"],
            num_codes=num_codes,
            tokens_per_frame=settings.latent_size**2,
            num_frames=num_frames,
            num_clips=num_clips,
        )
    if arguments.get("objective") == "video_dit":
        config |= {"frame_causal": False, "long_patch_size": None}  # as the script makes it
    return far_step_flops(
        meta_transformer(config),
        num_frames=num_frames,
        latent_size=settings.latent_size,
        num_clips=num_clips,
        teacher_forcing=arguments.get("teacher_forcing", False),
    )


def num_steps(settings: StudySettings, variant: Variant, share: float) -> int:
    """Steps that a variant has taken when `share` of its budget is spent: as many for all, or as many as cost the same."""
    budget = settings.budget
    if budget.variant is None:
        return max(1, round(share * budget.steps))
    operations = share * budget.steps * step_flops(settings, settings.variants[budget.variant])
    return max(1, round(operations / step_flops(settings, variant)))


@dataclass(frozen=True)
class TrainingRun:
    """A variant under a seed.

    Args:
        path (`Path`): Its folder; `model/` in it is what the script writes.
        settings ([`StudySettings`]), variant ([`Variant`]), seed (`int`): What is trained.
        data ([`DataFolder`]): On what.
        start ([`TrainingRun`], *optional*): Whose model it goes on from.
    """

    path: Path
    settings: StudySettings
    variant: Variant
    seed: int
    data: DataFolder
    start: "TrainingRun | None" = None

    @property
    def model_dir(self) -> Path:
        return self.path / "model"

    @property
    def steps(self) -> int:
        """Steps that are behind it, up to its last checkpoint."""
        checkpoints = list_checkpoints(self.model_dir)
        return checkpoint_step(checkpoints[-1]) if checkpoints else 0

    @property
    def last_step(self) -> int:
        """Of its whole budget."""
        return num_steps(self.settings, self.variant, 1)

    def measurements(self, step: int) -> Path:
        """The folder of what is measured after so many steps."""
        return self.path / f"step-{step:06}"

    def flops(self, step: int) -> float:
        """Floating-point operations of the training up to `step`, and of the one that it started from."""
        before = 0.0 if self.start is None else self.start.flops(self.start.last_step)
        return before + step * step_flops(self.settings, self.variant)

    def train(self, last_step: int) -> None:
        """Go on until `last_step` steps are done, and save the model as it is then.

        Raises:
            ValueError: The run is beyond that step already.
        """
        if self.variant.script is None:
            return
        if self.start is not None and not self.start.measurements(self.start.last_step).is_dir():
            self.start.train(self.start.last_step)
        first_step = self.steps
        if first_step > last_step:
            raise ValueError(
                f"{str(self.path)!r} is at step {first_step}, beyond {last_step}, where it is to be measured: its settings "
                "were others. Name another `--work_dir`, or delete the folder."
            )
        start_time = time.perf_counter()
        run_script(self.variant.script, self.arguments(last_step))
        if last_step > first_step:
            self._log({"first_step": first_step, "last_step": last_step, "seconds": time.perf_counter() - start_time})

    def arguments(self, last_step: int) -> dict:
        """Of the script, for a run up to `last_step`."""
        self.path.mkdir(parents=True, exist_ok=True)
        config_file = self.path / "config.json"
        with written_whole(config_file) as unfinished:
            unfinished.write_text(json.dumps(model_config(self.settings, self.variant), indent=2) + "\n")
        encoded = self.data.encoded(self.variant)
        if self.start is not None:
            model = {"pretrained_model_name_or_path": self.start.model_dir}
        else:
            model = {"transformer_config": config_file}
        if self.variant.script == "train_far":
            sources = {"latents_dir": encoded, "vae": self.data.vae, **model}
        else:
            sources = {"codes_dir": encoded, "vq": self.data.vq, "model_config": config_file}
        return {
            **sources,
            "output_dir": self.model_dir,
            "resume_from_checkpoint": "latest",
            "max_train_steps": last_step,
            "checkpoints_total_limit": 1,
            "validation_split": "none",  # there is none: the study measures by itself, all variants alike
            "report_to": "none",
            "seed": self.seed,
            **training_arguments(self.settings, self.variant),
        }

    def measure_cost(self) -> dict[str, float]:
        """What a step on the longest clips costs in float32: `tokens` of a clip, `parameters` in millions, `gib` of memory
        at the peak, `seconds`. Measured by `--dry_run`, in a process of its own, whose memory is nobody else's, on a new
        model: what a run goes on from may lie on another machine.

        Raises:
            RuntimeError: The script failed.
        """
        arguments = command_line({**replace(self, start=None).arguments(1), "mixed_precision": "no"}) + ["--dry_run"]
        command = [sys.executable, str(EXAMPLES / f"{self.variant.script}.py"), *arguments]
        result = subprocess.run(command, capture_output=True, text=True)
        found = DRY_RUN.search(result.stdout)
        if result.returncode or found is None:
            raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}")
        return {name: float(value) for name, value in found.groupdict().items()} | {"threads": torch.get_num_threads()}

    @property
    def seconds_per_step(self) -> float | None:
        """Of the stretches that were not interrupted, start and end of the script included; `None` without one. For
        information: the machine may have done other things meanwhile."""
        if not self._log_path.exists():
            return None
        segments = [json.loads(line) for line in self._log_path.read_text().splitlines()]
        num_steps = sum(segment["last_step"] - segment["first_step"] for segment in segments)
        return sum(segment["seconds"] for segment in segments) / num_steps

    @property
    def _log_path(self) -> Path:
        return self.path / "segments.jsonl"

    def _log(self, segment: dict) -> None:
        with open(self._log_path, "a") as log:
            log.write(json.dumps(segment) + "\n")
