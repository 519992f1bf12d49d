"""A reader can follow what runs: a call passes through few files and lines. These numbers may fall, not rise.

Two files more than in the days when FAR was the only model: what it shares with separable models is told once, in
`models/frame_network.py` and `models/frame_transformer.py`, and each of the two models in a file of its own.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from code_walk import lines_of_functions, walked
from datasets import Features, List, Value
from diffusers import AutoModel

import diffusers_far
from benchmarks.studies.scripts import load_script
from diffusers_far import FARPipeline
from diffusers_far.data.latents import LatentSource, write_shard
from diffusers_far.models.identity import vae_hash


PACKAGE = Path(diffusers_far.__file__).parent
WORLD = PACKAGE.parents[1] / "checkpoints" / "far-maze"
EXAMPLES = PACKAGE.parents[1] / "examples"


@pytest.fixture(scope="module")
def pipe() -> FARPipeline:
    pipe = FARPipeline.from_pretrained(WORLD)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_call_of_the_pipeline_can_be_followed(pipe):
    video, actions = torch.rand(1, 12, 3, 64, 64), torch.zeros(1, 14, dtype=torch.int64)
    with walked(PACKAGE) as walk:
        pipe(video=video, actions=actions, num_frames=2, num_inference_steps=2)
    assert len(walk.lines) <= 14 and sum(walk.lines.values()) <= 1376, str(walk)


def test_a_cached_denoising_step_can_be_followed(pipe):
    transformer = pipe.transformer
    latents = torch.randn(1, 13, transformer.config.in_channels, 8, 8)
    actions = torch.zeros(1, 13, dtype=torch.int64)
    cache = transformer.init_kv_cache(1, 8, 8, max_frames=13)
    transformer(latents[:, :12], -1, actions=actions[:, :12], kv_cache=cache, update_cache=True)
    with walked(PACKAGE) as walk:
        transformer(latents[:, 12:], 500, actions=actions[:, 12:], kv_cache=cache)
    assert len(walk.lines) <= 7 and sum(walk.lines.values()) <= 497, str(walk)


def test_a_training_of_one_step_can_be_followed(tmp_path):
    vae = AutoModel.from_pretrained(str(WORLD / "vae"))
    source = LatentSource(vae_hash(vae), vae.config.scaling_factor, "dataset", 2, 2)
    actions = pa.table({"actions": [[0] * 12] * 2})
    latents = np.random.default_rng(0).standard_normal((2, 12, vae.config.latent_channels, 8, 8))
    (tmp_path / "latents" / "train").mkdir(parents=True)
    path = source.shard_path(tmp_path / "latents" / "train", 0)
    write_shard(path, list(latents), actions, Features({"actions": List(Value("int64"))}), source)
    flags = (
        f"--latents_dir {tmp_path}/latents --vae {WORLD}/vae --transformer_config {EXAMPLES}/configs/far_maze.json "
        f"--output_dir {tmp_path}/run --num_frames 12 --train_batch_size 2 --max_train_steps 1 --teacher_forcing --use_ema"
    )
    script = load_script("train_far")
    with walked(PACKAGE, EXAMPLES) as walk:
        script.main(script.parse_args(flags.split()))
    assert len(walk.lines) <= 32 and sum(walk.lines.values()) <= 2765, str(walk)


def test_whole_functions_are_counted_without_what_is_no_code():
    source = '''"""A docstring."""

def one(value):
    """Of one.

    Two lines.
    """
    # A comment.
    return value + (
        1
    )

@decorated
def two():
    return 2
'''
    assert lines_of_functions(source, {3}) == 4
    assert lines_of_functions(source, {3, 14}) == 7
    assert lines_of_functions(source, set()) == 0
