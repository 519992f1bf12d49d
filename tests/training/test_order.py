import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_far.training.clips import epoch_order, step_generator, step_indices


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 50), st.integers(1, 70), st.integers(0, 2**31))
def test_every_epoch_shows_each_sample_once_whatever_the_batch_size(num_samples, batch_size, seed):
    num_steps = -(-2 * num_samples // batch_size)
    served = np.concatenate([step_indices(num_samples, batch_size, seed, step) for step in range(num_steps)])
    for epoch in range(2):
        assert sorted(served[epoch * num_samples : (epoch + 1) * num_samples]) == list(range(num_samples))


def test_an_epoch_is_ordered_once_for_all_of_its_steps():
    epoch_order.cache_clear()
    for step in range(30):
        step_indices(100, 7, seed=3, step=step)
    assert epoch_order.cache_info().misses == 3  # 30 steps of 7 samples: two epochs and the beginning of a third


def test_draws_depend_on_seed_step_process_and_stream_alone():
    def draw(*key):
        return tuple(torch.randn(4, generator=step_generator(*key)).tolist())

    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(3, 4, 5, 6) == draw(3, 4, 5, 6)
