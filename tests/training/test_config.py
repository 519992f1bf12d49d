import json
import math
from dataclasses import MISSING, dataclass, fields

import numpy as np
import pytest

from diffusers_far.data.rows import COMBINATION_RULES
from diffusers_far.training.config import (
    OPTIMIZERS,
    EMASettings,
    FARSettings,
    FrameSettings,
    parse_settings,
    read_config,
    setting,
)
from diffusers_far.training.objective import OBJECTIVES, TrainingObjective


# What a resumed run had to share with its first before the settings themselves said so.
EARLIER_IDENTITY = {
    *"num_frames frame_interval combine_actions num_actions train_batch_size gradient_accumulation_steps".split(),
    *"learning_rate lr_scheduler lr_warmup_steps optimizer adam_beta1 adam_beta2 adam_weight_decay adam_epsilon".split(),
    *"max_grad_norm objective clean_context_ratio clean_prefix_ratio teacher_forcing condition_dropout".split(),
    *"logit_mean logit_std repeat_ratio mixed_precision seed use_ema ema_decay".split(),
}


@dataclass(kw_only=True)
class ScriptSettings(EMASettings, FARSettings):
    """Of a script."""

    names: list[str] | None = setting(None, free=True)


def parse_any(*arguments: str) -> ScriptSettings:
    return parse_settings(ScriptSettings, arguments=["--output_dir", "run", *arguments])


def parse(*arguments: str) -> ScriptSettings:
    return parse_any("--latents_dir", "latents", *arguments)


def refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit):
        parse_settings(ScriptSettings, arguments=arguments)
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "one of the two"),
        (("--latents_dir", "a", "--dataset_name", "b"), "one of the two"),
        (("--latents_dir", "a", "--streaming"), "cached latents are read from where they lie"),
    ],
)
def test_clips_come_from_one_source(arguments, message, capsys):
    assert message in refusal(capsys, "--output_dir", "run", *arguments)
    assert parse_any("--dataset_name", "b").dataset_name == "b"


@pytest.mark.parametrize(
    "name, value",
    [
        ("gradient_accumulation_steps", 0),
        ("train_batch_size", 0),
        ("checkpointing_steps", 0),
        ("checkpoints_total_limit", -1),  # would leave no checkpoint
        ("num_validation_inference_steps", 0),
        ("num_train_epochs", 0),
        ("seed", -1),
        ("max_grad_norm", float("nan")),
        ("learning_rate", float("inf")),
        ("max_train_hours", -8.0),
    ],
)
def test_numbers_with_which_a_run_would_fail_late_are_refused_before_it_starts(name, value, capsys):
    flags = ("--output_dir", "run", "--latents_dir", "latents", f"--{name}={value}")
    assert f"`{name}` is {value}; pass a " in refusal(capsys, *flags)
    with pytest.raises(ValueError, match=f"`{name}` is {value}"):
        ScriptSettings(output_dir="run", latents_dir="latents", **{name: value})


def test_numbers_that_are_left_out_or_may_be_negative_are_taken():
    settings = parse("--logit_mean", "-0.5", "--num_validation_videos", "0")
    assert settings.logit_mean == -0.5 and settings.num_validation_inference_steps is None


def test_every_setting_has_its_rules_in_its_field():
    for each in fields(ScriptSettings):
        assert each.metadata.keys() == {"help", "least", "free", "of_stream", "rule"}, each.name
        is_given = each.default is not MISSING or each.default_factory is not MISSING
        assert is_given or each.name == "output_dir"


def test_the_identity_of_a_run_is_its_settings_but_for_the_free_ones():
    identity = parse("--learning_rate", "0.5", "--dataset_split", "small").identity()
    assert identity["learning_rate"] == 0.5 and "dataset_split" not in identity
    later = {"use_8bit_adam", "video_column", "streaming"}
    later |= {"decoder_draws", "decoder_learning_rate_ratio", "flow_map_guidance", "context_parallel_size"}
    assert identity.keys() == EARLIER_IDENTITY | later
    free = {each.name for each in fields(ScriptSettings) if each.metadata["free"]}
    assert not free & EARLIER_IDENTITY


def test_the_length_of_a_run_belongs_to_its_identity_where_the_schedule_depends_on_it():
    assert "max_train_steps" not in parse("--lr_scheduler", "constant").identity()
    assert parse("--lr_scheduler", "cosine", "--max_train_steps", "9").identity()["max_train_steps"] == 9


