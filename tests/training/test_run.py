import argparse
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers.training_utils import EMAModel
from tiny_models import tiny_transformer

from diffusers_far.data.clips import Clip, ClipBatch
from diffusers_far.data.rows import BadExampleError
from diffusers_far.training import clips as training_clips
from diffusers_far.training import run
from diffusers_far.training.checkpoints import save_checkpoint
from diffusers_far.training.clips import TrainingBatches, clip_loss
from diffusers_far.training.objective import ObjectiveDraw, TrainingObjective
from diffusers_far.training.run import (
    SHARDING_VARIABLES,
    StepOutcome,
    accumulate_gradients,
    build_accelerator,
    check_data,
    describe_launch,
    evaluated,
    hyperparameters,
    leave_out_planned_attention,
    require_finite,
    require_finite_metrics,
    run_identity,
    seed_step,
    tracker_names,
    training_facts,
)


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """What `build_accelerator` makes of a launcher's environment and a script's flags, in a state of its own."""

    def forget():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    def launch(environment=(), **flags):
        forget()
        for name, value in dict(environment).items():
            monkeypatch.setenv(name, value)
        defaults = {"gradient_accumulation_steps": None, "mixed_precision": None, "report_to": "none"}
        args = argparse.Namespace(output_dir=str(tmp_path), **{**defaults, "train_batch_size": 4, **flags})
        return build_accelerator(args), args

    yield launch
    forget()


TOLD = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}


def test_what_a_script_is_not_told_is_what_the_launcher_was_told(launched):
    accelerator, args = launched(TOLD)
    assert accelerator.mixed_precision == args.mixed_precision == "bf16" and args.gradient_accumulation_steps == 3


def test_what_a_script_is_told_goes_before_what_the_launcher_was_told(launched):
    accelerator, args = launched(TOLD, mixed_precision="no", gradient_accumulation_steps=2)
    assert accelerator.mixed_precision == args.mixed_precision == "no" and args.gradient_accumulation_steps == 2


def test_told_nothing_a_run_is_of_float32_without_accumulation(launched):
    accelerator, args = launched()
    assert accelerator.mixed_precision == args.mixed_precision == "no" and args.gradient_accumulation_steps == 1


@pytest.mark.parametrize(
    "name, value",
    [
        ("gradient_accumulation_steps", 0),
        ("train_batch_size", 0),
        ("checkpointing_steps", 0),
        ("checkpoints_total_limit", -1),  # would leave no checkpoint
        ("num_validation_inference_steps", 0),
        ("seed", -1),
        ("max_grad_norm", float("nan")),
        ("learning_rate", float("inf")),
        ("fps", -8.0),
    ],
)
def test_numbers_with_which_a_run_would_fail_late_are_refused_at_its_start(launched, name, value):
    with pytest.raises(ValueError, match=f"`{name}` is {value}"):
        launched(**{name: value})


def test_numbers_that_are_left_out_or_may_be_negative_are_taken(launched):
    launched(num_validation_inference_steps=None, max_train_hours=None, logit_mean=-0.5, num_validation_videos=0)


def test_a_loss_is_not_divided_again_by_what_the_launcher_accumulates(launched):
    accelerator, _ = launched(TOLD)
    weight = torch.ones((), requires_grad=True)
    accelerator.backward(weight * 6)
    assert weight.grad == 6


@pytest.mark.parametrize("variable, name", SHARDING_VARIABLES.items())
def test_a_launch_that_cuts_the_model_in_pieces_is_refused_by_name(launched, variable, name):
    with pytest.raises(ValueError, match=f"asks for {name} .*multi_gpu.yaml"):
        launched({variable: "true"})


def test_a_precision_of_the_launcher_that_scripts_do_not_know_is_refused(launched, monkeypatch):
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp8")
    with pytest.raises(ValueError, match="launcher's `mixed_precision` is 'fp8'.*no, fp16, bf16"):
        launched()


