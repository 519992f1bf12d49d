"""The settings of a protocol as arguments of a command line, so that every number can be given there."""

import argparse
from dataclasses import MISSING, fields
from typing import get_args, get_type_hints


def add_settings(parser: argparse.ArgumentParser, protocol_class: type) -> None:
    """An option for each field of a protocol, with its default and help."""
    hints = get_type_hints(protocol_class)
    for each in fields(protocol_class):
        is_list = bool(get_args(hints[each.name]))
        kind = get_args(hints[each.name])[0] if is_list else hints[each.name]
        num_values = None
        if is_list:  # `tuple[int, ...]` is of any length, `tuple[int, int]` of two
            num_values = "+" if Ellipsis in get_args(hints[each.name]) else len(get_args(hints[each.name]))
        assert each.default is not MISSING, f"{each.name} of {protocol_class.__name__} has no default"
        default = each.default
        if default is None:
            default = getattr(protocol_class, "default_guidance_scale", "the pipeline's own")
        parser.add_argument(
            f"--{each.name}",
            type=kind,
            nargs=num_values,
            default=each.default,
            help=f"{each.metadata.get('help', '')} Default: {default}.".strip(),
        )


def read_settings(args: argparse.Namespace, protocol_class: type):
    """The protocol that was asked for.

    Raises:
        ValueError: A setting outside its range.
    """
    values = {each.name: getattr(args, each.name) for each in fields(protocol_class)}
    return protocol_class(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    )
