"""Features of whole videos for FVD: the I3D network, from a TorchScript file that the user names.

FVD is defined by this network's weights, so there is no other way to it; without them no FVD is reported.
B videos, F frames, h/w pixels.
"""

from pathlib import Path

import torch


MIN_FRAMES = 10  # of the network, which halves time three times


class I3D:
    """Calls a TorchScript I3D as published evaluations do: resized by itself, values in [-1, 1], features before softmax.

    Args:
        network (`torch.jit.ScriptModule`): Takes `(B, 3, F, h, w)` and the keywords `rescale`, `resize` and
            `return_features`, as the widely used `i3d_torchscript.pt` does.
    """

    name = "I3D"

    def __init__(self, network: torch.jit.ScriptModule, device: torch.device | str = "cpu") -> None:
        self.network = network.eval().to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, video: torch.Tensor) -> torch.Tensor:
        """`(B, F, 3, h, w)` in [0, 1] -> `(B, num_features)`, float32, on the CPU.

        Raises:
            ValueError: Videos too short for the network, or a network that gives no features.
        """
        if video.shape[1] < MIN_FRAMES:
            raise ValueError(
                f"`video` has {video.shape[1]} frames, but I3D needs {MIN_FRAMES}; leave out --i3d_weights, or raise "
                "--num_frames."
            )
        frames = (video.float().to(self.device) * 2 - 1).movedim(2, 1)
        features = self.network(frames, rescale=False, resize=True, return_features=True)
        if features.ndim != 2 or len(features) != len(video):
            raise ValueError(
                f"The I3D file gave {tuple(features.shape)} for {len(video)} videos, not one row of features each; "
                "name the TorchScript file that takes `return_features`."
            )
        return features.float().cpu()


def load_i3d(path: str | Path, device: torch.device | str = "cpu") -> I3D:
    """Load the network from a TorchScript file.

    Raises:
        ValueError: There is no such file, or it is no TorchScript.
    """
    try:
        network = torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(
            f"`i3d_weights` {str(path)!r} is no TorchScript file that loads ({str(error).splitlines()[0]}); name the "
            "I3D network as TorchScript, `i3d_torchscript.pt`."
        ) from error
    return I3D(network, device)
