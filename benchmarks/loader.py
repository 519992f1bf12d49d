"""Speed of the input: how many frames a second the loaders deliver, and how many a model is trained on.

python -m benchmarks.loader --output docs/results/loader.json            # small sets of every form are made for it
python -m benchmarks.loader --images mazes --latents latents             # or the forms of your own data

The loaders are those of `train_far.py`: opened, cut and drawn by the same code. `python -m benchmarks.report` shows the file as
Markdown.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from diffusers import AutoModel

from diffusers_far import FARTransformer3DModel, preset_config
from diffusers_far.command_line import HelpWithDefaults
from diffusers_far.models.codec import encode_video
from diffusers_far.models.presets import PRESETS
from diffusers_far.training.clips import StepBatches, clip_loss, encode_batches
from diffusers_far.training.config import FARSettings
from diffusers_far.training.data import open_clips, training_batches
from diffusers_far.training.optimizers import build_optimizer

from .loader_sets import UCF_SIZE, DataSets, make_sets, prepare
from .measurement import Measurement, Row
from .table import show_rows
from .timing import describe_machine


ROOT = Path(__file__).parents[1]
NO_END = 10**9  # steps


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    parser.add_argument("--images", type=Path, help="A dataset of images; with it no sets are made.")
    parser.add_argument("--videos", type=Path, help="A dataset of video files, likewise.")
    parser.add_argument("--latents", type=Path, help="What cache_latents.py wrote with --vae, likewise.")
    parser.add_argument("--dataset_split", default="train")
    parser.add_argument("--num_actions", type=int, default=3, help="Discrete actions in these data.")
    parser.add_argument("--vae", type=Path, default=ROOT / "checkpoints" / "far-maze" / "vae")
    parser.add_argument(
        "--model", type=Path, default=ROOT / "checkpoints" / "far-maze", help="A pipeline, for the size of its model."
    )
    parser.add_argument("--num_trajectories", type=int, default=16, help="Of the sets that are made.")
    parser.add_argument("--num_trajectory_frames", type=int, default=300, help="Of each of these.")
    parser.add_argument("--num_frames", type=int, default=16, help="Of a clip.")
    parser.add_argument("--batch_size", type=int, default=4, help="Clips of a batch.")
    parser.add_argument("--num_workers", type=int, nargs="+", default=[0, 2], help="Processes that load.")
    parser.add_argument("--num_rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="Of each run of a loader.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file, written after every row; must not exist.")
    args = parser.parse_args(arguments)
    if args.output is not None and args.output.exists():
        parser.error(f"--output {args.output} exists; name another file, or move it away.")
    if args.num_rounds < 1 or args.seconds <= 0:
        parser.error(f"--num_rounds is {args.num_rounds} and --seconds {args.seconds}; both must be above 0.")
    return args


@dataclass(frozen=True)
class LoaderForm:
    """Data as a training reads them.

    Args:
        name (`str`): In tables.
        flags (`dict`): Settings of train_far.py: where they lie.
    """

    name: str
    flags: dict[str, str | bool]


def forms_of(sets: DataSets) -> list[LoaderForm]:
    forms = [] if sets.latents is None else [LoaderForm("cached latents", {"latents_dir": str(sets.latents)})]
    for name, folder in (("images", sets.images), ("videos", sets.videos)):
        if folder is not None:
            forms.append(LoaderForm(name, {"dataset_name": str(folder)}))
            forms.append(LoaderForm(f"{name}, streamed", {"dataset_name": str(folder), "streaming": True}))
    return forms


class LoaderBenchmark:
    """Times loaders and trainings in turn.

    Args:
        args (`argparse.Namespace`): Of `parse_args`.
        vae (`nn.Module`): Encodes images and videos.
        models (`dict`): [`FARTransformer3DModel`] by name: what is trained.
    """

    def __init__(
        self, args: argparse.Namespace, vae: torch.nn.Module, models: dict[str, FARTransformer3DModel]
    ) -> None:
        self.args, self.models = args, models
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        self.vae = vae.to(self.accelerator.device).eval()

    def rows(self, sets: DataSets) -> Iterator[Row]:
        """The trainings first, then the loaders beside them, then what is done once: encoding and preparing."""
        forms = forms_of(sets)
        trained = {}
        for name, model in self.models.items():
            trained[name] = self.measure_training(model, forms[0])
            settings = {"model": name, "parameters": f"{model.num_parameters() / 1e6:.1f} M"}
            yield Row("training", settings, {"frames a second": trained[name]})
        for form in forms:
            for num_workers in self.args.num_workers:
                loaded = self.measure_loader(form, num_workers)
                ratios = {f"of {name}": loaded.per(speed) for name, speed in trained.items()}
                settings = {"form": form.name, "worker processes": num_workers}
                yield Row("loader", settings, {"frames a second": loaded, **ratios})
        for form in forms:
            if form.name in ("images", "videos"):
                yield Row("encoding", {"form": form.name}, {"frames a second": self.measure_encoding(form)})
        for layout, folder in sets.sources.items():
            size = (64, 64) if layout == "classfolder" else None
            name = f"{layout}, {UCF_SIZE[1]}x{UCF_SIZE[0]} to 64x64" if size else layout
            yield Row(
                "preparation", {"source": name}, {"frames a second": self.measure_preparation(layout, folder, size)}
            )

    def batches(self, form: LoaderForm, transformer_config) -> StepBatches:
        """As train_far.py builds them."""
        settings = self.training_settings(form)
        clips = open_clips(settings, settings.dataset_split, self.vae)
        return training_batches(settings, clips, transformer_config, self.accelerator)

    def training_settings(self, form: LoaderForm) -> FARSettings:
        own = ("dataset_split", "num_actions", "num_frames", "seed")
        values = {name: getattr(self.args, name) for name in own} | {"train_batch_size": self.args.batch_size}
        return FARSettings(output_dir="unused", gradient_accumulation_steps=1, **values, **form.flags)

    def measure_loader(self, form: LoaderForm, num_workers: int) -> Measurement:
        """Frames a second that reach the training, not yet encoded. The clock starts with the first batch that is there,
        so that starting processes does not count."""
        batches = self.batches(form, next(iter(self.models.values())).config)
        speeds = []
        for _ in range(self.args.num_rounds):
            loaded = batches.load(0, NO_END, num_workers)
            next(loaded)
            num_frames, start = 0, time.perf_counter()
            while (seconds := time.perf_counter() - start) < self.args.seconds:
                clips, _ = next(loaded)
                num_frames += len(clips) * clips.num_frames
            speeds.append(num_frames / seconds)
            del loaded  # and with it the processes
        return Measurement(tuple(speeds), "frames/s")

    def measure_encoding(self, form: LoaderForm) -> Measurement:
        """Frames a second of the VAE, on the videos of one batch, clip by clip as in a training."""
        batches = self.batches(form, next(iter(self.models.values())).config)
        clips, _ = next(batches.load(0, 1))
        speeds = []
        for _ in range(self.args.num_rounds):
            start = time.perf_counter()
            for frames in clips.frames:
                encode_video(self.vae, frames).sum().item()  # waits for the device
            speeds.append(len(clips) * clips.num_frames / (time.perf_counter() - start))
        return Measurement(tuple(speeds), "frames/s")

    def measure_training(self, model: FARTransformer3DModel, form: LoaderForm) -> Measurement:
        """Frames a second of a model's steps on one batch of the longest clips; to load it does not count."""
        model = model.to(self.accelerator.device).train()
        optimizer = build_optimizer(self.training_settings(form), model)
        loaded = encode_batches(self.batches(form, model.config).longest.load(0, 1), self.vae)
        clips, draw = (part.to(self.accelerator.device) for part in next(loaded))
        speeds = []
        for _ in range(self.args.num_rounds + 1):  # the first one warms up
            start = time.perf_counter()
            loss = clip_loss(model, model.config, clips, draw)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # waits for the device
            speeds.append(len(clips) * clips.num_frames / (time.perf_counter() - start))
        return Measurement(tuple(speeds[1:]), "frames/s")

    def measure_preparation(self, layout: str, folder: Path, size: tuple[int, int] | None) -> Measurement:
        """Frames a second that one process of `prepare_dataset.py` turns into PNG files."""
        speeds = []
        for _ in range(self.args.num_rounds):
            start = time.perf_counter()
            num_frames = prepare(layout, folder, size)
            speeds.append(num_frames / (time.perf_counter() - start))
        return Measurement(tuple(speeds), "frames/s")


