"""One walk: step, go back, try another way, compare with what was recorded.

F context frames, N new frames; h/w pixels.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from ...evaluation.tiles import ACTION_NAMES, COLUMNS, DO, TILE_SIZE, load_textures
from ...hooks.flex_rope import FlexRoPEConfig
from ...pipelines import FARPipeline, FARSession
from ..inputs import ActionSpace
from .settings import Settings, WorldError, WorldLimits
from .starts import Start
from .tile_map import TileMap


class WorldModel:
    """A pipeline that all visitors share, one at a time.

    Args:
        pipe ([`FARPipeline`]): Of a model of discrete actions, or of none.

    Attributes:
        action_names (`list[str]`): By index; empty for a model without actions.
        default_settings ([`Settings`]): Those that the pipeline is shipped with.
        tile_textures (`np.ndarray`, *optional*): How tiles look, where the model's world is one of tiles, as its size and
            the names of its actions say.

    Raises:
        WorldError: The model's actions are continuous or it needs a class: there is no button for these.
    """

    def __init__(self, pipe: FARPipeline):
        config = pipe.transformer.config
        if config.action_dim is not None or config.num_classes is not None:
            raise WorldError(
                "This model takes continuous actions or classes; the app plays models of discrete actions."
            )
        self.pipe = pipe
        self.action_names = [ActionSpace.of(pipe).name_of(index) for index in range(config.num_actions or 0)]
        self.flex_rope = FlexRoPEConfig(**(pipe.config.flex_rope or {"slope": 0.0}))
        self.default_settings = Settings(
            pipe.default_inference_steps,
            pipe.default_guidance_scale,
            flex_rope_slope=self.flex_rope.slope,
            short_cache=pipe.default_short_cache,
        )
        side = COLUMNS * TILE_SIZE
        is_of_tiles = self.size == (side, side) and self.action_names == list(ACTION_NAMES)
        self.tile_textures = load_textures() if is_of_tiles else None
        self._lock = threading.Lock()

    @property
    def size(self) -> tuple[int, int] | None:
        """`(height, width)` that the model knows, if it says so."""
        config = self.pipe.config
        return (config.height, config.width) if config.height and config.width else None

    @contextmanager
    def taking_turns(self, flex_rope_slope: float) -> Iterator[FARPipeline]:
        """The pipeline, for one caller, with a FlexRoPE slope of their own: it is set on the weights that all share."""
        with self._lock:
            if flex_rope_slope > 0:
                self.pipe.enable_flex_rope(replace(self.flex_rope, slope=flex_rope_slope))
            else:
                self.pipe.disable_flex_rope()
            yield self.pipe


class World:
    """One walk from a start; the frames so far, and the way on.

    Args:
        model ([`WorldModel`]).
        start ([`Start`]): Without frames the model makes the first one too, which is the start then.
        settings ([`Settings`]).
        limits ([`WorldLimits`]).

    Attributes:
        actions (`list[int]`): N, those taken since the start.
        tile_map ([`TileMap`], *optional*): All that the frames showed, where the model's world is one of tiles.

    Raises:
        ValueError: Settings that this model does not know.
    """

    def __init__(self, model: WorldModel, start: Start, settings: Settings, limits: WorldLimits = WorldLimits()):
        self.model = model
        self.start = start
        self.settings = settings
        self.limits = limits
        self.actions: list[int] = []
        self._new_frames: list[np.ndarray] = []
        is_new = len(start.frames) == 0
        with model.taking_turns(settings.flex_rope_slope) as pipe:
            self.session: FARSession = pipe.start_session(
                video=None if is_new else start.frames,
                actions=[start.actions] if model.action_names and start.actions else None,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                short_cache=settings.short_cache,
                max_long_frames=settings.max_long_frames,
            )
            if is_new:
                self.start = replace(start, frames=_as_array(self.session.step()[0])[None])
        self.tile_map = self._mapped()

    @property
    def num_new_frames(self) -> int:
        return len(self._new_frames)

    @property
    def frames(self) -> np.ndarray:
        """Context and new frames, `(F + N, h, w, 3)`, uint8."""
        return np.stack([*self.start.frames, *self._new_frames])

    @property
    def follows_record(self) -> bool:
        """Whether every action so far is the recorded one, so that a true frame stands beside each new one."""
        return (
            self.start.true_frames is not None
            and len(self.actions) <= len(self.start.true_actions)
            and tuple(self.actions) == self.start.true_actions[: len(self.actions)]
        )

    @property
    def true_frames(self) -> np.ndarray:
        """What was recorded at the new frames, `(M, h, w, 3)`: up to the first action that was another."""
        if self.start.true_frames is None:
            return self.start.frames[:0]
        num_true = 0
        for ours, recorded in zip(self.actions, self.start.true_actions):
            if ours != recorded:
                break
            num_true += 1
        return self.start.true_frames[:num_true]

    @property
    def recorded_action(self) -> int | None:
        """The action that was recorded at the present frame, while the walk follows the record."""
        if not self.follows_record or len(self.actions) >= len(self.start.true_actions):
            return None
        return self.start.true_actions[len(self.actions)]

    def step(self, action: int | None = None) -> np.ndarray:
        """Take an action, see the next frame.

        Args:
            action (`int`, *optional*): Index into the model's actions; nothing for a model without actions.

        Returns:
            `np.ndarray` of shape `(h, w, 3)`, uint8.

        Raises:
            WorldError: There is no such action, or the walk is as long as it may be.
        """
        num_actions = len(self.model.action_names)
        if num_actions and (isinstance(action, bool) or not isinstance(action, int) or not 0 <= action < num_actions):
            raise WorldError(
                f"There is no action {str(action)[:20]!r}; there are {', '.join(self.model.action_names)}."
            )
        if self.num_new_frames >= self.limits.max_new_frames:
            raise WorldError(
                f"There are {self.num_new_frames} new frames, which is all there may be; go back or start anew."
            )
        with self.model.taking_turns(self.settings.flex_rope_slope):
            image = self.session.step(action if num_actions else None)[0]
        frame = _as_array(image)
        self._new_frames.append(frame)
        self.actions.append(action if num_actions else 0)
        if self.tile_map is not None:
            self.tile_map.show(frame, action)
        return frame

    def autoplay_action(self) -> int | None:
        """What a walk by itself does next: the recorded action, else the last one once more."""
        if not self.model.action_names:
            return None
        if self.recorded_action is not None:
            return self.recorded_action
        return self.actions[-1] if self.actions else 0

    def rewind(self, num_frames: int) -> None:
        """Forget the last new frames; the same actions make the same frames again.

        Raises:
            WorldError: There are not as many.
        """
        if (
            isinstance(num_frames, bool)
            or not isinstance(num_frames, int)
            or not 1 <= num_frames <= self.num_new_frames
        ):
            raise WorldError(
                f"Cannot go back {str(num_frames)[:20]}: {self.num_new_frames} frames were made since the start."
            )
        with self.model.taking_turns(self.settings.flex_rope_slope):
            self.session.rewind(num_frames)
        del self._new_frames[-num_frames:], self.actions[-num_frames:]
        self.tile_map = self._mapped()

    def fork(self) -> "World":
        """Another walk with the same past."""
        twin = object.__new__(World)
        twin.__dict__.update(self.__dict__)
        with self.model.taking_turns(self.settings.flex_rope_slope):
            twin.session = self.session.fork()
        twin.actions, twin._new_frames = list(self.actions), list(self._new_frames)
        twin.tile_map = twin._mapped()
        return twin

    def configure(self, settings: Settings) -> None:
        """Make the next frames another way. The cache's options stay those of the start.

        Raises:
            ValueError: What the model does not know, such as guidance without actions.
        """
        if settings == self.settings:
            return
        with self.model.taking_turns(settings.flex_rope_slope):
            self.session.set_config(
                num_inference_steps=settings.num_inference_steps, guidance_scale=settings.guidance_scale
            )
        self.settings = settings

    def _mapped(self) -> TileMap | None:
        """A map of the frames so far. The actions of a clip that a visitor brought are only assumed, so there it begins with
        the clip's last frame."""
        if self.model.tile_textures is None:
            return None
        tile_map = TileMap(self.model.tile_textures)
        first = len(self.start.frames) - 1 if self.start.true_frames is None else 0
        for frame, action in zip(self.frames[first:], [DO, *self.start.actions[first:], *self.actions]):
            tile_map.show(frame, action)
        return tile_map


def _as_array(image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))