def test_a_script_that_does_not_accumulate_refuses_a_launcher_that_asks_for_it(launched, monkeypatch, tmp_path):
    launched(TOLD)
    args = argparse.Namespace(output_dir=str(tmp_path), train_batch_size=4, mixed_precision=None, report_to="none")
    with pytest.raises(ValueError, match="`gradient_accumulation_steps` 3, but this script accumulates none"):
        build_accelerator(args)


def test_the_start_of_a_run_says_in_one_line_what_was_launched(launched, caplog):
    with caplog.at_level("INFO"):
        launched(gradient_accumulation_steps=2)
    assert "1 process on cpu, mixed precision no, global batch 8 = 1 x 4 x 2" in caplog.messages[-1]
    two = argparse.Namespace(num_processes=2, device=torch.device("cpu"))
    args = argparse.Namespace(train_batch_size=4, gradient_accumulation_steps=2, mixed_precision="bf16")
    assert describe_launch(args, two).startswith(
        "2 processes on cpu, mixed precision bf16, global batch 16 = 2 x 4 x 2"
    )


@pytest.mark.parametrize(
    "report_to, names",
    [
        ("none", []),
        ("all", ["tensorboard", "trackio"]),
        ("tensorboard", ["tensorboard"]),
        ("trackio, tensorboard", ["trackio", "tensorboard"]),
        ("wandb", "'wandb', which is not installed; `pip install wandb`"),
        ("tensorboard,wandb", "'wandb', which is not installed"),
        ("tensorbord", "'tensorbord', which is no tracker; choose from tensorboard, trackio, none"),
        ("tensorboard,none", "'none', which is no tracker"),
        ("", "'', which is no tracker"),
    ],
)
def test_trackers_are_those_that_were_named_or_the_run_does_not_start(report_to, names, monkeypatch):
    monkeypatch.setattr(run, "get_available_trackers", lambda: ["tensorboard", "trackio"])
    if isinstance(names, list):
        assert tracker_names(report_to) == names
    else:
        with pytest.raises(ValueError, match=names):
            tracker_names(report_to)


def test_all_trackers_are_none_where_none_is_installed_and_that_is_refused(monkeypatch):
    monkeypatch.setattr(run, "get_available_trackers", lambda: [])
    with pytest.raises(ValueError, match="'all'"):
        tracker_names("all")


def test_a_tracker_knows_the_hyperparameters_as_plain_values(launched, tmp_path):
    accelerator, args = launched(report_to="tensorboard", learning_rate=0.5, action_names=["left", "right"])
    known = hyperparameters(args, accelerator, transformer={"num_layers": 2, "axes_dims_rope": (4, 6, 6)})
    assert known["learning_rate"] == 0.5 and known["transformer.num_layers"] == 2 and known["num_processes"] == 1
    assert known["mixed_precision"] == "no" and known["action_names"] == '["left", "right"]'
    assert all(value is None or isinstance(value, (bool, int, float, str)) for value in known.values())
    accelerator.init_trackers("run", known)
    (stored,) = (tmp_path / "logs").rglob("hparams.yml")
    assert "learning_rate: 0.5" in stored.read_text()
    accelerator.end_training()


class Latents:
    """Cached latents as far as these functions look at them."""

    dataset_fingerprint, vae_hash = "data", "vae"

    def __init__(self, channels=4, actions=None, label=None):
        self.latent_shape = (channels, 4, 4)
        self.first_clip = Clip(torch.zeros(1, channels, 4, 4), actions, label)

    def check_rows(self, num_actions, num_classes):
        if self.first_clip.actions is not None and (self.first_clip.actions >= num_actions).any():
            raise BadExampleError("Trajectory 0 has the action 3")

    def clip(self, trajectory, start, length):
        return self.first_clip


