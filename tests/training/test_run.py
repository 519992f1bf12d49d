import json
import re
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers.configuration_utils import FrozenDict
from diffusers.training_utils import EMAModel
from tiny_models import tiny_pipeline, tiny_separable, tiny_transformer
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from benchmarks.studies.scripts import load_script
from diffusers_far import SCDTransformer3DModel
from diffusers_far.data.clips import Clip, ClipBatch
from diffusers_far.models.identity import settings_hash
from diffusers_far.pipelines.precision import DtypeComparison, DtypeTiming
from diffusers_far.training import clips as training_clips
from diffusers_far.training import run
from diffusers_far.training.checkpoints import save_checkpoint
from diffusers_far.training.clips import clip_loss
from diffusers_far.training.config import FARSettings, FrameSettings, check_context_parallel
from diffusers_far.training.data import describe_tokens, training_batches
from diffusers_far.training.launch import Launch
from diffusers_far.training.objective import ObjectiveDraw, TrainingObjective
from diffusers_far.training.run import (
    SHARDING_VARIABLES,
    StepOutcome,
    TrainingRun,
    build_accelerator,
    check_sharding,
    compare_training,
    describe_launch,
    disable_cudnn_attention,
    evaluated,
    hyperparameters,
    seed_step,
    tracker_names,
    training_facts,
)


def settings_of(tmp_path, **changes) -> FARSettings:
    defaults = {"latents_dir": "latents", "output_dir": str(tmp_path), "report_to": "none", "train_batch_size": 4}
    return FARSettings(**{**defaults, **changes})


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
        settings = settings_of(tmp_path, **flags)
        return build_accelerator(settings), settings

    yield launch
    forget()


@pytest.fixture
def make_run(launched, tmp_path):
    """A run in a folder of its own, of a model that is made or given."""

    def make(model=None, trial=None, **flags) -> TrainingRun:
        launched(mixed_precision=flags.get("mixed_precision"))
        made = TrainingRun(settings_of(tmp_path / "run", **{"train_batch_size": 2, **flags}), Launch())
        model = torch.nn.Linear(2, 2) if model is None else model
        made.prepare(model, torch.optim.SGD(model.parameters(), 0.1), trial=trial)
        return made

    return make


TOLD = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}


def test_what_a_script_is_not_told_is_what_the_launcher_was_told(launched):
    accelerator, settings = launched(TOLD)
    assert (
        accelerator.mixed_precision == settings.mixed_precision == "bf16" and settings.gradient_accumulation_steps == 3
    )


def test_what_a_script_is_told_goes_before_what_the_launcher_was_told(launched):
    accelerator, settings = launched(TOLD, mixed_precision="no", gradient_accumulation_steps=2)
    assert (
        accelerator.mixed_precision == settings.mixed_precision == "no" and settings.gradient_accumulation_steps == 2
    )


def test_told_nothing_a_run_is_of_float32_without_accumulation(launched):
    accelerator, settings = launched()
    assert (
        accelerator.mixed_precision == settings.mixed_precision == "no" and settings.gradient_accumulation_steps == 1
    )


def test_a_loss_is_not_divided_again_by_what_the_launcher_accumulates(launched):
    accelerator, _ = launched(TOLD)
    weight = torch.ones((), requires_grad=True)
    accelerator.backward(weight * 6)
    assert weight.grad == 6


def measured(chosen: torch.dtype):
    """A stand-in for `compare_training` that finds this dtype best."""
    return lambda model, loss_of_pass: DtypeComparison(chosen, (DtypeTiming(torch.float32, 1.0, 1.0),))


