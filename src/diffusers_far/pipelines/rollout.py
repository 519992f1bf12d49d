"""A growing video in latent space: finished frames behind, the next one made from noise.

B batch, F frames, C latent channels, H/W latent height/width, A action channels.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ..checks import check_count
from ..models.frame_network import FrameModulation
from ..models.frame_transformer import FrameTransformer
from ..models.frames import CLEAN_TIMESTEP, FrameBatch, repeat_batch
from ..models.joint_cache import JointCache, joined
from ..models.kv_cache import computing_dtype
from .inputs import NUM_TIMESTEPS, check_guidance
from .settings import GenerationSettings


MOST_REMAINING_NOISE = 0.02  # timesteps that are rounded to whole numbers leave 0.001


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Refuse a scheduler that does not bring noise to the data along the model's velocities.

    It is tried on velocities that point at known data: classes of diffusers come and go, and one class may follow flows
    under one config only.

    Raises:
        ValueError: Names the scheduler and the reason.
    """
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    prediction_type, reason = config.get("prediction_type", "flow_prediction"), None
    if prediction_type != "flow_prediction":
        reason = f"has `prediction_type` {prediction_type!r}, but the transformer predicts a flow's velocity"
    elif config.get("use_dynamic_shifting"):
        reason = "has `use_dynamic_shifting`, but the transformer knows no shift that depends on the size: set `shift`"
    else:
        try:
            share = remaining_noise(scheduler)
        except Exception as error:  # of whatever kind: a foreign scheduler is run
            reason = f"cannot be stepped from noise to data ({type(error).__name__}: {error})"
        else:
            if not share < MOST_REMAINING_NOISE:
                reason = f"leaves {share:.3g} of the noise where the velocities are exact"
    if reason is not None:
        raise ValueError(
            f"`scheduler` {name} {reason}; take a flow-matching one, such as `FlowMatchEulerDiscreteScheduler`, or "
            "`UniPCMultistepScheduler` with `use_flow_sigmas=True` and `prediction_type='flow_prediction'`."
        )


def remaining_noise(scheduler: SchedulerMixin) -> float:
    """How far from the data a scheduler ends, as a share of the way, where the velocity always points at the data."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(3, device="cpu")
    lowest, highest = float(min(scheduler.timesteps)), float(max(scheduler.timesteps))
    if not (0 <= lowest and 0.9 * NUM_TIMESTEPS <= highest <= NUM_TIMESTEPS):
        raise ValueError(
            f"its timesteps are {lowest:g} to {highest:g}; pure noise is {NUM_TIMESTEPS} to the transformer"
        )
    generator = torch.Generator().manual_seed(0)
    data = torch.linspace(-1, 1, 16).view(1, 1, 1, 4, 4)
    noise = latents = torch.randn(data.shape, generator=generator)
    for timestep in scheduler.timesteps:
        velocity = (latents - data) / (float(timestep) / NUM_TIMESTEPS)
        latents = take_step(scheduler, velocity, timestep, latents, generator)
    return ((latents - data).norm() / (noise - data).norm()).item()


def take_step(scheduler: SchedulerMixin, velocity, timestep, latents, generator) -> torch.Tensor:
    """Latents after a step; schedulers that draw noise of their own draw it from the generator."""
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    arguments = {"generator": generator} if takes_generator else {}
    return scheduler.step(velocity, timestep, latents, return_dict=False, **arguments)[0]


def frame_noise(
    shape: tuple[int, ...], generator: torch.Generator | list[torch.Generator] | None, device: torch.device
) -> torch.Tensor:
    """Noise of frames, `(B, F, C, H, W)`, float32; each sample's from its own generator where a list is given."""
    return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)


