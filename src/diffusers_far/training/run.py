"""One training: what its scripts share around the loop over the steps, which stands in each script.

B batch, F frames.
"""

import json
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.logging import get_logger
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    LoggerType,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    get_int_from_env,
    parse_flag_from_env,
    set_seed,
)
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import create_repo
from torch.distributed.fsdp import CPUOffloadPolicy

from ..command_line import Progress
from ..data.clips import ClipBatch
from ..models.context_parallel import ClipGroup
from ..models.internals import set_mixed_precision
from ..models.loading import name_some
from ..pipelines.hub import push_folder
from ..pipelines.precision import DtypeComparison, candidate_dtypes, compare_dtypes
from .checkpoints import checkpoint_states, find_checkpoint, load_checkpoint, read_run, save_checkpoint, way_back
from .clips import step_generator
from .config import FARSettings, RunSettings, check_context_parallel
from .launch import Launch
from .objective import ObjectiveDraw, TrainingObjective
from .shards import Shards, gathered, held_bytes, own_part


logger = get_logger(__name__)

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MAX_GRADIENT_DISTANCE = (
    0.1  # from float32's, and of the loss, for `--mixed_precision auto`; other clips change them more
)
LOSS_SCALE = 2.0**10  # exact in every dtype; without it small gradients are 0 in float16
# By these a process knows that its launcher was told to cut models in pieces.
SHARDING_VARIABLES = {
    "ACCELERATE_USE_FSDP": "FSDP 1",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
DROPOUT_STREAM = 3  # beside the streams of `clips`: what the network itself draws in a step
DRY_RUN_STEPS = 2  # the first warms up, the last is timed
MORE_PROCESSES = (2, 8, 64)  # times as many as there are, in what a dry run says


@dataclass(frozen=True)
class StepOutcome:
    """What came of one step's forward and backward passes.

    Args:
        loss (`float`): Mean over the batches of all processes.
        num_frames (`int`): Frames of the clips of all processes.
        faulty_clips (`tuple[str]`): Where the loss is not finite: the trajectories, of all processes, whose latents or
            actions are not.
    """

    loss: float
    num_frames: int
    faulty_clips: tuple[str, ...] = ()


class TrainingRun:
    """Accelerate, optimizer, schedule, averaged weights, checkpoints, clock and log of one training.

        run = TrainingRun(settings, launch)
        run.prepare(model, optimizer)
        run.start("train_far", dataset=fingerprint)
        loaded = run.load(batches)
        for _ in run.steps():
            outcome = run.accumulate_gradients(loaded, loss_of_a_pass)
            run.step(outcome)
            run.log(outcome)
            if run.must_stop():
                break
            run.save_checkpoint_if_due()
        if run.finish():
            with run.evaluated(pipeline) as is_main:
                ...  # the main process measures and saves the result

    Args:
        settings ([`RunSettings`]): Of the script. What they leave to the launcher is filled in.
        launch ([`Launch`]): See `launched`.

    Attributes:
        accelerator (`Accelerator`): Of the run.
        model (`nn.Module`): To be called in training, after `prepare`.
        ema (`EMAModel`, *optional*): The averaged weights.
        shards ([`Shards`], *optional*): Of a model that is in shards.
        first_step (`int`), finished (`int`): Steps that were done before this launch, and that are done by now.
        repo_id (`str`, *optional*): Where the result is uploaded, on the main process.

    Raises:
        ValueError: The output folder is in use, or see `build_accelerator`.
    """

    def __init__(self, settings: RunSettings, launch: Launch) -> None:
        self.settings, self.launch = settings, launch
        self.output_dir = Path(settings.output_dir)
        self.checkpoint = None
        if not settings.dry_run:
            self.checkpoint = find_checkpoint(self.output_dir, settings.resume_from_checkpoint)
        self.accelerator = build_accelerator(settings)
        set_seed(settings.seed)
        # Those that share clips follow each other, so that they are on one machine where they can be.
        size = settings.context_parallel_size
        self.clip_group = ClipGroup(dist.new_subgroups(size)[0]) if size > 1 else None
        self.ema, self.shards, self.repo_id = None, None, None
        self.first_step = self.finished = 0
        self._num_frames, self._training_seconds = 0, 0.0

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def prepare(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: EMAModel | None = None,
        order: Sequence[str] = ("lr_scheduler", "ema"),
        trial: Callable[[], Callable[[], torch.Tensor]] | None = None,
        **states: Any,
    ) -> None:
        """Hand model and optimizer to Accelerate, build the schedule, and say what checkpoints hold.

        Args:
            model (`nn.Module`): To be trained.
            optimizer (`torch.optim.Optimizer`): Of its parameters.
            ema (`EMAModel`, *optional*): Of its parameters.
            order (sequence of `str`): Of `lr_scheduler` and `ema` in checkpoints, which those of earlier versions depend on.
            trial (callable, *optional*): Makes a batch of the shapes that training has, where the model is then, and returns
                what computes the model's loss on it. Needed where the settings leave the precision to the machine.
            states: What checkpoints hold besides, see `checkpoint_states`.
        """
        settings = self.settings
        if settings.mixed_precision == "auto":
            settings.mixed_precision = self._settled_precision(model, trial)
            set_mixed_precision(self.accelerator, settings.mixed_precision)
        # The schedule counts optimizer steps, whatever the number of processes, so Accelerate does not step it.
        self.lr_scheduler = get_scheduler(
            settings.lr_scheduler,
            optimizer,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=settings.max_train_steps,
        )
        self.network, self.ema = model, ema
        own = {"lr_scheduler": self.lr_scheduler, "ema": ema}
        if self.accelerator.is_fsdp2:
            self.shards = Shards(self.accelerator, model, optimizer, ema)
            self.model, self.optimizer, own["ema"] = self.shards.network, self.shards.optimizer, self.shards.average
        else:
            self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        checkpoint_states(self.accelerator, **{name: own[name] for name in order}, **states)

    def _settled_precision(self, model: torch.nn.Module, trial: Callable[[], Callable[[], torch.Tensor]]) -> str:
        """What `auto` stands for: in the run that is resumed what it was there, else what the main process finds to be best."""
        if self.checkpoint is not None:
            return read_run(self.checkpoint)["identity"]["mixed_precision"]
        with nullcontext() if self.clip_group is None else model.sharing_clips(self.clip_group):
            comparison = compare_training(model.to(self.device), trial())
        names = {dtype: name for name, dtype in PRECISIONS.items()}
        [chosen] = broadcast_object_list([names[comparison.chosen]])
        logger.info(f"--mixed_precision auto is {chosen}: {comparison}")
        return chosen

    def start(self, project: str, **facts: Any) -> None:
        """Load the checkpoint that is resumed, and open the trackers and the repo.

        Args:
            project (`str`): What the trackers call it if the settings do not say.
            facts: What a resumed run must share besides the settings, such as the model's config; JSON values.

        Raises:
            ValueError: The checkpoint cannot be resumed, see `load_checkpoint`.
        """
        settings = self.settings
        self._identity = {**settings.identity(), "num_processes": self.accelerator.num_processes, **facts}
        if self.checkpoint is not None:
            self.first_step = self.finished = load_checkpoint(
                self.accelerator,
                self.checkpoint,
                self._identity,
                defaults=settings.defaults(),
                allow_changes=settings.allow_changed_run,
            )
        if self.ema is not None:
            self.ema.to(self.device)
        if self.is_main and not settings.dry_run:
            if getattr(settings, "push_to_hub", False):
                # Before the run, so that a missing token stops it at once and not at its end.
                name = settings.hub_model_id or self.output_dir.resolve().name
                self.repo_id = create_repo(name, exist_ok=True, token=settings.hub_token).repo_id
            self.output_dir.mkdir(parents=True, exist_ok=True)
            known = hyperparameters(settings, self.accelerator, facts)
            self.accelerator.init_trackers(settings.tracker_project_name or project, known)

    @property
    def last_step(self) -> int:
        """Where the loop ends."""
        return DRY_RUN_STEPS if self.settings.dry_run else self.settings.max_train_steps

    def load(self, batches) -> Iterator:
        """What the steps from the first to the last take, of something with a `load` such as [`TrainingBatches`]. From here
        on a signal lets the run finish its step."""
        if not self.settings.dry_run:
            self.launch.begin()  # before processes that load data begin, so that they die of no signal
        return batches.load(self.first_step, self.last_step, self.settings.dataloader_num_workers)

    def steps(self) -> Iterator[int]:
        """The numbers of the steps, from 0. What the network itself draws in one depends on its number and the seed."""
        self.progress = Progress(
            self.last_step,
            self.first_step,
            seconds_between_lines=self.settings.logging_seconds,
            max_hours=self.settings.max_train_hours,
            is_silent=not self.is_main or self.settings.dry_run,
        )
        self.model.train()
        for self._step in range(self.first_step, self.last_step):
            self._step_start_time = time.perf_counter()
            group_index = self.accelerator.process_index // self.settings.context_parallel_size
            seed_step(self.settings.seed, self._step, group_index)
            yield self._step

    def accumulate_gradients(
        self,
        loaded: Iterator[tuple[ClipBatch, ObjectiveDraw]],
        loss_of_pass: Callable[[ClipBatch, ObjectiveDraw], torch.Tensor],
    ) -> StepOutcome:
        """Forward and backward of one step; the mean gradient is left in the parameters, the same on all processes.

        Args:
            loaded (iterator): Gives the step's batches next.
            loss_of_pass (callable): Of the clips of a batch and what chance decided for them.
        """
        accelerator, num_passes = self.accelerator, self.settings.gradient_accumulation_steps
        step_loss, num_frames, batches = torch.zeros((), device=self.device), 0, []
        for number in range(num_passes):
            clips, draw = (part.to(self.device) for part in next(loaded))
            batches.append(clips)
            is_last = number == num_passes - 1
            with nullcontext() if is_last else accelerator.no_sync(self.model):
                sharing = nullcontext() if self.clip_group is None else self.network.sharing_clips(self.clip_group)
                # A whole model has been told its precision; shards have not.
                with sharing, nullcontext() if self.shards is None else accelerator.autocast():
                    loss = loss_of_pass(clips, draw) / num_passes
                accelerator.backward(loss)
            step_loss += loss.detach()
            num_frames += clips.latents.shape[0] * clips.latents.shape[1]
        step_loss = accelerator.reduce(step_loss, reduction="mean").item()
        faulty_clips = []
        if not math.isfinite(step_loss):
            faulty_clips = dict.fromkeys(gather_object([name for clips in batches for name in clips.not_finite()]))
        num_groups = accelerator.num_processes // self.settings.context_parallel_size
        return StepOutcome(step_loss, num_frames * num_groups, tuple(faulty_clips))

    def step(self, outcome: StepOutcome) -> None:
        """Change the weights by the gradients that are in the parameters, and their average.

        Raises:
            RuntimeError: Loss or gradient is not finite, see `require_finite`.
        """
        self.update_weights(outcome)
        self.average_weights()

    def update_weights(self, outcome: StepOutcome) -> None:
        """The first half of `step`."""
        gradient_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        self.gradient_norm = gradient_norm if self.shards is None else gathered(gradient_norm)
        self.require_finite(outcome.loss, self.gradient_norm, outcome.faulty_clips)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()

    def average_weights(self) -> None:
        """The second half of `step`."""
        if self.ema is not None:
            self.ema.step([own_part(parameter) for parameter in self.network.parameters()])

    def require_finite(
        self, loss: float, gradient_norm: torch.Tensor | float, faulty_clips: Sequence[str] = ()
    ) -> None:
        """Stop a run whose loss or gradient is NaN or infinite, before the optimizer changes the weights.

        With a loss scale (`--mixed_precision fp16`) a gradient that overflowed is no fault: the optimizer skips the step and
        the scale falls. It is one where the scale has fallen to 1 already.

        Args:
            loss (`float`): Of the step.
            gradient_norm (`torch.Tensor` or `float`): Of all gradients, before they are clipped.
            faulty_clips (sequence of `str`): See [`StepOutcome`].

        Raises:
            RuntimeError: With the cure, and the newest intact checkpoint with other weights.
        """
        scaler = self.accelerator.scaler
        is_overflow = scaler is not None and scaler.get_scale() > 1
        if math.isfinite(loss) and (is_overflow or math.isfinite(float(gradient_norm))):
            return
        raise RuntimeError(self._describe_not_finite(loss, float(gradient_norm), faulty_clips))

    def _describe_not_finite(self, loss: float, gradient_norm: float, faulty_clips: Sequence[str]) -> str:
        """What is not finite, why, as far as one can see, and how to go on."""
        what, value = ("norm of the gradient", gradient_norm) if math.isfinite(loss) else ("loss", loss)
        if faulty_clips:
            names = name_some(faulty_clips)
            reason, suspect = f"The data are not finite: NaN or infinite values in {names}. Mend or remove them,", None
        else:
            # The checkpoint of this very step has the weights that fail.
            suspect = self.output_dir / f"checkpoint-{self._step}"
            reason = "Lower `--learning_rate` or `--max_grad_norm`,"
        return (
            f"The {what} is {value} at step {self._step}; the weights were not changed by it. {reason} and go on with "
            f"`--allow_changed_run`. {way_back(self.output_dir, but_for=suspect)}"
        )

    def log(self, outcome: StepOutcome, **figures: float) -> None:
        """A step is done: tell the trackers and the log, with `figures` that only the trackers get."""
        if self.settings.dry_run and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.finished = self._step + 1
        self._seconds_of_last_step = time.perf_counter() - self._step_start_time
        self._training_seconds += self._seconds_of_last_step
        self._num_frames += outcome.num_frames
        shown = {
            "loss": outcome.loss,
            "learning_rate": self.lr_scheduler.get_last_lr()[0],
            "frames_per_second": self._num_frames / self._training_seconds,
        }
        told = {**shown, "gradient_norm": float(self.gradient_norm), **figures}
        self.accelerator.log({f"train/{name}": value for name, value in told.items()}, step=self.finished)
        self.progress.update(**shown)

    def log_validation(self, metrics: Mapping[str, float], step: int, text: str) -> None:
        """Held-out figures: to the trackers, and as a text to be read to the log."""
        self.accelerator.log({f"validation/{name}": value for name, value in metrics.items()}, step=step)
        logger.info(f"step {step}, held out: {text}")

    def must_stop(self) -> bool:
        """Whether the loop ends here: a signal came, or the time is over. All processes hear the same."""
        return self.launch.must_stop(self.accelerator, self.finished)

    def is_due(self, interval: int) -> bool:
        """Whether it is time for what is done every `interval` steps and once more at the end, after the loop."""
        is_between = self.finished % interval == 0 and self.finished < self.last_step
        return is_between and not self.settings.dry_run

    def save_checkpoint_if_due(self) -> None:
        if self.is_due(self.settings.checkpointing_steps):
            self._save_checkpoint()

    def finish(self) -> bool:
        """Save the last checkpoint. Says whether the result is saved now: not if a signal ended the loop."""
        self.progress.close()
        if self.finished > self.first_step:
            self._save_checkpoint()
        return not self.launch.is_interrupted

    @contextmanager
    def evaluated(self, pipeline: DiffusionPipeline) -> Iterator[bool]:
        """Inside, the pipeline's transformer is what is measured and saved, on the process that does so: the network in
        `eval` mode, with its averaged weights where there are any; of one in shards a whole copy. Every process calls this.
        Gives whether this is the process.

        Args:
            pipeline (`DiffusionPipeline`): Its transformer is the network.
        """
        if self.shards is not None:
            inside = self.shards.whole_inside(pipeline)
        else:
            inside = evaluated(self.network, self.ema) if self.is_main else nullcontext()
        with inside:
            yield self.is_main

    def _save_checkpoint(self) -> None:
        limit = self.settings.checkpoints_total_limit
        save_checkpoint(self.accelerator, self.output_dir, self.finished, self._identity, limit)

    def require_finite_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Fail a run whose model predicts no numbers, instead of saving it as a result.

        Raises:
            RuntimeError: Names the metrics, and the newest intact checkpoint before this step.
        """
        not_finite = [f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value)]
        if not_finite:
            raise RuntimeError(
                f"The validation after step {step} gave {', '.join(not_finite)}: what the model computes on held-out data is "
                f"not finite, so no result is saved. Lower `--learning_rate`, and go on with `--allow_changed_run`. "
                f"{way_back(self.output_dir, but_for=self.output_dir / f'checkpoint-{step}')}"
            )

    @property
    def result_name(self) -> str:
        """What the result is loaded by: the repo, or the folder's name."""
        return self.repo_id or self.output_dir.resolve().name

    def push(self, commit_message: str) -> None:
        """Upload the result, if that was asked for."""
        if self.repo_id is not None:
            url = push_folder(
                self.output_dir,
                self.repo_id,
                commit_message=commit_message,
                logging_dir=self.settings.logging_dir,
                token=self.settings.hub_token,
            )
            logger.info(f"Pushed to {url}")

    def describe_cost(self, batch: str) -> str:
        """What the run will cost, after a dry run, to be read: parameters; GiB of memory at the peak and seconds of a step, of
        the process that takes most; hours of the run; and what more processes would need for as many clips. Every process
        calls this.

        Args:
            batch (`str`): What a step takes, on all processes, such as `"16 clips"`.
        """
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.network.parameters()]
        total, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
        part = "" if trained == total else f", {trained / 1e6:.2f} M of them trained"
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**30
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        peak, seconds = map(max, zip(*gather_object([(peak, self._seconds_of_last_step)])))
        num_steps, num_processes = self.settings.max_train_steps, self.accelerator.num_processes
        hours = seconds * num_steps / 3600
        of_all = (
            f" ({hours * num_processes:.2f} of all {num_processes} processes together)" if num_processes > 1 else ""
        )
        return (
            f"{total / 1e6:.2f} M parameters{part}\n"
            f"{peak:.2f} GiB of memory at the peak, {seconds:.3f} s per step of {batch}\n"
            f"{hours:.2f} hours{of_all} for --max_train_steps {num_steps}, if all are like it; measuring and saving come on "
            f"top\n{self._describe_more_processes(peak, hours)}"
        )

    def _describe_more_processes(self, peak: float, hours: float) -> str:
        """What more processes would need; hours of the run and GiB at the peak are as measured. Each takes the batch that it
        takes now, so nothing changes but what it holds of the model."""
        settings, num_processes = self.settings, self.accelerator.num_processes
        dtype = torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float32

        def held(number: int, is_sharded: bool) -> float:
            sharded_in = dtype if is_sharded else None
            return held_bytes(self.network, self.optimizer, self.ema is not None, number, sharded_in) / 2**30

        rest = peak - held(num_processes, self.shards is not None)
        clips = settings.train_batch_size * getattr(settings, "gradient_accumulation_steps", 1)
        lines = [
            "As much on more processes of this kind, each with its batch, if what they send each other takes no time:"
        ]
        for times in MORE_PROCESSES:
            number, steps = times * num_processes, math.ceil(settings.max_train_steps / times)
            in_shards = f", {rest + held(number, True):.2f} in shards" if isinstance(settings, FARSettings) else ""
            lines.append(
                f"{number:5} processes: global batch {number // settings.context_parallel_size * clips}, {steps} steps, {hours / times:.2f} hours, "
                f"{rest + held(number, False):.2f} GiB each{in_shards}"
            )
        return "\n".join(lines)


