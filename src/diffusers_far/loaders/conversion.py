"""The released FAR checkpoints as models of this package and of diffusers."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderDC
from diffusers.utils import logging

from ..hooks import FlexRoPEConfig, apply_flex_rope
from ..models.frame_transformer import FrameTransformer
from ..models.loading import describe_key_errors, name_some
from ..models.transformer_far import FARTransformer3DModel
from ..models.transformer_scd import SCDTransformer3DModel


logger = logging.get_logger(__name__)

# The released transformers' keyword arguments, with their defaults.
ORIGINAL_DEFAULTS = {
    "patch_size": 1,
    "context_patch_size": None,
    "in_channels": 32,
    "num_layers": 12,
    "attention_head_dim": 64,
    "num_attention_heads": 12,
    "axes_dims_rope": (16, 24, 24),
    "out_channels": 32,
    "slope_scale": 0.0,
    "short_term_ctx_winsize": 16,
    "condition_cfg": None,
}
# Arguments that mean the same here.
SAME_ARGUMENTS = (
    "in_channels",
    "out_channels",
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "patch_size",
)
# What the two parts of a separable model have in common.
SHARED_ARGUMENTS = (
    "in_channels",
    "num_attention_heads",
    "attention_head_dim",
    "patch_size",
    "axes_dims_rope",
    "num_actions",
    "num_classes",
)
# Where a condition's type leads: the key of its size there, and the argument here.
ORIGINAL_CONDITIONS = {"label": ("num_classes", "num_classes"), "action": ("num_action_classes", "num_actions")}
# Ours to theirs; all other weights have the same names.
ORIGINAL_WEIGHT_NAMES = {"label_embedder.weight": "label_embedder.embedding_table.weight"}
# The output projection of long frames: the loss never looked at it, so it holds its initial zeros.
UNTRAINED_PREFIX = "context_proj_out."

# The released autoencoders: stages, and of each stage its channels and layers.
AUTOENCODER_STAGES = {8: 4, 16: 5, 32: 6}
AUTOENCODER_CHANNELS = (128, 256, 512, 512, 1024, 1024)
AUTOENCODER_LAYERS = {"encoder": (0, 4, 8, 2, 2, 2), "decoder": (0, 5, 10, 2, 2, 2)}
AUTOENCODER_STAGE_PREFIX = {"encoder": "encoder.down_blocks", "decoder": "decoder.up_blocks"}


def convert_original_far_transformer(
    state_dict: Mapping[str, torch.Tensor], original_config: Mapping[str, Any]
) -> FARTransformer3DModel:
    """A released FAR transformer as ours.

    Args:
        state_dict (`dict[str, torch.Tensor]`): The released weights. Those of `context_embedder` tell a long model.
        original_config (`dict`): Keyword arguments of the released model: `patch_size`, `context_patch_size` (read from
            the weights where it is left out), `in_channels`, `num_layers`, `attention_head_dim`, `num_attention_heads`,
            `axes_dims_rope`, `out_channels`, `slope_scale`, `short_term_ctx_winsize` and `condition_cfg`, which is
            `None`, `{"type": "label", "num_classes": n}` or `{"type": "action", "num_action_classes": n}`. What is
            left out has its default in the released code.

    Returns:
        [`FARTransformer3DModel`] in evaluation mode, with weights of its own in the dtype of the given ones. With a
        `slope_scale` other than 0 a constant FlexRoPE is applied to it.

    Raises:
        ValueError: A weight is missing, unknown or of the wrong shape, or the config has an unknown key or value.
    """
    config = model_arguments("original_config", original_config, state_dict)
    is_long = config["long_patch_size"] is not None
    dropped = [key for key in state_dict if is_long and key.startswith(UNTRAINED_PREFIX)]
    weights = {key: tensor for key, tensor in state_dict.items() if key not in dropped}

    with torch.device("meta"):
        model = FARTransformer3DModel(**config)
    fill(model, weights, ORIGINAL_WEIGHT_NAMES)
    if dropped:
        logger.warning(f"Dropped {name_some(dropped)}: no training step ever changed them, and nothing reads them.")
    return with_original_slope(model, original_config).eval()


def convert_original_scd_transformer(
    state_dict: Mapping[str, torch.Tensor], encoder_config: Mapping[str, Any], decoder_config: Mapping[str, Any]
) -> SCDTransformer3DModel:
    """A separable transformer of the public code as ours.

    Args:
        state_dict (`dict[str, torch.Tensor]`): Its weights; their names start with `encoder.` and `decoder.`.
        encoder_config (`dict`), decoder_config (`dict`): Keyword arguments of its two parts, those of a released FAR
            transformer (see [`convert_original_far_transformer`]); the decoder's may have `decoder_input_combine`,
            `"token_concat"`. But for `num_layers`, and the encoder's `slope_scale`, the two say the same.

    Returns:
        [`SCDTransformer3DModel`] in evaluation mode, as [`convert_original_far_transformer`] returns a FAR: with
        `action_shift=0`, and `learn_start=False`, for it makes no frame without one before it.

    Raises:
        ValueError: A weight is missing, unknown or of the wrong shape, or a config has an unknown key or value.
    """
    combination = decoder_config.get("decoder_input_combine", "token_concat")
    if combination != "token_concat":
        raise ValueError(
            f"`decoder_input_combine` is {combination!r} in `decoder_config`; the decoder here sees the feature as tokens "
            "of their own, 'token_concat'."
        )
    decoder_config = {key: value for key, value in decoder_config.items() if key != "decoder_input_combine"}
    weights = {name: dict_below(state_dict, f"{name}.") for name in ("encoder", "decoder")}
    encoder = model_arguments("encoder_config", encoder_config, weights["encoder"])
    decoder = model_arguments("decoder_config", decoder_config, weights["decoder"])
    layers = {"num_encoder_layers": encoder.pop("num_layers"), "num_decoder_layers": decoder.pop("num_layers")}
    different = [name for name in SHARED_ARGUMENTS if encoder.get(name) != decoder.get(name)]
    if different:
        raise ValueError(
            f"`encoder_config` and `decoder_config` differ in {name_some(different)}; only their layers may. Pass the "
            "configs that the weights were trained with."
        )
    with torch.device("meta"):
        config = {**encoder, **layers, "out_channels": decoder["out_channels"], "learn_start": False}
        model = SCDTransformer3DModel(**config)
    names = {
        f"{part}.{ours}": f"{part}.{theirs}" for part in weights for ours, theirs in ORIGINAL_WEIGHT_NAMES.items()
    }
    fill(model, state_dict, names)
    return with_original_slope(model, encoder_config).eval()


def dict_below(state_dict: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The weights whose names start so, without the start."""
    return {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}


