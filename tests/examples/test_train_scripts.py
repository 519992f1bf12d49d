"""What single functions of the training scripts do, without a training."""

import argparse

import pytest
import torch
from PIL import Image
from tiny_models import tiny_dc, tiny_pipeline, tiny_transformer

from benchmarks.studies.scripts import load_script


NEEDED = {"output_dir": "run", "latents_dir": "latents", "vae": "vae"}


@pytest.mark.parametrize(
    "told, start, expected",
    [
        ({}, None, (20, "exact")),
        ({"num_validation_inference_steps": 6}, None, (6, "exact")),
        ({"num_inference_steps": 8, "short_cache": 2}, None, (8, 2)),
        ({"num_inference_steps": 8, "num_validation_inference_steps": 6}, None, (8, "exact")),
        ({}, {"num_inference_steps": 5, "short_cache": 2}, (5, 2)),
        ({"num_inference_steps": 8, "short_cache": "rolling"}, {"num_inference_steps": 5}, (8, "rolling")),
    ],
)
def test_a_trained_pipeline_takes_the_steps_and_the_cache_that_it_was_told_or_measured_with(
    told, start, expected, tmp_path
):
    if start is not None:
        pipe = tiny_pipeline(tiny_transformer(long_patch_size=4))
        pipe.register_to_config(**start)
        pipe.save_pretrained(tmp_path)
    script, start = load_script("train_far"), None if start is None else str(tmp_path)
    settings = script.TrainFARSettings(pretrained_model_name_or_path=start, **NEEDED, **told)
    transformer = tiny_transformer(long_patch_size=4)
    pipe = script.build_pipeline(settings, transformer, tiny_dc(), (4, 4, 4))
    assert (pipe.default_inference_steps, pipe.default_short_cache) == expected


@pytest.mark.parametrize(
    "told, message",
    [
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
        ({"short_cache": 9}, "`short_cache` is 9"),
        ({"short_cache": "fast"}, "`short_cache` is 'fast'"),
        ({"short_cache": 2, "objective": "video_dit"}, "a video_dit has no cache"),
    ],
)
def test_steps_and_caches_that_cannot_be_are_refused_before_the_training(told, message):
    script = load_script("train_far")
    with pytest.raises(ValueError, match=message):
        settings = script.TrainFARSettings(**NEEDED, **told)
        script.build_pipeline(settings, tiny_transformer(long_patch_size=4), tiny_dc(), (4, 4, 4))


def test_the_sheet_of_a_vae_shows_small_frames_large(tmp_path):
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    load_script("train_vae").save_sample_grid(tiny_dc(), images, tmp_path / "sheets" / "step.png")
    width, height = Image.open(tmp_path / "sheets" / "step.png").size
    assert height >= 2 * 192 and width >= 3 * 192


def test_the_log_of_a_vae_says_where_its_worst_patch_is():
    metrics = {"psnr": 32.6, "ssim": 0.97, "worst_patch_psnr": 6.02, "worst_patch_image": 3}
    text = load_script("train_vae").describe_reconstruction(metrics | {"worst_patch_top": 30, "worst_patch_left": 17})
    assert text.startswith(
        "psnr 32.6, ssim 0.97; worst 8x8 patch 6.02 dB, at row 30, column 17 of the frame on the right"
    )


def test_a_token_models_config_must_have_the_sizes_of_its_decoder(tmp_path):
    (tmp_path / "model.json").write_text('{"hidden_size": 16}')
    args = argparse.Namespace(model_config=str(tmp_path / "model.json"), num_frames=4)
    codes = argparse.Namespace(latent_shape=(1, 2, 3), num_actions=None)
    with pytest.raises(ValueError, match="`--model_config` .*model.json' has no `decoder`"):
        load_script("train_token_ar").model_config(args, None, codes)
