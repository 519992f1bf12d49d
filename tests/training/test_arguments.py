import argparse

import numpy as np
import pytest
import torch

from diffusers_far.training.config import (
    RUN_IDENTITY,
    action_combiner,
    add_checkpoint_arguments,
    add_data_arguments,
    add_hub_arguments,
    add_objective_arguments,
    add_optimization_arguments,
    add_validation_arguments,
    build_optimizer,
    num_fed_actions,
    read_config,
    require_one_source,
    training_objective,
)
from diffusers_far.training.objective import OBJECTIVES, TrainingObjective


def parse_any(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for add in (
        add_data_arguments,
        add_objective_arguments,
        add_optimization_arguments,
        add_checkpoint_arguments,
        add_validation_arguments,
        add_hub_arguments,
    ):
        add(parser)
    args = parser.parse_args(["--output_dir", "run", *arguments])
    require_one_source(parser, args)
    return args


def parse(*arguments: str) -> argparse.Namespace:
    return parse_any("--latents_dir", "latents", *arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "one of the two"),
        (("--latents_dir", "a", "--dataset_name", "b"), "one of the two"),
        (("--latents_dir", "a", "--streaming"), "cached latents are read from where they lie"),
    ],
)
def test_clips_come_from_one_source(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse_any(*arguments)
    assert message in capsys.readouterr().err
    assert parse_any("--dataset_name", "b").dataset_name == "b"


def test_the_groups_stand_beside_each_other_and_hold_all_that_identifies_a_run():
    args = parse()
    assert all(hasattr(args, name) for name in RUN_IDENTITY)
    assert args.push_to_hub is False and args.report_to == "tensorboard"


def test_the_default_objective_is_the_objectives_own_default():
    assert training_objective(parse()) == TrainingObjective()


def test_every_flag_of_the_objective_reaches_it():
    flags = (
        "--clean_context_ratio 0.2 --clean_prefix_ratio 0.3 --condition_dropout 0.4 --logit_mean 0.5 --logit_std 0.6"
    )
    objective = training_objective(parse("--teacher_forcing", *flags.split()))
    assert objective == TrainingObjective("far", 0.2, 0.3, True, 0.4, 0.5, 0.6)
    with pytest.raises(ValueError, match="`teacher_forcing` needs frames in an order"):
        training_objective(parse("--teacher_forcing", "--objective", "video_dit"))


@pytest.mark.parametrize("name, kind", [("adamw", torch.optim.AdamW), ("radam", torch.optim.RAdam)])
def test_the_optimizer_has_the_parameters_and_settings_that_were_given(name, kind):
    parameter = torch.nn.Parameter(torch.zeros(2))
    args = parse("--optimizer", name, "--learning_rate", "0.5", "--adam_beta2", "0.9", "--adam_weight_decay", "0.1")
    optimizer = build_optimizer(args, [parameter])
    (group,) = optimizer.param_groups
    assert type(optimizer) is kind and group["params"] == [parameter]
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.5, (0.9, 0.9), 0.1, 1e-8)


def test_joined_actions_are_fed_as_their_sequences():
    args = parse("--combine_actions", "joint", "--num_actions", "3", "--frame_interval", "2")
    assert action_combiner(args)(np.array([[2, 1]])).tolist() == [7]
    assert num_fed_actions(args, 3) == 9
    assert action_combiner(parse()) is None and num_fed_actions(parse(), 3) == 3


def test_what_can_be_chosen_is_what_there_is():
    """The arguments state it once more, as the objectives and the optimizers take seconds to import."""
    parser = argparse.ArgumentParser()
    add_objective_arguments(parser)
    add_optimization_arguments(parser)
    choices = {action.dest: action.choices for action in parser._actions}
    assert choices["objective"] == OBJECTIVES
    for name in choices["optimizer"]:
        optimizer = build_optimizer(parser.parse_args(["--optimizer", name]), [torch.nn.Parameter(torch.zeros(1))])
        assert type(optimizer).__name__.lower() == name


@pytest.mark.parametrize(
    "content, message", [(None, "No such file"), ("{", "as JSON"), ("[]", "holds no JSON object")]
)
def test_a_config_that_is_none_is_named_with_its_argument(tmp_path, content, message):
    path = tmp_path / "model.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"`--vae_config` .*model.json.*{message}"):
        read_config("vae_config", str(path))
