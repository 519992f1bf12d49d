"""A rollout that is made frame by frame, one action at a time.

B batch, F frames, C latent channels, H/W latent height/width, A action channels.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
import torch

from ..checks import check_count, is_whole_number
from ..models.frames import FrameBatch
from .estimate import CostEstimate, estimate_frame
from .inputs import check_generator, check_settings, check_step_action
from .latency import LatencyBudget
from .rollout import Rollout
from .session_file import load_session, save_session
from .session_history import NoiseSource, SessionFrame, SessionHistory, new_generator, smallest_history
from .settings import GenerationSettings


Frame = list[PIL.Image.Image] | np.ndarray | torch.Tensor  # one frame of every sample of a batch


class FARSession:
    """One rollout, or a batch of them: give an action, see the next frame; go back, try another way.

    Made by [`FARPipeline.start_session`]. A finished frame is written to the cache when the next one is asked for: only
    then is it known which action was taken at it.

    One caller at a time: a verb that is called while another one runs is refused and changes nothing. A step that fails
    changes nothing either. Sessions of one pipeline are independent, but share its models: let them take turns.

    FlexRoPE, LoRA and whatever else is set on the pipeline holds from the next frame on; what is cached stays as it was
    encoded, until `reencode`.

    Args:
        decode (callable): `(latents, output_type) -> frame`, of latents `(B, C, H, W)`, as [`FARPipeline.decode_frame`].
        rollout ([`Rollout`]): Was given no frames but those of the history.
        history ([`SessionHistory`], *optional*): The frames so far.
        noise ([`NoiseSource`], *optional*): Torch's global generator by default.
        latency ([`LatencyBudget`], *optional*): Switched off by default.
        output_type (`str`): Of the frames that `step` returns: `"pil"`, `"np"`, `"pt"` or `"latent"`.
    """

    def __init__(
        self,
        decode: Callable[[torch.Tensor, str], Frame],
        rollout: Rollout,
        *,
        history: SessionHistory | None = None,
        noise: NoiseSource | None = None,
        latency: LatencyBudget | None = None,
        output_type: str = "pil",
    ):
        self.decode = decode
        self.rollout = rollout
        self.history = history or SessionHistory()
        self.noise = noise or NoiseSource()
        self.latency = latency or LatencyBudget()
        self.output_type = output_type
        self._lock = threading.Lock()
        self._verb = None  # what the caller who holds the lock called

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "A session cannot be pickled or copied, for it would take the models of its pipeline along; use `fork` for "
            "another one on the same pipeline, and `save` and `FARSession.load` for another process."
        )

    @property
    def config(self) -> GenerationSettings:
        """Steps, guidance and the cache's options; see `set_config`."""
        return self.rollout.config

    @property
    def num_frames(self) -> int:
        """Frames so far, context and forgotten ones included."""
        return self.history.num_frames

    @property
    def max_history(self) -> int | None:
        """Frames that are remembered for `frames`, `actions` and `rewind`; `None` where all are."""
        return self.history.max_frames

    @property
    def latents(self) -> torch.Tensor:
        """Latents of the frames that are remembered, `(B, F, C, H, W)`, float32."""
        frames = [frame.latents for frame in list(self.history.frames)]
        if frames:
            return torch.stack(frames, dim=1)
        batch_size, *frame_shape = self.rollout.latent_shape
        return torch.empty(batch_size, 0, *frame_shape, device=self.rollout.device)

    @property
    def frames(self) -> list[Frame]:
        """The frames that are remembered, decoded, each as `step` returned it."""
        return [self.decode(frame.latents, self.output_type) for frame in list(self.history.frames)]

    @property
    def actions(self) -> list[torch.Tensor | None]:
        """The action taken at each frame that is remembered, `(B,)` or `(B, A)`; `None` for the last."""
        return [None if frame.action is None else frame.action.clone() for frame in list(self.history.frames)]

    @property
    def generator(self) -> torch.Generator | list[torch.Generator] | None:
        """Of the noise; see `set_generator`."""
        return self.noise.generator

    @property
    def num_bytes(self) -> int:
        """Bytes that this session holds: the cache, `rollout.num_bytes` of them, and the frames that are remembered."""
        return self.rollout.num_bytes + self.history.num_bytes

    @property
    def num_rewindable(self) -> int:
        """How many frames `rewind` can go back now."""
        remembered = len(self.history.frames)
        num_left = 1 if self.history.is_complete else smallest_history(self.rollout.transformer)
        in_rollout = self.rollout.num_rewindable - 1  # the last frame that is left is written again
        return max(0, min(remembered - num_left, in_rollout + self._num_unwritten))

    @property
    def num_inference_steps_used(self) -> int | None:
        """Denoising steps that the latest frame took; fewer than `config.num_inference_steps` where a latency budget
        asked for it. `None` before the first new frame."""
        return self.latency.num_inference_steps_used

    def set_config(self, *, num_inference_steps: int | None = None, guidance_scale: float | None = None) -> None:
        """Change how frames are made, from the next one on; what is not given stays as it is.

        Guidance that crosses 1 upwards needs the null half of the context, which is encoded before the next frame, as if
        it had been there from the start; that takes all frames. Downwards the null half is dropped.

        Args:
            num_inference_steps (`int`, *optional*): From 1 to 1000.
            guidance_scale (`float`, *optional*): At least 0; guides above 1.

        Raises:
            ValueError: Out of range, guidance for a model without conditions, or frames are forgotten that the null half
                needs.
        """
        given = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        with self._alone("set_config"):
            config = replace(self.config, **{name: value for name, value in given.items() if value is not None})
            check_settings(self.rollout.transformer, config)
            is_guided = config.needs_null_half
            if is_guided == self.rollout.is_guided:
                self.rollout.set_config(config)
                return
            if is_guided:
                self._check_complete(f"`guidance_scale` {guidance_scale} needs a null half of the whole context")
                self.rollout = self.rollout.restarted(config)
            else:
                self._check_own_past("set_config")
                self.rollout = self.rollout.without_null_half(config)
            self.latency.forget()  # a step works on another batch now

    def set_generator(self, generator: torch.Generator | list[torch.Generator] | int | None) -> None:
        """Draw the noise from elsewhere, from the next frame on.

        Args:
            generator: A generator, a list of one per sample, the seed of a new one, or `None` for a new one with a random
                seed.
        """
        with self._alone("set_generator"):
            if generator is None or is_whole_number(generator):
                generator = new_generator(self.rollout.device, seed=generator)
            check_generator(generator, self.rollout.latent_shape[0])
            self.noise = NoiseSource(generator)

    def set_latency_budget(self, max_seconds_per_frame: float | None, min_inference_steps: int = 4) -> None:
        """Lower the denoising steps of the next frames, so that each comes in time; see [`LatencyBudget`].

        Args:
            max_seconds_per_frame (`float`, *optional*): Above 0; `None` for no limit.
            min_inference_steps (`int`, defaults to 4): Never fewer, even where frames then come late.
        """
        with self._alone("set_latency_budget"):
            self.latency.set_budget(max_seconds_per_frame, min_inference_steps)

    def reencode(self) -> None:
        """Encode the whole context anew before the next frame, as if what is set now, on the session and the pipeline,
        had been so from the start. Without it a change of FlexRoPE or LoRA leaves what is cached as it was.

        Raises:
            ValueError: Frames are forgotten.
        """
        with self._alone("reencode"):
            self._check_complete("The whole context cannot be encoded anew")
            self.rollout = self.rollout.restarted(self.config)

    def step(self, action: Any = None) -> Frame:
        """Take an action at the last frame and make the next one.

        Args:
            action (*optional*): An integer (or a vector, for continuous actions) for all samples, or one per sample;
                nothing where the model takes no actions or there is no frame yet.

        Returns:
            The new frame of every sample: a list of B images, `(B, h, w, 3)`, `(B, 3, h, w)` or latents `(B, C, H, W)`.

        Raises:
            ValueError: The action is missing, superfluous, of the wrong type, range or number.
            RuntimeError: Another caller is in the middle of a call of this session.
        """
        config = self.rollout.transformer.config
        with self._alone("step"), self._undone_on_failure():
            has_frame, batch_size = self.num_frames > 0, self.rollout.latent_shape[0]
            action = check_step_action(action, config, batch_size, has_frame=has_frame, device=self.rollout.device)
            new = self._make_frame(action)
            decoded = self.decode(new.latents, self.output_type)
            self._remember(new)
            return decoded

    def advance(self, action: torch.Tensor | None, **arguments) -> torch.Tensor:
        """Make the next frame, in latents.

        Args:
            action (`torch.Tensor` of shape `(B,)` or `(B, A)`, *optional*): Taken at the last frame.
            own_action (`torch.Tensor`, *optional*): The action that will be taken at the new frame, where it is known;
                a model with `action_shift=0` is fed it.
            noise (`torch.Tensor` of shape `(B, 1, C, H, W)`, *optional*): Drawn from the generator by default.
            on_step_end, on_frame_end (callable, *optional*): See [`Rollout.denoise`]; `latents -> latents`.

        Returns:
            `torch.Tensor` of shape `(B, C, H, W)`, float32.
        """
        with self._alone("advance"), self._undone_on_failure():
            new = self._make_frame(action, **arguments)
            self._remember(new)
            return new.latents

    @torch.no_grad()
    def _make_frame(
        self,
        action: torch.Tensor | None,
        own_action: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        on_step_end: Callable | None = None,
        on_frame_end: Callable | None = None,
    ) -> SessionFrame:
        """The next frame, which is still to be remembered; see `advance`."""
        action = None if action is None else action.clone()  # the caller may use its memory again
        if self.num_frames:
            self.history.frames[-1].action = action
        state = self.noise.state if noise is None else None
        if noise is None:
            noise = self.noise.draw(self.rollout.latent_shape, self.rollout.device)
        new = SessionFrame(noise[:, 0], previous_action=action, action=own_action, noise=state)
        self._write_pending(new)
        num_steps = self.latency.choose_steps(self.config.num_inference_steps)
        with self.latency.denoising(num_steps):
            latents = self.rollout.denoise(self._as_fed([new]), on_step_end, self.generator, num_steps)
        if on_frame_end is not None:
            latents = on_frame_end(latents)
        new.latents = latents[:, 0].clone()  # a callback may use its memory again
        return new

    def _remember(self, frame: SessionFrame) -> None:
        self.history.append(frame)
        self.history.forget_old(self._num_unwritten)

    def estimate(self, num_frames: int = 0, *, measure: bool = True) -> CostEstimate:
        """What the next step costs, or the one after `num_frames` more: bytes of the cache, `rollout.num_bytes` then, and seconds
        on this machine, measured as by [`FARPipeline.estimate`]. The session stays as it is.

        Args:
            num_frames (`int`, defaults to 0): At least 0.
            measure (`bool`, defaults to `True`): `False` only counts.

        Raises:
            ValueError: `num_frames` is no such number.
            RuntimeError: Another caller is in the middle of a call of this session.
        """
        check_count("num_frames", num_frames, least=0)
        with self._alone("estimate"):
            self._check_own_past("estimate")
            writes = [len(part) for part in self._pending_parts()]
            decode = partial(self.decode, output_type=self.output_type) if measure else None
            return estimate_frame(self.rollout, writes + [1] * num_frames, decode)

    def fork(self) -> "FARSession":
        """An independent continuation of the same past. It costs `rollout.num_bytes`, for a copy of the cache, and copies
        the generators, so that both draw the same noise from here on; latents are shared."""
        with self._alone("fork"):
            return FARSession(
                self.decode,
                self.rollout.clone(),
                history=self.history.clone(),
                noise=self.noise.clone(),
                latency=self.latency.clone(),
                output_type=self.output_type,
            )

    @torch.no_grad()
    def fork_batch(self, num_futures: int) -> "FARSession":
        """So many futures of the present, as one session with a batch: `step` takes an action for each, or one for all. They
        come out as those of as many forks.

        What is in the cache is stored once, and attended to by all; each future holds the frames that it makes. Of a long
        model whose short window is encoded anew (`short_cache="exact"` or a number) each future holds a window of its own; with
        `max_long_frames` each holds a whole cache. A `rewind` cannot go back into what is shared.

        Every future has a generator of its own, and all draw the same noise: give others with `set_generator([...])`.

        Args:
            num_futures (`int`): At least 1.

        Raises:
            ValueError: No such number, or this session is a batch itself.
            RuntimeError: Another caller is in the middle of a call of this session.
        """
        check_count("num_futures", num_futures)
        if self.rollout.latent_shape[0] != 1:
            raise ValueError(
                f"`fork_batch` makes futures of one present, but this session has a batch of {self.rollout.latent_shape[0]}; "
                "start a session for each sample."
            )
        with self._alone("fork_batch"), self._undone_on_failure():
            self._write_settled()
            latency = self.latency.clone()
            latency.forget()  # a step works on another batch
            return FARSession(
                self.decode,
                self.rollout.futures(num_futures),
                history=self.history.repeated(num_futures),
                noise=self.noise.repeated(num_futures),
                latency=latency,
                output_type=self.output_type,
            )

    def rewind(self, num_frames: int) -> None:
        """Forget the last `num_frames` frames, and their noise with them: the same actions make the same frames again,
        within rounding.

        What was set stays as it is now. Frames that the cache has forgotten meanwhile, under `max_long_frames`, stay
        forgotten, so then the frames come out a little different; so do they with `short_cache="rolling"`.

        Args:
            num_frames (`int`): From 0 to `num_rewindable`.

        Raises:
            ValueError: Fewer frames are remembered; one must be left, with the short window before it.
        """
        with self._alone("rewind"):
            if not is_whole_number(num_frames) or not 0 <= num_frames <= self.num_rewindable:
                raise ValueError(
                    f"`num_frames` is {num_frames!r} but this session can go back {self.num_rewindable} frames: it "
                    f"remembers {len(self.history.frames)} of {self.num_frames}, and one must be left, with the short "
                    "window before it. Go back fewer, or start with a larger `max_history`."
                )
            if num_frames == 0:
                return
            noises = (frame.noise for frame in self.history.last(num_frames))
            self.noise.restore(next((noise for noise in noises if noise is not None), None))  # or refuses
            self.history.drop_last(num_frames)
            self._unwrite(max(0, self.rollout.num_frames - (self.num_frames - 1)))

    def save(self, path: str | os.PathLike) -> None:
        """Write the whole state to a new safetensors file: [`load`] goes on bit-exactly, in another process too.

        Raises:
            ValueError: There is a file already; it is left as it is.
            OSError: There is no such folder or no room; names both.
        """
        with self._alone("save"):
            self._check_own_past("save")
            save_session(
                path,
                rollout=self.rollout,
                history=self.history,
                noise=self.noise,
                latency=self.latency,
                output_type=self.output_type,
            )

    @classmethod
    def load(cls, pipe, path: str | os.PathLike) -> "FARSession":
        """A session that was saved, on a [`FARPipeline`] with the same transformer, scheduler and FlexRoPE.

        Raises:
            ValueError: The file is of another version, transformer, scheduler or FlexRoPE, damaged, or no session; or it
                was changed to say what cannot be.
        """
        state = load_session(path, pipe.transformer, pipe.scheduler, pipe._execution_device)
        return cls(pipe.decode_frame, **state)

    @contextmanager
    def _alone(self, verb: str) -> Iterator[None]:
        """Refuse a second caller instead of letting it wait: it would act on a frame that it has not seen."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                f"`{verb}` was called while this session is in the middle of `{self._verb}`; call it afterwards, or give "
                "each caller a session of its own with `fork`."
            )
        self._verb = verb
        try:
            if not self.rollout.is_intact:
                raise RuntimeError(
                    "An earlier step failed while it wrote to the cache, and the context cannot be encoded anew, for only "
                    f"{len(self.history.frames)} of {self.num_frames} frames are remembered; load a saved session, or "
                    "start another."
                )
            yield
        finally:
            self._lock.release()

    @contextmanager
    def _undone_on_failure(self) -> Iterator[None]:
        """Measure a frame as it is made. If that fails, go back to where the session was, so that the step can be taken
        again or otherwise."""
        noise_state, num_written = self.noise.state, self.rollout.num_frames
        last = self.history.frames[-1] if self.num_frames else None
        action = None if last is None else last.action
        try:
            with self.latency.frame(is_usual=self._num_unwritten <= 1):
                yield
        except BaseException:
            self.noise.restore(noise_state)
            if last is not None:
                last.action = action
            if not self.rollout.is_intact and self.history.is_complete:
                self.rollout = self.rollout.restarted(self.config)
            elif self.rollout.is_intact and self.rollout.num_frames > num_written and self._writes_last_action:
                self._unwrite(1)  # it was written with the action of the step that failed
            raise

    def _check_own_past(self, verb: str) -> None:
        if self.rollout.is_of_futures:
            raise ValueError(
                f"`{verb}` needs a past that is the session's own, but these futures share theirs; call it on the session that "
                "they were forked from, before `fork_batch`."
            )

    def _check_complete(self, problem: str) -> None:
        if not self.history.is_complete:
            raise ValueError(
                f"{problem}, but only {len(self.history.frames)} of {self.num_frames} frames are remembered; start the "
                "session so, or with `max_history=None`."
            )

    @property
    def _num_unwritten(self) -> int:
        """Finished frames that are not in the context yet: the last one, mostly."""
        return self.num_frames - self.rollout.num_frames

    @property
    def _is_fed_own_action(self) -> bool:
        """Whether the model is fed, with each frame, the action taken at it, instead of the one that led to it."""
        return self.rollout.transformer.takes_actions and not self.rollout.transformer.config.action_shift

    @property
    def _writes_last_action(self) -> bool:
        """Whether a frame is written with the action taken at it; a separable model's encoder reads ahead."""
        transformer = self.rollout.transformer
        return transformer.takes_actions and (self._is_fed_own_action or transformer.is_separable)

    def _write_pending(self, coming: SessionFrame) -> None:
        """Add the finished frames that are not in the context yet; a context at once, and new frames one by one where it
        matters, so that what is encoded anew equals what was encoded as the frames came."""
        parts = self._pending_parts()
        for part, later in zip(parts, [*parts[1:], [coming]]):
            self.rollout.write(self._as_fed(part), self._as_fed(later[:1]))

    def _write_settled(self) -> None:
        """Add those finished frames to the context that no action to come changes; a context that must be written at once and
        lacks one waits for it."""
        *parts, last = self._pending_parts() or [[]]
        if not self._writes_last_action:
            parts.append(last)
        elif not self.rollout.order_matters:
            parts.append(last[:-1])
        parts = [part for part in parts if part]
        for part, later in zip(parts, [*parts[1:], self.history.last(1)]):
            self.rollout.write(self._as_fed(part), self._as_fed(later[:1]))

    def _pending_parts(self) -> list[list[SessionFrame]]:
        """Those frames, as many together as are written at once."""
        pending = self.history.last(self._num_unwritten)
        num_at_once = len(pending)
        if self.rollout.order_matters:
            num_at_once = max(0, self.history.num_context_frames - self.rollout.num_frames)
        parts = [pending[:num_at_once], *([frame] for frame in pending[num_at_once:])]
        return [part for part in parts if part]

    def _unwrite(self, num_frames: int) -> None:
        """Take the last frames out of the context again."""
        if num_frames:
            first = self.rollout.num_frames - num_frames
            *window, coming = self.history.before(first + 1, smallest_history(self.rollout.transformer))
            self.rollout.rewind(num_frames, self._as_fed(window), self._as_fed([coming]))

    def _as_fed(self, frames: list[SessionFrame]) -> FrameBatch:
        """Frames with the actions that the model is fed with them: those that led to them, or, with `action_shift=0`,
        those taken at them; null where there is none."""
        batch_size, *frame_shape = self.rollout.latent_shape
        device, config = self.rollout.device, self.rollout.transformer.config
        no_latents = torch.empty(batch_size, 0, *frame_shape, device=device)
        latents = torch.stack([frame.latents for frame in frames], dim=1) if frames else no_latents
        if not self.rollout.transformer.takes_actions:
            return FrameBatch(latents)
        action_shape, dtype = ((), torch.int64) if config.action_dim is None else ((config.action_dim,), torch.float32)
        actions = torch.zeros((batch_size, len(frames), *action_shape), dtype=dtype, device=device)
        action_mask = torch.zeros((batch_size, len(frames)), dtype=torch.bool, device=device)
        for number, frame in enumerate(frames):
            action = frame.action if self._is_fed_own_action else frame.previous_action
            if action is not None:
                actions[:, number], action_mask[:, number] = action, True
        return FrameBatch(latents, actions, action_mask)
