import argparse
import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from tiny_models import tiny_transformer

from diffusers_far.data.latents import LatentClip
from diffusers_far.training.checkpoints import save_checkpoint
from diffusers_far.training.clips import ClipBatch, TrainingBatches, clip_loss
from diffusers_far.training.objective import ObjectiveDraw, TrainingObjective
from diffusers_far.training.run import (
    StepOutcome,
    accumulate_gradients,
    check_data,
    evaluated,
    leave_out_planned_attention,
    model_hash,
    require_finite,
    require_finite_metrics,
    run_identity,
    seed_step,
    training_facts,
)


class Latents:
    """Cached latents as far as these functions look at them."""

    dataset_fingerprint, vae_hash = "data", "vae"

    def __init__(self, channels=4, actions=None, label=None):
        self.latent_shape = (channels, 4, 4)
        self.first_clip = LatentClip(torch.zeros(1, channels, 4, 4), actions, label)

    def clip(self, trajectory, start, length):
        return self.first_clip


@pytest.mark.parametrize(
    "model, latents, message",
    [
        ({}, Latents(channels=3), "3 channels but the transformer has `in_channels` 4"),
        ({"num_actions": 3}, Latents(), "takes actions but the latents have none"),
        ({"num_classes": 3}, Latents(), "takes classes but the latents have none"),
        ({"num_actions": 3}, Latents(actions=torch.zeros(1)), "go up to 4 but the transformer has `num_actions` 3"),
    ],
)
def test_data_that_does_not_fit_the_model_is_refused(model, latents, message):
    with pytest.raises(ValueError, match=message):
        check_data(latents, tiny_transformer(**model), num_fed_actions=5)


def test_data_that_fits_passes():
    check_data(Latents(actions=torch.zeros(1), label=0), tiny_transformer(num_actions=3, num_classes=2), 3)
    check_data(Latents(actions=torch.zeros(1)), tiny_transformer(), None)


def test_the_length_of_a_run_belongs_to_its_identity_where_the_schedule_depends_on_it():
    args = argparse.Namespace(seed=1, lr_scheduler="constant_with_warmup", max_train_steps=9)
    identity = run_identity(args, ["seed"], Latents(), 2, rank=4)
    assert identity == {"seed": 1, "dataset": "data", "vae": "vae", "num_processes": 2, "rank": 4}
    args.lr_scheduler = "cosine"
    assert run_identity(args, ["seed"], Latents(), 2)["max_train_steps"] == 9


def test_a_models_hash_changes_with_any_bit_and_with_the_config_but_not_with_the_precision_it_is_stored_in():
    model = tiny_transformer().half()
    expected = model_hash(model)
    assert model_hash(copy.deepcopy(model).float()) == expected
    assert model_hash(tiny_transformer(trained_frames=9).half()) != expected
    model = model.float()
    model.proj_out.bias.data[0] += 1e-6
    assert model_hash(model) != expected


def test_what_the_network_draws_depends_on_seed_step_and_process_alone():
    def drawn(*place):
        torch.rand(3)  # whatever was drawn before
        seed_step(*place)
        return torch.rand(4).tolist()

    places = [(0, 1, 0), (0, 2, 0), (1, 1, 0), (0, 1, 1)]
    assert all(drawn(*place) == drawn(*place) for place in places)
    assert len({tuple(drawn(*place)) for place in places}) == 4


def test_accumulated_gradients_are_those_of_one_batch():
    transformer = tiny_transformer(num_actions=3, condition_dropout=0.0)
    objective = TrainingObjective(teacher_forcing=True)
    generator = torch.Generator().manual_seed(0)
    clips = [
        ClipBatch(torch.randn(1, 3, 4, 4, 4, generator=generator), torch.ones(1, 3).long(), None) for _ in range(2)
    ]
    draws = [ObjectiveDraw.stack([objective.draw(3, 0, (4, 4, 4), generator)]) for _ in range(2)]
    outcome = accumulate_gradients(
        Accelerator(cpu=True),
        transformer,
        transformer.config,
        iter(zip(clips, draws)),
        num_accumulated=2,
        teacher_forcing=True,
    )
    gradient = transformer.x_embedder.weight.grad.clone()
    transformer.zero_grad()
    losses = [
        clip_loss(transformer, transformer.config, clip, draw, teacher_forcing=True)
        for clip, draw in zip(clips, draws)
    ]
    loss = torch.stack(losses).mean()
    loss.backward()
    torch.testing.assert_close(gradient, transformer.x_embedder.weight.grad)
    assert outcome == StepOutcome(pytest.approx(loss.item()), num_frames=6)


