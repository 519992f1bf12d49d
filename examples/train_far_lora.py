"""Train a LoRA of a FAR pipeline: the pipeline stays as it is, a small adapter learns.

    accelerate launch examples/train_far_lora.py --pretrained_model_name_or_path far-maze --latents_dir latents-doom \
        --rank 16 --output_dir far-maze-doom

The latents come from `cache_latents.py` with the pipeline's VAE; `--dataset_name` encodes each clip when it is drawn
instead, and with `--streaming` such a dataset is read as it is needed. The result in `--output_dir` is
`pytorch_lora_weights.safetensors`, which `pipe.load_lora_weights` loads, a card and a sample video, beside the run's
checkpoints and logs.
"""

from dataclasses import dataclass
from functools import partial

from diffusers_far.command_line import set_up_logging
from diffusers_far.training.config import FARSettings, parse_settings, setting


DEFAULT_FPS = 8  # of the sample video, where the pipeline has none
SAMPLE = "sample.mp4"


@dataclass(kw_only=True)
class TrainLoRASettings(FARSettings):
    """Of this script, beside what the trainings of a FAR transformer share."""

    pretrained_model_name_or_path: str = setting(help="FAR pipeline to adapt: a folder or a Hub id.", free=True)
    rank: int = setting(16)
    lora_alpha: float | None = setting(None, "Scales the adapter by alpha / rank; the rank if left out.")
    lora_dropout: float = setting(0.0)
    target_modules: list[str] = setting(
        ["attention"], "Layers to adapt: attention, mlp, or ends of layers' names, such as norm1.linear."
    )
    num_frames: int | None = setting(
        None, "Longest clip, long frames included; if left out, as many as the pipeline was trained on.", least=1
    )
    train_batch_size: int = setting(8, "Clips per process and pass.", least=1)
    max_train_steps: int = setting(1000, least=1)
    lr_warmup_steps: int = setting(50, least=0)

    def check(self) -> None:
        super().check()
        if self.lora_alpha is None:
            self.lora_alpha = float(self.rank)


def parse_args(arguments: list[str] | None = None) -> TrainLoRASettings:
    return parse_settings(TrainLoRASettings, __doc__, arguments)


if __name__ == "__main__":
    settings = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

import torch
from accelerate.logging import get_logger

from diffusers_far import FARPipeline
from diffusers_far.evaluation.media import write_mp4
from diffusers_far.models.identity import model_identity
from diffusers_far.pipelines.model_card import results_section, write_card
from diffusers_far.training.clips import clip_loss, encode_batches
from diffusers_far.training.data import (
    check_data,
    describe_tokens,
    open_clips,
    open_validation_clips,
    training_batches,
)
from diffusers_far.training.launch import Launch, launched
from diffusers_far.training.lora import (
    add_lora,
    checkpoint_trained_only,
    lora_card,
    lora_targets,
    save_lora,
)
from diffusers_far.training.optimizers import build_optimizer
from diffusers_far.training.run import TrainingRun, disable_cudnn_attention, training_facts
from diffusers_far.training.validation import Measurement, describe_metrics, measure, side_by_side


logger = get_logger(__name__)


def save_result(
    run: TrainingRun,
    pipeline: FARPipeline,
    facts: dict[str, str],
    before: Measurement | None,
    after: Measurement | None,
) -> None:
    """Write the adapter, a sample video and the card, and push them."""
    settings, sample = run.settings, None
    save_lora(pipeline, run.output_dir)
    if after is not None and after.predicted is not None:
        sample = SAMPLE
        video = side_by_side(after.truth, after.predicted)
        write_mp4(run.output_dir / sample, video, fps=pipeline.config.fps or DEFAULT_FPS, scale=2)
    metadata = settings.known_metadata(relation="adapter")
    card = lora_card(pipeline, run.result_name, settings.pretrained_model_name_or_path, facts, metadata)
    metrics = [None if measured is None else measured.metrics for measured in (before, after)]
    write_card(run.output_dir, f"{card}\n{results_section(*metrics, sample)}")
    logger.info(f"Saved the adapter to {run.output_dir}")
    run.push(f"LoRA after {facts['Steps']}")


