import pytest
import torch
from tiny_models import tiny_dc, tiny_kl, tiny_pipeline, tiny_taesd, tiny_vq

from diffusers_far.models.codec import (
    decode_codes,
    decode_video,
    encode_codes,
    encode_images,
    encode_video,
    nearest_codes,
    scale_latents,
    spatial_compression,
    unscale_latents,
)


ENCODERS = {tiny_dc: 4, tiny_kl: 2, tiny_taesd: 2}  # pixels per latent

every_vae = pytest.mark.parametrize("build", ENCODERS)


def random_video(num_frames: int = 3) -> torch.Tensor:
    return torch.rand(num_frames, 3, 8, 16, generator=torch.Generator().manual_seed(0))


@every_vae
def test_compression_is_that_of_the_latents(build):
    vae = build()
    assert spatial_compression(vae) == ENCODERS[build]
    height, width = encode_video(vae, random_video()).shape[-2:]
    assert (height, width) == (8 // ENCODERS[build], 16 // ENCODERS[build])


@every_vae
def test_unscaling_inverts_scaling(build):
    vae, latents = build(), torch.randn(2, 4, 2, 4)
    torch.testing.assert_close(unscale_latents(vae, scale_latents(vae, latents)), latents)


def test_scaling_subtracts_the_shift_and_multiplies_by_the_factor():
    vae, latents = tiny_kl(), torch.randn(2, 4, 2, 4)
    torch.testing.assert_close(scale_latents(vae, latents), (latents - 0.1) * 0.7)


def test_each_channel_has_a_mean_and_a_deviation_where_the_config_has_them():
    vae, latents = tiny_kl(), torch.randn(2, 4, 2, 4)
    mean, std = (1.0, 2.0, 3.0, 4.0), (0.5, 1.0, 2.0, 4.0)
    vae.register_to_config(shift_factor=None, latents_mean=mean, latents_std=std)
    expected = torch.stack([(latents[:, i] - mean[i]) * 0.7 / std[i] for i in range(4)], dim=1)
    torch.testing.assert_close(scale_latents(vae, latents), expected)
    torch.testing.assert_close(unscale_latents(vae, expected), latents)
    video = random_video()
    with torch.no_grad():
        reconstruction = (vae.decode(encode_images(vae, video * 2 - 1)).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decode_video(vae, encode_video(vae, video)), reconstruction, atol=1e-5, rtol=1e-5)


def test_one_of_mean_and_deviation_serves_alone_and_needs_no_factor():
    vae, latents = tiny_kl(), torch.randn(2, 4, 2, 4)
    vae.register_to_config(shift_factor=None, scaling_factor=None, latents_std=[2.0] * 4)
    torch.testing.assert_close(scale_latents(vae, latents), latents / 2)
    vae.register_to_config(latents_std=None, latents_mean=[1.0] * 4)
    torch.testing.assert_close(scale_latents(vae, latents), latents - 1)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"latents_mean": [0.0] * 3}, "`latents_mean` .* one finite number for each of the 4 latent channels"),
        ({"latents_std": [1.0, 1.0, 0.0, 1.0]}, "`latents_std` .* above 0"),
        ({"latents_std": [None] * 4}, "`latents_std` .* one finite number"),
        ({"shift_factor": "0.1"}, "`shift_factor` .* give a finite number"),
        ({"latents_mean": [float("nan")] * 4}, "`latents_mean`"),
        ({"scaling_factor": None}, "`scaling_factor` of the VAE's config is None"),
        ({"scaling_factor": 0}, "`scaling_factor` of the VAE's config is 0"),
        ({"scaling_factor": float("nan")}, "`scaling_factor` of the VAE's config is nan"),
        ({"shift_factor": float("inf")}, "`shift_factor` of the VAE's config is inf"),
        (
            {"latents_mean": [1.0] * 4, "shift_factor": 0.1},
            "`shift_factor` 0.1 and `latents_mean`, which say the same",
        ),
    ],
)
def test_a_vae_whose_statistics_cannot_be_is_refused_before_a_pipeline_is_made(fields, message):
    vae = tiny_kl()
    vae.register_to_config(**({"shift_factor": None} | fields))
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(vae=vae)


