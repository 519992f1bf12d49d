"""LPIPS with the VGG-16 features (arXiv:1801.03924), from weights that the user gives; nothing is downloaded."""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn


# Channels of VGG-16's convolutions in the five stages whose outputs are compared; the pooling comes between stages.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class LPIPS(nn.Module):
    """Perceptual distance. `forward`: two batches (B, 3, height, width) in [-1, 1] to (B,), 0 for equal images."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        in_channels = 3
        for index, widths in enumerate(STAGES):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if index > 0 else []
            for width in widths:
                layers += [nn.Conv2d(in_channels, width, 3, 1, 1), nn.ReLU()]
                in_channels = width
            self.stages.append(nn.Sequential(*layers))
        self.weights = nn.ParameterList(nn.Parameter(torch.ones(1, widths[-1], 1, 1)) for widths in STAGES)
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
