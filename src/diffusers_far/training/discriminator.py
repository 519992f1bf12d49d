"""Patch discriminator and its losses, for the adversarial part of an autoencoder's training."""

import torch
import torch.nn.functional as F
from torch import nn


class PatchDiscriminator(nn.Module):
    """Says of each patch of an image whether it looks real (pix2pix, arXiv:1611.07004).

    Group norm stands in for batch norm: real and reconstructed images are judged in separate batches, whose statistics
    would give them away.

    Args:
        in_channels (`int`): Channels of the image.
        base_channels (`int`): Channels of the first layer; doubled by each layer up to 8 times.
        num_layers (`int`): Number of layers that halve the size; 3 sees patches of 70 pixels, 2 of 34.
    """

    def __init__(self, in_channels: int = 3, base_channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        widths = [base_channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers = [nn.Conv2d(in_channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride, 1, bias=False),
                nn.GroupNorm(min(32, widths[i]), widths[i]),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, height, width) in [-1, 1] to logits (B, 1, rows, columns); above 0 means real."""
        return self.layers(images)


def hinge_discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def hinge_generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    return -fake_logits.mean()


def adaptive_weight(
    reconstruction_loss: torch.Tensor, generator_loss: torch.Tensor, last_layer: torch.Tensor, max_weight: float = 1e4
) -> torch.Tensor:
    """The weight at which both losses pull equally at the decoder's last layer.

    Source: VQGAN, arXiv:2012.09841, equation 7.

    Args:
        reconstruction_loss, generator_loss (`torch.Tensor`, scalars): Both with a graph that reaches `last_layer`.
        last_layer (`torch.Tensor`): The weight of the decoder's last layer.
        max_weight (`float`): Upper limit, for a discriminator whose gradient vanishes.
    """
    reconstruction_gradient = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)[0]
    generator_gradient = torch.autograd.grad(generator_loss, last_layer, retain_graph=True)[0]
    weight = reconstruction_gradient.norm() / (generator_gradient.norm() + 1e-4)
    return weight.clamp(0, max_weight).detach()
