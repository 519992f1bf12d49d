import pytest
import torch

from diffusers_far.evaluation.networks import load_i3d


class MeansOfThirds(torch.nn.Module):
    """Has the signature of the published I3D: the mean of each channel, or nothing that looks like features."""

    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        assert not rescale and resize
        return x.mean(dim=(2, 3, 4)) if return_features else x


class NoFeatures(torch.nn.Module):
    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        return x


def save(network: torch.nn.Module, path):
    torch.jit.script(network).save(str(path))
    return path


def test_the_network_sees_channels_before_frames_from_minus_one_to_one(tmp_path):
    i3d = load_i3d(save(MeansOfThirds(), tmp_path / "i3d.pt"))
    video = torch.rand(2, 10, 3, 8, 8)
    torch.testing.assert_close(i3d(video), 2 * video.mean(dim=(1, 3, 4)) - 1)


def test_videos_too_short_and_networks_without_features_are_refused(tmp_path):
    i3d = load_i3d(save(NoFeatures(), tmp_path / "i3d.pt"))
    with pytest.raises(ValueError, match="needs 10"):
        i3d(torch.rand(1, 9, 3, 8, 8))
    with pytest.raises(ValueError, match="one row of features"):
        i3d(torch.rand(1, 10, 3, 8, 8))


@pytest.mark.parametrize("content", [None, b"no network"])
def test_a_file_that_is_no_torchscript_is_named(tmp_path, content):
    path = tmp_path / "i3d.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="i3d.pt"):
        load_i3d(path)