class Rollout:
    """Writes clean frames and denoises new ones. Writing and denoising are two calls: a denoised frame becomes context
    only when it is written.

    Args:
        transformer ([`FARTransformer3DModel`] or [`SCDTransformer3DModel`]): The denoiser.
        scheduler: A flow-matching scheduler; copied, so that rollouts do not disturb each other.
        latent_shape (`tuple`): `(B, C, H, W)`.
        max_frames (`int`): Frames that the cache has room for at first, context included; it grows.
        device (`torch.device`): Where the transformer runs.
        class_labels (`torch.Tensor` of shape `(B,)`, *optional*).
        config (`GenerationSettings`).

    Attributes:
        num_steps (`int`): Denoising steps of a frame; some schedulers make more than `num_inference_steps`.
        num_frames (`int`): Clean frames that were written, those that the cache has forgotten since included.
        is_guided (`bool`): Whether the batch has a null half.
        is_intact (`bool`): `False` after a write that failed midway: the cache holds parts of it.
    """

    def __init__(
        self,
        transformer: FrameTransformer,
        scheduler: SchedulerMixin,
        *,
        latent_shape: tuple[int, int, int, int],
        max_frames: int,
        device: torch.device,
        class_labels: torch.Tensor | None = None,
        config: GenerationSettings = GenerationSettings(),
    ):
        self.transformer = transformer
        self.scheduler = copy.deepcopy(scheduler)
        self.latent_shape = latent_shape
        self.max_frames = max_frames
        self.device = device
        self.class_labels = None if class_labels is None else class_labels.to(device)
        self.is_guided = config.needs_null_half
        self.set_config(config)
        self.num_frames = 0
        self.is_intact = True
        self.frames: FrameBatch | None = None  # clean frames, where nothing is cached
        self.kv_cache = None
        if config.use_cache:
            batch_size, _, height, width = latent_shape
            self.kv_cache = transformer.init_kv_cache(
                batch_size * (2 if self.is_guided else 1),
                height,
                width,
                max_frames,
                dtype=computing_dtype(transformer.dtype, device),
                device=device,
                **asdict(config.cache_options),
            )

    def set_guidance(self, guidance_scale: float) -> None:
        """Guide the next steps otherwise, those of the frame in the making too.

        At 1 or less the null half is not looked at, but it stays in the batch, so that guidance can rise again. With
        `guidance_mode="feature"` a frame that was begun without guidance is finished without.

        Raises:
            ValueError: No finite number of at least 0, or above 1 where the context has no null half.
        """
        check_guidance(self.transformer, guidance_scale, self.config.guidance_mode)
        if guidance_scale > 1 and not self.is_guided and self.config.guidance_mode == "condition":
            raise ValueError(
                f"`guidance_scale` was set to {guidance_scale} in the middle, but the context was encoded without a null "
                "half; start with a guidance above 1, and lower it until it is wanted."
            )
        self.config = replace(self.config, guidance_scale=guidance_scale)

    @property
    def num_bytes(self) -> int:
        """Bytes of the cache, which a `clone` copies: 2 x layers x batch x width x tokens x bytes per element, where the
        tokens are those that it has room for, and guidance doubles the batch."""
        return 0 if self.kv_cache is None else self.kv_cache.num_bytes

    @property
    def num_rewindable(self) -> int:
        """Frames that `rewind` can take out again. Where old ones are forgotten, the sinks and the short window stay."""
        if self.kv_cache is None:
            return self.num_frames
        if self.kv_cache.num_frames == self.num_frames:
            return self.num_frames - self.kv_cache.num_shared_frames
        num_kept = self.config.cache_options.num_sink_frames + self.transformer.config.short_window - 1
        return max(0, self.kv_cache.num_frames - num_kept)

    @property
    def order_matters(self) -> bool:
        """Whether frames that are written at once leave another cache than frames that are written one by one."""
        return self.config.cache_options.is_rolling or self.config.cache_options.max_long_frames is not None

    def set_config(self, config: GenerationSettings) -> None:
        """Make the next frames another way; what is cached must fit, so guidance must not cross 1."""
        self.config = config
        self.num_steps = len(self._set_timesteps())

    def _set_timesteps(self, num_inference_steps: int | None = None) -> torch.Tensor:
        """Timesteps of a frame: as many as are asked for, else as the config has it."""
        if num_inference_steps is None and self.config.sigmas is not None:
            self.scheduler.set_timesteps(sigmas=list(self.config.sigmas), device=self.device)
        else:
            self.scheduler.set_timesteps(num_inference_steps or self.config.num_inference_steps, device=self.device)
        return self.scheduler.timesteps

    def restarted(
        self,
        config: GenerationSettings,
        max_frames: int | None = None,
        transformer: FrameTransformer | None = None,
    ) -> "Rollout":
        """The same rollout before its first frame, with another config, and room for `max_frames`, else for as many as at
        first; of a copy of the `transformer` where one is given."""
        return Rollout(
            transformer or self.transformer,
            self.scheduler,
            latent_shape=self.latent_shape,
            max_frames=max_frames or self.max_frames,
            device=self.device,
            class_labels=self.class_labels,
            config=config,
        )

    def without_null_half(self, config: GenerationSettings) -> "Rollout":
        """The same rollout with the same past, but unguided from here on, as `config` has it: nothing is encoded anew."""
        twin = self.restarted(config)
        tensors, clock = self.state()
        halves = {
            name: tensor.chunk(2, dim=1 if name in ("keys", "values") else 0)[1] for name, tensor in tensors.items()
        }
        twin.restore(halves, clock)
        return twin

    def outline(self, writes: Sequence[int], max_frames: int | None = None) -> "Rollout":
        """What this rollout becomes by some writes, but for the values; see [`FARKVCache.outline`]."""
        twin = copy.copy(self)
        twin.num_frames += sum(writes)
        twin.kv_cache = self.kv_cache and self.kv_cache.outline(writes, max_frames)
        return twin

    def clone(self) -> "Rollout":
        """An independent rollout with the same past; copies the cache."""
        twin = copy.copy(self)
        twin.scheduler = copy.deepcopy(self.scheduler)
        twin.kv_cache = None if self.kv_cache is None else self.kv_cache.clone()
        return twin

    def futures(self, num_futures: int) -> "Rollout":
        """A batch of rollouts that go on from this one's past, which is stored once; this one has a batch of 1."""
        twin = copy.copy(self)
        twin.scheduler = copy.deepcopy(self.scheduler)
        twin.latent_shape = (num_futures, *self.latent_shape[1:])
        twin.class_labels = repeat_batch(self.class_labels, num_futures)
        if self.kv_cache is not None:
            twin.kv_cache = JointCache.of_futures(self.kv_cache, num_futures)
        elif self.frames is not None:
            twin.frames = FrameBatch(*(joined([tensor] * num_futures) for tensor in vars(self.frames).values()))
        return twin

    @property
    def is_of_futures(self) -> bool:
        """Whether the past is shared by a batch, and so is no state of its own."""
        return isinstance(self.kv_cache, JointCache)

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """The past, as tensors (views) and JSON values, for [`restore`] in another process."""
        if self.kv_cache is not None:
            tensors, clock = self.kv_cache.state()
            return tensors, {"num_frames": self.num_frames, "cache": clock}
        tensors = {} if self.frames is None else {**vars(self.frames)}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return tensors, {"num_frames": self.num_frames}

    def state_form(self, clock: dict) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor that a `state` at this clock has.

        Raises:
            ValueError: No rollout ever shows this clock.
        """
        if not isinstance(clock, dict) or clock.keys() != {"num_frames", *(["cache"] if self.kv_cache else [])}:
            raise ValueError(f"the clock is {clock!r}")
        check_count("the clock's `num_frames`", clock["num_frames"], least=0)
        batch_size, _, height, width = self.latent_shape
        if self.kv_cache is None:
            num_rows = batch_size * (2 if self.is_guided else 1)
            has_frames = clock["num_frames"] > 0
            return (
                FrameBatch.form(self.transformer, num_rows, clock["num_frames"], height, width) if has_frames else {}
            )
        form, num_forgotten = (
            self.kv_cache.state_form(clock["cache"]),
            clock["num_frames"] - clock["cache"]["num_frames"],
        )
        if num_forgotten < 0 or (num_forgotten > 0) != clock["cache"]["_has_forgotten"]:
            raise ValueError(f"the clock is {clock!r}, of which the cache has forgotten {num_forgotten} frames")
        return form

    def restore(self, tensors: dict[str, torch.Tensor], clock: dict) -> None:
        """Take over the past of another rollout of the same model and shape; this one has seen no frame yet."""
        self.num_frames = clock["num_frames"]
        if self.kv_cache is not None:
            self.kv_cache.restore(tensors, clock["cache"])
        elif tensors:
            self.frames = FrameBatch(**tensors)

    def write(self, frames: FrameBatch, coming: FrameBatch | None = None) -> None:
        """Add clean frames, `latents` (B, F, C, H, W), to the context.

        Args:
            frames (`FrameBatch`): The new ones, after those that were written before.
            coming (`FrameBatch`, *optional*): The frame after them; of a separable model that takes actions, what that is
                fed is written with them.
        """
        num_new_frames, frames = frames.num_frames, self._model_inputs(frames)
        if self.kv_cache is None:
            self.frames = frames if self.frames is None else self.frames.append(frames)
        else:
            self._write_to_cache(frames, self._next_action(coming))
        self.num_frames += num_new_frames

    def _next_action(self, coming: FrameBatch | None) -> dict[str, torch.Tensor]:
        """What a separable model is told of the frame to come."""
        if not self.transformer.is_separable or coming is None or coming.actions is None:
            return {}
        fed = self._model_inputs(coming)
        mask = None if fed.action_mask is None else fed.action_mask[:, 0]
        return {"next_action": fed.actions[:, 0], "next_action_mask": mask}

    def _write_to_cache(self, frames: FrameBatch, next_action: dict[str, torch.Tensor]) -> None:
        num_cached = self.kv_cache.num_frames
        self.is_intact = False
        try:
            self.kv_cache.make_room(frames.num_frames)
            with self.transformer.cache_context("context"):
                labels = self._model_labels()
                self._predict(frames, CLEAN_TIMESTEP, class_labels=labels, update_cache=True, **next_action)
            self.is_intact = True
        except ValueError:  # refused before anything was written
            self.is_intact = self.kv_cache.num_frames == num_cached
            raise

    def rewind(self, num_frames: int, window: FrameBatch, coming: FrameBatch | None = None) -> None:
        """Take the last frames out of the context again; a write must follow.

        Args:
            num_frames (`int`): How many.
            window (`FrameBatch`): The frames before them, as many as were short then.
            coming (`FrameBatch`, *optional*): For a separable model, the first of those that are taken out.
        """
        if self.kv_cache is None:
            self.frames = self.frames.between(0, self.frames.num_frames - num_frames)
        else:
            window = window.looking_ahead(coming) if self.transformer.is_separable else window
            self.kv_cache.rewind(self.kv_cache.num_frames - num_frames, self._model_inputs(window))
        self.num_frames -= num_frames

    def denoise(
        self,
        frame: FrameBatch,
        on_step_end: Callable | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
    ) -> torch.Tensor:
        """Make the next frame.

        Args:
            frame (`FrameBatch`): Noise as `latents`, (B, 1, C, H, W), and the action that the frame is fed.
            on_step_end (callable, *optional*): `(step_index, timestep, latents) -> latents`, after each step.
            generator (`torch.Generator` or a list, *optional*): For schedulers that draw noise of their own.
            num_inference_steps (`int`, *optional*): Of this frame; the config's by default.

        Returns:
            `torch.Tensor` of shape `(B, 1, C, H, W)`, float32.
        """
        timesteps = self._set_timesteps(num_inference_steps)
        fed = self._model_inputs(frame)  # but for the latents the same at every step
        ends = self._step_ends(timesteps)
        modulations, null_feature = self._modulations(fed, timesteps, ends), self._null_feature(generator)
        latents, dtype = frame.latents.float(), fed.latents.dtype
        for step_index, (timestep, modulation) in enumerate(zip(timesteps, modulations)):
            fed = replace(fed, latents=self._with_null_half(latents.to(dtype)))
            told = {} if ends is None or modulation is not None else {"r_timestep": ends[step_index]}
            with self.transformer.cache_context("denoise", step_index=step_index, num_inference_steps=len(timesteps)):
                velocity = self._velocity(fed, timestep, modulation, null_feature | told).float()
            if self.is_guided or null_feature:
                null_velocity, velocity = velocity.chunk(2)
                if self.config.guidance_scale > 1:
                    velocity = null_velocity + float(self.config.guidance_scale) * (velocity - null_velocity)
            latents = take_step(self.scheduler, velocity, timestep, latents, generator)
            if on_step_end is not None:
                latents = on_step_end(step_index, timestep, latents)
        return latents

    def _step_ends(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        """Where each step ends, for a flow map whose scheduler goes there at once; with another it is the flow model that it is
        too, and told nothing."""
        if self.transformer.config.flow_map and "r_timestep" in inspect.signature(self.scheduler.step).parameters:
            return torch.cat([timesteps[1:], timesteps.new_zeros(1)])
        return None

    def _modulations(self, fed: FrameBatch, timesteps: torch.Tensor, ends: torch.Tensor | None) -> list:
        """Of each step, where the blocks need not compute their own."""
        if self.kv_cache is None:
            return [None] * len(timesteps)
        labels, attention_kwargs = self._model_labels(), self.config.attention_kwargs
        known = self.transformer.frame_modulations(fed, timesteps, labels, attention_kwargs, ends)
        return known or [None] * len(timesteps)

    def _null_feature(self, generator: torch.Generator | list[torch.Generator] | None) -> dict[str, torch.Tensor]:
        """Noise for the frame's feature, where guidance leads away from a noisy one."""
        if self.config.guidance_mode != "feature" or self.config.guidance_scale <= 1:
            return {}
        batch_size, _, height, width = self.latent_shape
        noise = frame_noise(self.transformer.feature_shape(batch_size, height, width), generator, self.device)
        return {"null_feature_noise": noise.to(self.transformer.dtype)}

    def _velocity(
        self, noisy: FrameBatch, timestep: torch.Tensor, modulation: FrameModulation | None, told: dict
    ) -> torch.Tensor:
        """Velocity of the one noisy frame at a step, `(B, 1, C, H, W)`; of the null half first, where there is one. What else
        the model is told of the step is `told`."""
        if modulation is not None:
            return self._predict(FrameBatch(noisy.latents), modulation=modulation, **told)
        if self.kv_cache is not None or (self.frames is None and not self.transformer.is_separable):
            return self._predict(noisy, timestep, class_labels=self._model_labels(), **told)
        context = self.frames or noisy.between(0, 0)
        batch_size, num_clean = context.latents.shape[:2]
        timesteps = torch.full((batch_size, num_clean + 1), CLEAN_TIMESTEP, device=self.device)
        timesteps[:, -1] = timestep
        frames, labels = context.append(noisy), self._model_labels()
        clean = {"clean_hidden_states": frames.latents} if self.transformer.is_separable else {}
        return self._predict(frames, timesteps, class_labels=labels, **clean, **told)[:, -1:]

    def _predict(
        self, frames: FrameBatch, timestep: torch.Tensor | float | None = None, **arguments
    ) -> torch.Tensor | None:
        return self.transformer(
            frames.latents,
            timestep,
            actions=frames.actions,
            action_mask=frames.action_mask,
            kv_cache=self.kv_cache,
            attention_kwargs=self.config.attention_kwargs,
            return_dict=False,
            **arguments,
        )[0]

    def _model_labels(self) -> torch.Tensor | None:
        """Of each sample; with guidance the null class in front, of the null half."""
        if not self.is_guided or self.class_labels is None:
            return self.class_labels
        null_labels = torch.full_like(self.class_labels, self.transformer.config.num_classes)
        return torch.cat([null_labels, self.class_labels])

    def _model_inputs(self, frames: FrameBatch) -> FrameBatch:
        """In the model's dtype; with guidance a null half in front, whose actions are null in the context too."""
        latents = self._with_null_half(frames.latents.to(self.transformer.dtype))
        actions, action_mask = frames.actions, frames.action_mask
        if self.is_guided and actions is not None:
            if action_mask is None:
                action_mask = torch.ones(actions.shape[:2], dtype=torch.bool, device=actions.device)
            action_mask = torch.cat([torch.zeros_like(action_mask), action_mask])
            actions = torch.cat([actions, actions])
        return FrameBatch(latents, actions, action_mask)

    def _with_null_half(self, latents: torch.Tensor) -> torch.Tensor:
        """With guidance once more."""
        return torch.cat([latents, latents]) if self.is_guided else latents