@pytest.mark.parametrize("chosen, precision", [(torch.bfloat16, "bf16"), (torch.float32, "no")])
def test_auto_becomes_what_is_fastest_and_then_the_run_is_as_if_it_had_been_given(
    make_run, monkeypatch, caplog, chosen, precision
):
    monkeypatch.setattr(run, "compare_training", measured(chosen))
    caplog.set_level("INFO")
    images = torch.randn(8, 2)
    torch.manual_seed(0)
    given = make_run(torch.nn.Linear(2, 2), mixed_precision=precision)
    expected = given.model(images)
    torch.manual_seed(0)
    auto = make_run(torch.nn.Linear(2, 2), trial=lambda: None, mixed_precision="auto")
    assert torch.equal(auto.model(images), expected) and expected.dtype == torch.float32
    assert auto.settings.identity() == given.settings.identity()
    assert auto.accelerator.mixed_precision == precision and auto.accelerator.scaler is None
    assert f"--mixed_precision auto is {precision}: " in caplog.text


def test_a_resumed_run_keeps_the_precision_that_auto_stood_for(make_run, monkeypatch, tmp_path):
    def begin(**flags) -> TrainingRun:
        return make_run(trial=lambda: None, output_dir=str(tmp_path / "auto"), max_train_steps=2, **flags)

    monkeypatch.setattr(run, "compare_training", measured(torch.bfloat16))
    first = begin(mixed_precision="auto")
    first.start("run")
    save_checkpoint(first.accelerator, first.output_dir, 1, first._identity, None)
    monkeypatch.setattr(run, "compare_training", measured(torch.float32))  # the machine has changed its mind
    for flag in ("auto", "bf16"):
        resumed = begin(mixed_precision=flag, resume_from_checkpoint="latest")
        resumed.start("run")
        assert resumed.first_step == 1 and resumed.accelerator.mixed_precision == "bf16"
    with pytest.raises(ValueError, match="`mixed_precision` was 'bf16' and is 'no'"):
        begin(mixed_precision="no", resume_from_checkpoint="latest").start("run")


def test_all_processes_take_the_precision_that_the_first_one_found(make_run, monkeypatch):
    monkeypatch.setattr(run, "compare_training", measured(torch.float32))
    monkeypatch.setattr(run, "broadcast_object_list", lambda found: ["bf16"])  # what comes of the first process
    other = make_run(trial=lambda: None, mixed_precision="auto")
    assert other.settings.mixed_precision == other.accelerator.mixed_precision == "bf16"


@pytest.mark.parametrize("make", [tiny_transformer, tiny_separable])
def test_a_step_is_measured_and_compared_without_a_trace(make):
    model = make(num_actions=3, action_shift=1, num_classes=2, long_patch_size=2, condition_dropout=0.5)
    objective = TrainingObjective(teacher_forcing=True, decoder_draws=2 if model.is_separable else None)
    sizes = {
        "num_frames": 6,
        "short_window": model.config.short_window,
        "interval": 1,
        "num_accumulated": 1,
        "seed": 0,
    }
    batches = training_clips.StepBatches(objective=objective, latent_shape=(4, 4, 4), batch_size=2, **sizes)
    clips, draw = batches.invented(model)
    assert clips.latents.shape == (2, 6, 4, 4, 4) and draw.noise.shape[-5:] == clips.latents.shape
    weights, state = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    comparison = compare_training(model, partial(clip_loss, model, model.config, clips, draw))
    of_half = comparison.timings[1]
    assert of_half.dtype == torch.bfloat16 and of_half.seconds > 0 and of_half.speedup > 0
    assert 0 < of_half.distances["loss"] < 0.05 and 0 < of_half.distances["gradient"] < 0.1
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("variable, name", SHARDING_VARIABLES.items())
def test_a_launch_that_cuts_the_model_in_pieces_is_refused_by_name(launched, variable, name):
    with pytest.raises(ValueError, match=f"asks for {name} .*multi_gpu.yaml"):
        launched({variable: "true"})


def test_a_launch_with_fsdp_2_is_taken_and_says_where_nothing_is_cut(launched, caplog):
    accelerator, _ = launched({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})
    assert not accelerator.is_fsdp2 and "asks for FSDP 2, but Accelerate cuts no model here" in caplog.text


SHARDING = {"activation_checkpointing": False, "cpu_offload": OffloadPolicy()}


