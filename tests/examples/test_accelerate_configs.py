"""The launch configs in `examples/configs/accelerate`, as Accelerate reads them."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from diffusers_far import FARTransformer3DModel


CONFIGS = Path(__file__).parents[2] / "examples" / "configs" / "accelerate"
LAUNCHES = {
    "one_gpu": {"num_processes": 1, "multi_gpu": False, "use_fsdp": False, "use_cpu": False},
    "multi_gpu": {"num_processes": 8, "multi_gpu": True, "use_fsdp": False, "use_cpu": False},
    "fsdp": {"num_processes": 8, "multi_gpu": False, "use_fsdp": True, "use_cpu": False},
    "cpu": {"num_processes": 2, "multi_gpu": True, "use_fsdp": False, "use_cpu": True},
}


def test_every_config_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(LAUNCHES)


@pytest.mark.parametrize("name", LAUNCHES)
def test_accelerate_reads_a_config_and_launches_what_it_says(name):
    path = str(CONFIGS / f"{name}.yaml")
    assert load_config_from_file(path).num_processes == LAUNCHES[name]["num_processes"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", path, "script.py"]))
    assert {key: getattr(args, key) for key in LAUNCHES[name]} == LAUNCHES[name]


def test_fsdp_wraps_the_blocks_that_the_transformer_has():
    config = load_config_from_file(str(CONFIGS / "fsdp.yaml")).fsdp_config
    assert [config["fsdp_transformer_layer_cls_to_wrap"]] == FARTransformer3DModel._no_split_modules
