"""What the studies train on and are measured on: plain mazes of 3 by 3 cells, so small that a walk comes back to more than
half of its views; their latents, and their codes.

DIR/mazes      made by make_maze_dataset.py
DIR/latents    by cache_latents.py, with the shipped VAE
DIR/poses      the same latents, with the camera's poses for actions
DIR/vq         a VQ autoencoder, by train_vae.py, for the token-autoregressive baseline
DIR/codes      by cache_latents.py, with that
"""

import json
from dataclasses import dataclass
from pathlib import Path

from .poses import write_poses
from .scripts import ROOT, run_script, run_script_alone
from .settings import CONFIGS, Variant, merge


SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class DataFolder:
    """Where the data lie.

    Args:
        path (`Path`): The folder.
    """

    path: Path

    @property
    def mazes(self) -> Path:
        return self.path / "mazes"

    @property
    def latents(self) -> Path:
        return self.path / "latents"

    @property
    def poses(self) -> Path:
        return self.path / "poses"

    @property
    def vae(self) -> Path:
        """The shipped VAE, which made the latents."""
        return ROOT / read_data_settings()["vae"]

    @property
    def vq(self) -> Path:
        return self.path / "vq"

    @property
    def codes(self) -> Path:
        return self.path / "codes"

    def encoded(self, variant: Variant) -> Path:
        """What a variant is trained on and shown."""
        if variant.script == "train_token_ar":
            return self.codes
        return self.poses if variant.knows_pose else self.latents

    def require(self, *folders: Path) -> None:
        """Refuse to start on data that are not there.

        Raises:
            ValueError: Names what is missing, and the command that makes it.
        """
        missing = [folder.relative_to(self.path) for folder in folders if not folder.is_dir()]
        if missing:
            raise ValueError(
                f"`--data_dir` {str(self.path)!r} lacks {', '.join(map(str, missing))}; make it with "
                f"`python -m benchmarks.studies prepare --data_dir {self.path}`."
            )


def read_data_settings(*, smoke: bool = False) -> dict:
    """The committed numbers of the data."""
    values = json.loads((CONFIGS / "data.json").read_text())
    overrides = values.pop("smoke")
    return merge(values, overrides) if smoke else values


def prepare(data: DataFolder, *, num_processes: int = 1, smoke: bool = False) -> None:
    """Make what is not there yet; interrupted, it goes on with the same call.

    Args:
        data ([`DataFolder`]): May hold some of it already.
        num_processes (`int`): That encode at a time.
        smoke (`bool`): Very little of everything.
    """
    settings = read_data_settings(smoke=smoke)
    data.path.mkdir(parents=True, exist_ok=True)
    if not data.mazes.is_dir():
        run_script_alone("make_maze_dataset", {"output_dir": data.mazes, **settings["mazes"]})
    cache(data, data.vae, data.latents, num_processes)
    for split in SPLITS:
        write_poses(data.latents, split, data.poses)
    if not (data.vq / "config.json").is_file():
        run_script(
            "train_vae",
            {
                "dataset_name": data.mazes,
                "vae_config": ROOT / settings["vq_config"],
                "output_dir": data.vq,
                "resume_from_checkpoint": "latest",
                "report_to": "none",
                **settings["vq_training"],
            },
        )
    cache(data, data.vq, data.codes, num_processes)


def cache(data: DataFolder, autoencoder: Path, folder: Path, num_processes: int) -> None:
    """Encode every split; shards that are there are kept."""
    run = run_script if num_processes == 1 else run_script_alone
    for split in SPLITS:
        run(
            "cache_latents",
            {
                "dataset_name": data.mazes,
                "dataset_split": split,
                "vae": autoencoder,
                "output_dir": folder,
                "num_processes": num_processes,
            },
        )
