"""The training objective: which frames of a clip are noisy, how noisy, and the loss on their predicted velocity.

B batch, F frames (long ones first), F_short short frames, C latent channels, H/W latent height/width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from ..models.transformer_far import CLEAN_TIMESTEP


NUM_TRAIN_TIMESTEPS = 1000
OBJECTIVES = ("far", "video_dit")


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
        teacher_forcing (`bool`): The objective's; the same for all clips of a batch.
    """

    noise: torch.Tensor
    timestep: torch.Tensor
    keeps_action: torch.Tensor
    keeps_label: torch.Tensor
    frame_order: torch.Tensor
    teacher_forcing: bool = False

    @classmethod
    def stack(cls, draws: Sequence["ObjectiveDraw"]) -> "ObjectiveDraw":
        stacked = {name: torch.stack([getattr(draw, name) for draw in draws]) for name in cls._tensor_names()}
        return cls(**stacked, teacher_forcing=draws[0].teacher_forcing)

    def to(self, device: torch.device | str) -> "ObjectiveDraw":
        return replace(self, **{name: getattr(self, name).to(device) for name in self._tensor_names()})

    @classmethod
    def _tensor_names(cls) -> list[str]:
        return [field.name for field in fields(cls) if field.name != "teacher_forcing"]


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
        logit_mean (`float`), logit_std (`float`): Of the logit-normal noise levels. The paper's are 0 and 1; a mean above
            0 spends more of the training on high noise, where a frame is decided by its context.
        repeat_ratio (`float`): Share of the clips that are a stretch of themselves over and over. What comes after the first
            round is known to those who look far enough back, and to nobody else.
        condition_dropout (`float`): Share of the actions (per frame) and labels (per clip) that become null. It is drawn
            here, not by the model, so that a clip's draw does not depend on the batch it is in.

    Source: FAR, arXiv:2503.19325; teacher forcing, ACDiT, arXiv:2412.07720; the clean prefix and the repetition are ours.
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
        keeps_action = torch.rand(num_frames, generator=generator) >= self.condition_dropout
        keeps_label = torch.rand((), generator=generator) >= self.condition_dropout
        frame_order = draw_frame_order(num_frames, self.repeat_ratio, generator)
        keeps_action[1:] &= frame_order.diff() == 1  # no action leads from the end of a stretch to its start
        return ObjectiveDraw(
            noise=noise,
            timestep=torch.cat([long_timestep, timestep.masked_fill(is_clean, CLEAN_TIMESTEP)], dim=-1),
            keeps_action=keeps_action,
            keeps_label=keeps_label,
            frame_order=frame_order,
            teacher_forcing=self.teacher_forcing,
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
    num_short_frames = velocity.shape[-4]
    target = (noise - latents)[..., -num_short_frames:, :, :, :].float()
    is_noisy = timestep[..., -num_short_frames:] > 0
    frame_losses = (velocity.float() - target).square().flatten(-3).mean(dim=-1)  # (B, F_short)
    clip_losses = (frame_losses * is_noisy).sum(dim=-1) / is_noisy.sum(dim=-1).clamp(min=1)
    return clip_losses.mean()
