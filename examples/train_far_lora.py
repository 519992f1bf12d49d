"""Train a LoRA of a FAR pipeline: the pipeline stays as it is, a small adapter learns.

    accelerate launch examples/train_far_lora.py --pretrained_model_name_or_path far-maze --latents_dir latents-doom \
        --rank 16 --output_dir far-maze-doom

The latents come from `cache_latents.py` with the pipeline's VAE; `--dataset_name` encodes each clip when it is drawn
instead, and with `--streaming` such a dataset is read as it is needed. The result in `--output_dir` is
`pytorch_lora_weights.safetensors`, which `pipe.load_lora_weights` loads, a card and a sample video, beside the run's
checkpoints and logs.
"""

import argparse
from pathlib import Path

from diffusers_far.command_line import HelpWithDefaults, Progress, set_up_logging
from diffusers_far.training.config import (
    RUN_IDENTITY,
    add_checkpoint_arguments,
    add_data_arguments,
    add_hub_arguments,
    add_objective_arguments,
    add_optimization_arguments,
    add_validation_arguments,
    build_optimizer,
    num_fed_actions,
    require_one_source,
    training_objective,
)


DEFAULT_FPS = 8  # of the sample video, where the pipeline has none
SAMPLE = "sample.mp4"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    parser.add_argument(
        "--pretrained_model_name_or_path", required=True, help="FAR pipeline to adapt: a folder or a Hub id."
    )
    add_data_arguments(parser)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lora_alpha", type=float, help="Scales the adapter by alpha / rank; the rank if left out.")
    parser.add_argument("--lora_dropout", type=float, default=0.0)
    parser.add_argument(
        "--target_modules",
        nargs="+",
        default=["attention"],
        help="Layers to adapt: attention, mlp, or ends of layers' names, such as norm1.linear.",
    )
    add_objective_arguments(parser)
    add_optimization_arguments(parser)
    add_checkpoint_arguments(parser)
    add_validation_arguments(parser)
    add_hub_arguments(parser)
    # `num_frames`: as many as the pipeline was trained on.
    parser.set_defaults(num_frames=None, train_batch_size=8, max_train_steps=1000, lr_warmup_steps=50)
    args = parser.parse_args(arguments)
    require_one_source(parser, args)
    if args.lora_alpha is None:
        args.lora_alpha = float(args.rank)
    return args


if __name__ == "__main__":
    args = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

import torch
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler

from diffusers_far import FARPipeline
from diffusers_far.evaluation.media import write_mp4
from diffusers_far.models.identity import model_identity
from diffusers_far.training.checkpoints import checkpoint_states, find_checkpoint, load_checkpoint, save_checkpoint
from diffusers_far.training.clips import encode_batches, open_clips, open_validation_clips
from diffusers_far.training.hub import known_metadata, open_repo, push_folder, results_section, write_card
from diffusers_far.training.launch import Launch, launched
from diffusers_far.training.lora import (
    add_lora,
    checkpoint_trained_only,
    lora_card,
    lora_targets,
    save_lora,
)
from diffusers_far.training.run import (
    accumulate_gradients,
    build_accelerator,
    check_data,
    evaluated,
    hyperparameters,
    leave_out_planned_attention,
    require_finite,
    require_finite_metrics,
    run_identity,
    seed_step,
    training_batches,
    training_facts,
)
from diffusers_far.training.step_cost import describe_step_cost
from diffusers_far.training.validation import Measurement, describe_metrics, measure, side_by_side


logger = get_logger(__name__)


def save_result(
    args: argparse.Namespace,
    pipeline: FARPipeline,
    facts: dict[str, str],
    before: Measurement | None,
    after: Measurement | None,
    repo_id: str | None,
) -> None:
    """Write the adapter, a sample video and the card, and push them."""
    output_dir, sample = Path(args.output_dir), None
    save_lora(pipeline, output_dir)
    if after is not None and after.predicted is not None:
        sample = SAMPLE
        video = side_by_side(after.truth, after.predicted)
        write_mp4(output_dir / sample, video, fps=pipeline.config.fps or DEFAULT_FPS, scale=2)
    name, start = repo_id or output_dir.resolve().name, args.pretrained_model_name_or_path
    card = lora_card(pipeline, name, start, facts, known_metadata(args, relation="adapter"))
    metrics = [None if measured is None else measured.metrics for measured in (before, after)]
    write_card(output_dir, f"{card}\n{results_section(*metrics, sample)}")
    logger.info(f"Saved the adapter to {output_dir}")
    if repo_id is not None:
        url = push_folder(output_dir, repo_id, commit_message=f"LoRA after {facts['Steps']}")
        logger.info(f"Pushed to {url}")


