"""The paper's recipes call what exists, say what the paper says, and cost what is counted."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from diffusers import AutoencoderDC

from benchmarks.studies.recipes import (
    PEAK,
    RECIPES,
    UTILISATIONS,
    read_recipe,
    read_recipes,
    recipe_table,
    recorded_calls,
)
from benchmarks.studies.scripts import ROOT, load_script
from diffusers_far.models.codec import spatial_compression


pytestmark = pytest.mark.full  # loads every script

CONFIGS = ROOT / "examples" / "configs"
SCRIPTS = sorted(RECIPES.glob("*.sh"))
# Model, parameters in millions, clip, steps, warm-up, compression of the autoencoder: the paper's.
EXPECTED = {
    "bair": ("far-b", 130, 30, 200_000, None, 8),
    "dmlab": ("far-b-long", 158, 300, 1_000_000, 10_000, 8),
    "minecraft": ("far-m-long", 280, 300, 1_000_000, 10_000, 16),
    "ucf101_generation": ("far-l", 457, 16, 400_000, None, 16),
    "ucf101_prediction": ("far-b", 130, 16, 200_000, None, 8),
}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Where the recipes are run."""
    monkeypatch.chdir(ROOT)


def calls_of(name: str, script: str) -> list[list[str]]:
    """The arguments of each call of a script in a recipe."""
    calls = [call for call in recorded_calls(RECIPES / f"{name}.sh") if f"examples/{script}.py" in call]
    return [call[call.index(f"examples/{script}.py") + 1 :] for call in calls]


def test_there_is_a_recipe_for_each_task_of_the_paper():
    assert {script.stem for script in SCRIPTS} == set(EXPECTED)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_command_of_a_recipe_is_accepted(script):
    calls = recorded_calls(script)
    names = []
    for call in calls:
        if call[:2] == ["accelerate", "launch"]:
            launch = launch_command_parser().parse_args(call[2:])
            assert (ROOT / launch.config_file).is_file() and launch.num_processes == 8
            path, arguments = launch.training_script, launch.training_script_args
        else:
            path, arguments = call[1], call[2:]
        assert (ROOT / path).is_file()
        load_script(Path(path).stem).parse_args(arguments)
        names.append(Path(path).stem)
    assert names[:2] == ["prepare_dataset"] * 2 and names[2:6] == ["train_vae", *["cache_latents"] * 2, "train_far"]
    assert names[6:] and set(names[6:]) == {"evaluate"}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipe_is_the_paper_s(name):
    recipe = read_recipe(RECIPES / f"{name}.sh")
    model, millions, num_frames, steps, warm_up, compression = EXPECTED[name]
    arguments = recipe.arguments
    assert recipe.model_name == model and round(recipe.transformer.num_parameters() / 1e6) == millions
    assert (arguments.num_frames, arguments.max_train_steps, recipe.num_clips) == (num_frames, steps, 32)
    assert arguments.frame_interval == (3 if name == "ucf101_generation" else 1)
    assert (arguments.learning_rate, arguments.optimizer, arguments.adam_weight_decay) == (1e-4, "adamw", 0)
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.max_grad_norm) == (0.9, 0.999, 1.0)
    assert arguments.use_ema and arguments.ema_decay == 0.9999 and arguments.mixed_precision == "bf16"
    assert arguments.objective == "far" and arguments.clean_context_ratio == 0.1 and not arguments.teacher_forcing
    assert (arguments.clean_prefix_ratio, arguments.condition_dropout) == (0, 0.1)
    if warm_up is None:
        assert arguments.lr_scheduler == "constant"
    else:
        assert (arguments.lr_scheduler, arguments.lr_warmup_steps) == ("constant_with_warmup", warm_up)
    (vae_call,) = calls_of(name, "train_vae")
    vae_arguments = load_script("train_vae").parse_args(vae_call)
    config = json.loads((ROOT / vae_arguments.vae_config).read_text())
    with torch.device("meta"):
        vae = AutoencoderDC.from_config(config)
    assert spatial_compression(vae) == compression and vae.config.latent_channels == 32
    assert vae_arguments.disc_start == vae_arguments.max_train_steps // 2 and vae_arguments.lpips_weights
    (prepare, *_) = calls_of(name, "prepare_dataset")
    assert int(prepare[prepare.index("--size") + 1]) == 8 * compression  # 64 latents a frame


