"""Visitors, each with walks of their own, in a store that bounds their number and how long they stay."""

import threading
import time
from collections.abc import Callable

from .settings import Settings, WorldError, WorldLimits
from .starts import Start
from .world import World, WorldModel


class Visitor:
    """The walks of one visitor; one of them is in view.

    Args:
        model ([`WorldModel`]).
        limits ([`WorldLimits`]).
    """

    def __init__(self, model: WorldModel, limits: WorldLimits):
        self.model = model
        self.limits = limits
        self.branches: list[World] = []
        self.branch = 0

    @property
    def world(self) -> World:
        """The walk in view.

        Raises:
            WorldError: None was started yet, or it was dropped.
        """
        if not self.branches:
            raise WorldError("There is no walk: none was started, or it was left alone too long. Choose a start.")
        return self.branches[self.branch]

    def begin(self, start: Start, settings: Settings) -> World:
        """Start anew; what was before is kept if the start fails."""
        world = World(self.model, start, settings, self.limits)
        self.branches, self.branch = [world], 0
        return world

    def fork(self) -> World:
        """Go on in a copy of the walk in view.

        Raises:
            WorldError: There are as many as there may be.
        """
        if len(self.branches) >= self.limits.max_branches:
            raise WorldError(f"There are {len(self.branches)} branches, which is all there may be; start anew.")
        self.branches.append(self.world.fork())
        self.branch = len(self.branches) - 1
        return self.world

    def show(self, branch: int) -> World:
        """Bring another walk into view."""
        if isinstance(branch, bool) or not isinstance(branch, int) or not 0 <= branch < len(self.branches):
            raise WorldError(f"There is no branch {str(branch)[:20]!r}; there are {len(self.branches)}.")
        self.branch = branch
        return self.world


class VisitorStore:
    """Visitors by the id of their browser's session. May be used from several threads.

    Args:
        model ([`WorldModel`]).
        limits ([`WorldLimits`]).
        clock (callable): Seconds; for tests.
    """

    def __init__(
        self, model: WorldModel, limits: WorldLimits = WorldLimits(), clock: Callable[[], float] = time.monotonic
    ):
        self.model = model
        self.limits = limits
        self.clock = clock
        self._visitors: dict[str, Visitor] = {}
        self._last_seen: dict[str, float] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._visitors)

    def visitor(self, visitor_id: str) -> Visitor:
        """A visitor, new ones included; forgets those who have been idle too long.

        Raises:
            WorldError: There are as many as there may be.
        """
        with self._lock:
            now = self.clock()
            for other, last_seen in list(self._last_seen.items()):
                if now - last_seen > self.limits.idle_seconds:
                    self._forget(other)
            if visitor_id not in self._visitors:
                if len(self._visitors) >= self.limits.max_visitors:
                    raise WorldError(
                        f"{len(self._visitors)} visitors are here, which is all there may be; come back later."
                    )
                self._visitors[visitor_id] = Visitor(self.model, self.limits)
            self._last_seen[visitor_id] = now
            return self._visitors[visitor_id]

    def drop(self, visitor_id: str) -> None:
        """Forget a visitor who has left; unknown ones are passed over."""
        with self._lock:
            self._forget(visitor_id)

    def _forget(self, visitor_id: str) -> None:
        self._visitors.pop(visitor_id, None)
        self._last_seen.pop(visitor_id, None)
