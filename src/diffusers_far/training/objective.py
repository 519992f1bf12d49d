"""The training objective: which frames of a clip are noisy, how noisy, and the loss on their predicted velocity.

B batch, F frames (long ones first), F_short short frames, C latent channels, H/W latent height/width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..models.frames import CLEAN_TIMESTEP


NUM_TRAIN_TIMESTEPS = 1000
OBJECTIVES = ("far", "video_dit")
DERIVATIVE_STEP = 5.0  # in timesteps, of the central differences of a flow map


@dataclass(frozen=True)
class ObjectiveDraw:
    """All that chance decides for a clip, or, stacked, for a batch of clips (then with a batch dimension in front).

    Args:
        noise (`torch.Tensor` of shape `(F, C, H, W)`): x_1; zero at the long frames, which are never noisy. For a separable
            model `(N, F, C, H, W)`, of N decoder draws.
        timestep (`torch.Tensor` of shape `(F,)` or `(N, F)`): 1 to 1000; -1 marks a clean frame.
        keeps_action (`torch.Tensor` of shape `(F,)`, bool): `False`: the frame's action is dropped.
        keeps_label (`torch.Tensor` of shape `()`, bool): `False`: the clip's class is dropped.
        frame_order (`torch.Tensor` of shape `(F,)`, int64): Which frame of the trajectory's clip stands at each place.
        r_timestep (`torch.Tensor`, as `timestep`, *optional*): Of a flow map: where the step ends, 0 to `timestep`; -1 for a
            clean frame.
        teacher_forcing (`bool`), guidance_scale (`float`): The objective's; the same for all clips of a batch.
    """

    noise: torch.Tensor
    timestep: torch.Tensor
    keeps_action: torch.Tensor
    keeps_label: torch.Tensor
    frame_order: torch.Tensor
    r_timestep: torch.Tensor | None = None
    teacher_forcing: bool = False
    guidance_scale: float = 1.0

    @classmethod
    def stack(cls, draws: Sequence["ObjectiveDraw"]) -> "ObjectiveDraw":
        first = draws[0]
        return replace(
            first, **{name: torch.stack([getattr(draw, name) for draw in draws]) for name in first._tensors()}
        )

    def to(self, device: torch.device | str) -> "ObjectiveDraw":
        return replace(self, **{name: tensor.to(device) for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}


@dataclass(frozen=True)
class TrainingObjective:
    """Flow matching on clips, `x_t = (1 - t) x_0 + t x_1`, the velocity `x_1 - x_0` being learned.

    Args:
        name (`str`): `"far"`: each frame has a noise level of its own. `"video_dit"`: the clip's noisy frames share one,
            as in a video diffusion transformer.
        clean_context_ratio (`float`): Share of the frames that are replaced by their clean latents (stochastic clean
            context), as inference feeds finished frames. They have no loss. With `"video_dit"` there are none.
        clean_prefix_ratio (`float`): Share of the clips whose first short frames are clean, their number drawn from 1
            to `F_short - 1`, and whose next frame is noisy: exactly what inference asks for.
        teacher_forcing (`bool`): Every short frame is noisy and attends to clean frames alone, which the transformer is
            fed beside the noisy ones (`clean_hidden_states`): all frames of a clip train what inference asks for, at
            about twice the tokens. The two ratios have no say then.
        decoder_draws (`int`, *optional*): Of a separable model, which has teacher forcing by its nature: how often the frames
            of a clip are noised and decoded for one pass of its encoder.
        learn_start (`bool`): Whether a separable model makes frame 0. A frame without a feature is clean, for it has no loss.
        flow_map (`bool`): The mean velocity of a step from t to r is learned, see `draw_steps` and `flow_map_loss`. All context
            is clean, as with teacher forcing.
        flow_map_guidance (`float`): Of a flow map: it learns the velocities that guidance of this scale would give, 1 for
            none, and needs none then. What guides is the model itself under null conditions.
        logit_mean (`float`), logit_std (`float`): Of the logit-normal noise levels. The paper's are 0 and 1; a mean above
            0 spends more of the training on high noise, where a frame is decided by its context.
        repeat_ratio (`float`): Share of the clips that are a stretch of themselves over and over. What comes after the first
            round is known to those who look far enough back, and to nobody else.
        condition_dropout (`float`): Share of the actions (per frame) and labels (per clip) that become null. It is drawn
            here, not by the model, so that a clip's draw does not depend on the batch it is in.

    Source: FAR, arXiv:2503.19325; teacher forcing, ACDiT, arXiv:2412.07720; separable models, arXiv:2602.10095; flow maps,
    AnyFlow, arXiv:2605.13724; the clean prefix and the repetition are ours.
    """

    name: str = "far"
    clean_context_ratio: float = 0.1
    clean_prefix_ratio: float = 0.0
    teacher_forcing: bool = False
    condition_dropout: float = 0.1
    logit_mean: float = 0.0
    logit_std: float = 1.0
    repeat_ratio: float = 0.0
    decoder_draws: int | None = None
    learn_start: bool = True
    flow_map: bool = False
    flow_map_guidance: float = 1.0

    def __post_init__(self):
        if self.name not in OBJECTIVES:
            raise ValueError(f"`name` is {self.name!r}; the objectives are {', '.join(OBJECTIVES)}.")
        for name in ("clean_context_ratio", "clean_prefix_ratio", "condition_dropout", "repeat_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it is a share, from 0 to 1.")
        if self.teacher_forcing and self.name != "far":
            raise ValueError(f"`teacher_forcing` needs frames in an order, but `name` is {self.name!r}; leave it out.")
        if self.decoder_draws is not None and not (self.decoder_draws >= 1 and self.teacher_forcing):
            raise ValueError(
                f"`decoder_draws` is {self.decoder_draws} and `teacher_forcing` {self.teacher_forcing}; draws are at least 1, "
                "of a separable model, whose context is always clean."
            )
        if self.flow_map and not self.teacher_forcing:
            raise ValueError(
                "`teacher_forcing` is False, but the frames of a flow map are trained one by one, after clean frames; pass "
                "`--teacher_forcing`."
            )
        if self.flow_map and (self.logit_mean, self.logit_std) != (0.0, 1.0):
            raise ValueError(
                f"`logit_mean` is {self.logit_mean} and `logit_std` {self.logit_std}, but the steps of a flow map begin and "
                "end at uniform levels; leave them out."
            )
        if self.flow_map_guidance != 1 and not (self.flow_map and self.flow_map_guidance > 1):
            raise ValueError(
                f"`flow_map_guidance` is {self.flow_map_guidance} and `flow_map` {self.flow_map}; guidance is put into flow "
                "maps alone, at a scale above 1."
            )
        if not self.logit_std > 0:
            raise ValueError(f"`logit_std` is {self.logit_std}; a spread is above 0.")

    def draw(
        self, num_frames: int, num_long_frames: int, latent_shape: Sequence[int], generator: torch.Generator
    ) -> ObjectiveDraw:
        """Draw for one clip.

        Args:
            num_frames (`int`): F.
            num_long_frames (`int`): Clean frames at the start of the clip that the model compresses.
            latent_shape (sequence of `int`): C, H, W.
            generator (`torch.Generator`): On the CPU, so that the draw is the same whatever device trains.
        """
        num_short_frames, draws = num_frames - num_long_frames, [self.decoder_draws] if self.decoder_draws else []
        num_levels = 1 if self.name == "video_dit" else math.prod([*draws, num_short_frames])
        ends = []
        if self.flow_map:
            timestep, *ends = draw_steps((*draws, num_short_frames), generator)
        else:
            timestep = draw_timesteps(num_levels, generator, self.logit_mean, self.logit_std)
            timestep = timestep.reshape(*draws, -1).expand(*draws, num_short_frames)
        is_clean = torch.rand(num_short_frames, generator=generator) < self.clean_context_ratio
        if self.name == "video_dit" or self.teacher_forcing:
            is_clean[:] = False
        has_prefix = torch.rand((), generator=generator) < self.clean_prefix_ratio
        prefix_place = torch.rand((), generator=generator).item()
        if has_prefix and num_short_frames > 1 and not self.teacher_forcing:
            num_prefix_frames = 1 + int(prefix_place * (num_short_frames - 1))
            is_clean[:num_prefix_frames] = True
            is_clean[num_prefix_frames] = False
        if self.decoder_draws and (num_long_frames or not self.learn_start):
            is_clean[0] = True  # no short frame comes before it, and so no feature

        noise = torch.randn(*draws, num_short_frames, *latent_shape, generator=generator)
        noise = torch.cat([noise.new_zeros(*draws, num_long_frames, *latent_shape), noise], dim=-4)
        long_timestep = torch.full((*draws, num_long_frames), CLEAN_TIMESTEP)
        timestep, *ends = (
            torch.cat([long_timestep, each.masked_fill(is_clean, CLEAN_TIMESTEP)], dim=-1)
            for each in (timestep, *ends)
        )
        keeps_action = torch.rand(num_frames, generator=generator) >= self.condition_dropout
        keeps_label = torch.rand((), generator=generator) >= self.condition_dropout
        frame_order = draw_frame_order(num_frames, self.repeat_ratio, generator)
        keeps_action[1:] &= frame_order.diff() == 1  # no action leads from the end of a stretch to its start
        return ObjectiveDraw(
            noise=noise,
            timestep=timestep,
            r_timestep=ends[0] if ends else None,
            keeps_action=keeps_action,
            keeps_label=keeps_label,
            frame_order=frame_order,
            teacher_forcing=self.teacher_forcing,
            guidance_scale=self.flow_map_guidance,
        )


def draw_frame_order(num_frames: int, repeat_ratio: float, generator: torch.Generator) -> torch.Tensor:
    """The frames of a clip as they come, or, in a share of the clips, a stretch of them over and over: of an eighth to half of
    the clip, anywhere in it, so that neither the distance nor the place tells what comes again.

    Returns:
        `torch.Tensor` of shape `(num_frames,)`, int64: indices into the clip.
    """
    order = torch.arange(num_frames)
    # Without repetition nothing is drawn, so that everything else is drawn as if there were none.
    if repeat_ratio == 0 or torch.rand((), generator=generator) >= repeat_ratio or num_frames < 2:
        return order
    shortest, longest = -(-num_frames // 8), num_frames // 2
    length = int(torch.randint(shortest, longest + 1, (), generator=generator))
    start = int(torch.randint(num_frames - length + 1, (), generator=generator))
    return start + order % length


def draw_timesteps(
    num_timesteps: int, generator: torch.Generator, logit_mean: float = 0.0, logit_std: float = 1.0
) -> torch.Tensor:
    """Logit-normal timesteps as the scheduler's integers.

    Returns:
        `torch.Tensor` of shape `(num_timesteps,)`, float32, whole numbers from 1 to 1000.
    """
    time = (logit_mean + logit_std * torch.randn(num_timesteps, generator=generator)).sigmoid()
    return (time * NUM_TRAIN_TIMESTEPS).ceil().clamp(1, NUM_TRAIN_TIMESTEPS)


def draw_steps(shape: Sequence[int], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the steps of a flow map begin and end: at the larger and the smaller of two uniform levels, for a quarter of the
    frames; for another quarter at 0 in the end; for half of them where they begin, which is plain flow matching. Of two
    frames in a row one is of the latter kind.

    Args:
        shape (sequence of `int`): The frames of a clip last.
        generator (`torch.Generator`): On the CPU.

    Returns:
        Timesteps of this shape, float32: where a step begins, from 5 to 995, so that its neighbours are timesteps too; and
        where it ends, from 0 to that.
    """
    levels = torch.rand(2, *shape, generator=generator) * NUM_TRAIN_TIMESTEPS
    start = levels.amax(dim=0).clamp(DERIVATIVE_STEP, NUM_TRAIN_TIMESTEPS - DERIVATIVE_STEP)
    end = torch.minimum(levels.amin(dim=0), start)
    kind = (torch.arange(shape[-1]) + torch.randint(4, (*shape[:-1], 1), generator=generator)) % 4
    return start, torch.where(kind % 2 == 0, start, end.masked_fill(kind == 1, 0))