def test_each_of_several_machines_starts_its_share_of_the_same_training():
    script, machines = RECIPES / "dmlab.sh", {"MACHINES": "2", "MACHINE_RANK": "1", "MAIN_IP": "10.0.0.1"}
    for step, global_batch in (("train_vae", 256), ("train_far", 32)):
        (call,) = recorded_calls(script, step, **machines)
        launch = launch_command_parser().parse_args(call[2:])
        assert (launch.num_processes, launch.num_machines, launch.machine_rank) == (16, 2, 1)
        assert (launch.main_process_ip, launch.rdzv_backend, launch.max_restarts) == ("10.0.0.1", "c10d", 3)
        arguments = load_script(step).parse_args(launch.training_script_args)
        assert arguments.train_batch_size * 16 == global_batch and arguments.resume_from_checkpoint == "latest"


@pytest.mark.parametrize(
    "steps, environment, message",
    [(["train"], {}, "STEP is train; give prepare"), ([], {"GPUS": "3"}, "is 3, which does not divide the 32 clips")],
)
def test_a_step_or_a_number_of_gpus_that_cannot_be_is_refused_before_anything_is_called(steps, environment, message):
    with pytest.raises(subprocess.CalledProcessError) as error:
        recorded_calls(RECIPES / "dmlab.sh", *steps, **environment)
    assert message in error.value.stderr


def test_the_largest_autoencoder_and_model_of_the_paper_are_there_too():
    with torch.device("meta"):
        vae = AutoencoderDC.from_config(json.loads((CONFIGS / "dc_ae_f32.json").read_text()))
    assert spatial_compression(vae) == 32
    assert json.loads((CONFIGS / "far_xl_ucf101.json").read_text())["num_classes"] == 101


def test_evaluation_follows_the_paper_s_protocols():
    parse = load_script("evaluate").parse_args
    (teco,) = map(parse, calls_of("dmlab", "evaluate"))
    assert teco.protocol == "teco" and teco.settings.guidance_scale == 1.5
    class_, free = map(parse, calls_of("ucf101_generation", "evaluate"))
    assert (class_.settings.condition, class_.settings.guidance_scale) == ("class", 2.0)
    assert (free.settings.condition, free.settings.guidance_scale) == ("free", 1.0)
    assert class_.settings.seeds == (0, 2, 4, 6) and class_.settings.frame_interval == 3
    long, short = map(parse, calls_of("bair", "evaluate"))
    assert (long.settings.num_context_frames, long.settings.num_frames, short.settings.num_frames) == (2, 28, 14)


def test_costs_follow_from_tokens_and_parameters():
    """Six operations for each parameter and token, without attention: the count lies somewhat above."""
    recipe = read_recipe(RECIPES / "ucf101_prediction.sh")
    model = recipe.transformer
    per_frame = 6 * model.config.num_layers * model.inner_dim**2  # modulation runs once a frame, not once a token
    floor = 6 * (model.num_parameters() - per_frame) * 1024 * 32 * 200_000
    assert floor < recipe.flops < 1.25 * floor
    good, modest = UTILISATIONS
    assert recipe.hours(good) == pytest.approx(recipe.flops / (0.4 * PEAK) / 3600)
    assert recipe.hours(modest, num_gpus=8) == pytest.approx(recipe.hours(good) / 4)


def test_the_table_has_a_row_for_each_recipe():
    rows = recipe_table().splitlines()
    assert "not measured: 40% and 20% of the 312 * 10^12" in rows[0]
    assert len(rows) == 4 + len(read_recipes())
