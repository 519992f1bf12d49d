"""Loading: a transformer and a whole pipeline from a folder, in a process that has loaded one before; and the import of the
package, in new processes.

Weights are mapped into memory and read when they are first used, so each run goes on until it has touched all of them.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from diffusers.utils import logging
from safetensors.torch import load_file

from diffusers_far import FARPipeline, FARTransformer3DModel

from ..checks import require_close
from ..measurement import Measurement, Row, compared
from ..models import FAR_B, BenchmarkModel
from ..timing import time_in_turn
from .step import FARStep, NaiveStep


FAR_MAZE = Path(__file__).parents[2] / "checkpoints" / "far-maze"
PAGE_SIZE = 4096  # bytes; the smallest in use
NUM_FRAMES = 20  # of the clip on which the loaded pipeline's transformer is compared
STATEMENTS = {
    "FAR": "import diffusers_far",
    "diffusers": "from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, DiffusionPipeline, SchedulerMixin",
}


def run(num_rounds: int, model: BenchmarkModel = FAR_B, pipeline: Path = FAR_MAZE) -> Iterator[Row]:
    """Yield a row for the transformer, for the pipeline and for the import."""
    yield load_transformer(model, num_rounds)
    yield load_pipeline(pipeline, num_rounds)
    yield import_package(num_rounds)


def load_transformer(model: BenchmarkModel, num_rounds: int) -> Row:
    """`from_pretrained`, beside reading the file, which is the limit, and building the model and filling it from a state dict.

    Raises:
        RuntimeError: A weight is not what was saved.
    """
    transformer = model.build()
    with tempfile.TemporaryDirectory() as folder:
        transformer.save_pretrained(folder)
        torch.save(transformer.state_dict(), Path(folder, "weights.pth"))
        load = partial(load_and_touch, FARTransformer3DModel, folder)
        loaded = load().state_dict()
        wrong = [name for name, weight in transformer.state_dict().items() if not torch.equal(loaded[name], weight)]
        if wrong:
            raise RuntimeError(f"These weights were loaded with other values than they were saved with: {wrong}.")
        rivals = {
            "FAR": load,
            "limit": partial(read_weights, list(Path(folder).glob("*.safetensors"))),
            "naive": partial(load_naively, model, Path(folder, "weights.pth")),
        }
        timings = time_in_turn(rivals, num_rounds)
    difference = Measurement((0.0,), "difference")
    return Row("loading", {"what": f"transformer of {model.name}"}, {**compared(timings), "difference": difference})


def load_pipeline(folder: Path, num_rounds: int) -> Row:
    """`from_pretrained`, beside reading the files; what is compared is a step of the transformer that was loaded."""
    logging.disable_progress_bar()
    pipe = FARPipeline.from_pretrained(folder)
    clip = BenchmarkModel(folder.name, pipe.transformer.config).clip(NUM_FRAMES)
    far, naive = (step(pipe.transformer, clip)() for step in (FARStep, NaiveStep))
    difference = require_close(far, naive, f"a step of {folder.name}")
    rivals = {
        "FAR": partial(load_and_touch, FARPipeline, folder),
        "limit": partial(read_weights, list(folder.glob("*/*.safetensors"))),
    }
    timings = time_in_turn(rivals, num_rounds)
    logging.enable_progress_bar()
    return Row("loading", {"what": f"pipeline {folder.name}"}, {**compared(timings), "difference": difference})


def import_package(num_rounds: int) -> Row:
    """A Python process that imports the package, beside one that imports the classes of diffusers that it is made of."""
    commands = {name: [sys.executable, "-c", statement] for name, statement in STATEMENTS.items()}
    rivals = {name: partial(subprocess.run, command, check=True) for name, command in commands.items()}
    return Row("loading", {"what": "import"}, compared(time_in_turn(rivals, num_rounds)), {"statements": STATEMENTS})


def load_and_touch(kind: type, folder: str | Path) -> FARTransformer3DModel | FARPipeline:
    loaded = kind.from_pretrained(folder)
    modules = loaded.components.values() if isinstance(loaded, FARPipeline) else [loaded]
    touch(chain(*(module.parameters() for module in modules if isinstance(module, torch.nn.Module))))
    return loaded


def read_weights(files: Sequence[Path]) -> None:
    touch(chain(*(load_file(file).values() for file in files)))


def load_naively(model: BenchmarkModel, file: Path) -> None:
    transformer = FARTransformer3DModel(**model.config)
    transformer.load_state_dict(torch.load(file, weights_only=True))
    touch(transformer.parameters())


@torch.no_grad()
def touch(tensors: Iterable[torch.Tensor]) -> None:
    """Read a number of every page of memory."""
    for tensor in tensors:
        tensor.view(-1)[:: PAGE_SIZE // tensor.element_size()].sum()
