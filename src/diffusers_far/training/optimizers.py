"""The optimizer of a training: which one, over which parameters, at which rates."""

import torch
from torch import nn

from .config import DECODER_RATE_RATIO, FARSettings, OptimizerSettings


CLASSES = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "radam": torch.optim.RAdam}
MOMENTUM = 0.95  # of Muon


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the matrices of a network, AdamW for the rest, as one optimizer with one state.

    Muon makes all directions of a matrix's step equally long. With the scale that is used here its steps are about as long as
    AdamW's, so that one learning rate serves both. Unlike `torch.optim.Muon`, which computes in bfloat16, it computes in
    float32: on a processor without bfloat16 the former takes longer than the rest of a small model's step.

    Args:
        groups (list of `dict`): Parameters, each group with `is_muon`; where it is `True` they have two dimensions.
        lr, betas, weight_decay, eps: As AdamW's; Muon takes the decay too.

    Source: Muon, https://kellerjordan.github.io/posts/muon; its scale, arXiv:2502.16982.
    """

    def __init__(self, groups: list[dict], lr: float, **options):
        self._adamw = torch.optim.AdamW([group for group in groups if not group["is_muon"]], lr, **options)
        super().__init__(groups, {"lr": lr, **options})

    @torch.no_grad()
    def step(self, closure=None):
        # Handed over at each step: a checkpoint that is loaded brings a new state and new groups.
        self._adamw.state = self.state
        self._adamw.param_groups = [group for group in self.param_groups if not group["is_muon"]]
        loss = self._adamw.step(closure)
        for group in self.param_groups:
            if group["is_muon"]:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict) -> None:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            momentum = state["momentum_buffer"]
            momentum.lerp_(parameter.grad, 1 - MOMENTUM)
            update = orthogonalized(parameter.grad.lerp(momentum, MOMENTUM))
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"] * 0.2 * max(parameter.shape) ** 0.5)


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix with the same singular vectors, and all singular values at about 1: five steps of Newton and Schulz."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    matrix = matrix.mT if is_tall else matrix
    matrix = matrix / matrix.norm().clamp(min=1e-7)
    a, b, c = 3.4445, -4.7750, 2.0315  # as steep as can be at 0
    for _ in range(5):
        gram = matrix @ matrix.mT
        matrix = a * matrix + (b * gram + c * gram @ gram) @ matrix
    return matrix.mT if is_tall else matrix


def rates_by_part(settings: FARSettings, transformer: nn.Module) -> list[dict]:
    """Groups of the parameters that are trained: one, or of a separable model two, its decoder with a rate of its own."""
    groups = [{"params": [], "lr": settings.learning_rate}]
    of_decoder = set()
    if getattr(transformer, "is_separable", False):
        ratio = settings.decoder_learning_rate_ratio
        groups.append({"params": [], "lr": settings.learning_rate * (DECODER_RATE_RATIO if ratio is None else ratio)})
        of_decoder = {id(parameter) for parameter in transformer.decoder.parameters()}
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            groups[id(parameter) in of_decoder]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def build_optimizer(settings: OptimizerSettings, network: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that was asked for, over what is trained of `network`; for `muon`, the matrices of a transformer's blocks
    go to Muon."""
    groups, rate = rates_by_part(settings, network), settings.learning_rate
    options = {
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "weight_decay": settings.adam_weight_decay,
        "eps": settings.adam_epsilon,
    }
    if settings.use_8bit_adam:
        import bitsandbytes

        return getattr(bitsandbytes.optim, f"{CLASSES[settings.optimizer].__name__}8bit")(groups, rate, **options)
    if settings.optimizer != "muon":
        return CLASSES[settings.optimizer](groups, rate, **options)
    return MuonAdamW(_with_matrices_apart(groups, network), rate, **options)


def _with_matrices_apart(groups: list[dict], network: nn.Module) -> list[dict]:
    """Each group as two: the matrices of the network's blocks, for Muon, and all else."""
    in_blocks = {
        id(parameter)
        for name, parameter in network.named_parameters()
        if "transformer_blocks." in name and parameter.ndim == 2
    }
    return [
        group
        | {"params": [each for each in group["params"] if (id(each) in in_blocks) == is_muon], "is_muon": is_muon}
        for group in groups
        for is_muon in (True, False)
    ]
