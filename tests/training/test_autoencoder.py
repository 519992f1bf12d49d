import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from tiny_models import tiny_vq

from diffusers_far.models.codec import encode_images, encode_video
from diffusers_far.training.vae import (
    Autoencoding,
    decoder_last_layer,
    measure_reconstruction,
    measure_scaling_factor,
    reconstruction_loss,
)


def tiny_dc() -> AutoencoderDC:
    torch.manual_seed(0)
    shared = {"block_out_channels": (8, 8, 16), "layers_per_block": (0, 1, 1), "qkv_multiscales": ((), (), ())}
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in shared.items()}
    return AutoencoderDC(latent_channels=4, **sides)


def tiny_kl() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
    )


@pytest.mark.parametrize("build", [tiny_dc, tiny_kl])
def test_training_pass_depends_on_the_generator_alone(build):
    autoencoding = Autoencoding(build(), latent_noise=0.1)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    first, again, other = (autoencoding(images, torch.Generator().manual_seed(seed)).images for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_noise_the_training_pass_of_a_dc_is_its_forward():
    vae = tiny_dc()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(Autoencoding(vae)(images, torch.Generator()).images, vae(images).sample)


def test_latent_noise_has_the_given_relative_strength():
    vae = tiny_dc()
    seen = []
    vae.decode = lambda latents: (seen.append(latents), type("Decoded", (), {"sample": latents}))[1]
    images = torch.rand(64, 3, 16, 16) * 2 - 1
    Autoencoding(vae, latent_noise=0.1)(images, torch.Generator().manual_seed(0))
    clean = encode_images(vae, images)
    assert ((seen[0] - clean).std() / clean.std()).item() == pytest.approx(0.1, rel=0.05)


def test_kl_is_that_of_the_distribution_and_zero_without_one():
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    vae = tiny_kl()
    distribution = vae.encode(images).latent_dist
    expected = distribution.kl().mean() / distribution.mean[0].numel()
    torch.testing.assert_close(Autoencoding(vae)(images, torch.Generator()).kl, expected)
    assert Autoencoding(tiny_dc())(images, torch.Generator()).kl == 0


def test_commitment_is_the_distance_to_the_codebook_and_zero_without_one():
    vq, images = tiny_vq(), torch.rand(2, 3, 8, 8) * 2 - 1
    reconstruction = Autoencoding(vq)(images, torch.Generator())
    _, expected, _ = vq.quantize(reconstruction.latents)
    torch.testing.assert_close(reconstruction.commitment, expected)
    reconstruction.commitment.backward()
    assert vq.quantize.embedding.weight.grad.abs().sum() > 0 and vq.encoder.conv_in.weight.grad.abs().sum() > 0
    assert Autoencoding(tiny_dc())(images, torch.Generator()).commitment == 0


def test_negative_latent_noise_is_refused():
    with pytest.raises(ValueError, match="latent_noise"):
        Autoencoding(tiny_dc(), latent_noise=-0.1)


def test_reconstruction_loss_adds_the_weighted_square():
    images, target = torch.zeros(4), torch.full((4,), 2.0)
    assert reconstruction_loss(images, target) == 2
    assert reconstruction_loss(images, target, mse_weight=0.5) == 4


def test_psnr_is_the_mean_over_images():
    class OffByOne(torch.nn.Module):
        """Decodes every image brighter by its own amount."""

        config = type("Config", (), {"scaling_factor": 1.0})
        device, dtype = torch.device("cpu"), torch.float32

        def encode(self, images):
            return type("Encoded", (), {"latent": images})

        def decode(self, latents):
            offsets = torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)  # 0.1 and 0.01 in [0, 1]
            return type("Decoded", (), {"sample": latents + offsets})

    batch = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    assert measure_reconstruction(OffByOne(), [batch])["psnr"] == pytest.approx((20 + 40) / 2, abs=1e-3)


def test_a_small_thing_that_is_lost_shows_in_the_worst_patch_and_its_place():
    class LosesASpot(torch.nn.Module):
        config = type("Config", (), {"scaling_factor": 1.0})
        device, dtype = torch.device("cpu"), torch.float32

        def encode(self, images):
            return type("Encoded", (), {"latent": images})

        def decode(self, latents):
            return type("Decoded", (), {"sample": latents.clamp(max=0)})

    batches = torch.full((2, 3, 3, 64, 64), 100, dtype=torch.uint8)
    batches[1, 0, :, 30:38, 17:25] = 255
    metrics = measure_reconstruction(LosesASpot(), batches)
    assert metrics["psnr"] > 80 and metrics["worst_patch_psnr"] == pytest.approx(6.02, abs=0.01)
    assert [metrics[f"worst_patch_{place}"] for place in ("image", "top", "left")] == [3, 30, 17]
    tiny = measure_reconstruction(LosesASpot(), [torch.zeros(1, 3, 11, 12, dtype=torch.uint8)])
    assert tiny["worst_patch_psnr"] == 100


@pytest.mark.parametrize("build", [tiny_dc, tiny_kl])
def test_scaling_factor_brings_latents_to_unit_variance(build):
    vae = build()
    batches = torch.randint(0, 256, (6, 4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    factor = measure_scaling_factor(vae, batches)
    with torch.no_grad():
        latents = encode_images(vae, batches.flatten(0, 1) / 127.5 - 1)
    assert (latents * factor).std().item() == pytest.approx(1, rel=1e-3)


def test_a_scaling_factor_goes_with_the_statistics_of_each_channel():
    vae = tiny_kl()
    vae.register_to_config(latents_mean=[1.0, 0.0, -1.0, 2.0], latents_std=[0.5, 2.0, 4.0, 1.0])
    frames = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    vae.register_to_config(scaling_factor=measure_scaling_factor(vae, [frames]))
    assert encode_video(vae, frames).std(correction=0).item() == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("bias", [0.0, float("nan")])
def test_latents_that_cannot_be_scaled_are_refused(bias):
    vae = tiny_dc()
    with torch.no_grad():
        for parameter in vae.encoder.parameters():
            parameter.fill_(bias)
    with pytest.raises(RuntimeError, match="cannot be scaled to 1"):
        measure_scaling_factor(vae, torch.zeros(1, 2, 3, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize("build", [tiny_dc, tiny_kl])
def test_the_last_layer_makes_the_pixels(build):
    vae = build()
    decoded = vae(torch.rand(1, 3, 16, 16)).sample
    decoded.sum().backward()
    assert decoder_last_layer(vae).grad.abs().sum() > 0
    assert decoder_last_layer(vae).shape[0] in (3, 3 * 4)