def models_to_train(args: argparse.Namespace, in_channels: int) -> dict[str, FARTransformer3DModel]:
    """The smallest of the paper's sizes, and the shipped model's size; new weights."""
    conditions = {"in_channels": in_channels, "num_actions": args.num_actions, "action_shift": 1}
    with torch.device("meta"):
        sizes = {name: FARTransformer3DModel(**preset_config(name)).num_parameters() for name in PRESETS}
    smallest = min(sizes, key=sizes.get)
    torch.manual_seed(args.seed)
    shipped = FARTransformer3DModel.load_config(args.model, subfolder="transformer")
    return {
        smallest: FARTransformer3DModel(**preset_config(smallest, **conditions)),
        args.model.resolve().name: FARTransformer3DModel.from_config(shipped, **conditions),
    }


def main(args: argparse.Namespace) -> None:
    vae = AutoModel.from_pretrained(str(args.vae))
    benchmark = LoaderBenchmark(args, vae, models_to_train(args, vae.config.latent_channels))
    settings = (
        "num_frames",
        "batch_size",
        "num_trajectories",
        "num_trajectory_frames",
        "seconds",
        "seed",
        "num_rounds",
    )
    results = {"machine": describe_machine(), **{name: getattr(args, name) for name in settings}}
    with tempfile.TemporaryDirectory() as folder:
        # The sets are thrown away, and so is what `datasets` makes of them.
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        sets = DataSets(args.images, args.videos, args.latents)
        if sets == DataSets():
            sets = make_sets(Path(folder), args.num_trajectories, args.num_trajectory_frames, args.vae)
        show_rows(benchmark.rows(sets), results, args.output)


if __name__ == "__main__":
    main(parse_args())
