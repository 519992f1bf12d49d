import argparse
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest

from diffusers_far.commands.arguments import add_settings, read_settings
from diffusers_far.evaluation.protocols import PROTOCOLS, TilesProtocol
from diffusers_far.evaluation.world_model import WorldModelProtocol


ALL = [WorldModelProtocol, TilesProtocol, *PROTOCOLS.values()]


def parse(protocol_class, *arguments: str):
    parser = argparse.ArgumentParser()
    add_settings(parser, protocol_class)
    return read_settings(parser.parse_args(arguments), protocol_class)


@pytest.mark.parametrize("protocol_class", ALL)
def test_nothing_given_is_the_protocol_as_it_is(protocol_class):
    assert parse(protocol_class) == protocol_class()


@pytest.mark.parametrize("protocol_class", ALL)
def test_every_number_can_be_given(protocol_class):
    for each in fields(protocol_class):
        default = getattr(protocol_class(), each.name)
        if get_args(get_type_hints(protocol_class)[each.name]):
            assert getattr(parse(protocol_class, f"--{each.name}", "8", "9"), each.name) == (8, 9)
        elif each.type is not str:
            value = (default or 0) + 1
            assert getattr(parse(protocol_class, f"--{each.name}", str(value)), each.name) == value


def test_a_value_out_of_range_is_an_error():
    with pytest.raises(ValueError, match="num_trajectories"):
        parse(PROTOCOLS["mcvd"], "--num_trajectories", "0")
