r"""Convert a released FAR transformer and its DC-AE (`guyuchao/FAR_Models`, `.pth`) to a pipeline folder.

    python scripts/convert_far_to_diffusers.py \
        --transformer FAR_B_Long_DMLab_Action64.pth --transformer_config far-b-long --num_actions 4 --trained_frames 300 \
        --vae DCAE_DMLab_Res64.pth --output_dir far-b-long-dmlab

`FARPipeline.from_pretrained(output_dir)` loads the folder.

The released files are plain state dicts. Training checkpoints that keep them under a key (`ema`, `params_ema`,
`state_dict`, `params`, `model` or `module`, averaged weights first) or below a `module.` prefix are unwrapped.
"""

import argparse
import json
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers_far.command_line import HelpWithDefaults
from diffusers_far.models.presets import PRESETS


logger = logging.getLogger("convert_far_to_diffusers")

WRAPPERS = ("ema", "params_ema", "state_dict", "params", "model", "module")  # the averaged weights first
PARALLEL_PREFIX = "module."
LATENT_SIZE = 8  # height and width of the latents that the released models were trained on


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    parser.add_argument("--transformer", type=Path, required=True, help="The released transformer, a .pth file.")
    parser.add_argument(
        "--transformer_config",
        required=True,
        help=f"Its size, one of {', '.join(PRESETS)}; or a JSON file with its keyword arguments, of a separable model "
        "those of its two parts, as `encoder` and `decoder`.",
    )
    condition = parser.add_mutually_exclusive_group()
    condition.add_argument("--num_actions", type=int, help="Of a model of that size: its discrete actions.")
    condition.add_argument("--num_classes", type=int, help="Of a model of that size: its classes.")
    parser.add_argument(
        "--trained_frames", type=int, help="The longest clip seen in training; FlexRoPE starts to decay after it."
    )
    parser.add_argument("--vae", type=Path, required=True, help="The released DC-AE, a .pth file.")
    parser.add_argument(
        "--vae_compression",
        type=int,
        choices=[8, 16, 32],
        help="Pixels per latent along one side, read from the weights by default.",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="A folder that is empty or does not exist.")
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="Of all weights."
    )
    parser.add_argument("--fps", type=float, help="Frames per second of the videos that the model knows.")
    parser.add_argument("--height", type=int, help=f"In pixels; by default that of {LATENT_SIZE} latents.")
    parser.add_argument("--width", type=int, help=f"In pixels; by default that of {LATENT_SIZE} latents.")
    parser.add_argument("--push_to_hub", metavar="REPO", help="Upload the folder to this repo on the Hub.")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    args = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_far import (
    FARPipeline,
    convert_original_far_autoencoder,
    convert_original_far_transformer,
    convert_original_scd_transformer,
)
from diffusers_far.models.codec import spatial_compression


def main(args: argparse.Namespace) -> None:
    if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
        raise FileExistsError(f"`--output_dir` {str(args.output_dir)!r} is not an empty folder; choose another one.")

    # 1. Read, before anything is written
    original_config = read_original_config(args.transformer_config, args.num_actions, args.num_classes)
    dtype = getattr(torch, args.dtype)
    transformer_weights = read_checkpoint(args.transformer, dtype)
    vae_weights = read_checkpoint(args.vae, dtype)

    # 2. Convert
    if original_config.keys() == {"encoder", "decoder"}:
        transformer = convert_original_scd_transformer(
            transformer_weights, original_config["encoder"], original_config["decoder"]
        )
    else:
        transformer = convert_original_far_transformer(transformer_weights, original_config)
    transformer.register_to_config(trained_frames=args.trained_frames)
    vae = convert_original_far_autoencoder(vae_weights, args.vae_compression)
    default_size = LATENT_SIZE * spatial_compression(vae)
    pipe = FARPipeline(
        transformer,
        vae,
        FlowMatchEulerDiscreteScheduler(),
        fps=args.fps,
        height=args.height or default_size,
        width=args.width or default_size,
    )

    # 3. Save
    facts = {"Weights": f"converted from `{args.transformer.name}` and `{args.vae.name}`"}
    pipe.save_pretrained(
        args.output_dir, training_facts=facts, push_to_hub=args.push_to_hub is not None, repo_id=args.push_to_hub
    )
    logger.info(f"Saved the pipeline to {args.output_dir}")


def read_original_config(name: str, num_actions: int | None, num_classes: int | None) -> dict[str, Any]:
    """Keyword arguments of the released model: of a preset, with its condition, or from a JSON file."""
    if name in PRESETS:
        config = dict(PRESETS[name])
        if "long_patch_size" in config:
            config["context_patch_size"] = config.pop("long_patch_size")
        if num_actions is not None:
            config["condition_cfg"] = {"type": "action", "num_action_classes": num_actions}
        if num_classes is not None:
            config["condition_cfg"] = {"type": "label", "num_classes": num_classes}
        return config
    if num_actions is not None or num_classes is not None:
        raise ValueError(
            f"`--transformer_config` is {name!r} and not one of {', '.join(PRESETS)}; `--num_actions` and "
            "`--num_classes` complete one of these. Write `condition_cfg` into the JSON file instead."
        )
    try:
        config = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`--transformer_config` is {name!r}, which is neither a size ({', '.join(PRESETS)}) nor a JSON file that "
            f"can be read: {error}"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"`--transformer_config` {name!r} holds a {type(config).__name__}; it must be a JSON object.")
    return config


def read_checkpoint(path: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state dict in a `.pth` file, on the CPU, its floats as `dtype`. Pickled code is never run.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is truncated, no checkpoint, or holds other things than tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is not a file; pass the path of a downloaded .pth file.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{str(path)!r} is truncated or no checkpoint of plain tensors: {reason} Download it again and compare its "
            "size with the original."
        ) from error
    state_dict = unwrap(checkpoint)
    if not state_dict or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        kind = f"a dict of {', '.join(map(str, list(checkpoint)[:8]))}" if isinstance(checkpoint, dict) else "no dict"
        raise ValueError(
            f"{str(path)!r} holds {kind}, in which no state dict was found, neither by itself nor under "
            f"{', '.join(WRAPPERS)}."
        )
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in state_dict.items()}


def unwrap(checkpoint: Any) -> dict[str, Any]:
    """The state dict in a training checkpoint; empty where there is none."""
    if not isinstance(checkpoint, Mapping):
        return {}
    for wrapper in WRAPPERS:
        if isinstance(checkpoint.get(wrapper), Mapping):
            return unwrap(checkpoint[wrapper])
    if checkpoint and all(str(key).startswith(PARALLEL_PREFIX) for key in checkpoint):
        return {key.removeprefix(PARALLEL_PREFIX): value for key, value in checkpoint.items()}
    return dict(checkpoint)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(args)
