"""Train a FAR transformer, or a separable one: next-frame prediction with flow matching, on cached latents or on a dataset as it is.

    accelerate launch examples/train_far.py --latents_dir latents --vae vae-maze \
        --transformer_config examples/configs/far_maze.json --num_frames 40 --output_dir far-maze --use_ema

The latents come from `cache_latents.py`; `--dataset_name` encodes each clip when it is drawn instead, and with
`--streaming` such a dataset is read as it is needed. The result in `--output_dir` is a pipeline folder, beside the run's
checkpoints and logs: `FARPipeline.from_pretrained` loads it, and after `--objective video_dit`
`VideoDiTPipeline.from_pretrained`.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from diffusers_far.command_line import set_up_logging
from diffusers_far.models.presets import PRESETS, preset_config
from diffusers_far.training.config import (
    OPTIMIZERS,
    EMASettings,
    FARSettings,
    parse_settings,
    read_config,
    setting,
)


DEFAULT_FPS = 8  # of the videos that are written, where the pipeline has none
DEFAULT_INFERENCE_STEPS = 20  # of a new pipeline
FLOW_MAP_STEPS = 4  # of a new pipeline of a flow map
SAMPLE = "sample.mp4"


@dataclass(kw_only=True)
class TrainFARSettings(EMASettings, FARSettings):
    """Of this script, beside what the trainings of a FAR transformer share."""

    vae: str = setting(help="Folder or Hub id of the VAE; of latents, the one that made them.", free=True)
    transformer_config: str | None = setting(
        None,
        f"JSON file with the model's arguments, or one of {', '.join(PRESETS)}. Its `_class_name` may be "
        "SCDTransformer3DModel, a separable model; without it, it is FARTransformer3DModel.",
        free=True,
    )
    fps: float | None = setting(None, "Frames per second of the clips; goes into the pipeline.", free=True)
    action_names: list[str] | None = setting(None, "Names of the actions; go into the pipeline.", free=True)
    num_inference_steps: int | None = setting(
        None,
        "Steps of a frame where a call does not say; goes into the pipeline. If left out, those of the pipeline that "
        f"training starts from, else those that are measured, else {DEFAULT_INFERENCE_STEPS}.",
        least=1,
        free=True,
    )
    short_cache: int | str | None = setting(
        None,
        "How a call caches that does not say: exact, rolling or a number of frames; goes into the pipeline. If left out, "
        "as the pipeline that training starts from, else exact.",
        free=True,
    )
    optimizer: Literal[(*OPTIMIZERS, "muon")] = setting(
        "adamw", "With muon the matrices of the blocks are Muon's, all else AdamW's."
    )
    flow_map: bool = setting(
        False, "Train a flow map, for few steps: a new one, or what training starts from is made one.", free=True
    )
    compile: bool = setting(False, "Compile the blocks with `torch.compile`.", free=True)

    def check(self) -> None:
        super().check()
        if isinstance(self.short_cache, str) and self.short_cache.isdecimal():
            self.short_cache = int(self.short_cache)


def parse_args(arguments: list[str] | None = None) -> TrainFARSettings:
    return parse_settings(TrainFARSettings, __doc__, arguments)


if __name__ == "__main__":
    settings = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

import numpy as np
import torch
from accelerate.logging import get_logger
from diffusers import AutoModel, FlowMapEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import EMAModel

from diffusers_far import FARPipeline, FARTransformer3DModel, SCDTransformer3DModel, VideoDiTPipeline
from diffusers_far.checks import check_count
from diffusers_far.evaluation.media import contact_sheet, write_mp4
from diffusers_far.models.codec import spatial_compression
from diffusers_far.models.identity import public_config
from diffusers_far.models.kv_cache import CacheOptions
from diffusers_far.pipelines.model_card import model_card, results_section, write_card
from diffusers_far.training.clips import clip_loss, encode_batches
from diffusers_far.training.data import (
    check_data,
    describe_tokens,
    open_clips,
    open_validation_clips,
    training_batches,
)
from diffusers_far.training.launch import Launch, launched
from diffusers_far.training.optimizers import build_optimizer
from diffusers_far.training.pretrained import as_flow_map, is_pipeline, pipeline_settings, with_conditions
from diffusers_far.training.run import TrainingRun, disable_cudnn_attention, training_facts
from diffusers_far.training.validation import Measurement, describe_metrics, measure, side_by_side


logger = get_logger(__name__)

Transformer = FARTransformer3DModel | SCDTransformer3DModel


def transformer_class(config: dict, source: str) -> type[Transformer]:
    """The class that a config names; FAR's where it names none.

    Args:
        config (`dict`): Of a transformer.
        source (`str`): The argument that gave it, and its value.

    Raises:
        ValueError: It is none that this script trains.
    """
    classes = {each.__name__: each for each in (FARTransformer3DModel, SCDTransformer3DModel)}
    name = config.get("_class_name", FARTransformer3DModel.__name__)
    if name not in classes:
        raise ValueError(f"{source} has the `_class_name` {name!r}; this script trains {' and '.join(classes)}.")
    return classes[name]


def build_transformer(settings: TrainFARSettings, in_channels: int, num_actions: int | None) -> Transformer:
    """The model to train, new or pretrained; what the config leaves open is taken from the data."""
    if settings.pretrained_model_name_or_path is not None:
        return load_transformer(settings, num_actions)
    if settings.transformer_config is None:
        raise ValueError(
            "`--transformer_config` is missing; give a preset or a JSON file, or `--pretrained_model_name_or_path`."
        )
    if settings.transformer_config in PRESETS:
        config = preset_config(settings.transformer_config, action_shift=1, num_actions=num_actions)
    else:
        config = read_config("transformer_config", settings.transformer_config)
    source = f"`--transformer_config` {settings.transformer_config!r}"
    its_class = transformer_class(config, source)
    config = {"in_channels": in_channels} | public_config(config)
    if settings.objective == "video_dit" and its_class is FARTransformer3DModel:
        config |= {"frame_causal": False, "long_patch_size": None}
    try:
        return its_class(**config)
    except TypeError as error:
        raise ValueError(f"{source} does not fit: {error}.") from error


def load_transformer(settings: TrainFARSettings, num_actions: int | None) -> Transformer:
    """The pretrained model; it gets a new embedding where the data have more actions than it knows."""
    start = settings.pretrained_model_name_or_path
    place = {"subfolder": "transformer" if is_pipeline(start) else None, "revision": settings.revision}
    config = FARTransformer3DModel.load_config(start, **place)
    its_class = transformer_class(config, f"`--pretrained_model_name_or_path` {start!r}")
    transformer = its_class.from_pretrained(start, torch_dtype=torch.float32, **place)
    if num_actions is not None and num_actions > (transformer.config.num_actions or 0):
        return with_conditions(transformer, num_actions=num_actions, action_dim=None)
    return transformer


def build_pipeline(
    settings: TrainFARSettings, transformer: Transformer, vae: torch.nn.Module, latent_shape: tuple[int, ...]
) -> FARPipeline:
    """The pipeline of the objective, with the settings of the one that training starts from."""
    height, width = (size * spatial_compression(vae) for size in latent_shape[1:])
    config, start = transformer.config, settings.pretrained_model_name_or_path
    options = {"scheduler": FlowMatchEulerDiscreteScheduler()}
    if start is not None:
        options |= pipeline_settings(start, config.num_actions, settings.revision)
    default_steps = DEFAULT_INFERENCE_STEPS
    if config.flow_map:
        default_steps, options = FLOW_MAP_STEPS, flow_map_options(settings, options)
    # A new pipeline makes frames as they were measured.
    options.setdefault("num_inference_steps", settings.num_validation_inference_steps or default_steps)
    own = ("fps", "action_names", "num_inference_steps", "short_cache")
    options |= {name: getattr(settings, name) for name in own if getattr(settings, name) is not None}
    check_count("num_inference_steps", options["num_inference_steps"])
    if options.get("short_cache"):
        CacheOptions(options["short_cache"]).check(config.short_window, config.long_patch_size is not None)
    pipeline_class = FARPipeline
    if settings.objective == "video_dit":
        pipeline_class, options = VideoDiTPipeline, video_dit_options(settings, options)
    pipeline = pipeline_class(transformer, vae, height=height, width=width, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flow_map_options(settings: TrainFARSettings, options: dict) -> dict:
    """Those of the pipeline of a flow map, from those of the model that it started from."""
    scheduler, options = options["scheduler"], dict(options)
    if not isinstance(scheduler, FlowMapEulerDiscreteScheduler):  # of the flow model that became a flow map
        options["scheduler"] = FlowMapEulerDiscreteScheduler(shift=scheduler.config.get("shift", 1.0))
        options.pop("num_inference_steps", None)
    if settings.flow_map_guidance is not None:
        options["guidance_scale"] = 1.0  # it is in the weights
    return options


def video_dit_options(settings: TrainFARSettings, options: dict) -> dict:
    """Those of a [`VideoDiTPipeline`], from those of a [`FARPipeline`]."""
    if settings.short_cache not in (None, "exact"):
        raise ValueError(f"`--short_cache` is {settings.short_cache!r}, but a video_dit has no cache; leave it out.")
    options = {name: option for name, option in options.items() if name != "short_cache"}
    return options | {"context_mode": "clean" if settings.clean_prefix_ratio else "noised"}


def log_measurement(run: TrainingRun, pipeline: FARPipeline, measurement: Measurement, step: int) -> None:
    """The figures to the log and the trackers, the predicted videos to the trackers that take images and to a file."""
    run.log_validation(measurement.metrics, step, f"\n{describe_metrics(measurement.metrics)}")
    if measurement.predicted is None:
        return
    folder = run.output_dir / "validation"
    folder.mkdir(exist_ok=True)
    write_video(pipeline, measurement, folder / f"step-{step:07}.mp4")
    pairs = zip(measurement.truth[:4], measurement.predicted[:4])
    sheet = np.asarray(contact_sheet([video for pair in pairs for video in pair]))
    for tracker in run.accelerator.trackers:
        if hasattr(tracker, "log_images"):
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation/truth_above_prediction": sheet[None]}, step=step, **options)


def write_video(pipeline: FARPipeline, measurement: Measurement, path: Path) -> None:
    video = side_by_side(measurement.truth, measurement.predicted)
    write_mp4(path, video, fps=pipeline.config.fps or DEFAULT_FPS, scale=2)


def save_result(
    run: TrainingRun, pipeline: FARPipeline, facts: dict[str, str], measurement: Measurement | None
) -> None:
    """Write the pipeline, a sample video and the card, and push them."""
    sample = metrics = None
    if measurement is not None:
        metrics = measurement.metrics
        if measurement.predicted is not None:
            sample = SAMPLE
            write_video(pipeline, measurement, run.output_dir / sample)
    card = model_card(pipeline, run.result_name, facts, run.settings.known_metadata(relation="finetune"))
    write_card(run.output_dir, f"{card}\n{results_section(None, metrics, sample)}")
    pipeline.save_pretrained(run.output_dir)
    logger.info(f"Saved the pipeline to {run.output_dir}")
    run.push(f"FAR after {facts['Steps']}")


@launched
def main(settings: TrainFARSettings, launch: Launch) -> None:
    set_up_logging(__name__)
    run = TrainingRun(settings, launch)

    # 1. Data and models
    vae = AutoModel.from_pretrained(settings.vae, torch_dtype=torch.float32)
    vae = vae.to(run.device).requires_grad_(False).eval()
    clips, held_out = open_clips(settings, settings.dataset_split, vae), open_validation_clips(settings, vae)
    num_actions = settings.num_fed_actions(clips.num_actions)
    transformer = build_transformer(settings, clips.latent_shape[0], num_actions)
    transformer = as_flow_map(transformer) if settings.flow_map else transformer
    config = transformer.config
    check_data(clips, transformer, num_actions, held_out)
    batches = training_batches(settings, clips, config, run.accelerator)
    # Conditions are dropped by the objective, each clip's by its own generator, so the model must not drop more.
    transformer.register_to_config(condition_dropout=0.0, trained_frames=settings.num_frames)
    disable_cudnn_attention(config)
    if settings.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if settings.compile:
        transformer.compile_repeated_blocks(dynamic=True)

    # 2. Optimizer, and the run that is resumed
    ema = EMAModel(transformer.parameters(), decay=settings.ema_decay, foreach=True) if settings.use_ema else None
    optimizer = build_optimizer(settings, transformer)
    run.prepare(
        transformer,
        optimizer,
        ema,
        trial=lambda: partial(clip_loss, transformer, config, *batches.invented(transformer)),
    )
    model_config = public_config(config)
    run.start("train_far", dataset=clips.dataset_fingerprint, vae=clips.vae_hash, transformer=model_config)
    logger.info(
        f"{transformer.num_parameters() / 1e6:.2f} M parameters; {batches.description}; from step {run.first_step}"
    )

    # 3. The pipeline that is measured and, in the end, saved
    pipeline = build_pipeline(settings, transformer, vae, clips.latent_shape)

    def measure_held_out() -> Measurement | None:
        if held_out is None:
            return None
        with run.evaluated(pipeline) as is_main, run.accelerator.autocast():
            measurement = measure(settings, pipeline, held_out) if is_main else None
        if measurement is not None:
            log_measurement(run, pipeline, measurement, run.finished)
        return measurement

    # 4. Train
    loaded = encode_batches(run.load(batches), vae)
    for _ in run.steps():
        outcome = run.accumulate_gradients(loaded, partial(clip_loss, run.model, config))
        run.step(outcome)
        run.log(outcome)
        if run.must_stop():
            break
        run.save_checkpoint_if_due()
        if run.is_due(settings.validation_steps):
            measure_held_out()
    if settings.dry_run:
        cost = run.describe_cost(f"{batches.clips_per_step} clips")
        run.accelerator.print(f"{describe_tokens(transformer, batches)}\n{cost}")
        return

    # 5. Save
    if run.finish():
        measurement = measure_held_out()
        if measurement is not None:
            run.require_finite_metrics(measurement.metrics, run.finished)
        facts = training_facts(run, batches.objective)
        facts["EMA"] = str(settings.ema_decay) if settings.use_ema else "none"
        with run.evaluated(pipeline) as is_main:
            if is_main:
                pipeline.transformer.register_to_config(condition_dropout=settings.condition_dropout)
                save_result(run, pipeline, facts, measurement)
    run.accelerator.end_training()


if __name__ == "__main__":
    main(settings)