def model_arguments(
    name: str, original_config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Our keyword arguments for a released config, which was given as the argument `name`."""
    unknown = set(original_config) - set(ORIGINAL_DEFAULTS)
    if unknown:
        raise ValueError(
            f"`{name}` has unknown keys {name_some(unknown)}; the released models take "
            f"{name_some(ORIGINAL_DEFAULTS, limit=99)}."
        )
    original_config = {**ORIGINAL_DEFAULTS, **original_config}
    return {
        **{name: original_config[name] for name in SAME_ARGUMENTS},
        "long_patch_size": find_long_patch_size(state_dict, original_config),
        "short_window": original_config["short_term_ctx_winsize"],
        "axes_dims_rope": tuple(original_config["axes_dims_rope"]),
        **condition_arguments(original_config["condition_cfg"]),
    }


def with_original_slope(model: FrameTransformer, original_config: Mapping[str, Any]) -> FrameTransformer:
    """The model, with a constant FlexRoPE where its release had one."""
    slope = original_config.get("slope_scale", ORIGINAL_DEFAULTS["slope_scale"])
    if slope:
        apply_flex_rope(model, FlexRoPEConfig(slope, "constant"))
    return model


def convert_original_far_autoencoder(
    state_dict: Mapping[str, torch.Tensor], spatial_compression: int | None = None
) -> AutoencoderDC:
    """A released FAR autoencoder (DC-AE) as diffusers' `AutoencoderDC`, whose weights have the same names.

    Args:
        state_dict (`dict[str, torch.Tensor]`): The released weights.
        spatial_compression (`int`, *optional*): Pixels per latent along one side: 8, 16 or 32. Read from the weights
            where it is left out.

    Returns:
        `AutoencoderDC` in evaluation mode, with weights of its own in the dtype of the given ones.

    Raises:
        ValueError: A weight is missing, unknown or of the wrong shape, or no released autoencoder compresses so.
    """
    config = autoencoder_config(state_dict, spatial_compression)
    with torch.device("meta"):
        model = AutoencoderDC(**config)
    fill(model, state_dict)
    return model.eval()


def find_long_patch_size(state_dict: Mapping[str, torch.Tensor], original_config: Mapping[str, Any]) -> int | None:
    """Side of a long frame's patches, from the config or else from the weights; `None` for a base model."""
    given, weight = original_config["context_patch_size"], state_dict.get("context_embedder.weight")
    if weight is None:
        if given is not None:
            raise ValueError(
                f"`context_patch_size` is {given} but `state_dict` has no `context_embedder.weight`: these are weights "
                "of a base model. Leave it out, or pass those of a long model."
            )
        return None
    if given is not None:
        return given
    in_channels = original_config["in_channels"]
    side = math.isqrt(weight.shape[-1] // in_channels)
    if side < 1 or side**2 * in_channels != weight.shape[-1]:
        raise ValueError(
            f"`context_embedder.weight` has shape {tuple(weight.shape)}, which is no square patch of `in_channels` "
            f"{in_channels}; correct `in_channels` in `original_config`."
        )
    return side


def condition_arguments(condition_cfg: Mapping[str, Any] | None) -> dict[str, int]:
    """`num_classes` or `num_actions` of a released model's condition."""
    if condition_cfg is None:
        return {}
    kind = condition_cfg.get("type")
    if kind not in ORIGINAL_CONDITIONS:
        raise ValueError(f"`condition_cfg` is {dict(condition_cfg)}; its `type` is 'label' or 'action'.")
    original_name, name = ORIGINAL_CONDITIONS[kind]
    if set(condition_cfg) != {"type", original_name}:
        raise ValueError(
            f"`condition_cfg` is {dict(condition_cfg)}; for type {kind!r} it has `{original_name}` beside the type, "
            "and nothing else."
        )
    return {name: condition_cfg[original_name]}


def autoencoder_config(
    state_dict: Mapping[str, torch.Tensor], spatial_compression: int | None = None
) -> dict[str, Any]:
    """Keyword arguments of the `AutoencoderDC` that these released weights belong to."""
    stages = [int(key.split(".")[2]) for key in state_dict if key.startswith("encoder.down_blocks.")]
    found = 2 ** max(stages, default=0)
    if spatial_compression is None:
        spatial_compression = found
    if spatial_compression not in AUTOENCODER_STAGES or spatial_compression != found:
        raise ValueError(
            f"`spatial_compression` is {spatial_compression} and the weights' encoder compresses {found}x; the "
            f"released autoencoders compress {', '.join(f'{size}x' for size in AUTOENCODER_STAGES)}. Check that these "
            "are weights of one of them, or leave `spatial_compression` out."
        )
    num_stages = AUTOENCODER_STAGES[spatial_compression]
    config = {"in_channels": 3, "latent_channels": 32, "attention_head_dim": 32, "scaling_factor": 0.2889}
    for side, prefix in AUTOENCODER_STAGE_PREFIX.items():
        config[f"{side}_block_types"] = stage_block_types(state_dict, prefix, num_stages)
        config[f"{side}_block_out_channels"] = AUTOENCODER_CHANNELS[:num_stages]
        config[f"{side}_layers_per_block"] = AUTOENCODER_LAYERS[side][:num_stages]
        config[f"{side}_qkv_multiscales"] = ((),) * num_stages
    is_residual = [block_type == "ResBlock" for block_type in config["decoder_block_types"]]
    config["decoder_norm_types"] = tuple("batch_norm" if residual else "rms_norm" for residual in is_residual)
    config["decoder_act_fns"] = tuple("relu" if residual else "silu" for residual in is_residual)
    config["downsample_block_type"], config["upsample_block_type"] = "pixel_unshuffle", "pixel_shuffle"
    return config


def stage_block_types(state_dict: Mapping[str, torch.Tensor], prefix: str, num_stages: int) -> tuple[str, ...]:
    """What the stages of an encoder or decoder are made of, told by their weights: only EfficientViT blocks attend."""
    keys_with_attention = [key for key in state_dict if ".attn." in key]
    return tuple(
        "EfficientViTBlock" if any(key.startswith(f"{prefix}.{stage}.") for key in keys_with_attention) else "ResBlock"
        for stage in range(num_stages)
    )


def fill(
    model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor], original_names: Mapping[str, str] = {}
) -> None:
    """Give a model on the meta device copies of released weights, all of them and no others.

    Args:
        original_names (`dict[str, str]`): Names of the model's weights to those in `state_dict`, where they differ.

    Raises:
        ValueError: Names the weights that are missing, unknown or of the wrong shape, as `state_dict` calls them.
    """
    shapes = {original_names.get(name, name): tuple(weight.shape) for name, weight in model.state_dict().items()}
    given = {key: tuple(getattr(value, "shape", ())) for key, value in state_dict.items()}
    wrong = [
        f"{key} {given[key]} instead of {shape}" for key, shape in shapes.items() if given.get(key, shape) != shape
    ]
    problems = describe_key_errors(set(shapes) - set(given), set(given) - set(shapes), wrong)
    if problems:
        raise ValueError(
            f"`state_dict` does not fit the {type(model).__name__} that its config describes: {problems}. Pass the "
            "weights themselves, not a checkpoint around them, and the config that they were trained with."
        )
    copies = {name: state_dict[original_names.get(name, name)].clone() for name in model.state_dict()}
    model.load_state_dict(copies, assign=True)
