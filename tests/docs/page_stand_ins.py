"""What a page takes for given: the folder in which its blocks are run, and small models, data and clips in it."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import load_dataset
from diffusers import VQModel
from local_hub import LocalHub, run_python

from diffusers_far import TokenARConfig, TokenARForVideo
from diffusers_far.evaluation.media import encode_mp4


ROOT = Path(__file__).parents[2]
FAR_MAZE, FAR_CRAFTER = ROOT / "checkpoints" / "far-maze", ROOT / "checkpoints" / "far-crafter"

PUSH = """
    import sys
    from huggingface_hub import create_repo, upload_folder
    from diffusers_far import FARPipeline

    FARPipeline.from_pretrained(sys.argv[1]).push_to_hub("org/far-maze")
    create_repo("org/far-maze-lora")
    upload_folder(repo_id="org/far-maze-lora", folder_path=sys.argv[2])
"""


def lay_out(page: Path, folder: Path, hub: LocalHub) -> None:
    """Make a folder in which a page's blocks find what the page takes for given; what they write stays in it."""
    for name in ("checkpoints", "examples", "scripts", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    prepare = STAND_INS.get(page.relative_to(ROOT).as_posix())
    if prepare is not None:
        prepare(folder, hub)


def clip(folder: Path, hub: LocalHub) -> None:
    walk = load_dataset(str(ROOT / "examples" / "crafter_walks"), split="test").with_format("numpy")[0]
    encode_mp4(folder / "clip.mp4", walk["video"][96:128], fps=8)


def trained_model(folder: Path, hub: LocalHub) -> None:
    (folder / "far-crafter").symlink_to(FAR_CRAFTER)


def walks(folder: Path, hub: LocalHub) -> None:
    (folder / "doom").symlink_to(ROOT / "examples" / "mazes")


def token_model(folder: Path, hub: LocalHub) -> None:
    """Random weights of the baseline's own sizes, but for a smaller decoder."""
    (folder / "mazes").symlink_to(ROOT / "examples" / "mazes")
    torch.manual_seed(0)
    config = json.loads((ROOT / "examples" / "configs" / "vq_maze.json").read_text())
    VQModel.from_config(config).save_pretrained(folder / "token-ar-maze" / "vq")
    decoder = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = TokenARForVideo(TokenARConfig(num_codes=512, tokens_per_frame=64, num_actions=3, decoder=decoder))
    model.save_pretrained(folder / "token-ar-maze")


def pushed_model(folder: Path, hub: LocalHub) -> None:
    run_python(PUSH, hub, FAR_MAZE, ROOT / "checkpoints" / "far-maze-doom")


STAND_INS: dict[str, Callable[[Path, LocalHub], None]] = {
    "docs/generate.md": clip,
    "docs/train.md": trained_model,
    "docs/lora.md": walks,
    "docs/baselines.md": token_model,
    "docs/hub.md": pushed_model,
}