def draw_num_long_frames(num_frames: int, short_window: int, generator: torch.Generator) -> int:
    """How many long frames precede the short window in a step: uniform, from none to all that the clip has room for.

    Args:
        num_frames (`int`): Longest clip.
        short_window (`int`): Short frames; a step's clips have these and the long frames that are drawn.
        generator (`torch.Generator`): The same on all processes, whose passes must have one shape.
    """
    return int(torch.randint(max(0, num_frames - short_window) + 1, (), generator=generator))


def add_noise(latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """`x_t = (1 - t) x_0 + t x_1`, frame by frame; clean frames, at timestep -1, stay what they are.

    Args:
        latents (`torch.Tensor` of shape `(B, F, C, H, W)`): x_0.
        noise (`torch.Tensor` of shape `(B, F, C, H, W)`): x_1; or, as the timesteps, of several draws, `(N, B, F, C, H, W)`.
        timestep (`torch.Tensor` of shape `(B, F)`): 1 to 1000, or -1.
    """
    time = (timestep.clamp(min=0) / NUM_TRAIN_TIMESTEPS)[..., None, None, None]
    return (1 - time) * latents + time * noise


def velocity_loss(
    velocity: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of the velocity `x_1 - x_0` on the noisy frames: their mean in each clip, then over clips.

    Args:
        velocity (`torch.Tensor` of shape `(B, F_short, C, H, W)`): What the transformer returns.
        latents, noise (`torch.Tensor` of shape `(B, F, C, H, W)`): x_0 and x_1 of all frames.
        timestep (`torch.Tensor` of shape `(B, F)`): -1 marks the clean frames.

    All but the latents may be of several draws, `(N, B, ...)`, each of which counts as clips of its own.

    Returns:
        `torch.Tensor` of shape `()`, float32. A clip without a noisy frame counts as 0.
    """
    frame_losses = _squared_errors(velocity, noise - latents)
    return _mean_of_marked(frame_losses, timestep[..., -frame_losses.shape[-1] :] > 0).mean()


def _squared_errors(velocity: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Of each short frame, `(B, F_short)`, float32; `target` is of all frames."""
    target = target[..., -velocity.shape[-4] :, :, :, :].float()
    return (velocity.float() - target).square().flatten(-3).mean(dim=-1)


def _mean_of_marked(frame_losses: torch.Tensor, is_marked: torch.Tensor) -> torch.Tensor:
    """In each clip, `(B,)`; 0 where there are none."""
    return (frame_losses * is_marked).sum(dim=-1) / is_marked.sum(dim=-1).clamp(min=1)


@torch.no_grad()
def flow_map_target(
    predict: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    noisy: torch.Tensor,
    velocity: torch.Tensor,
    timestep: torch.Tensor,
    r_timestep: torch.Tensor,
) -> torch.Tensor:
    """What the mean velocity u of a step from t to r must be: `v - (t - r) du/dt`, by a central difference of `predict` along
    the path.

    Args:
        predict (callable): u of noisy latents, `timestep` and `r_timestep`, of the short frames.
        noisy, velocity (`torch.Tensor` of shape `(B, F, C, H, W)`): x_t and v.
        timestep, r_timestep (`torch.Tensor` of shape `(B, F)`): t and r; -1 marks a clean frame, which stays where it is.

    Returns:
        `torch.Tensor` of shape `(B, F_short, C, H, W)`, float32.
    """
    step = torch.where(timestep > 0, DERIVATIVE_STEP, 0.0)
    way = (step / NUM_TRAIN_TIMESTEPS)[..., None, None, None] * velocity
    difference = predict(noisy + way, timestep + step, r_timestep) - predict(noisy - way, timestep - step, r_timestep)
    num_short_frames = difference.shape[-4]
    span = (timestep - r_timestep)[..., -num_short_frames:, None, None, None]
    return velocity[..., -num_short_frames:, :, :, :].float() - span * difference.float() / (2 * DERIVATIVE_STEP)


def flow_map_loss(
    velocity: torch.Tensor, target: torch.Tensor, timestep: torch.Tensor, r_timestep: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of the mean velocity, weighted by `t sqrt(1 - t)`. The error of a frame with r < t is scaled, without
    gradient, to the mean error of those of its clip with r = t, where there are any: it is as large as the mean of what is
    learned beside it, whatever the length of its step.

    Args:
        velocity, target (`torch.Tensor` of shape `(B, F_short, C, H, W)`): What the transformer returns, and `flow_map_target`.
        timestep, r_timestep (`torch.Tensor` of shape `(B, F)`): t and r; -1 marks a clean frame.

    Returns:
        `torch.Tensor` of shape `()`, float32; each clip counts the same.
    """
    frame_losses = _squared_errors(velocity, target)
    timestep, r_timestep = (each[..., -frame_losses.shape[-1] :] for each in (timestep, r_timestep))
    is_noisy, is_flow = timestep > 0, (timestep > 0) & (r_timestep == timestep)
    flow_loss = _mean_of_marked(frame_losses, is_flow)[..., None]
    is_scaled = is_noisy & ~is_flow & is_flow.any(dim=-1, keepdim=True)
    scale = torch.where(is_scaled, flow_loss / frame_losses.clamp(min=1e-8), 1.0).detach()
    time = timestep.clamp(min=0) / NUM_TRAIN_TIMESTEPS
    return _mean_of_marked(frame_losses * scale * time * (1 - time).sqrt(), is_noisy).mean()
