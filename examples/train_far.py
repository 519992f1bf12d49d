"""Train a FAR transformer: next-frame prediction with flow matching, on cached latents or on a dataset as it is.

    accelerate launch examples/train_far.py --latents_dir latents --vae vae-maze \
        --transformer_config examples/configs/far_maze.json --num_frames 40 --output_dir far-maze --use_ema

The latents come from `cache_latents.py`; `--dataset_name` encodes each clip when it is drawn instead, and with
`--streaming` such a dataset is read as it is needed. The result in `--output_dir` is a pipeline folder, beside the run's
checkpoints and logs: `FARPipeline.from_pretrained` loads it, and after `--objective video_dit`
`VideoDiTPipeline.from_pretrained`.
"""

import argparse
import time
from pathlib import Path

from diffusers_far.command_line import HelpWithDefaults, Progress, set_up_logging
from diffusers_far.models.presets import PRESETS, preset_config
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
    read_config,
    require_one_source,
    training_objective,
)


DEFAULT_FPS = 8  # of the videos that are written, where the pipeline has none
DEFAULT_INFERENCE_STEPS = 20  # of a new pipeline
SAMPLE = "sample.mp4"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    add_data_arguments(parser)
    parser.add_argument(
        "--vae", required=True, help="Folder or Hub id of the VAE; of latents, the one that made them."
    )
    parser.add_argument("--transformer_config", help=f"JSON file, or one of {', '.join(PRESETS)}.")
    parser.add_argument("--pretrained_model_name_or_path", help="Pipeline or transformer to start from instead.")
    parser.add_argument("--fps", type=float, help="Frames per second of the clips; goes into the pipeline.")
    parser.add_argument("--action_names", nargs="*", help="Names of the actions; go into the pipeline.")
    parser.add_argument(
        "--num_inference_steps",
        type=int,
        help="Steps of a frame where a call does not say; goes into the pipeline. If left out, those of the pipeline that "
        f"training starts from, else those that are measured, else {DEFAULT_INFERENCE_STEPS}.",
    )
    parser.add_argument(
        "--short_cache",
        type=lambda text: int(text) if text.isdecimal() else text,
        help="How a call caches that does not say: exact, rolling or a number of frames; goes into the pipeline. If left "
        "out, as the pipeline that training starts from, else exact.",
    )
    add_objective_arguments(parser)
    add_optimization_arguments(parser)
    parser.add_argument("--use_ema", action="store_true", help="Average the weights; the pipeline gets the average.")
    parser.add_argument("--ema_decay", type=float, default=0.9999)
    parser.add_argument("--compile", action="store_true", help="Compile the blocks with `torch.compile`.")
    add_checkpoint_arguments(parser)
    add_validation_arguments(parser)
    add_hub_arguments(parser)
    args = parser.parse_args(arguments)
    require_one_source(parser, args)
    return args


if __name__ == "__main__":
    args = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers import AutoModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from diffusers_far import FARPipeline, FARTransformer3DModel, VideoDiTPipeline
from diffusers_far.checks import check_count
from diffusers_far.evaluation.media import contact_sheet, write_mp4
from diffusers_far.models.codec import spatial_compression
from diffusers_far.models.kv_cache import CacheOptions
from diffusers_far.pipelines.model_card import model_card
from diffusers_far.training.checkpoints import checkpoint_states, find_checkpoint, load_checkpoint, save_checkpoint
from diffusers_far.training.clips import encode_batches, open_clips, open_validation_clips
from diffusers_far.training.hub import known_metadata, open_repo, push_folder, results_section, write_card
from diffusers_far.training.launch import Launch, launched
from diffusers_far.training.pretrained import is_pipeline, pipeline_settings, with_conditions
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


def build_transformer(args: argparse.Namespace, in_channels: int, num_actions: int | None) -> FARTransformer3DModel:
    """The model to train, new or pretrained; what the config leaves open is taken from the data."""
    if args.pretrained_model_name_or_path is not None:
        transformer = FARTransformer3DModel.from_pretrained(
            args.pretrained_model_name_or_path,
            subfolder="transformer" if is_pipeline(args.pretrained_model_name_or_path) else None,
            torch_dtype=torch.float32,
        )
        if num_actions is not None and num_actions > (transformer.config.num_actions or 0):
            return with_conditions(transformer, num_actions=num_actions, action_dim=None)
        return transformer
    if args.transformer_config is None:
        raise ValueError(
            "`--transformer_config` is missing; give a preset or a JSON file, or `--pretrained_model_name_or_path`."
        )
    if args.transformer_config in PRESETS:
        config = preset_config(args.transformer_config, action_shift=1, num_actions=num_actions)
    else:
        config = read_config("transformer_config", args.transformer_config)
    config = {"in_channels": in_channels} | config
    if args.objective == "video_dit":
        config |= {"frame_causal": False, "long_patch_size": None}
    try:
        return FARTransformer3DModel(**config)
    except TypeError as error:
        raise ValueError(f"`--transformer_config` {args.transformer_config!r} does not fit: {error}.") from error


