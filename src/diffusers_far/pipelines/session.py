"""A rollout that is made frame by frame, one action at a time.

B batch, F frames, C latent channels, H/W latent height/width, A action channels.
"""

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..models.frame_batch import FrameBatch
from .inputs import check_step_action, frame_noise
from .rollout import Rollout, RolloutConfig
from .session_file import SessionFrame, load_session, save_session


if TYPE_CHECKING:
    from .pipeline_far import FARPipeline


class FARSession:
    """One rollout, or a batch of them: give an action, see the next frame; go back, try another way.

    Made by [`FARPipeline.start_session`]; a call of the pipeline is a session in a loop. A finished frame is written to
    the cache when the next one is asked for: only then is it known which action was taken at it.

    Args:
        pipe ([`FARPipeline`]): Decodes, and lends its models.
        rollout ([`Rollout`]): Has seen no frame yet.
        context (`torch.Tensor` of shape `(B, F, C, H, W)`, *optional*): Scaled latents.
        actions (`torch.Tensor` of shape `(B, F - 1)` or `(B, F - 1, A)`, *optional*): Taken at the frames of the context
            but the last.
        generator (`torch.Generator` or a list of B, *optional*): Of the noise.
        max_history (`int`, *optional*): Frames whose latents are kept for `frames` and `rewind`, at least the model's
            short window; `None` keeps all.
        output_type (`str`): Of the frames that `step` returns: `"pil"`, `"np"`, `"pt"` or `"latent"`.

    Attributes:
        num_frames (`int`): Frames so far, context and forgotten ones included.
    """

    def __init__(
        self,
        pipe: "FARPipeline",
        rollout: Rollout,
        *,
        context: torch.Tensor | None = None,
        actions: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        max_history: int | None = None,
        output_type: str = "pil",
    ):
        short_window = rollout.transformer.config.short_window
        if max_history is not None and max_history < short_window:
            raise ValueError(
                f"`max_history` is {max_history} but the short window alone has {short_window} frames; keep as many."
            )
        self.pipe = pipe
        self.rollout = rollout
        self.generator = generator
        self.max_history = max_history
        self.output_type = output_type
        self.num_frames = 0
        self._history: list[SessionFrame] = []
        self._num_unwritten = 0
        self._lock = threading.Lock()
        if context is not None:
            for frame in range(context.shape[1]):
                led_by = None if actions is None or frame == 0 else actions[:, frame - 1]
                self._remember(SessionFrame(context[:, frame], led_by))

    @property
    def config(self) -> RolloutConfig:
        """Steps, guidance and the cache's options; see `set_config`."""
        return self.rollout.config

    @property
    def latents(self) -> torch.Tensor:
        """Latents of the frames that are remembered, `(B, F, C, H, W)`."""
        return torch.stack([frame.latents for frame in self._history], dim=1)

    @property
    def frames(self) -> list:
        """The frames that are remembered, decoded, each as `step` returned it."""
        return [self.pipe.decode_frame(frame.latents, self.output_type) for frame in self._history]

    @property
    def actions(self) -> list[torch.Tensor | None]:
        """The action taken at each frame that is remembered; `None` for the last."""
        return [frame.action for frame in self._history]

    def set_config(self, **changes) -> None:
        """Change `num_inference_steps` or `guidance_scale` from the next frame on. Guidance that crosses 1 encodes the
        remembered frames anew, as the null half of the batch comes or goes."""
        config = replace(self.config, **changes)
        if (config.guidance_scale > 1) != self.rollout.is_guided:
            self.rollout = self.rollout.restarted(config)
            self._num_unwritten = len(self._history)
        else:
            self.rollout.set_config(config)

    def step(self, action: Any = None) -> Any:
        """Take an action at the last frame and make the next one.

        Args:
            action (*optional*): An integer (or a vector, for continuous actions) for all samples, or one per sample;
                nothing where the model takes no actions or there is no frame yet.

        Returns:
            The new frame of every sample: a list of B images, `(B, h, w, 3)`, `(B, 3, h, w)` or latents `(B, C, H, W)`.

        Raises:
            RuntimeError: Another caller is in the middle of a step of this session.
        """
        config = self.rollout.transformer.config
        batch_size, has_frame = self.rollout.latent_shape[0], bool(self._history)
        action = check_step_action(action, config, batch_size, has_frame=has_frame, device=self.rollout.device)
        return self.pipe.decode_frame(self.advance(action), self.output_type)

    @torch.no_grad()
    def advance(
        self,
        action: torch.Tensor | None,
        own_action: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        on_step_end: Callable | None = None,
        on_frame_end: Callable | None = None,
    ) -> torch.Tensor:
        """Make the next frame, in latents; what `step` and the pipeline's call share.

        Args:
            action (`torch.Tensor` of shape `(B,)` or `(B, A)`, *optional*): Taken at the last frame.
            own_action (`torch.Tensor`, *optional*): The action that will be taken at the new frame, where it is known;
                a model with `action_shift=0` is fed it.
            noise (`torch.Tensor` of shape `(B, 1, C, H, W)`, *optional*): Drawn from the generator by default.
            on_step_end, on_frame_end (callable, *optional*): See [`Rollout.denoise`]; `latents -> latents`.

        Returns:
            `torch.Tensor` of shape `(B, C, H, W)`, float32.
        """
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("This session is in the middle of a step; give each caller a session of its own.")
        try:
            if self._history:
                self._history[-1].action = action
                self._write_pending()
            states = None if noise is not None else self._generator_states()
            if noise is None:
                batch_size, *frame_shape = self.rollout.latent_shape
                noise = frame_noise((batch_size, 1, *frame_shape), self.generator, self.rollout.device)
            new = SessionFrame(noise[:, 0], led_by=action, action=own_action, generator_states=states)
            latents = self.rollout.denoise(self._as_fed([new]), on_step_end, self.generator)
            if on_frame_end is not None:
                latents = on_frame_end(latents)
            new.latents = latents[:, 0]
            self._remember(new)
            return new.latents
        finally:
            self._lock.release()

    def fork(self) -> "FARSession":
        """An independent continuation of the same past. It copies the cache, `rollout.kv_cache.num_bytes` per sample,
        and the generators, so that both draw the same noise from here on; latents are shared."""
        twin = FARSession(
            self.pipe,
            self.rollout.clone(),
            generator=clone_generator(self.generator),
            max_history=self.max_history,
            output_type=self.output_type,
        )
        twin._history = [replace(frame) for frame in self._history]
        twin.num_frames, twin._num_unwritten = self.num_frames, self._num_unwritten
        return twin

    def save(self, path: str | os.PathLike) -> None:
        """Write the whole state to a new safetensors file: [`load`] goes on bit-exactly, in another process too."""
        save_session(self, path)

    @classmethod
    def load(cls, pipe: "FARPipeline", path: str | os.PathLike) -> "FARSession":
        """A session that was saved, on a pipeline with the same transformer.

        Raises:
            ValueError: The file is of another version or transformer, truncated, or no session.
        """
        return load_session(cls, pipe, path)

    def rewind(self, num_frames: int) -> None:
        """Forget the last `num_frames` frames, and their noise with them: the same actions make the same frames again.

        Raises:
            ValueError: Fewer frames are remembered; one must be left, with the short window before it.
        """
        if num_frames == 0:
            return
        left = len(self._history) - num_frames
        num_written = self.num_frames - self._num_unwritten
        rewritten = min(num_written, self.num_frames - num_frames - 1)  # the last frame left is written again
        window = self._window_before(left - 1)
        if not 0 < num_frames < len(self._history) or window is None:
            raise ValueError(
                f"`num_frames` is {num_frames} but {len(self._history)} of {self.num_frames} frames are remembered, and "
                "one must be left with the short window before it; go back fewer, or start with a larger "
                "`max_history`."
            )
        dropped = self._history[left]
        if dropped.generator_states is not None:
            for generator, state in zip(self.generators, dropped.generator_states):
                generator.set_state(state)
        self._history = self._history[:left]
        self._history[-1].action = None
        if rewritten < num_written:
            self.rollout.rewind(num_written - rewritten, self._as_fed(window))
        self.num_frames -= num_frames
        self._num_unwritten = self.num_frames - rewritten

    def _remember(self, frame: SessionFrame) -> None:
        if self._history and frame.led_by is not None:
            self._history[-1].action = frame.led_by
        self._history.append(frame)
        self.num_frames += 1
        self._num_unwritten += 1
        if self.max_history is not None and len(self._history) - self._num_unwritten > 0:
            excess = len(self._history) - self.max_history
            del self._history[: max(0, min(excess, len(self._history) - self._num_unwritten))]

    def _write_pending(self) -> None:
        """Add the finished frames that are not in the context yet."""
        if self._num_unwritten:
            self.rollout.write(self._as_fed(self._history[-self._num_unwritten :]))
            self._num_unwritten = 0

    def _window_before(self, frame: int) -> list[SessionFrame] | None:
        """The frames that are short while the one at this place of the history is being written again, or `None` where
        they are forgotten."""
        config = self.rollout.transformer.config
        num_needed = 0 if config.long_patch_size is None else config.short_window - 1
        num_needed = min(num_needed, self.num_frames - len(self._history) + frame)
        return self._history[frame - num_needed : frame] if num_needed <= frame else None

    def _as_fed(self, frames: list[SessionFrame]) -> FrameBatch:
        """Frames with the actions that the model is fed with them: those that led to them, or, with `action_shift=0`,
        those taken at them; null where there is none."""
        batch_size, *frame_shape = self.rollout.latent_shape
        if not frames:
            return FrameBatch(torch.empty(batch_size, 0, *frame_shape, device=self.rollout.device))
        latents = torch.stack([frame.latents for frame in frames], dim=1)
        config = self.rollout.transformer.config
        if not self.rollout.transformer.takes_actions:
            return FrameBatch(latents)
        fed = [frame.led_by if config.action_shift else frame.action for frame in frames]
        dtype = torch.int64 if config.action_dim is None else torch.float32
        null = torch.zeros((batch_size, *([config.action_dim] if config.action_dim else [])), dtype=dtype)
        null = null.to(latents.device)
        actions = torch.stack([null if action is None else action for action in fed], dim=1)
        mask = torch.tensor([action is not None for action in fed], device=latents.device)
        return FrameBatch(latents, actions, mask.expand(batch_size, -1))

    @property
    def generators(self) -> list[torch.Generator]:
        """The generators of the noise; none where torch's global one draws it."""
        if self.generator is None:
            return []
        return list(self.generator) if isinstance(self.generator, (list, tuple)) else [self.generator]

    def _generator_states(self) -> list[torch.Tensor] | None:
        return [generator.get_state() for generator in self.generators] or None


def clone_generator(
    generator: torch.Generator | list[torch.Generator] | None,
) -> torch.Generator | list[torch.Generator] | None:
    """Generators of their own that go on from the same state."""
    if isinstance(generator, (list, tuple)):
        return [clone_generator(each) for each in generator]
    return None if generator is None else generator.clone_state()
