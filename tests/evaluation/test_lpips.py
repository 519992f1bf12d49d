import pickle

import pytest
import torch
from safetensors.torch import save_file

from diffusers_far.evaluation.networks import VGG_STAGES, load_lpips


# Where torchvision's VGG-16 keeps the convolutions of each stage, as the `lpips` package's state dict names them.
CONVOLUTIONS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


@pytest.fixture
def weights():
    torch.manual_seed(0)
    state, in_channels = {}, 3
    for index, (widths, layers) in enumerate(zip(VGG_STAGES, CONVOLUTIONS)):
        for width, layer in zip(widths, layers):
            name = f"net.slice{index + 1}.{layer}"
            state[f"{name}.weight"] = torch.randn(width, in_channels, 3, 3) * (2 / (9 * in_channels)) ** 0.5
            state[f"{name}.bias"] = torch.zeros(width)
            in_channels = width
        state[f"lin{index}.model.1.weight"] = torch.rand(1, widths[-1], 1, 1)
    return state


def test_equal_images_have_no_distance_and_different_ones_have_one(weights, tmp_path):
    save_file(weights, tmp_path / "lpips.safetensors")
    lpips = load_lpips(tmp_path / "lpips.safetensors")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(lpips(images, images), torch.zeros(2))
    assert (lpips(images, -images) > 0).all()
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


def test_a_torch_file_loads_as_a_safetensors_file_does(weights, tmp_path):
    save_file(weights, tmp_path / "lpips.safetensors")
    torch.save(weights, tmp_path / "lpips.pth")
    first, second = load_lpips(tmp_path / "lpips.safetensors"), load_lpips(tmp_path / "lpips.pth")
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


def test_missing_weights_are_named(weights, tmp_path):
    del weights["lin3.model.1.weight"]
    save_file(weights, tmp_path / "lpips.safetensors")
    with pytest.raises(ValueError, match="lin3.model.1.weight"):
        load_lpips(tmp_path / "lpips.safetensors")


@pytest.mark.parametrize("name", ["lpips.safetensors", "lpips.pth"])
def test_a_file_that_holds_code_or_is_damaged_is_refused_by_name(tmp_path, name):
    for content in (b"", b"no weights", pickle.dumps({"a": pytest.raises})):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}' is damaged, or holds more than tensors"):
            load_lpips(tmp_path / name)