def test_how_a_stream_is_mixed_belongs_to_the_identity_of_a_stream_alone():
    added = parse_any("--dataset_name", "a", "--streaming").identity().keys() - parse().identity().keys()
    assert added == {"shuffle_buffer_size", "clips_per_trajectory"}


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_recipe_is_read_and_flags_win_over_it(suffix, tmp_path):
    recipe = tmp_path / f"recipe.{suffix}"
    values = {"latents_dir": "latents", "learning_rate": 3e-5, "use_ema": True, "names": ["left", "right"], "seed": 7}
    text = "\n".join(f"{name}: {json.dumps(value)}" for name, value in values.items())
    recipe.write_text(json.dumps(values) if suffix == "json" else f"# why\n{text}\nlogit_mean: 1e-1\n")
    settings = parse_settings(
        ScriptSettings, arguments=[str(recipe), "--output_dir", "run", "--seed", "8", "--use_ema", "False"]
    )
    assert (settings.learning_rate, settings.names, settings.seed) == (3e-5, ["left", "right"], 8)
    assert settings.use_ema is False and settings.logit_mean == (0.1 if suffix == "yaml" else 0)


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rat: 1", "learning_rat, which this script does not know"),
        ("- 1", "has no settings by name"),
        ("a: [", "cannot be read"),
        ("seed: many", "argument --seed: invalid int value: 'many'"),
        ("train_batch_size: 0", "`train_batch_size` is 0"),
        (None, "No such file"),
    ],
)
def test_a_recipe_with_what_no_flag_takes_is_refused_by_name(text, message, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    if text is not None:
        recipe.write_text(text)
    assert message in refusal(capsys, str(recipe), "--output_dir", "run", "--latents_dir", "latents")


def test_a_secret_is_no_identity_and_is_never_shown():
    settings = parse("--hub_token", "hf_secret")
    assert settings.hub_token == "hf_secret"
    for text in (repr(settings), str(settings.identity()), str(settings.shown())):
        assert "hf_secret" not in text


def test_epochs_become_steps_and_a_stream_has_none(capsys):
    settings = parse("--num_train_epochs", "3")
    settings.count_epochs(num_samples=10, samples_per_step=4)
    assert settings.max_train_steps == 8  # 30 samples
    unchanged = parse("--max_train_steps", "7")
    unchanged.count_epochs(10, 4)
    assert unchanged.max_train_steps == 7
    said = refusal(capsys, *"--output_dir run --dataset_name a --streaming --num_train_epochs 2".split())
    assert "`num_train_epochs` is 2, but the length of a stream is not known; give `--max_train_steps`" in said
    with pytest.raises(ValueError, match="length of a stream"):
        FrameSettings(output_dir="run", dataset_name="a", streaming=True, num_train_epochs=2)


def test_the_default_objective_is_the_objectives_own_default():
    assert parse().training_objective() == TrainingObjective()


def test_every_flag_of_the_objective_reaches_it():
    flags = (
        "--clean_context_ratio 0.2 --clean_prefix_ratio 0.3 --condition_dropout 0.4 --logit_mean 0.5 --logit_std 0.6"
    )
    objective = parse("--teacher_forcing", *flags.split()).training_objective()
    assert objective == TrainingObjective("far", 0.2, 0.3, True, 0.4, 0.5, 0.6)
    with pytest.raises(ValueError, match="`teacher_forcing` needs frames in an order"):
        parse("--teacher_forcing", "--objective", "video_dit").training_objective()


SEPARABLE = {"num_decoder_layers": 4, "learn_start": False}


def test_a_separable_model_is_trained_on_clean_context_with_several_draws():
    assert parse().training_objective(SEPARABLE) == TrainingObjective(
        clean_context_ratio=0.0, teacher_forcing=True, decoder_draws=2, learn_start=False
    )
    assert parse("--decoder_draws", "3", "--teacher_forcing").training_objective(SEPARABLE).decoder_draws == 3


def test_the_model_says_whether_it_is_trained_as_a_flow_map():
    flow_map = {"flow_map": True, "num_actions": 3}
    settings = parse("--teacher_forcing", "--flow_map_guidance", "3")
    objective = settings.training_objective(flow_map)
    assert objective == TrainingObjective(teacher_forcing=True, flow_map=True, flow_map_guidance=3.0)
    assert parse().training_objective(SEPARABLE | flow_map).flow_map
    with pytest.raises(ValueError, match="`flow_map_guidance` is 3.0, but no condition guides this model"):
        settings.training_objective({"flow_map": True})
    with pytest.raises(ValueError, match="`flow_map_guidance` is 3.0 and `flow_map` False"):
        settings.training_objective({"num_actions": 3})
    with pytest.raises(ValueError, match="pass `--teacher_forcing`"):
        parse().training_objective(flow_map)


@pytest.mark.parametrize(
    "flag, value, config",
    [
        ("clean_context_ratio", 0.2, SEPARABLE),
        ("clean_prefix_ratio", 0.5, SEPARABLE),
        ("objective", "video_dit", SEPARABLE),
        ("decoder_draws", 2, {}),
        ("decoder_learning_rate_ratio", 1.0, {}),
    ],
)
def test_what_has_no_meaning_for_the_model_is_refused(flag, value, config):
    with pytest.raises(ValueError, match=f"`{flag}` is {value!r}, but .*; leave it out"):
        parse(f"--{flag}={value}").training_objective(config)


def test_joined_actions_are_fed_as_their_sequences():
    settings = parse("--combine_actions", "joint", "--num_actions", "3", "--frame_interval", "2")
    assert settings.action_combiner()(np.array([[2, 1]])).tolist() == [7]
    assert settings.num_fed_actions(3) == 9
    assert parse().action_combiner() is None and parse().num_fed_actions(3) == 3


def test_what_can_be_chosen_is_what_there_is():
    for name, values in (("objective", OBJECTIVES), ("combine_actions", COMBINATION_RULES), ("optimizer", OPTIMIZERS)):
        assert [getattr(parse(f"--{name}", value), name) for value in values] == list(values)


def test_a_least_of_minus_infinity_still_asks_for_a_number():
    with pytest.raises(ValueError, match="`logit_mean` is nan; pass a finite number."):
        ScriptSettings(output_dir="run", latents_dir="latents", logit_mean=math.nan)


@pytest.mark.parametrize(
    "content, message", [(None, "No such file"), ("{", "as JSON"), ("[]", "holds no JSON object")]
)
def test_a_config_that_is_none_is_named_with_its_argument(tmp_path, content, message):
    path = tmp_path / "model.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"`--vae_config` .*model.json.*{message}"):
        read_config("vae_config", str(path))
