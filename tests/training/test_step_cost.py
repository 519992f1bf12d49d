import argparse
import re

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny_models import tiny_pipeline, tiny_transformer

from diffusers_far.data.clips import Clip
from diffusers_far.training.clips import TrainingBatches
from diffusers_far.training.objective import TrainingObjective
from diffusers_far.training.step_cost import describe_cost, describe_step_cost


def test_a_cost_is_told_in_seconds_a_step_and_hours_of_the_run():
    args = argparse.Namespace(max_train_steps=7200)
    text = describe_cost(args, torch.device("cpu"), tiny_transformer(), 1.5, "8 frames")
    assert re.search(r"[\d.]+ M parameters\n[\d.]+ GiB of memory at the peak, 1\.500 s per step of 8 frames\n", text)
    assert "3.00 hours for --max_train_steps 7200" in text


class Trajectories:
    """Two trajectories of six random frames."""

    num_frames, latent_shape = np.array([6, 6]), (4, 4, 4)

    def clip(self, trajectory, start, length, interval=1):
        return Clip(torch.randn(length, 4, 4, 4), torch.ones(length).long(), None)


@pytest.mark.parametrize("teacher_forcing", [False, True])
def test_the_tokens_of_a_step_count_the_twins_of_teacher_forcing(teacher_forcing):
    pipe = tiny_pipeline(tiny_transformer(num_actions=3))
    sizes = {"num_frames": 4, "short_window": None, "interval": 1, "batch_size": 2, "num_accumulated": 1, "seed": 0}
    batches = TrainingBatches(Trajectories(), TrainingObjective(teacher_forcing=teacher_forcing), **sizes)
    args = argparse.Namespace(max_train_steps=10, num_frames=4, gradient_accumulation_steps=1)
    optimizer = torch.optim.SGD(pipe.transformer.parameters(), 0.0)
    text = describe_step_cost(args, Accelerator(cpu=True), pipe.transformer, pipe.vae, optimizer, batches)
    assert text.startswith("64 tokens per clip of 4 frames, 0 of them long")
    assert ("; 128 with the noisy twins of teacher forcing" in text) == teacher_forcing
    assert "s per step of 2 clips" in text and "hours for --max_train_steps 10" in text
