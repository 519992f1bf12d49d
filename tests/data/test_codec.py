import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from diffusers_far.data.codec import decode_video, encode_images, encode_video, scale_latents, unscale_latents


def test_scaling_is_undone_with_and_without_a_shift(vae):
    latents = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(unscale_latents(vae, scale_latents(vae, latents)), latents)
    vae.register_to_config(shift_factor=0.3)
    torch.testing.assert_close(scale_latents(vae, latents), (latents - 0.3) * 0.5)
    torch.testing.assert_close(unscale_latents(vae, scale_latents(vae, latents)), latents)


def test_bytes_and_floats_encode_alike_in_any_batch_size(vae):
    video = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    latents = encode_video(vae, video)
    assert latents.shape == (5, 4, 4, 4)
    torch.testing.assert_close(encode_video(vae, video / 255, batch_size=2), latents)


def test_a_video_decodes_to_the_unit_range(vae):
    video = decode_video(vae, torch.randn(5, 4, 4, 4) * 10, batch_size=2)
    assert video.shape == (5, 3, 16, 16)
    assert 0 <= video.min() and video.max() <= 1


@pytest.mark.parametrize("build", [AutoencoderKL, AutoencoderTiny])
def test_other_autoencoders_encode_without_sampling(build):
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    model = build(norm_num_groups=4, block_out_channels=(8,)) if build is AutoencoderKL else build()
    with torch.no_grad():
        assert torch.equal(encode_images(model, images), encode_images(model, images))
