"""A forward and backward pass over one clip, without an optimizer. Peak memory is of a process that does just that, weights and
gradients included."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from diffusers_far import FARTransformer3DModel

from ..checks import require_close
from ..limit import Limit, clip_pass
from ..measurement import Measurement, Row, compared
from ..memory import peak_memory_of
from ..models import FAR_B, FAR_B_LONG, BenchmarkModel
from ..naive import CLEAN_TIMESTEP, NaiveFAR
from ..timing import MAX_LONG_ROUNDS, time_in_turn


PLACES = ((FAR_B, 16), (FAR_B_LONG, 300))
GRADIENT_FLOOR = 1e-6  # a gradient that is smaller everywhere is rounding


def run(num_rounds: int, places: tuple[tuple[BenchmarkModel, int], ...] = PLACES) -> Iterator[Row]:
    """Yield a row for each model and length of the clip."""
    for model, num_frames in places:
        yield measure(model, num_frames, min(num_rounds, MAX_LONG_ROUNDS))


def measure(model: BenchmarkModel, num_frames: int, num_rounds: int) -> Row:
    """Of one clip; loss and gradients are what is compared."""
    peaks = {f"{name} peak": peak_memory_of(train_once, model, num_frames, name) for name in VELOCITIES}
    transformer = model.build()
    far_step = TrainingStep(partial(far_velocity, transformer), transformer, model, num_frames)
    naive_step = TrainingStep(NaiveFAR(transformer), transformer, model, num_frames)
    losses, gradients = [], []
    for step in (far_step, naive_step):
        losses.append(step())
        gradients.append({name: parameter.grad for name, parameter in transformer.named_parameters()})
    what = f"training of {model.name} on {num_frames} frames"
    difference = require_close(*losses, f"the loss, in {what}")
    gradient_difference = require_close_gradients(*gradients, what)
    del gradients

    limit = Limit(transformer, [clip_pass(transformer, num_frames, model.latent_size)], has_backward=True)
    timings = time_in_turn({"FAR": far_step, "limit": limit, "naive": naive_step}, num_rounds)
    return Row(
        case="training",
        settings={"model": model.name, "frames": num_frames},
        measurements={
            **compared(timings),
            "arithmetic": Measurement((limit.num_flops / 1e9,), "GFLOP"),
            **peaks,
            "difference": difference,
            "of gradients": gradient_difference,
        },
        notes={"tokens of an attention call of the limit": limit.group_size},
    )


class TrainingStep:
    """Flow matching on a clip whose short frames have noise levels of their own: the loss, and its gradients.

    Args:
        velocity (callable): Of latents, timesteps and actions.
        transformer (`FARTransformer3DModel`): Its parameters get the gradients.
        model (`BenchmarkModel`), num_frames (`int`): Of the clip.
    """

    def __init__(
        self,
        velocity: Callable[..., torch.Tensor],
        transformer: FARTransformer3DModel,
        model: BenchmarkModel,
        num_frames: int,
    ):
        self.velocity, self.transformer = velocity, transformer
        clip, plan = model.clip(num_frames), transformer.context_plan(num_frames, model.latent_size, model.latent_size)
        time = torch.linspace(0.1, 0.9, num_frames)
        time[: plan.num_long_frames] = 0
        self.latents = torch.lerp(clip.latents, clip.noise, time[None, :, None, None, None])
        self.timestep = torch.where(time > 0, 1000 * time, CLEAN_TIMESTEP)[None]
        self.actions = clip.fed_actions
        self.target = (clip.noise - clip.latents)[:, plan.num_long_frames :]

    def __call__(self) -> torch.Tensor:
        self.transformer.zero_grad(set_to_none=True)
        loss = F.mse_loss(self.velocity(self.latents, self.timestep, self.actions), self.target)
        loss.backward()
        return loss.detach()


def far_velocity(
    transformer: FARTransformer3DModel, latents: torch.Tensor, timestep: torch.Tensor, actions: torch.Tensor
) -> torch.Tensor:
    return transformer(latents, timestep, actions=actions).sample


def checkpointed_velocity(transformer: FARTransformer3DModel) -> Callable[..., torch.Tensor]:
    transformer.enable_gradient_checkpointing()
    return partial(far_velocity, transformer)


VELOCITIES: dict[str, Callable[[FARTransformer3DModel], Callable[..., torch.Tensor]]] = {
    "FAR": lambda transformer: partial(far_velocity, transformer),
    "checkpointed": checkpointed_velocity,
    "naive": NaiveFAR,
}


def train_once(model: BenchmarkModel, num_frames: int, name: str) -> None:
    """What peak memory is measured of."""
    transformer = model.build()
    TrainingStep(VELOCITIES[name](transformer), transformer, model, num_frames)()


def require_close_gradients(
    gradients: dict[str, torch.Tensor | None], expected: dict[str, torch.Tensor | None], what: str
) -> Measurement:
    """The largest difference of a gradient, in proportion to the largest value of that gradient.

    A parameter that nothing depends on has no gradient, or zero: those of long queries in the last layer.
    """
    worst = 0.0
    for name, theirs in expected.items():
        ours = gradients[name]
        if ours is None or theirs is None:
            assert all(each is None or not each.any() for each in (ours, theirs)), name
            continue
        scale = theirs.abs().max().clamp(min=GRADIENT_FLOOR)
        worst = max(worst, require_close(ours / scale, theirs / scale, f"the gradient of {name}, in {what}").median)
    return Measurement((worst,), "difference")