@pytest.mark.parametrize(
    "loss, norm, what", [(float("nan"), 1.0, "loss is nan"), (1.0, float("inf"), "norm of the gradient is inf")]
)
def test_a_loss_or_a_gradient_that_is_no_number_stops_the_run_with_a_cure(tmp_path, loss, norm, what):
    accelerator = Accelerator(cpu=True)
    require_finite(accelerator, 3, tmp_path, loss=1.0, gradient_norm=torch.tensor(2.0))
    with pytest.raises(RuntimeError, match=f"{what} at step 3.* Lower `--learning_rate`.* holds no intact checkpoint"):
        require_finite(accelerator, 3, tmp_path, loss=loss, gradient_norm=torch.tensor(norm))
    accelerator.prepare(torch.nn.Linear(2, 2))
    save_checkpoint(accelerator, tmp_path, 2, {}, None)
    with pytest.raises(RuntimeError, match="'checkpoint-2' is intact"):
        require_finite(accelerator, 3, tmp_path, loss=loss, gradient_norm=torch.tensor(norm))


@pytest.mark.parametrize("scale, is_fault", [(65536.0, False), (1.0, True)])
def test_a_gradient_that_overflowed_with_a_loss_scale_is_a_fault_only_without_room_below(scale, is_fault, tmp_path):
    accelerator = argparse.Namespace(scaler=argparse.Namespace(get_scale=lambda: scale))
    with pytest.raises(RuntimeError) if is_fault else nullcontext():
        require_finite(accelerator, 0, tmp_path, loss=1.0, gradient_norm=float("inf"))


def test_a_trajectory_that_is_not_finite_is_named(tmp_path):
    transformer, objective = tiny_transformer(num_actions=3), TrainingObjective()
    batches = TrainingBatches(
        FaultyLatents(),
        objective,
        num_frames=3,
        short_window=None,
        interval=1,
        batch_size=2,
        num_accumulated=2,
        seed=0,
    )
    accelerator = Accelerator(cpu=True)
    outcome = accumulate_gradients(accelerator, transformer, transformer.config, batches.load(0, 1), num_accumulated=2)
    assert outcome.faulty_clips == ("trajectory 2",)
    with pytest.raises(RuntimeError, match="data are not finite: trajectory 2 holds"):
        require_finite(
            accelerator, 0, tmp_path, loss=outcome.loss, gradient_norm=1.0, faulty_clips=outcome.faulty_clips
        )


class FaultyLatents:
    """Four trajectories; one value of number 2 is missing."""

    num_frames, latent_shape = np.full(4, 3), (4, 4, 4)

    def clip(self, trajectory, start, length, interval=1):
        latents = torch.zeros(length, 4, 4, 4)
        if trajectory == 2:
            latents[1, 0, 0, 0] = float("nan")
        return LatentClip(latents, torch.zeros(length).long(), None)


def test_metrics_that_are_no_numbers_fail_the_run(tmp_path):
    require_finite_metrics({"loss": 1.0}, 3, tmp_path)
    with pytest.raises(RuntimeError, match="after step 3 gave psnr nan: .* no result is saved"):
        require_finite_metrics({"loss": 1.0, "psnr": float("nan")}, 3, tmp_path)


def test_averaged_weights_are_in_place_only_while_they_are_evaluated():
    model = torch.nn.Linear(2, 2).train()
    trained = model.weight.detach().clone()
    ema = EMAModel(model.parameters(), decay=0.5)
    for shadow in ema.shadow_params:
        shadow.zero_()
    with pytest.raises(KeyError), evaluated(model, ema):
        assert not model.training and not model.weight.any()
        raise KeyError
    assert model.training and torch.equal(model.weight, trained)
    with evaluated(model):
        assert not model.training and torch.equal(model.weight, trained)


def test_the_facts_of_a_run_name_its_data_and_no_place_on_the_machine():
    args = argparse.Namespace(
        dataset_split="train",
        num_frames=8,
        frame_interval=1,
        train_batch_size=2,
        gradient_accumulation_steps=3,
        optimizer="adamw",
        learning_rate=1e-4,
        lr_scheduler="constant",
        seed=0,
    )
    facts = training_facts(args, "/somewhere/mazes", 7, TrainingObjective())
    assert facts["Data"].startswith("mazes, split train") and facts["Steps"] == "7 of 6 clips per process"


@pytest.mark.parametrize("long_patch_size", [None, 4])
def test_the_attention_of_long_models_alone_is_kept_from_cudnn(long_patch_size, monkeypatch):
    left_out = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: left_out.append(not enabled))
    leave_out_planned_attention(tiny_transformer(long_patch_size=long_patch_size).config)
    assert left_out == ([] if long_patch_size is None else [True])