@pytest.mark.parametrize(
    "settings, plugin, message",
    [
        ({"mixed_precision": "fp16"}, {}, "`--mixed_precision fp16` was never tried; give bf16"),
        ({"mixed_precision": "auto"}, {}, "`--mixed_precision auto` was never tried; give bf16"),
        ({"use_8bit_adam": True}, {}, "`--use_8bit_adam` was never tried"),
        ({"optimizer": "muon"}, {}, "`--optimizer muon` was never tried; give adamw"),
        ({"compile": True}, {}, "`--compile` was never tried"),
        ({}, {"activation_checkpointing": True}, "`fsdp_activation_checkpointing`.*`--gradient_checkpointing`"),
        ({}, {"cpu_offload": CPUOffloadPolicy()}, "`fsdp_offload_params`"),
    ],
)
def test_what_was_never_tried_in_shards_is_refused_by_name(tmp_path, settings, plugin, message):
    given = settings_of(tmp_path, mixed_precision="bf16")
    accelerator = SimpleNamespace(
        is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=SimpleNamespace(**SHARDING | plugin))
    )
    check_sharding(
        given, SimpleNamespace(is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=SimpleNamespace(**SHARDING)))
    )
    for name, value in settings.items():
        setattr(given, name, value)
    with pytest.raises(ValueError, match=message):
        check_sharding(given, accelerator)


def test_scripts_that_were_never_tried_in_shards_refuse_them(tmp_path):
    settings = FrameSettings(dataset_name="frames", output_dir=str(tmp_path))
    accelerator = SimpleNamespace(is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=SimpleNamespace(**SHARDING)))
    with pytest.raises(ValueError, match="this script was never tried; launch it with multi_gpu.yaml"):
        check_sharding(settings, accelerator)


@pytest.mark.parametrize(
    "settings, config, message",
    [
        ({}, {}, "is 2, but 3 processes were launched; launch a multiple of 2"),
        ({"compile": True, "num_processes": 4}, {}, "`--compile` was never tried with it"),
        ({"lora_dropout": 0.1, "num_processes": 4}, {}, "`--lora_dropout` would be the same for different frames"),
        ({"num_processes": 4}, {"num_attention_heads": 3}, "has 3 `num_attention_heads`; give a divisor of 3"),
        ({"num_processes": 4}, {"long_patch_size": 2, "short_window": 1}, "1 short frames to share.*at most 1"),
        ({"num_processes": 4, "num_frames": 1}, {}, "1 short frames to share"),
        ({"num_processes": 4, "num_frames": 2}, {"num_decoder_layers": 1}, "1 short frames to share"),
    ],
)
def test_clips_that_processes_cannot_share_are_refused_by_name(tmp_path, settings, config, message):
    given = settings_of(tmp_path, context_parallel_size=2)
    usual = {"num_attention_heads": 4, "long_patch_size": None, "short_window": 3}
    check_context_parallel(given, 4, FrozenDict(usual))
    for name, value in settings.items():
        setattr(given, name, value)
    with pytest.raises(ValueError, match=message):
        check_context_parallel(given, settings.get("num_processes", 3), FrozenDict(usual | config))


def test_processes_that_share_clips_draw_the_same_ones_and_are_one_in_the_count(tmp_path):
    settings = settings_of(tmp_path, context_parallel_size=2, num_frames=3, gradient_accumulation_steps=1)
    drawn = [
        training_batches(
            settings, FaultyLatents(), tiny_transformer().config, SimpleNamespace(process_index=index, num_processes=4)
        )
        for index in range(4)
    ]
    assert [batches.process_index for batches in drawn] == [0, 0, 1, 1]
    assert {batches.clips_per_step for batches in drawn} == {2 * settings.train_batch_size}
    four = SimpleNamespace(num_processes=4, device=torch.device("cpu"), is_fsdp2=False)
    assert describe_launch(settings, four).endswith(
        "global batch 8 = 2 x 4 x 1 (groups of 2 processes, batch of each, accumulated)"
    )


def test_a_precision_of_the_launcher_that_scripts_do_not_know_is_refused(launched, monkeypatch):
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp8")
    with pytest.raises(ValueError, match="launcher's `mixed_precision` is 'fp8'.*no, fp16, bf16"):
        launched()


