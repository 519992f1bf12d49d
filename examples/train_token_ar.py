"""Train the token-autoregressive baseline: a decoder of transformers that predicts a video code by code.

    accelerate launch examples/train_token_ar.py --codes_dir codes --vq vq-maze \
        --model_config examples/configs/token_ar_maze.json --num_frames 16 --output_dir token-ar-maze --use_ema

The codes come from `cache_latents.py` with a `VQModel`. The result in `--output_dir` loads with
`TokenARForVideo.from_pretrained`, the VQ autoencoder from its subfolder `vq`, beside the run's checkpoints and logs.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from diffusers_far.command_line import set_up_logging
from diffusers_far.training.config import EMASettings, OptimizerSettings, parse_settings, read_config, setting


@dataclass(kw_only=True)
class TrainTokenSettings(EMASettings, OptimizerSettings):
    """Of this script, beside what all trainings share."""

    codes_dir: str = setting(help="Folder that cache_latents.py wrote with a VQModel.", free=True)
    vq: str = setting(help="Folder or Hub id of the VQModel that made the codes.", free=True)
    model_config: str = setting(help="JSON file: `decoder`, and what else TokenARConfig takes.", free=True)
    num_frames: int = setting(16, "Frames of a clip.", least=1)
    condition_dropout: float = setting(0.1, "Share of actions that become null.")
    num_validation_clips: int = setting(64, "Clips of the held-out loss.", least=1, free=True)
    num_validation_videos: int = setting(8, "Clips that are continued; 0: none.", least=0, free=True)


def parse_args(arguments: list[str] | None = None) -> TrainTokenSettings:
    return parse_settings(TrainTokenSettings, __doc__, arguments)


if __name__ == "__main__":
    settings = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

from accelerate.logging import get_logger
from diffusers import AutoModel, VQModel
from diffusers.training_utils import EMAModel

from diffusers_far import TokenARConfig, TokenARForVideo
from diffusers_far.data.latents import LatentDataset
from diffusers_far.models.loading import saved_whole
from diffusers_far.training.clips import TrainingBatches, usable_trajectories
from diffusers_far.training.launch import Launch, launched
from diffusers_far.training.objective import TrainingObjective
from diffusers_far.training.optimizers import build_optimizer
from diffusers_far.training.run import TrainingRun, evaluated
from diffusers_far.training.tokens import check_codes, measure_tokens, token_loss
from diffusers_far.training.validation import describe_metrics


logger = get_logger(__name__)


def model_config(settings: TrainTokenSettings, vq: VQModel, codes: LatentDataset) -> dict:
    """The arguments of `TokenARConfig`: the file's, and from codebook and data what it leaves open."""
    _, height, width = codes.latent_shape
    config = read_config("model_config", settings.model_config)
    if "decoder" not in config:  # transformers' own default is a model of billions of weights
        raise ValueError(f"`--model_config` {settings.model_config!r} has no `decoder`, the sizes of the transformer.")
    return {
        "num_codes": vq.config.num_vq_embeddings,
        "tokens_per_frame": height * width,
        "num_actions": codes.num_actions,
        "trained_frames": settings.num_frames,
    } | config


@launched
def main(settings: TrainTokenSettings, launch: Launch) -> None:
    set_up_logging(__name__)
    run = TrainingRun(settings, launch)

    # 1. Data and models
    vq = AutoModel.from_pretrained(settings.vq)
    if not isinstance(vq, VQModel):
        raise ValueError(
            f"`--vq` {settings.vq!r} is of the class {type(vq).__name__}; give the VQModel that made the codes."
        )
    vq = vq.to(run.device).requires_grad_(False).eval()
    codes, held_out = LatentDataset(settings.codes_dir, settings.dataset_split), None
    if (Path(settings.codes_dir) / settings.validation_split).is_dir():
        held_out = LatentDataset(settings.codes_dir, settings.validation_split)
    config_arguments = model_config(settings, vq, codes)
    token_ar = TokenARForVideo(TokenARConfig(**config_arguments))
    config = token_ar.config
    for split in (codes, held_out):
        if split is not None:
            check_codes(split, vq)
            split.check_rows(config.num_actions)
            usable_trajectories(split, settings.num_frames)
    if settings.gradient_checkpointing:
        token_ar.activation_checkpointing_enable()
    batches = TrainingBatches(
        codes,
        TrainingObjective(condition_dropout=settings.condition_dropout),  # of its draws only the dropped actions count
        num_frames=settings.num_frames,
        short_window=None,
        interval=1,
        batch_size=settings.train_batch_size,
        num_accumulated=settings.gradient_accumulation_steps,
        seed=settings.seed,
        process_index=run.accelerator.process_index,
        num_processes=run.accelerator.num_processes,
    )
    settings.count_epochs(len(batches.trajectories), batches.clips_per_step)

    # 2. Optimizer, and the run that is resumed
    ema = EMAModel(token_ar.parameters(), decay=settings.ema_decay, foreach=True) if settings.use_ema else None
    optimizer = build_optimizer(settings, token_ar)
    run.prepare(
        token_ar,
        optimizer,
        ema,
        trial=lambda: partial(token_loss, token_ar, config, *(part.to(run.device) for part in batches[0])),
    )
    run.start("train_token_ar", dataset=codes.dataset_fingerprint, vae=codes.vae_hash, model=config_arguments)
    logger.info(
        f"{token_ar.num_parameters() / 1e6:.2f} M parameters; {batches.description} of {config.tokens_per_frame} codes; from "
        f"step {run.first_step}"
    )

    def measure_held_out() -> dict[str, float]:
        if held_out is None or not run.is_main:
            return {}
        with evaluated(token_ar, ema):
            metrics = measure_tokens(
                token_ar,
                vq,
                held_out,
                num_frames=settings.num_frames,
                num_clips=settings.num_validation_clips,
                num_videos=settings.num_validation_videos,
                num_new_frames=settings.num_validation_frames,
                batch_size=settings.train_batch_size,
            )
        run.log_validation(metrics, run.finished, f"\n{describe_metrics(metrics)}")
        return metrics

    # 3. Train
    loaded = run.load(batches)
    for _ in run.steps():
        outcome = run.accumulate_gradients(loaded, partial(token_loss, run.model, config))
        run.step(outcome)
        run.log(outcome)
        if run.must_stop():
            break
        run.save_checkpoint_if_due()
        if run.is_due(settings.validation_steps):
            measure_held_out()
    if settings.dry_run:
        num_tokens = settings.num_frames * config.tokens_per_frame
        cost = run.describe_cost(f"{batches.clips_per_step} clips")
        run.accelerator.print(f"{num_tokens} tokens per clip of {settings.num_frames} frames\n{cost}")
        return

    # 4. Save
    if run.finish() and run.is_main:
        run.require_finite_metrics(measure_held_out(), run.finished)
        with evaluated(token_ar, ema), saved_whole(run.output_dir) as folder:
            token_ar.save_pretrained(folder)
            vq.save_pretrained(folder / "vq")
        logger.info(f"Saved the model to {run.output_dir} after step {run.finished}")
    run.accelerator.end_training()


if __name__ == "__main__":
    main(settings)
