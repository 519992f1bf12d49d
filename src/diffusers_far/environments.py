"""A model as an environment of Gymnasium: one world, or several that advance in one batch. Needs the extra `data`.

B worlds, F frames, A action channels; h/w pixels.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from datasets import Dataset
from gymnasium.spaces import Box, Discrete
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from .checks import check_choice, check_count
from .data.clips import ClipBatch
from .data.video_clips import VideoClips
from .models.codec import spatial_compression
from .pipelines import FARPipeline, FARSession
from .pipelines.inputs import check_actions, repeat_samples, video_to_tensor


RENDER_MODES = ["rgb_array"]
DEFAULT_FPS = 8  # at which videos of worlds are shown whose pipeline does not know it


class FARWorldVectorEnv(gymnasium.vector.VectorEnv):
    """Worlds that a model makes up under the actions of agents; all of them advance in one batch.

    A world begins behind frames of a dataset, behind a given context, or with nothing, and then with a first frame that the
    model makes. What an agent sees is what the model draws, and that is the last frame of the context as the VAE decodes it.

    No world has an end of its own, so all are truncated together, after `max_episode_steps`; the next step begins new ones,
    whatever actions it is given (`AutoresetMode.NEXT_STEP`). The same seeds and actions make the same frames to the bit, on the
    same machine and with as many worlds. A world's noise and context are those of a [`FARWorldEnv`] of its seed, its frames
    within rounding.

    Args:
        pipe ([`FARPipeline`] or `str`): Of a model that takes actions; or the folder or Hub id of one.
        num_envs (`int`, defaults to 1): B.
        dataset (`datasets.Dataset`, *optional*): Rows with `video` and `actions`, see [`VideoClips`]. For each new world the
            seed draws a row, and in it the place of the context.
        num_context_frames (`int`, defaults to 8): Frames of a dataset's row that a world goes on from.
        video, actions (*optional*): The context of all worlds instead, as of [`FARPipeline.start_session`]: F frames, and
            F - 1 actions.
        max_episode_steps (`int`, *optional*): Frames until all worlds are truncated; without it they go on.
        reward_fn (callable, *optional*): `(frame, action) -> float`, of a new frame `(h, w, 3)`, uint8, and the action that
            led to it. All rewards are 0 by default.
        action_range (`tuple` of 2 `float`, defaults to `(-1, 1)`): Of continuous actions: what the action space tells agents.
        render_mode (`str`, *optional*): `"rgb_array"`: `render` returns the frames that are seen.
        session_arguments: How frames are made, as of [`FARPipeline.start_session`]: `num_inference_steps`, `class_labels`,
            `max_long_frames`.

    Attributes:
        session ([`FARSession`]): What makes the frames; a planner forks it.
        action_names (`list[str]`): Of discrete actions, where the pipeline knows them.

    Raises:
        ValueError: The model takes no actions, the dataset has no row that is long enough, or whatever
            [`FARPipeline.start_session`] refuses; before a world is asked for.
    """

    metadata = {"render_modes": RENDER_MODES, "autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(
        self,
        pipe: FARPipeline | str | os.PathLike,
        num_envs: int = 1,
        *,
        dataset: Dataset | None = None,
        num_context_frames: int = 8,
        video: Any = None,
        actions: Any = None,
        max_episode_steps: int | None = None,
        reward_fn: Callable[[np.ndarray, Any], float] | None = None,
        action_range: tuple[float, float] = (-1.0, 1.0),
        render_mode: str | None = None,
        **session_arguments,
    ):
        check_count("num_envs", num_envs)
        check_count("num_context_frames", num_context_frames)
        check_count("max_episode_steps", max_episode_steps, optional=True)
        if render_mode is not None:
            check_choice("render_mode", render_mode, RENDER_MODES)
        if dataset is not None and video is not None:
            raise ValueError("`dataset` and `video` were both given; worlds begin behind one of the two.")
        self.pipe = pipe if isinstance(pipe, FARPipeline) else FARPipeline.from_pretrained(pipe)
        config = self.pipe.transformer.config
        no_actions = check_actions(None, config, [0])
        if no_actions is None:
            raise ValueError(
                "`pipe` has a model that takes no actions, so there is nothing to do; give one that does."
            )
        self.metadata = {**self.metadata, "render_fps": self.pipe.config.fps or DEFAULT_FPS}
        self.num_envs, self.max_episode_steps, self.render_mode = num_envs, max_episode_steps, render_mode
        self.num_context_frames, self.reward_fn = num_context_frames, reward_fn
        self.session_arguments = session_arguments

        # 1. Where worlds begin
        self.clips = None if dataset is None else VideoClips(dataset)
        self.context = {"actions": repeat_samples(no_actions, num_envs) if actions is None else actions}
        if video is not None:
            self.context["video"] = repeat_samples(video_to_tensor(video), num_envs)
        if self.clips is not None:
            self.clips.check_rows(config.num_actions, config.num_classes)
            if "actions" not in self.clips.conditions:
                raise ValueError(f"`dataset` has the columns {dataset.column_names}; it also needs `actions`.")
            self.long_enough = np.flatnonzero(self.clips.num_frames >= num_context_frames)
            if not len(self.long_enough):
                longest = self.clips.num_frames.max()
                raise ValueError(
                    f"`num_context_frames` is {num_context_frames} but the longest row of `dataset` has {longest}; choose fewer."
                )

        # 2. What agents see and do
        _, _, height, width = self._start_session([np.random.default_rng(0)] * num_envs)[0].rollout.latent_shape
        unit = spatial_compression(self.pipe.vae)
        self.single_observation_space = Box(0, 255, (height * unit, width * unit, 3), np.uint8)
        self.single_action_space = (
            Discrete(config.num_actions) if config.action_dim is None else Box(*action_range, (config.action_dim,))
        )
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.action_names = list(self.pipe.config.action_names or ())

        # 3. No world yet
        self.session: FARSession | None = None
        self.rngs: Sequence[np.random.Generator] = [np_random()[0] for _ in range(num_envs)]

    @property
    def is_over(self) -> bool:
        """Whether the worlds were truncated."""
        return self.num_steps == self.max_episode_steps

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin new worlds.

        Args:
            seed (`int` or sequence of B, *optional*): Of each world; of one number the first world's, and those after it
                count up. Without a seed, worlds follow from the last one that was given.
            options (`dict`, *optional*): There are none.

        Returns:
            Frames `(B, h, w, 3)`, uint8, and facts: of worlds from a dataset the `row` and the `first_frame` of its context,
            each of shape `(B,)`.
        """
        if seed is not None:
            seeds = list(range(seed, seed + self.num_envs)) if np.ndim(seed) == 0 else list(seed)
            if len(seeds) != self.num_envs:
                raise ValueError(
                    f"`seed` has {len(seeds)} seeds but there are {self.num_envs} worlds; give one for each."
                )
            self.rngs = [rng if each is None else np_random(each)[0] for rng, each in zip(self.rngs, seeds)]
        return self.begin(self.rngs, options)

    def begin(
        self, rngs: Sequence[np.random.Generator], options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin new worlds, each with what a generator of its own draws; see `reset`."""
        if options:
            raise ValueError(f"`options` has {sorted(options)} but worlds of a batch all begin anew; leave it out.")
        self.session, facts = self._start_session(rngs)
        self.num_steps = 0
        if self.session.num_frames == 0:
            drawn = self.session.step()
        else:
            drawn = self.session.decode(self.session.latents[:, -1], self.session.output_type)
        self.frames = in_levels(drawn)
        return self.frames.copy(), facts

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Make the next frame of each world.

        Args:
            actions (array of shape `(B,)` or `(B, A)`): Taken at the frames that are seen.

        Returns:
            Frames `(B, h, w, 3)`, uint8; rewards, float64, terminations, which are all `False`, and truncations, `(B,)` each;
            and facts, see `reset`.

        Raises:
            gymnasium.error.ResetNeeded: There is no world yet.
        """
        self._require_world()
        rewards, facts = np.zeros(self.num_envs), {}
        if self.is_over:
            _, facts = self.begin(self.rngs)
        else:
            self.frames = in_levels(self.session.step(np.asarray(actions)))
            self.num_steps += 1
            if self.reward_fn is not None:
                rewards[:] = [self.reward_fn(frame, action) for frame, action in zip(self.frames, actions)]
        never, truncations = np.zeros(self.num_envs, bool), np.full(self.num_envs, self.is_over)
        return self.frames.copy(), rewards, never, truncations, facts

    def render(self) -> tuple[np.ndarray, ...] | None:
        """The frames that are seen, B of shape `(h, w, 3)`, uint8; `None` without a `render_mode`."""
        self._require_world()
        return None if self.render_mode is None else tuple(self.frames.copy())

    def _require_world(self) -> None:
        if self.session is None:
            raise gymnasium.error.ResetNeeded("There is no world yet; call `reset` first.")

    def _start_session(self, rngs: Sequence[np.random.Generator]) -> tuple[FARSession, dict[str, Any]]:
        """A session behind the context that is drawn for each world, and what was drawn."""
        context, facts = self.context, {}
        if self.clips is not None:
            rows = [int(rng.choice(self.long_enough)) for rng in rngs]
            num_starts = self.clips.num_frames[rows] - self.num_context_frames + 1
            starts = [int(rng.integers(num)) for rng, num in zip(rngs, num_starts)]
            clips = [self.clips.clip(row, start, self.num_context_frames) for row, start in zip(rows, starts)]
            batch = ClipBatch.stack(clips)
            context = {"video": batch.video, "actions": batch.actions[:, : self.num_context_frames - 1]}
            if self.pipe.transformer.takes_labels and batch.labels is not None:
                context["class_labels"] = batch.labels
            facts = {"row": np.array(rows), "first_frame": np.array(starts)}
        # Generators of the CPU serve every device, and draw the same on each.
        noise = [torch.Generator().manual_seed(int(rng.integers(2**63))) for rng in rngs]
        session = self.pipe.start_session(**context, **self.session_arguments, generator=noise, output_type="np")
        return session, facts


class FARWorldEnv(gymnasium.Env):
    """One world that a model makes up under an agent's actions: a [`FARWorldVectorEnv`] of one.

    Args:
        pipe ([`FARPipeline`] or `str`), arguments: As of [`FARWorldVectorEnv`], but for `num_envs`. Actions, frames and rewards
            have no batch.

    Examples:
        >>> from diffusers_far.environments import FARWorldEnv

        >>> world = FARWorldEnv("checkpoints/far-crafter", max_episode_steps=64)
        >>> frame, facts = world.reset(seed=0)
        >>> frame, reward, terminated, truncated, facts = world.step(world.action_names.index("move_left"))
    """

    metadata = {"render_modes": RENDER_MODES}

    def __init__(self, pipe: FARPipeline | str | os.PathLike, **arguments):
        self.worlds = FARWorldVectorEnv(pipe, 1, **arguments)
        self.observation_space = self.worlds.single_observation_space
        self.action_space = self.worlds.single_action_space
        self.metadata = {**self.metadata, "render_fps": self.worlds.metadata["render_fps"]}
        self.render_mode, self.action_names = self.worlds.render_mode, self.worlds.action_names

    @property
    def session(self) -> FARSession | None:
        """See [`FARWorldVectorEnv`]."""
        return self.worlds.session

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin a new world; see [`FARWorldVectorEnv.reset`]."""
        super().reset(seed=seed)
        frames, facts = self.worlds.begin([self.np_random], options)
        return frames[0], {name: values[0] for name, values in facts.items()}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Make the next frame.

        Raises:
            gymnasium.error.ResetNeeded: There is no world yet, or it was truncated.
        """
        if self.session is not None and self.worlds.is_over:
            raise gymnasium.error.ResetNeeded("The world was truncated; call `reset` for a new one.")
        frames, rewards, _, truncations, _ = self.worlds.step([action])
        return frames[0], float(rewards[0]), False, bool(truncations[0]), {}

    def render(self) -> np.ndarray | None:
        """The frame that is seen, `(h, w, 3)`, uint8; `None` without a `render_mode`."""
        frames = self.worlds.render()
        return None if frames is None else frames[0]


def in_levels(frames: np.ndarray) -> np.ndarray:
    """Frames in [0, 1] as uint8."""
    return (frames * 255).round().astype(np.uint8)


gymnasium.register(
    "FARWorld-v0",
    entry_point="diffusers_far.environments:FARWorldEnv",
    vector_entry_point="diffusers_far.environments:FARWorldVectorEnv",
)
