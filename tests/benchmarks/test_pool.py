import pytest
import torch
from session_walks import pipeline

from benchmarks.pool import run


@pytest.mark.parametrize("config", [{}, {"num_actions": None, "action_dim": 2}, {"num_actions": None}])
def test_a_pool_is_timed_beside_batches_of_equal_length_and_beside_turns(config):
    pipe = pipeline(**config)
    pipe.register_to_config(height=8, width=12)
    rows = list(run(pipe, [2, 3, 5], num_inference_steps=1, num_rounds=2))
    assert [row.settings["rival"] for row in rows] == ["batch of 3 frames", "batch of 5 frames", "in turn"]
    shares = torch.tensor([row.measurements["pool / rival"].values for row in rows])
    assert shares.shape == (3, 2) and (shares > 0).all()