def test_a_script_that_does_not_accumulate_refuses_a_launcher_that_asks_for_it(launched, monkeypatch, tmp_path):
    launched(TOLD)
    settings = FrameSettings(dataset_name="frames", output_dir=str(tmp_path), report_to="none")
    with pytest.raises(ValueError, match="`gradient_accumulation_steps` 3, but this script accumulates none"):
        build_accelerator(settings)


def test_the_start_of_a_run_says_in_one_line_what_was_launched(launched, caplog, tmp_path):
    with caplog.at_level("INFO"):
        launched(gradient_accumulation_steps=2)
    assert "1 process on cpu, mixed precision no, global batch 8 = 1 x 4 x 2" in caplog.messages[-1]
    two = SimpleNamespace(num_processes=2, device=torch.device("cpu"), is_fsdp2=False)
    settings = settings_of(tmp_path, gradient_accumulation_steps=2, mixed_precision="bf16")
    assert describe_launch(settings, two).startswith(
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


def test_a_tracker_knows_the_hyperparameters_as_plain_values_and_no_secret(launched, tmp_path):
    accelerator, settings = launched(
        report_to="tensorboard", learning_rate=0.5, dataset_ids=["org/a", "org/b"], hub_token="hf_secret"
    )
    facts = {"dataset": "abc", "transformer": {"num_layers": 2, "axes_dims_rope": (4, 6, 6)}}
    known = hyperparameters(settings, accelerator, facts)
    assert known["learning_rate"] == 0.5 and known["transformer.num_layers"] == 2 and known["num_processes"] == 1
    assert known["mixed_precision"] == "no" and known["dataset_ids"] == '["org/a", "org/b"]'
    assert all(value is None or isinstance(value, (bool, int, float, str)) for value in known.values())
    accelerator.init_trackers("run", known)
    (stored,) = (tmp_path / "logs").rglob("hparams.yml")
    assert "learning_rate: 0.5" in stored.read_text() and "hf_secret" not in stored.read_text()
    accelerator.end_training()


def test_a_run_keeps_its_secret_out_of_logs_trackers_and_checkpoints(make_run, caplog):
    caplog.set_level("DEBUG")
    trained = make_run(report_to="tensorboard", hub_token="hf_secret", max_train_steps=1)
    trained.start("run", dataset="abc")
    for _ in trained.steps():
        trained.model(torch.ones(2)).sum().backward()
        outcome = StepOutcome(loss=1.0, num_frames=2)
        trained.step(outcome)
        trained.log(outcome)
    assert trained.finish()
    trained.accelerator.end_training()
    files = [path for path in trained.output_dir.rglob("*") if path.is_file()]
    assert {"run.json", "hparams.yml"} <= {path.name for path in files}
    assert not any(b"hf_secret" in path.read_bytes() for path in files) and "hf_secret" not in caplog.text


def test_the_trackers_write_where_they_are_told_under_the_name_they_are_told(make_run, tmp_path):
    trained = make_run(report_to="tensorboard", logging_dir=str(tmp_path / "elsewhere"), tracker_project_name="walks")
    trained.start("run")
    trained.accelerator.end_training()
    assert list((tmp_path / "elsewhere" / "walks").rglob("events*")) and not (trained.output_dir / "logs").exists()


def test_a_run_that_was_interrupted_ends_with_the_weights_of_one_that_was_not(make_run, tmp_path):
    def train(folder, last_step=4, resume=None):
        torch.manual_seed(0)
        trained = make_run(output_dir=str(tmp_path / folder), max_train_steps=4, resume_from_checkpoint=resume)
        trained.start("run")
        for step in trained.steps():
            trained.model(torch.randn(3, 2)).square().mean().backward()
            outcome = StepOutcome(loss=1.0, num_frames=2)
            trained.step(outcome)
            trained.log(outcome)
            if trained.finished == last_step:
                break
        trained.finish()
        return trained.model.weight

    whole = train("whole")
    train("halves", last_step=2)
    assert torch.equal(train("halves", resume="latest"), whole)


def test_a_checkpoint_of_an_earlier_version_resumes_unless_a_setting_has_changed(make_run):
    names = (
        "num_frames frame_interval combine_actions num_actions train_batch_size gradient_accumulation_steps "
        "learning_rate lr_scheduler lr_warmup_steps optimizer adam_beta1 adam_beta2 adam_weight_decay adam_epsilon "
        "max_grad_norm objective clean_context_ratio clean_prefix_ratio teacher_forcing condition_dropout logit_mean "
        "logit_std repeat_ratio mixed_precision seed"
    ).split()  # all that they had
    first = make_run()
    identity = {name: getattr(first.settings, name) for name in names} | {"num_processes": 1, "dataset": "abc"}
    save_checkpoint(first.accelerator, first.output_dir, 2, json.loads(json.dumps(identity)), None)
    resumed = make_run(resume_from_checkpoint="latest")
    resumed.start("run", dataset="abc")
    assert resumed.first_step == 2
    changes = {"use_8bit_adam": True, "num_frames": 8, "teacher_forcing": True, "streaming": True}
    for name, value in changes.items():
        changed = make_run(resume_from_checkpoint="latest")
        setattr(changed.settings, name, value)  # as flags would, whatever is installed
        with pytest.raises(ValueError, match=f"`{name}` was .* and is {value}"):
            changed.start("run", dataset="abc")


def test_a_separable_model_comes_from_a_config_or_from_its_weights(tmp_path):
    build = load_script("train_far").build_transformer
    given = SimpleNamespace(pretrained_model_name_or_path=None, revision=None, objective="far")
    source = tiny_separable(num_actions=3)
    source.save_pretrained(tmp_path)
    given.transformer_config = str(tmp_path / "config.json")
    new = build(given, in_channels=4, num_actions=3)
    assert type(new) is SCDTransformer3DModel and settings_hash(new.config) == settings_hash(source.config)
    given.pretrained_model_name_or_path = str(tmp_path)
    weights = build(given, in_channels=4, num_actions=3).state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in source.state_dict().items())