@launched
def main(args: argparse.Namespace, launch: Launch) -> None:
    set_up_logging(__name__)
    checkpoint = None if args.dry_run else find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    output_dir = Path(args.output_dir)
    accelerator = build_accelerator(args)
    checkpoint_trained_only(accelerator)
    set_seed(args.seed)

    # 1. The pipeline and the data
    pipeline = FARPipeline.from_pretrained(args.pretrained_model_name_or_path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.requires_grad_(False).to(accelerator.device)
    transformer, config = pipeline.transformer, pipeline.transformer.config
    args.num_frames = args.num_frames or config.trained_frames or 16
    latents = open_clips(args, args.dataset_split, pipeline.vae)
    validation_latents = open_validation_clips(args, pipeline.vae)
    check_data(latents, transformer, num_fed_actions(args, latents.num_actions), validation_latents)
    leave_out_planned_attention(config)
    objective = training_objective(args)
    batches = training_batches(args, latents, objective, config, accelerator)

    # 2. The adapter
    base_model = model_identity(transformer, rounded_to=torch.float32)
    targets = lora_targets(transformer, args.target_modules)
    parameters = add_lora(
        transformer, rank=args.rank, alpha=args.lora_alpha, dropout=args.lora_dropout, targets=targets
    )
    # Conditions are dropped by the objective, each clip's by its own generator, so the model must not drop more.
    transformer.register_to_config(condition_dropout=0.0)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()

    # 3. Optimizer
    optimizer = build_optimizer(args, parameters)
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    model, optimizer = accelerator.prepare(transformer, optimizer)
    # The schedule counts optimizer steps, whatever the number of processes, so Accelerate does not step it.
    checkpoint_states(accelerator, lr_scheduler=lr_scheduler)

    if args.dry_run:
        accelerator.print(describe_step_cost(args, accelerator, model, pipeline.vae, optimizer, batches))
        return

    # 4. Start or resume
    adapter = {"rank": args.rank, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
    identity = run_identity(
        args,
        RUN_IDENTITY,
        latents,
        accelerator.num_processes,
        base_model=base_model,
        target_modules=targets,
        **adapter,
    )
    first_step, repo_id = 0, None
    if checkpoint is not None:
        first_step = load_checkpoint(accelerator, checkpoint, identity, allow_changes=args.allow_changed_run)
    if accelerator.is_main_process:
        repo_id = open_repo(output_dir, args.hub_model_id) if args.push_to_hub else None
        output_dir.mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers("train_far_lora", hyperparameters(args, accelerator))
    logger.info(
        f"{sum(parameter.numel() for parameter in parameters):,} parameters to train in {', '.join(targets)}; "
        f"{batches.extent}; from step {first_step}"
    )

    def measure_held_out(step: int) -> Measurement | None:
        if validation_latents is None or not accelerator.is_main_process:
            return None
        with evaluated(transformer), accelerator.autocast():
            measurement = measure(args, pipeline, validation_latents)
        accelerator.log({f"validation/{name}": value for name, value in measurement.metrics.items()}, step=step)
        logger.info(f"step {step}, held out:\n{describe_metrics(measurement.metrics)}")
        return measurement

    # 5. Train; without the adapter the transformer is what it was before the first step, whether the run is resumed or not
    transformer.disable_adapters()
    before = measure_held_out(step=0)
    if before is not None:
        require_finite_metrics(before.metrics, 0, output_dir)
    transformer.enable_adapters()
    transformer.train()
    num_accumulated = args.gradient_accumulation_steps
    launch.begin()  # before processes that load data begin, so that they die of no signal
    loaded = encode_batches(batches.load(first_step, args.max_train_steps, args.dataloader_num_workers), pipeline.vae)
    progress = Progress(
        args.max_train_steps,
        first_step,
        seconds_between_lines=args.logging_seconds,
        max_hours=args.max_train_hours,
        is_silent=not accelerator.is_main_process,
    )
    finished = first_step
    for step in range(first_step, args.max_train_steps):
        seed_step(args.seed, step, accelerator.process_index)
        outcome = accumulate_gradients(
            accelerator,
            model,
            config,
            loaded,
            num_accumulated=num_accumulated,
        )
        gradient_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
        require_finite(
            accelerator,
            step,
            output_dir,
            loss=outcome.loss,
            gradient_norm=gradient_norm,
            faulty_clips=outcome.faulty_clips,
        )
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()

        finished = step + 1
        scalars = {
            "train/loss": outcome.loss,
            "train/gradient_norm": float(gradient_norm),
            "train/learning_rate": lr_scheduler.get_last_lr()[0],
        }
        accelerator.log(scalars, step=finished)
        progress.update(loss=outcome.loss, learning_rate=scalars["train/learning_rate"])
        if launch.must_stop(accelerator, finished):
            break
        if finished % args.checkpointing_steps == 0 and finished < args.max_train_steps:
            save_checkpoint(accelerator, output_dir, finished, identity, args.checkpoints_total_limit)
        if finished % args.validation_steps == 0 and finished < args.max_train_steps:
            measure_held_out(finished)
    progress.close()

    # 6. Save
    if finished > first_step:
        save_checkpoint(accelerator, output_dir, finished, identity, args.checkpoints_total_limit)
    if accelerator.is_main_process and not launch.is_interrupted:
        after = measure_held_out(finished)
        if after is not None:
            require_finite_metrics(after.metrics, finished, output_dir)
        facts = training_facts(args, args.latents_dir or args.dataset_name, finished, objective) | {
            "Base model": f"weights {base_model[:16]} (SHA-256)",
            "Adapter": f"rank {args.rank}, alpha {args.lora_alpha:g}, dropout {args.lora_dropout:g}, {', '.join(targets)}",
        }
        save_result(args, pipeline, facts, before, after, repo_id)
    accelerator.end_training()


if __name__ == "__main__":
    main(args)