def compare_training(model: torch.nn.Module, loss_of_pass: Callable[[], torch.Tensor]) -> DtypeComparison:
    """Forward and backward of a model in float32 and, its weights in float32, with mixed precision. It leaves no trace but
    `train` mode.

    Args:
        model (`nn.Module`): On its device.
        loss_of_pass (callable): Of the same clips each time.
    """
    parameters = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    device = parameters[0].device

    def step(dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
        model.zero_grad()
        torch.manual_seed(0)  # what the network itself draws
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of_pass()
        (loss * LOSS_SCALE).backward()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return {"loss": [loss.detach()], "gradient": gradients}

    passes = {dtype: partial(step, dtype) for dtype in (torch.float32, *candidate_dtypes(device))}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        comparison = compare_dtypes(passes, device, MAX_GRADIENT_DISTANCE)
    model.zero_grad()
    return comparison


def build_accelerator(settings: RunSettings) -> Accelerator:
    """Accelerate as the settings ask for it; says in the log what was launched.

    `mixed_precision` and `gradient_accumulation_steps` that are `None` become what the launcher was told.

    On a machine without an accelerator it is told so: processes that torchrun starts there would otherwise not know of
    each other, and each would train and write alone.

    Raises:
        ValueError: A tracker is unknown or not installed, or the launcher was told what the scripts cannot do.
    """
    asked = [variable for variable in SHARDING_VARIABLES if parse_flag_from_env(variable)]
    is_fsdp2 = asked == ["ACCELERATE_USE_FSDP"] and get_int_from_env(["FSDP_VERSION"], 1) == 2
    if asked and not is_fsdp2:
        refuse_sharding(asked[-1])
    output_dir, is_auto = Path(settings.output_dir), settings.mixed_precision == "auto"
    accelerator = Accelerator(
        mixed_precision="no" if is_auto else settings.mixed_precision,
        cpu=not torch.accelerator.is_available(),
        log_with=tracker_names(settings.report_to) or None,
        project_config=ProjectConfiguration(
            project_dir=str(output_dir), logging_dir=str(output_dir / settings.logging_dir)
        ),
        # The long frames' parameters have no gradient in a step without long frames.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if accelerator.mixed_precision not in PRECISIONS:
        raise ValueError(
            f"The launcher's `mixed_precision` is {accelerator.mixed_precision!r}; the training scripts know "
            f"{', '.join(PRECISIONS)}. Give one of them with `--mixed_precision`."
        )
    settings.mixed_precision = "auto" if is_auto else accelerator.mixed_precision
    launched_steps = accelerator.gradient_accumulation_steps
    if not hasattr(settings, "gradient_accumulation_steps"):
        if launched_steps > 1:
            raise ValueError(
                f"The launch asks for `gradient_accumulation_steps` {launched_steps}, but this script accumulates none; "
                "leave it out, and give a larger `--train_batch_size`."
            )
    elif settings.gradient_accumulation_steps is None:
        settings.gradient_accumulation_steps = launched_steps
    settings.check()
    if settings.context_parallel_size > 1:
        check_context_parallel(settings, accelerator.num_processes)
    if is_fsdp2 or accelerator.is_fsdp2:
        check_sharding(settings, accelerator)
    # The scripts divide the loss by it themselves; Accelerate's `backward` would do so once more.
    accelerator.gradient_accumulation_steps = 1
    logger.info(describe_launch(settings, accelerator))
    return accelerator


def refuse_sharding(variable: str) -> None:
    """Refuse a launcher that was told to cut models as the scripts cannot; a `variable` of the environment says so."""
    raise ValueError(
        f"The launch asks for {SHARDING_VARIABLES[variable]} (`{variable}`), but the training scripts know whole models and "
        "FSDP 2; launch with examples/configs/accelerate/fsdp.yaml, multi_gpu.yaml or one_gpu.yaml."
    )


def check_sharding(settings: RunSettings, accelerator: Accelerator) -> None:
    """Refuse what was never tried with a model in shards, and say where none is cut.

    Raises:
        ValueError: Says what, and what to do instead.
    """
    if not accelerator.is_fsdp2:
        logger.warning(
            "The launch asks for FSDP 2, but Accelerate cuts no model here: it shards over several GPUs only."
        )
        return
    plugin = accelerator.state.fsdp_plugin
    refused = [
        (not isinstance(settings, FARSettings), "this script", "launch it with multi_gpu.yaml"),
        (settings.mixed_precision == "fp16", "`--mixed_precision fp16`", "give bf16"),
        (settings.mixed_precision == "auto", "`--mixed_precision auto`", "give bf16"),
        (getattr(settings, "use_8bit_adam", False), "`--use_8bit_adam`", "leave it out"),
        (getattr(settings, "optimizer", None) == "muon", "`--optimizer muon`", "give adamw"),
        (getattr(settings, "compile", False), "`--compile`", "leave it out"),
        (plugin.activation_checkpointing, "`fsdp_activation_checkpointing`", "give `--gradient_checkpointing`"),
        (isinstance(plugin.cpu_offload, CPUOffloadPolicy), "`fsdp_offload_params`", "take more processes"),
    ]
    for is_asked, what, instead in refused:
        if is_asked:
            raise ValueError(f"The launch asks for FSDP 2, with which {what} was never tried; {instead}.")


def tracker_names(report_to: str) -> list[str]:
    """The trackers that `--report_to` names: one, several with commas between them, `all` that are installed, or `none`.

    Raises:
        ValueError: One is unknown or not installed: Accelerate would leave it out without a word.
    """
    names = [name.strip().lower() for name in report_to.split(",")]
    if names == ["none"]:
        return []
    available = [str(tracker) for tracker in get_available_trackers()]
    if names == ["all"] and available:
        return available
    missing = [name for name in names if name not in available]
    if missing:
        is_known = missing[0] in LoggerType.list() and missing[0] != "all"
        cure = f"`pip install {missing[0]}`, or choose" if is_known else "choose"
        raise ValueError(
            f"`--report_to` {report_to!r} asks for {missing[0]!r}, which is {'not installed' if is_known else 'no tracker'}; "
            f"{cure} from {', '.join([*available, 'none'])}."
        )
    return names


def describe_launch(settings: RunSettings, accelerator: Accelerator) -> str:
    """One line: how many processes, on which device, at which precision, and the global batch."""
    num_processes, num_accumulated = accelerator.num_processes, getattr(settings, "gradient_accumulation_steps", 1)
    size = settings.context_parallel_size
    num_groups, takers = num_processes // size, "processes" if size == 1 else f"groups of {size} processes"
    device = accelerator.device.type
    if device == "cuda":
        device += f" ({torch.cuda.get_device_name(accelerator.device)})"
    return (
        f"{num_processes} process{'es' if num_processes > 1 else ''} on {device}"
        f"{', the model in shards (FSDP 2)' if accelerator.is_fsdp2 else ''}, mixed precision {settings.mixed_precision}, "
        f"global batch {num_groups * settings.train_batch_size * num_accumulated} = {num_groups} x "
        f"{settings.train_batch_size} x {num_accumulated} ({takers}, batch of each, accumulated)"
    )


def hyperparameters(settings: RunSettings, accelerator: Accelerator, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a tracker is to know of a run: names and plain values, and no secret.

    Args:
        settings ([`RunSettings`]): Of the script, after `build_accelerator`.
        accelerator (`Accelerator`): Of the run.
        facts (`dict`): What else. The names in a dict, such as the config of `transformer` or `vae_config`, get what it is
            of in front: `transformer.num_layers`, `vae.latent_channels`.
    """
    values = {}
    for fact, value in facts.items():
        model = fact.removesuffix("_config")
        is_config = isinstance(value, dict)
        values |= {f"{model}.{name}": each for name, each in value.items()} if is_config else {fact: value}
    values |= settings.shown() | {"num_processes": accelerator.num_processes, "device": accelerator.device.type}
    return {
        name: value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value, default=str)
        for name, value in values.items()
    }


def seed_step(seed: int, step: int, process_index: int = 0) -> None:
    """Make what the network itself draws in a step, such as dropout, a function of the seed and the step: measuring,
    resuming or worker processes cannot change it."""
    torch.manual_seed(step_generator(seed, step, process_index, stream=DROPOUT_STREAM).initial_seed())


@contextmanager
def evaluated(transformer: torch.nn.Module, ema=None):
    """The transformer in `eval` mode, and with its averaged weights where there are any; afterwards as it trains.

    Args:
        transformer (`torch.nn.Module`): In `train` mode.
        ema (`diffusers.training_utils.EMAModel`, *optional*): Of its parameters.
    """
    if ema is not None:
        ema.store(transformer.parameters())
        ema.copy_to(transformer.parameters())
    transformer.eval()
    try:
        yield
    finally:
        transformer.train()
        if ema is not None:
            ema.restore(transformer.parameters())


def disable_cudnn_attention(transformer_config) -> None:
    """Let no attention of a long model run on cuDNN, which prepares itself for each new shape: the clips of such a model differ
    in length from step to step, and on an H200 its steps then took many times as long. A model without long frames sees one
    shape, and keeps cuDNN."""
    if transformer_config.long_patch_size is not None:
        torch.backends.cuda.enable_cudnn_sdp(False)


def training_facts(run: TrainingRun, objective: TrainingObjective) -> dict[str, str]:
    """What a card says of a run; a folder of data by its name, not where it lies."""
    settings = run.settings
    data = Path(settings.latents_dir or settings.dataset_name).name
    num_clips, size = settings.train_batch_size * settings.gradient_accumulation_steps, settings.context_parallel_size
    return {
        "Data": f"{data}, split {settings.dataset_split}, encoded by the VAE of the pipeline",
        "Clips": f"up to {settings.num_frames} frames, every {settings.frame_interval}",
        "Steps": f"{run.finished} of {num_clips} clips per {'process' if size == 1 else f'{size} processes'}",
        "Objective": str(objective),
        "Optimizer": f"{settings.optimizer}, learning rate {settings.learning_rate}, {settings.lr_scheduler}",
        "Seed": str(settings.seed),
    }