@pytest.mark.parametrize("force_upcast", [True, False])
def test_a_vae_that_overflows_in_float16_computes_in_float32(force_upcast):
    vae, dtypes = tiny_kl().half(), []
    vae.register_to_config(force_upcast=force_upcast)
    for side in (vae.encoder, vae.decoder):
        side.register_forward_hook(lambda module, args, output: dtypes.append(args[0].dtype))
    latents = encode_video(vae, random_video())
    decode_video(vae, latents)
    assert dtypes == [torch.float32 if force_upcast else torch.float16] * 2
    assert vae.dtype == latents.dtype == torch.float16


def test_how_taesd_stores_latents_as_bytes_changes_nothing():
    vae, latents = tiny_taesd(), torch.randn(2, 4, 2, 4)
    assert (vae.config.latent_magnitude, vae.config.latent_shift) == (3, 0.5)
    assert torch.equal(scale_latents(vae, latents), latents)


def test_a_distribution_is_encoded_as_its_mode():
    vae, images = tiny_kl(), random_video() * 2 - 1
    with torch.no_grad():
        assert torch.equal(encode_images(vae, images), vae.encode(images).latent_dist.mean)


@every_vae
def test_the_decoder_gets_what_the_encoder_gave(build):
    vae, video = build(), random_video()
    with torch.no_grad():
        expected = (vae.decode(encode_images(vae, video * 2 - 1)).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decode_video(vae, encode_video(vae, video)), expected, atol=1e-5, rtol=1e-5)


@every_vae
def test_frames_in_small_batches_are_the_frames_at_once(build):
    vae, video = build(), random_video(5)
    latents = encode_video(vae, video)
    torch.testing.assert_close(encode_video(vae, video, batch_size=2), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decode_video(vae, latents, batch_size=1), decode_video(vae, latents), atol=1e-5, rtol=0)


@every_vae
def test_no_more_frames_than_the_batch_size_are_encoded_or_decoded_at_once(build):
    vae, video, batch_sizes = build(), random_video(5), []
    for side in (vae.encoder, vae.decoder):
        side.register_forward_hook(lambda module, args, output: batch_sizes.append(len(args[0])))
    decode_video(vae, encode_video(vae, video, batch_size=2), batch_size=2)
    assert batch_sizes == [2, 2, 1] * 2


def test_bytes_are_pixels_in_255ths():
    vae = tiny_dc()
    video = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(encode_video(vae, video), encode_video(vae, video / 255))


@every_vae
def test_decoded_pixels_stay_between_0_and_1(build):
    video = decode_video(build(), 50 * torch.randn(2, 4, 2, 4))
    assert video.min() >= 0 and video.max() <= 1


def test_decoded_codes_are_the_reconstruction_in_batches_of_any_size():
    vq, video = tiny_vq(), torch.rand(5, 3, 8, 12)
    codes = encode_codes(vq, video, batch_size=2)
    assert codes.shape == (5, 4, 6) and codes.dtype == torch.int64
    assert torch.equal(codes, encode_codes(vq, video)) and len(codes.unique()) > 1
    with torch.no_grad():
        expected = (vq(video * 2 - 1).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decode_codes(vq, codes, batch_size=3), expected)


def test_codes_are_the_nearest_entries_of_the_codebook():
    vq, latents = tiny_vq(), torch.randn(2, 4, 3, 5)
    codes = nearest_codes(vq, latents)
    distances = (latents.movedim(1, -1)[..., None, :] - vq.quantize.embedding.weight).square().sum(-1)
    assert torch.equal(codes, distances.argmin(-1))


def test_codes_of_bytes_are_those_of_the_same_shares():
    vq, video = tiny_vq(), torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(encode_codes(vq, video), encode_codes(vq, video / 255))