def build_pipeline(
    args: argparse.Namespace, transformer: FARTransformer3DModel, vae: torch.nn.Module, latent_shape: tuple[int, ...]
) -> FARPipeline:
    """The pipeline of the objective, with the settings of the one that training starts from."""
    height, width = (size * spatial_compression(vae) for size in latent_shape[1:])
    settings = pipeline_settings(args.pretrained_model_name_or_path, transformer.config.num_actions)
    # A new pipeline makes frames as they were measured.
    settings.setdefault("num_inference_steps", args.num_validation_inference_steps or DEFAULT_INFERENCE_STEPS)
    own = ("fps", "action_names", "num_inference_steps", "short_cache")
    settings |= {name: getattr(args, name) for name in own if getattr(args, name) is not None}
    check_count("num_inference_steps", settings["num_inference_steps"])
    config = transformer.config
    CacheOptions(settings.get("short_cache") or "exact").check(config.short_window, config.long_patch_size is not None)
    pipeline_class = FARPipeline
    if args.objective == "video_dit":
        if args.short_cache not in (None, "exact"):
            raise ValueError(f"`--short_cache` is {args.short_cache!r}, but a video_dit has no cache; leave it out.")
        pipeline_class = VideoDiTPipeline
        settings.pop("short_cache", None)  # there is no cache
        settings["context_mode"] = "clean" if args.clean_prefix_ratio else "noised"
    pipeline = pipeline_class(transformer, vae, height=height, width=width, **settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def log_measurement(
    args: argparse.Namespace, accelerator: Accelerator, pipeline: FARPipeline, measurement: Measurement, step: int
) -> None:
    """The figures to the log and the trackers, the predicted videos to the trackers that take images and to a file."""
    logger.info(f"step {step}, held out:\n{describe_metrics(measurement.metrics)}")
    accelerator.log({f"validation/{name}": value for name, value in measurement.metrics.items()}, step=step)
    if measurement.predicted is None:
        return
    folder = Path(args.output_dir) / "validation"
    folder.mkdir(exist_ok=True)
    write_video(pipeline, measurement, folder / f"step-{step:07}.mp4")
    pairs = zip(measurement.truth[:4], measurement.predicted[:4])
    sheet = np.asarray(contact_sheet([video for pair in pairs for video in pair]))
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation/truth_above_prediction": sheet[None]}, step=step, **options)


def write_video(pipeline: FARPipeline, measurement: Measurement, path: Path) -> None:
    video = side_by_side(measurement.truth, measurement.predicted)
    write_mp4(path, video, fps=pipeline.config.fps or DEFAULT_FPS, scale=2)


def save_result(
    args: argparse.Namespace,
    pipeline: FARPipeline,
    facts: dict[str, str],
    measurement: Measurement | None,
    repo_id: str | None,
) -> None:
    """Write the pipeline, a sample video and the card, and push them."""
    output_dir, sample = Path(args.output_dir), None
    if measurement is not None and measurement.predicted is not None:
        sample = SAMPLE
        write_video(pipeline, measurement, output_dir / sample)
    metadata = known_metadata(args, relation="finetune")
    card = model_card(pipeline, repo_id or output_dir.resolve().name, facts, metadata)
    metrics = None if measurement is None else measurement.metrics
    write_card(output_dir, f"{card}\n{results_section(None, metrics, sample)}")
    pipeline.save_pretrained(output_dir)
    logger.info(f"Saved the pipeline to {output_dir}")
    if repo_id is not None:
        url = push_folder(output_dir, repo_id, commit_message=f"FAR after {facts['Steps']}")
        logger.info(f"Pushed to {url}")


@launched
def main(args: argparse.Namespace, launch: Launch) -> None:
    set_up_logging(__name__)
    checkpoint = None if args.dry_run else find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    output_dir = Path(args.output_dir)
    accelerator = build_accelerator(args)
    set_seed(args.seed)

    # 1. Data and models
    vae = AutoModel.from_pretrained(args.vae, torch_dtype=torch.float32)
    vae = vae.to(accelerator.device).requires_grad_(False).eval()
    latents = open_clips(args, args.dataset_split, vae)
    validation_latents = open_validation_clips(args, vae)
    num_actions = num_fed_actions(args, latents.num_actions)
    transformer = build_transformer(args, latents.latent_shape[0], num_actions)
    check_data(latents, transformer, num_actions, validation_latents)
    config = transformer.config
    leave_out_planned_attention(config)
    objective = training_objective(args)
    batches = training_batches(args, latents, objective, config, accelerator)
    # Conditions are dropped by the objective, each clip's by its own generator, so the model must not drop more.
    transformer.register_to_config(condition_dropout=0.0, trained_frames=args.num_frames)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.compile:
        transformer.compile_repeated_blocks(dynamic=True)

    # 2. Optimizer
    optimizer = build_optimizer(args, transformer.parameters())
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    model, optimizer = accelerator.prepare(transformer, optimizer)
    ema = EMAModel(transformer.parameters(), decay=args.ema_decay, foreach=True) if args.use_ema else None
    # The schedule counts optimizer steps, whatever the number of processes, so Accelerate does not step it.
    checkpoint_states(accelerator, lr_scheduler=lr_scheduler, ema=ema)

    if args.dry_run:
        accelerator.print(describe_step_cost(args, accelerator, model, vae, optimizer, batches))
        return

    # 3. Start or resume
    model_config = {name: value for name, value in config.items() if not name.startswith("_")}
    identity = run_identity(
        args,
        (*RUN_IDENTITY, "use_ema", "ema_decay"),
        latents,
        accelerator.num_processes,
        transformer=model_config,
    )
    first_step, repo_id = 0, None
    if checkpoint is not None:
        first_step = load_checkpoint(accelerator, checkpoint, identity, allow_changes=args.allow_changed_run)
    if ema is not None:
        ema.to(accelerator.device)
    if accelerator.is_main_process:
        repo_id = open_repo(output_dir, args.hub_model_id) if args.push_to_hub else None
        output_dir.mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers("train_far", hyperparameters(args, accelerator, transformer=model_config))
    logger.info(f"{transformer.num_parameters() / 1e6:.2f} M parameters; {batches.extent}; from step {first_step}")

    # 4. The pipeline that is measured and, in the end, saved
    pipeline = build_pipeline(args, transformer, vae, latents.latent_shape)

    def measure_held_out(step: int) -> Measurement | None:
        if validation_latents is None or not accelerator.is_main_process:
            return None
        with evaluated(transformer, ema), accelerator.autocast():
            measurement = measure(args, pipeline, validation_latents)
        log_measurement(args, accelerator, pipeline, measurement, step)
        return measurement

    # 5. Train
    transformer.train()
    num_accumulated = args.gradient_accumulation_steps
    launch.begin()  # before processes that load data begin, so that they die of no signal
    loaded = encode_batches(batches.load(first_step, args.max_train_steps, args.dataloader_num_workers), vae)
    progress = Progress(
        args.max_train_steps,
        first_step,
        seconds_between_lines=args.logging_seconds,
        max_hours=args.max_train_hours,
        is_silent=not accelerator.is_main_process,
    )
    training_seconds, num_trained_frames, finished, measurement = 0.0, 0, first_step, None
    for step in range(first_step, args.max_train_steps):
        step_start_time = time.perf_counter()
        seed_step(args.seed, step, accelerator.process_index)
        outcome = accumulate_gradients(
            accelerator,
            model,
            config,
            loaded,
            num_accumulated=num_accumulated,
        )
        gradient_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
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
        if ema is not None:
            ema.step(transformer.parameters())

        finished = step + 1
        num_trained_frames += outcome.num_frames
        training_seconds += time.perf_counter() - step_start_time
        frames_per_second = num_trained_frames / training_seconds
        scalars = {
            "train/loss": outcome.loss,
            "train/gradient_norm": float(gradient_norm),
            "train/learning_rate": lr_scheduler.get_last_lr()[0],
            "train/frames_per_second": frames_per_second,
        }
        accelerator.log(scalars, step=finished)
        progress.update(
            loss=outcome.loss, learning_rate=scalars["train/learning_rate"], frames_per_second=frames_per_second
        )
        measurement = None
        if launch.must_stop(accelerator, finished):
            break
        if finished % args.checkpointing_steps == 0 and finished < args.max_train_steps:
            save_checkpoint(accelerator, output_dir, finished, identity, args.checkpoints_total_limit)
        if finished % args.validation_steps == 0:
            measurement = measure_held_out(finished)
    progress.close()

    # 6. Save
    if finished > first_step:
        save_checkpoint(accelerator, output_dir, finished, identity, args.checkpoints_total_limit)
    if accelerator.is_main_process and not launch.is_interrupted:
        measurement = measurement or measure_held_out(finished)
        if measurement is not None:
            require_finite_metrics(measurement.metrics, finished, output_dir)
        transformer.register_to_config(condition_dropout=args.condition_dropout)
        facts = training_facts(args, args.latents_dir or args.dataset_name, finished, objective)
        facts["EMA"] = str(args.ema_decay) if args.use_ema else "none"
        with evaluated(transformer, ema):
            save_result(args, pipeline, facts, measurement, repo_id)
    accelerator.end_training()


if __name__ == "__main__":
    main(args)
