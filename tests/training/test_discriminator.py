import torch

from diffusers_far.training.vae import (
    PatchDiscriminator,
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
)


def test_each_logit_sees_only_its_patch():
    discriminator = PatchDiscriminator(3, base_channels=8, num_layers=1)
    discriminator.layers = torch.nn.Sequential(
        *[layer for layer in discriminator.layers if not isinstance(layer, torch.nn.GroupNorm)]
    )
    images = torch.zeros(1, 3, 32, 32)
    changed = images.clone()
    changed[..., 0, 0] = 1
    difference = (discriminator(images) - discriminator(changed)).abs()[0, 0]
    assert difference[0, 0] > 0
    assert difference[16 // 2 :, 16 // 2 :].max() == 0


def test_a_perfect_discriminator_has_no_hinge_loss():
    real, fake = torch.full((2, 1, 3, 3), 1.5), torch.full((2, 1, 3, 3), -1.5)
    assert hinge_discriminator_loss(real, fake) == 0
    assert hinge_discriminator_loss(fake, real) == 2.5
    assert hinge_generator_loss(fake) == 1.5


def test_the_adaptive_weight_balances_the_gradients_at_the_last_layer():
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    reconstruction_loss, generator_loss = (weight * torch.tensor([2.0, 0.0])).sum(), weight.sum() * 0.1
    balance = adaptive_weight(reconstruction_loss, generator_loss, weight)
    torch.testing.assert_close(balance, torch.tensor(2 / (0.02**0.5 + 1e-4)))
    assert not balance.requires_grad
