"""A growing video in latent space: finished frames behind, the next one made from noise.

B batch, F frames, C latent channels, H/W latent height/width, A action channels.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from diffusers import SchedulerMixin

from ..models.adapters import lora_scale
from ..models.cache_options import CacheOptions
from ..models.denoising_steps import DenoisingSteps
from ..models.frame_batch import FrameBatch
from ..models.transformer_far import CLEAN_TIMESTEP, FARTransformer3DModel


@dataclass(frozen=True)
class RolloutConfig:
    """How frames are made.

    Args:
        num_inference_steps (`int`): Denoising steps of a frame.
        guidance_scale (`float`): Above 1 the model also runs with the null condition, in the same batch.
        use_cache (`bool`): `False` computes the whole context anew at every step.
        cache_options (`CacheOptions`): How the cache saves time and memory.
        attention_kwargs (`dict`, *optional*): Passed to the transformer: `scale` scales LoRA layers.

    Raises:
        ValueError: `attention_kwargs` has another key, or no finite number.
    """

    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    use_cache: bool = True
    cache_options: CacheOptions = CacheOptions()
    attention_kwargs: dict | None = None

    def __post_init__(self):
        lora_scale(self.attention_kwargs)


class Rollout:
    """Writes clean frames and denoises new ones. Writing and denoising are two calls: a denoised frame becomes context
    only when it is written.

    Args:
        transformer ([`FARTransformer3DModel`]): The denoiser.
        scheduler: A flow-matching scheduler; copied, so that rollouts do not disturb each other.
        latent_shape (`tuple`): `(B, C, H, W)`.
        max_frames (`int`): Frames that the cache has room for at first, context included; it grows.
        device (`torch.device`): Where the transformer runs.
        class_labels (`torch.Tensor` of shape `(B,)`, *optional*).
        config (`RolloutConfig`).

    Attributes:
        num_steps (`int`): Denoising steps of a frame; some schedulers make more than `num_inference_steps`.
        num_frames (`int`): Clean frames that were written, those that the cache has forgotten since included.
        is_intact (`bool`): `False` after a write that failed midway: the cache holds parts of it.
    """

    def __init__(
        self,
        transformer: FARTransformer3DModel,
        scheduler: SchedulerMixin,
        *,
        latent_shape: tuple[int, int, int, int],
        max_frames: int,
        device: torch.device,
        class_labels: torch.Tensor | None = None,
        config: RolloutConfig = RolloutConfig(),
    ):
        self.transformer = transformer
        self.scheduler = copy.deepcopy(scheduler)
        self.latent_shape = latent_shape
        self.max_frames = max_frames
        self.device = device
        self.class_labels = class_labels
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
                dtype=self._computing_dtype,
                device=device,
                **asdict(config.cache_options),
            )

    @property
    def _computing_dtype(self) -> torch.dtype:
        device_type = torch.device(self.device).type
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return self.transformer.dtype

    @property
    def is_guided(self) -> bool:
        """Whether the batch has a null half."""
        return self.config.guidance_scale > 1

    @property
    def num_bytes(self) -> int:
        """Bytes of the cache, which a `clone` copies: 2 x layers x batch x width x tokens x bytes per element, where the
        tokens are those that it has room for, and guidance doubles the batch."""
        return 0 if self.kv_cache is None else self.kv_cache.num_bytes

    @property
    def num_rewindable(self) -> int:
        """Frames that `rewind` can take out again. Where old ones are forgotten, the sinks and the short window stay."""
        if self.kv_cache is None or self.kv_cache.num_frames == self.num_frames:
            return self.num_frames
        num_kept = self.config.cache_options.num_sink_frames + self.transformer.config.short_window - 1
        return max(0, self.kv_cache.num_frames - num_kept)

    @property
    def order_matters(self) -> bool:
        """Whether frames that are written at once leave another cache than frames that are written one by one."""
        return self.config.cache_options.is_rolling or self.config.cache_options.max_long_frames is not None

    def set_config(self, config: RolloutConfig) -> None:
        """Make the next frames another way; what is cached must fit, so guidance must not cross 1."""
        self.config = config
        self.scheduler.set_timesteps(config.num_inference_steps, device=self.device)
        self.num_steps = len(self.scheduler.timesteps)

    def restarted(self, config: RolloutConfig) -> "Rollout":
        """The same rollout before its first frame, with another config."""
        return Rollout(
            self.transformer,
            self.scheduler,
            latent_shape=self.latent_shape,
            max_frames=self.max_frames,
            device=self.device,
            class_labels=self.class_labels,
            config=config,
        )

    def without_null_half(self, config: RolloutConfig) -> "Rollout":
        """The same rollout with the same past, but unguided from here on, as `config` has it: nothing is encoded anew."""
        twin = self.restarted(config)
        tensors, clock = self.state()
        halves = {
            name: tensor.chunk(2, dim=1 if name in ("keys", "values") else 0)[1] for name, tensor in tensors.items()
        }
        twin.restore(halves, clock)
        return twin

    def clone(self) -> "Rollout":
        """An independent rollout with the same past; copies the cache."""
        twin = copy.copy(self)
        twin.scheduler = copy.deepcopy(self.scheduler)
        twin.kv_cache = None if self.kv_cache is None else self.kv_cache.clone()
        return twin

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """The past, as tensors (views) and JSON values, for [`restore`] in another process."""
        if self.kv_cache is not None:
            tensors, clock = self.kv_cache.state()
            return tensors, {"num_frames": self.num_frames, "cache": clock}
        tensors = {} if self.frames is None else {**vars(self.frames)}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return tensors, {"num_frames": self.num_frames}

    def restore(self, tensors: dict[str, torch.Tensor], clock: dict) -> None:
        """Take over the past of another rollout of the same model and shape; this one has seen no frame yet."""
        self.num_frames = clock["num_frames"]
        if self.kv_cache is not None:
            self.kv_cache.restore(tensors, clock["cache"])
        elif tensors:
            self.frames = FrameBatch(**tensors)

    def write(self, frames: FrameBatch) -> None:
        """Add clean frames, `latents` (B, F, C, H, W), to the context."""
        num_new_frames, frames = frames.num_frames, self._model_inputs(frames)
        if self.kv_cache is None:
            self.frames = frames if self.frames is None else self.frames.append(frames)
        else:
            self._write_to_cache(frames)
        self.num_frames += num_new_frames

    def _write_to_cache(self, frames: FrameBatch) -> None:
        num_cached = self.kv_cache.num_frames
        self.is_intact = False
        try:
            self.kv_cache.make_room(frames.num_frames)
            with self.transformer.cache_context("context"):
                self._predict(frames, CLEAN_TIMESTEP, update_cache=True)
            self.is_intact = True
        except ValueError:  # refused before anything was written
            self.is_intact = self.kv_cache.num_frames == num_cached
            raise

    def rewind(self, num_frames: int, window: FrameBatch) -> None:
        """Take the last frames out of the context again; a write must follow.

        Args:
            num_frames (`int`): How many.
            window (`FrameBatch`): The frames before them, as many as were short then.
        """
        if self.kv_cache is None:
            self.frames = self.frames.between(0, self.frames.num_frames - num_frames)
        else:
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
        self.scheduler.set_timesteps(num_inference_steps or self.config.num_inference_steps, device=self.device)
        steps, num_steps = DenoisingSteps(self.scheduler.timesteps), len(self.scheduler.timesteps)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_arguments = {"generator": generator} if takes_generator else {}
        latents = frame.latents.float()
        for step_index, timestep in enumerate(steps.timesteps):
            steps.index = step_index
            inputs = self._model_inputs(FrameBatch(latents, frame.actions, frame.action_mask))
            with self.transformer.cache_context("denoise", step_index=step_index, num_inference_steps=num_steps):
                velocity = self._velocity(inputs, steps).float()
            if self.is_guided:
                null_velocity, velocity = velocity.chunk(2)
                velocity = null_velocity + self.config.guidance_scale * (velocity - null_velocity)
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False, **step_arguments)[0]
            if on_step_end is not None:
                latents = on_step_end(step_index, timestep, latents)
        return latents

    def _velocity(self, noisy: FrameBatch, steps: DenoisingSteps) -> torch.Tensor:
        """Velocity of the one noisy frame at a step, `(B, 1, C, H, W)`."""
        if self.kv_cache is not None or self.frames is None:
            return self._predict(noisy, steps.timestep, steps=steps)
        context = self.frames
        batch_size, num_clean = context.latents.shape[:2]
        timesteps = torch.full((batch_size, num_clean + 1), CLEAN_TIMESTEP, device=self.device)
        timesteps[:, -1] = steps.timestep
        return self._predict(context.append(noisy), timesteps)[:, -1:]

    def _predict(
        self, frames: FrameBatch, timestep, update_cache: bool = False, steps: DenoisingSteps | None = None
    ) -> torch.Tensor | None:
        class_labels = self.class_labels
        if self.is_guided and class_labels is not None:
            null_labels = torch.full_like(class_labels, self.transformer.config.num_classes)
            class_labels = torch.cat([null_labels, class_labels])
        return self.transformer(
            frames.latents,
            timestep,
            actions=frames.actions,
            action_mask=frames.action_mask,
            class_labels=class_labels,
            kv_cache=self.kv_cache,
            update_cache=update_cache,
            attention_kwargs=self.config.attention_kwargs,
            return_dict=False,
            denoising_steps=steps,
        )[0]

    def _model_inputs(self, frames: FrameBatch) -> FrameBatch:
        """In the model's dtype; with guidance a null half in front, whose actions are null in the context too."""
        latents, actions, action_mask = frames.latents.to(self.transformer.dtype), frames.actions, frames.action_mask
        if not self.is_guided:
            return FrameBatch(latents, actions, action_mask)
        latents = torch.cat([latents, latents])
        if actions is not None:
            if action_mask is None:
                action_mask = torch.ones(actions.shape[:2], dtype=torch.bool, device=actions.device)
            action_mask = torch.cat([torch.zeros_like(action_mask), action_mask])
            actions = torch.cat([actions, actions])
        return FrameBatch(latents, actions, action_mask)
