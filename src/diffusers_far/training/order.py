"""The order of the samples and every random draw of training, as pure functions of (seed, step).

Nothing here has a state to save: a run that resumes at step N draws what the uninterrupted run drew at step N.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a permutation of `num_samples`, read-only.

    The last two are remembered, as all steps of an epoch ask for the same one: to draw that of millions of frames takes
    longer than a small training step.
    """
    order = np.random.default_rng((seed, epoch)).permutation(num_samples)
    order.flags.writeable = False
    return order


def step_indices(num_samples: int, global_batch_size: int, seed: int, step: int) -> np.ndarray:
    """The samples of one step. Epochs follow each other without a gap, each in an order of its own.

    Args:
        num_samples (`int`): Size of the dataset, at least 1.
        global_batch_size (`int`): Samples per step over all processes.
        seed (`int`): Seed of the run.
        step (`int`): Optimizer step, from 0.

    Returns:
        `np.ndarray` of shape `(global_batch_size,)`, int64, in `[0, num_samples)`.
    """
    positions = step * global_batch_size + np.arange(global_batch_size)
    epochs, places = np.divmod(positions, num_samples)
    indices = np.empty(global_batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        indices[epochs == epoch] = epoch_order(num_samples, seed, int(epoch))[places[epochs == epoch]]
    return indices


def step_generator(seed: int, step: int, process_index: int = 0, stream: int = 0) -> torch.Generator:
    """A CPU generator for the draws of one step on one process; `stream` separates independent uses in a step."""
    state = np.random.SeedSequence((seed, step, process_index, stream)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))


class StepBatchSampler:
    """The batches of one process from `first_step` on, for `torch.utils.data.DataLoader(batch_sampler=...)`.

    Args:
        num_samples (`int`): Size of the dataset.
        batch_size (`int`): Samples per step on this process.
        seed (`int`): Seed of the run.
        first_step, last_step (`int`): The steps to serve, `first_step <= step < last_step`.
        process_index, num_processes (`int`): This process's share of each global batch.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        first_step: int,
        last_step: int,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        if num_samples < 1 or batch_size < 1:
            raise ValueError(f"`num_samples` is {num_samples} and `batch_size` {batch_size}; both must be at least 1.")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.steps = range(first_step, last_step)
        self.process_index = process_index
        self.num_processes = num_processes

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            indices = step_indices(self.num_samples, self.batch_size * self.num_processes, self.seed, step)
            yield indices[self.process_index * self.batch_size :][: self.batch_size].tolist()