@pytest.mark.parametrize(
    "model, latents, message",
    [
        ({}, Latents(channels=3), "3 channels but the transformer has `in_channels` 4"),
        ({"num_actions": 3}, Latents(), "takes actions but the latents have none"),
        ({"num_classes": 3}, Latents(), "takes classes but the latents have none"),
        ({"num_actions": 3}, Latents(actions=torch.zeros(1)), "are continuous, but the transformer's are discrete"),
        ({"action_dim": 2}, Latents(actions=torch.zeros(1, dtype=int)), "are discrete, but"),
        (
            {"num_actions": 3},
            Latents(actions=torch.zeros(1, dtype=int)),
            "go up to 4 but the transformer has `num_actions` 3",
        ),
    ],
)
def test_data_that_does_not_fit_the_model_is_refused(model, latents, message):
    with pytest.raises(ValueError, match=message):
        check_data(latents, tiny_transformer(**model), num_fed_actions=5)


def test_data_that_fits_passes():
    check_data(Latents(actions=torch.zeros(1, dtype=int), label=0), tiny_transformer(num_actions=3, num_classes=2), 3)
    check_data(Latents(), tiny_transformer(), None)


def test_the_split_that_is_held_out_is_looked_at_before_the_first_step_too():
    good, bad = (Latents(actions=torch.full((1,), action)) for action in (2, 3))
    check_data(good, tiny_transformer(num_actions=3), 3, good)
    with pytest.raises(BadExampleError, match="Of the split that is held out: Trajectory 0 has the action 3"):
        check_data(good, tiny_transformer(num_actions=3), 3, bad)
    with pytest.raises(ValueError, match="Of the split that is held out: .*3 channels"):
        check_data(good, tiny_transformer(num_actions=3), 3, Latents(channels=3))


def test_the_length_of_a_run_belongs_to_its_identity_where_the_schedule_depends_on_it():
    args = argparse.Namespace(seed=1, lr_scheduler="constant_with_warmup", max_train_steps=9)
    identity = run_identity(args, ["seed"], Latents(), 2, rank=4)
    assert identity == {"seed": 1, "dataset": "data", "vae": "vae", "num_processes": 2, "rank": 4}
    args.lr_scheduler = "cosine"
    assert run_identity(args, ["seed"], Latents(), 2)["max_train_steps"] == 9


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
    )
    gradient = transformer.x_embedder.weight.grad.clone()
    transformer.zero_grad()
    losses = [clip_loss(transformer, transformer.config, clip, draw) for clip, draw in zip(clips, draws)]
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
    save_checkpoint(accelerator, tmp_path, 3, {}, None)  # the weights that fail
    with pytest.raises(RuntimeError, match="'checkpoint-2' is intact"):
        require_finite(accelerator, 3, tmp_path, loss=loss, gradient_norm=torch.tensor(norm))
    with pytest.raises(RuntimeError, match="'checkpoint-2' is intact"):
        require_finite_metrics({"loss": float("nan")}, 3, tmp_path)
    with pytest.raises(RuntimeError, match="'checkpoint-3' is intact"):
        require_finite(accelerator, 3, tmp_path, loss=loss, gradient_norm=norm, faulty_clips=["trajectory 2"])


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
    with pytest.raises(RuntimeError, match="data are not finite: NaN or infinite values in trajectory 2"):
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
        return Clip(latents, torch.zeros(length).long(), None)


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


def test_a_split_that_is_held_out_and_too_short_is_refused_at_the_start(monkeypatch, tmp_path):
    (tmp_path / "validation").mkdir()
    args = argparse.Namespace(validation_dataset_name=None, latents_dir=str(tmp_path), validation_split="validation")
    args.streaming, args.num_frames, args.frame_interval = False, 4, 1
    monkeypatch.setattr(training_clips, "open_clips", lambda *_: FaultyLatents())
    with pytest.raises(ValueError, match="split 'validation', which is held out: .* the longest of 4 .* has 3"):
        training_clips.open_validation_clips(args, None)
    args.num_frames = 3
    assert training_clips.open_validation_clips(args, None) is not None