def test_a_class_that_no_script_trains_is_refused_with_where_it_stands(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    given = SimpleNamespace(pretrained_model_name_or_path=None, transformer_config=str(tmp_path / "config.json"))
    with pytest.raises(ValueError, match="^`--transformer_config` '.*' has the `_class_name` 'WanTransformer3DModel'"):
        load_script("train_far").build_transformer(given, in_channels=4, num_actions=3)


def test_what_the_network_draws_depends_on_seed_step_and_process_alone():
    def drawn(*place):
        torch.rand(3)  # whatever was drawn before
        seed_step(*place)
        return torch.rand(4).tolist()

    places = [(0, 1, 0), (0, 2, 0), (1, 1, 0), (0, 1, 1)]
    assert all(drawn(*place) == drawn(*place) for place in places)
    assert len({tuple(drawn(*place)) for place in places}) == 4


def test_accumulated_gradients_are_those_of_one_batch(make_run):
    transformer = tiny_transformer(num_actions=3, condition_dropout=0.0)
    objective = TrainingObjective(teacher_forcing=True)
    generator = torch.Generator().manual_seed(0)
    clips = [
        ClipBatch(torch.randn(1, 3, 4, 4, 4, generator=generator), torch.ones(1, 3).long(), None) for _ in range(2)
    ]
    draws = [ObjectiveDraw.stack([objective.draw(3, 0, (4, 4, 4), generator)]) for _ in range(2)]
    trained = make_run(transformer, train_batch_size=1, gradient_accumulation_steps=2)
    outcome = trained.accumulate_gradients(
        iter(zip(clips, draws)), partial(clip_loss, trained.model, transformer.config)
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
def test_a_loss_or_a_gradient_that_is_no_number_stops_the_run_with_a_cure(make_run, loss, norm, what):
    trained = make_run(max_train_steps=4)
    trained.first_step = 3
    next(trained.steps())
    trained.require_finite(1.0, torch.tensor(2.0))
    with pytest.raises(RuntimeError, match=f"{what} at step 3.* Lower `--learning_rate`.* holds no intact checkpoint"):
        trained.require_finite(loss, torch.tensor(norm))
    for step in (2, 3):  # the last has the weights that fail
        save_checkpoint(trained.accelerator, trained.output_dir, step, {}, None)
    with pytest.raises(RuntimeError, match="'checkpoint-2' is intact"):
        trained.require_finite(loss, torch.tensor(norm))
    with pytest.raises(RuntimeError, match="'checkpoint-2' is intact"):
        trained.require_finite_metrics({"loss": float("nan")}, 3)
    with pytest.raises(RuntimeError, match="'checkpoint-3' is intact"):
        trained.require_finite(loss, norm, faulty_clips=["trajectory 2"])


@pytest.mark.parametrize("scale, is_fault", [(65536.0, False), (1.0, True)])
def test_a_gradient_that_overflowed_with_a_loss_scale_is_a_fault_only_without_room_below(scale, is_fault, make_run):
    trained = make_run()
    next(trained.steps())
    trained.accelerator.scaler = SimpleNamespace(get_scale=lambda: scale)
    with pytest.raises(RuntimeError) if is_fault else nullcontext():
        trained.require_finite(1.0, float("inf"))


def test_a_trajectory_that_is_not_finite_is_named_before_the_weights_change(make_run):
    transformer = tiny_transformer(num_actions=3)
    trained = make_run(transformer, num_frames=3, gradient_accumulation_steps=2, max_train_steps=1)
    batches = training_batches(trained.settings, FaultyLatents(), transformer.config, trained.accelerator)
    loaded, weights = trained.load(batches), transformer.x_embedder.weight.detach().clone()
    next(trained.steps())
    outcome = trained.accumulate_gradients(loaded, partial(clip_loss, trained.model, transformer.config))
    trained.launch.end()
    assert outcome.faulty_clips == ("trajectory 2",)
    with pytest.raises(RuntimeError, match="data are not finite: NaN or infinite values in trajectory 2"):
        trained.step(outcome)
    assert torch.equal(transformer.x_embedder.weight, weights)


def test_a_dry_run_of_a_separable_model_counts_the_tokens_of_both_parts(make_run):
    model = tiny_separable(num_actions=3)
    trained = make_run(model, num_frames=3, gradient_accumulation_steps=1, decoder_draws=3)
    batches = training_batches(trained.settings, FaultyLatents(), model.config, trained.accelerator)
    tokens = describe_tokens(model, batches)
    assert "of them long; the decoder sees" in tokens and "twins" not in tokens
    (own, decoded) = (int(re.search(pattern, tokens)[1]) for pattern in (r"^(\d+)", r"sees (\d+)"))
    assert decoded == 3 * 2 * own


def test_epochs_of_clips_become_steps(make_run):
    trained = make_run(num_train_epochs=3, num_frames=3, gradient_accumulation_steps=1)
    training_batches(trained.settings, FaultyLatents(), tiny_transformer().config, trained.accelerator)
    assert trained.settings.max_train_steps == trained.last_step == 6  # 3 times 4 trajectories, 2 a step


@pytest.mark.parametrize("teacher_forcing", [False, True])
def test_a_dry_run_takes_two_steps_of_the_longest_clips_and_tells_their_cost(teacher_forcing, make_run):
    transformer = tiny_pipeline(tiny_transformer(num_actions=3)).transformer
    flags = {"num_frames": 4, "gradient_accumulation_steps": 1, "max_train_steps": 7200, "validation_steps": 1}
    trained = make_run(transformer, dry_run=True, teacher_forcing=teacher_forcing, checkpointing_steps=1, **flags)
    batches = training_batches(trained.settings, Trajectories(), transformer.config, trained.accelerator)
    loaded, num_steps = trained.load(batches), 0
    for num_steps, _ in enumerate(trained.steps(), start=1):
        outcome = trained.accumulate_gradients(loaded, partial(clip_loss, trained.model, transformer.config))
        trained.step(outcome)
        trained.log(outcome)
        trained.save_checkpoint_if_due()
        assert not trained.is_due(1)
    assert num_steps == 2 and not trained.output_dir.exists()
    tokens, cost = describe_tokens(transformer, batches), trained.describe_cost("2 clips")
    assert tokens.startswith("64 tokens per clip of 4 frames, 0 of them long")
    assert ("; 128 with the noisy twins of teacher forcing" in tokens) == teacher_forcing
    seconds = r"[\d.]+ M parameters\n[\d.]+ GiB of memory at the peak, (\d+\.\d{3}) s per step of 2 clips\n"
    (seconds,) = re.findall(seconds, cost)
    (hours,) = re.findall("([0-9.]+) hours for", cost)
    assert float(hours) == pytest.approx(float(seconds) * 2, abs=0.01)  # 7,200 steps; both are rounded
    assert "hours for --max_train_steps 7200" in cost
    more = re.findall(r"(\d+) processes: global batch (\d+), (\d+) steps, ([\d.]+) hours", cost)
    assert [row[:3] for row in more] == [("2", "4", "3600"), ("8", "16", "900"), ("64", "128", "113")]
    assert all(float(row[3]) == pytest.approx(float(hours) / int(row[0]), abs=0.01) for row in more)


def test_a_dry_run_adds_what_more_processes_hold_to_what_a_step_takes(make_run, monkeypatch):
    transformer = tiny_transformer(num_actions=3)
    held = {(1, False): 10, (2, False): 14, (8, False): 14, (64, False): 14, (2, True): 7, (8, True): 3, (64, True): 1}
    trained = make_run(transformer, num_frames=3, gradient_accumulation_steps=3, max_train_steps=640)
    monkeypatch.setattr(
        "diffusers_far.training.run.held_bytes",
        lambda network, optimizer, has_average, number, dtype: held[number, dtype is not None] * 2**30,
    )
    rows = trained._describe_more_processes(peak=12.0, hours=64.0).splitlines()[1:]
    assert rows == [
        "    2 processes: global batch 12, 320 steps, 32.00 hours, 16.00 GiB each, 9.00 in shards",
        "    8 processes: global batch 48, 80 steps, 8.00 hours, 16.00 GiB each, 5.00 in shards",
        "   64 processes: global batch 384, 10 steps, 1.00 hours, 16.00 GiB each, 3.00 in shards",
    ]


class Trajectories:
    """Two trajectories of six random frames."""

    num_frames, latent_shape = np.array([6, 6]), (4, 4, 4)

    def clip(self, trajectory, start, length, interval=1):
        return Clip(torch.randn(length, 4, 4, 4), torch.ones(length).long(), None)


class FaultyLatents:
    """Four trajectories; one value of number 2 is missing."""

    num_frames, latent_shape = np.full(4, 3), (4, 4, 4)

    def clip(self, trajectory, start, length, interval=1):
        latents = torch.zeros(length, 4, 4, 4)
        if trajectory == 2:
            latents[1, 0, 0, 0] = float("nan")
        return Clip(latents, torch.zeros(length).long(), None)


def test_metrics_that_are_no_numbers_fail_the_run(make_run):
    trained = make_run()
    trained.require_finite_metrics({"loss": 1.0}, 3)
    with pytest.raises(RuntimeError, match="after step 3 gave psnr nan: .* no result is saved"):
        trained.require_finite_metrics({"loss": 1.0, "psnr": float("nan")}, 3)


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


def test_the_facts_of_a_run_name_its_data_and_no_place_on_the_machine(make_run):
    trained = make_run(latents_dir="/somewhere/mazes", gradient_accumulation_steps=3)
    trained.finished = 7
    facts = training_facts(trained, TrainingObjective())
    assert facts["Data"].startswith("mazes, split train") and facts["Steps"] == "7 of 6 clips per process"


@pytest.mark.parametrize("long_patch_size", [None, 4])
def test_the_attention_of_long_models_alone_is_kept_from_cudnn(long_patch_size, monkeypatch):
    left_out = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: left_out.append(not enabled))
    disable_cudnn_attention(tiny_transformer(long_patch_size=long_patch_size).config)
    assert left_out == ([] if long_patch_size is None else [True])