@launched
def main(settings: TrainLoRASettings, launch: Launch) -> None:
    set_up_logging(__name__)
    run = TrainingRun(settings, launch)

    # 1. The pipeline and the data
    pipeline = FARPipeline.from_pretrained(
        settings.pretrained_model_name_or_path, revision=settings.revision, dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    vae, transformer, config = pipeline.vae, pipeline.transformer, pipeline.transformer.config
    vae.requires_grad_(False).to(run.device)
    settings.num_frames = settings.num_frames or config.trained_frames or 16
    clips, held_out = open_clips(settings, settings.dataset_split, vae), open_validation_clips(settings, vae)
    check_data(clips, transformer, settings.num_fed_actions(clips.num_actions), held_out)
    batches = training_batches(settings, clips, config, run.accelerator)
    disable_cudnn_attention(config)

    # 2. The adapter
    base_model = model_identity(transformer, rounded_to=torch.float32)
    targets = lora_targets(transformer, settings.target_modules)
    parameters = add_lora(
        transformer,
        rank=settings.rank,
        alpha=settings.lora_alpha,
        dropout=settings.lora_dropout,
        targets=targets,
    )
    # Conditions are dropped by the objective, each clip's by its own generator, so the model must not drop more.
    transformer.register_to_config(condition_dropout=0.0)
    if settings.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()

    # 3. Optimizer, and the run that is resumed
    optimizer = build_optimizer(settings, transformer)
    run.prepare(
        transformer, optimizer, trial=lambda: partial(clip_loss, transformer, config, *batches.invented(transformer))
    )
    checkpoint_trained_only(run.accelerator, transformer)
    run.start(
        "train_far_lora",
        dataset=clips.dataset_fingerprint,
        vae=clips.vae_hash,
        base_model=base_model,
        target_modules=targets,
    )
    logger.info(
        f"{sum(parameter.numel() for parameter in parameters):,} parameters to train in {', '.join(targets)}; "
        f"{batches.description}; from step {run.first_step}"
    )

    def measure_held_out(step: int) -> Measurement | None:
        if held_out is None or settings.dry_run:
            return None
        with run.evaluated(pipeline) as is_main, run.accelerator.autocast():
            if not is_main:
                return None
            if step == 0:  # without the adapter it is what it was then, whether the run is resumed or not
                pipeline.transformer.disable_adapters()
            measurement = measure(settings, pipeline, held_out)
            pipeline.transformer.enable_adapters()
        run.log_validation(measurement.metrics, step, f"\n{describe_metrics(measurement.metrics)}")
        return measurement

    # 4. What the pipeline is worth without the adapter
    before = measure_held_out(step=0)
    if before is not None:
        run.require_finite_metrics(before.metrics, 0)

    # 5. Train
    loaded = encode_batches(run.load(batches), vae)
    for _ in run.steps():
        outcome = run.accumulate_gradients(loaded, partial(clip_loss, run.model, config))
        run.step(outcome)
        run.log(outcome)
        if run.must_stop():
            break
        run.save_checkpoint_if_due()
        if run.is_due(settings.validation_steps):
            measure_held_out(run.finished)
    if settings.dry_run:
        cost = run.describe_cost(f"{batches.clips_per_step} clips")
        run.accelerator.print(f"{describe_tokens(transformer, batches)}\n{cost}")
        return

    # 6. Save
    if run.finish():
        after = measure_held_out(run.finished)
        if after is not None:
            run.require_finite_metrics(after.metrics, run.finished)
        sizes = f"rank {settings.rank}, alpha {settings.lora_alpha:g}, dropout {settings.lora_dropout:g}"
        facts = training_facts(run, batches.objective) | {
            "Base model": f"weights {base_model[:16]} (SHA-256)",
            "Adapter": f"{sizes}, {', '.join(targets)}",
        }
        with run.evaluated(pipeline) as is_main:
            if is_main:
                save_result(run, pipeline, facts, before, after)
    run.accelerator.end_training()


if __name__ == "__main__":
    main(settings)
