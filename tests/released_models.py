"""What the release looks like: configs and weights under its names, made from tiny models of ours."""

import torch
from diffusers import AutoencoderDC

from diffusers_far import FARTransformer3DModel
from diffusers_far.loaders import conversion


# Keyword arguments of the released classes, for models of the size of `tiny_transformer`.
LONG_CONFIG = {
    "patch_size": 1,
    "context_patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "axes_dims_rope": [4, 6, 6],
    "out_channels": 4,
    "slope_scale": 0.0,
    "short_term_ctx_winsize": 3,
    "condition_cfg": {"type": "action", "num_action_classes": 3},
}
BASE_CONFIG = {key: value for key, value in LONG_CONFIG.items() if key != "context_patch_size"}
UNCONDITIONAL_CONFIG = {**BASE_CONFIG, "condition_cfg": None}
LABEL_CONFIG = {**BASE_CONFIG, "condition_cfg": {"type": "label", "num_classes": 3}}

# The released autoencoders, spelled out.
BLOCK_TYPES = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
RELEASED_AUTOENCODERS = {
    compression: {
        "in_channels": 3,
        "latent_channels": 32,
        "attention_head_dim": 32,
        "encoder_block_types": tuple(BLOCK_TYPES[:stages]),
        "decoder_block_types": tuple(BLOCK_TYPES[:stages]),
        "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024)[:stages],
        "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024)[:stages],
        "encoder_layers_per_block": (0, 4, 8, 2, 2, 2)[:stages],
        "decoder_layers_per_block": (0, 5, 10, 2, 2, 2)[:stages],
        "encoder_qkv_multiscales": ((),) * stages,
        "decoder_qkv_multiscales": ((),) * stages,
        "decoder_norm_types": ("batch_norm", "batch_norm", "batch_norm", "rms_norm", "rms_norm", "rms_norm")[:stages],
        "decoder_act_fns": ("relu", "relu", "relu", "silu", "silu", "silu")[:stages],
        "downsample_block_type": "pixel_unshuffle",
        "upsample_block_type": "pixel_shuffle",
        "scaling_factor": 0.2889,
    }
    for compression, stages in {8: 4, 16: 5, 32: 6}.items()
}


def released(model: FARTransformer3DModel) -> dict[str, torch.Tensor]:
    """The weights of a model under the names of the release, with the projection that it never trained."""
    weights = {
        key.replace("label_embedder.", "label_embedder.embedding_table."): w for key, w in model.state_dict().items()
    }
    if model.config.long_patch_size is not None:
        patch_dim = model.config.in_channels * model.config.long_patch_size**2
        weights["context_proj_out.weight"] = torch.zeros(patch_dim, model.inner_dim)
        weights["context_proj_out.bias"] = torch.zeros(patch_dim)
    return weights


def without(state_dict: dict[str, torch.Tensor], key: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state_dict.items() if name != key}


def narrow_autoencoder(monkeypatch) -> AutoencoderDC:
    """The released 8x architecture, 32 channels wide and one layer deep; the conversion is told to expect that."""
    layers = (0, 1, 1, 1, 1, 1)
    monkeypatch.setattr(conversion, "AUTOENCODER_CHANNELS", (32,) * 6)
    monkeypatch.setattr(conversion, "AUTOENCODER_LAYERS", {"encoder": layers, "decoder": layers})
    narrow = {f"{side}_block_out_channels": (32,) * 4 for side in ("encoder", "decoder")}
    shallow = {f"{side}_layers_per_block": layers[:4] for side in ("encoder", "decoder")}
    torch.manual_seed(0)
    return AutoencoderDC(**{**RELEASED_AUTOENCODERS[8], **narrow, **shallow})
