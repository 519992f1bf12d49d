"""Visitors, each with walks of their own, in a store that bounds their number and how long they stay."""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
            raise WorldError("There is no rollout: none was started, or it was left alone too long. Choose a start.")
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
        # Of the last second, with who called; of all who are no visitors under None.
        self._calls: dict[str | None, deque[tuple[float, str]]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._visitors)

    @contextmanager
    def starting(self, visitor_id: str) -> Iterator[Visitor]:
        """A visitor who is about to start, a new one perhaps. Only this makes visitors: who has not started anything in the
        end has no place.

        Raises:
            WorldError: There are as many as there may be, and each has just been seen.
        """
        with self._lock:
            now = self.clock()
            visitor = self._visitors.get(visitor_id)
            if visitor is None:
                self._make_room(now)
                visitor = self._visitors[visitor_id] = Visitor(self.model, self.limits)
            self._last_seen[visitor_id] = now
        try:
            yield visitor
        finally:
            if not visitor.branches:
                self.drop(visitor_id)

    def visitor(self, visitor_id: str) -> Visitor:
        """A visitor who has started.

        Raises:
            WorldError: There is none of this id.
        """
        with self._lock:
            if visitor_id not in self._visitors:
                raise WorldError(
                    "There is no rollout: none was started, or it was left alone too long. Choose a start."
                )
            self._last_seen[visitor_id] = self.clock()
            return self._visitors[visitor_id]

    def admits(self, visitor_id: str) -> bool:
        """Whether one more call of this id is not too many for this second. Those who are no visitors are counted together:
        whoever calls may call themselves anything. One of these alone does not shut out the rest."""
        with self._lock:
            who = visitor_id if visitor_id in self._visitors else None
            limits = self.limits
            most = most_of_one = limits.max_calls_per_second
            if who is None:
                most, most_of_one = limits.max_other_calls_per_second, limits.max_waiting
            calls, now = self._calls.setdefault(who, deque()), self.clock()
            while calls and now - calls[0][0] >= 1:
                calls.popleft()
            if len(calls) >= most or sum(caller == visitor_id for _, caller in calls) >= most_of_one:
                return False
            calls.append((now, visitor_id))
            return True

    def _make_room(self, now: float) -> None:
        """For one more: the idle are forgotten, and where that is not enough, who has not been seen for longest."""
        for other, last_seen in list(self._last_seen.items()):
            if now - last_seen > self.limits.idle_seconds:
                self._forget(other)
        if len(self._visitors) >= self.limits.max_visitors:
            longest_away = min(self._last_seen, key=self._last_seen.get)
            if now - self._last_seen[longest_away] <= self.limits.yield_seconds:
                raise WorldError(
                    f"{len(self._visitors)} visitors are here, which is all there may be; come back later."
                )
            self._forget(longest_away)

    def drop(self, visitor_id: str) -> None:
        """Forget a visitor who has left; unknown ones are passed over."""
        with self._lock:
            self._forget(visitor_id)

    def _forget(self, visitor_id: str) -> None:
        self._visitors.pop(visitor_id, None)
        self._last_seen.pop(visitor_id, None)
        self._calls.pop(visitor_id, None)


class Turns:
    """Who may use something that serves one at a time: of those who wait, the one who has used it least.

    Seconds are counted, not turns, so that long steps give nobody a larger share. Who comes, or comes back, is level with the
    one who has used it least among those who are here: nobody saves up.

    Args:
        max_waiting (`int`): Turns that one visitor may wait for or have.
        clock (callable): Seconds; for tests.
    """

    def __init__(self, max_waiting: int, clock: Callable[[], float] = time.monotonic):
        self.max_waiting = max_waiting
        self.clock = clock
        self._numbers = itertools.count()
        self._places: dict[int, str] = {}  # number in the order of arrival -> visitor, who keeps it during the turn
        self._turn: int | None = None
        self._seconds: dict[str, float] = {}
        self._changed = threading.Condition()

    @contextmanager
    def of(self, visitor_id: str) -> Iterator[None]:
        """Waits for this visitor's turn, and has it inside.

        Raises:
            WorldError: As many of their turns are waited for as may be.
        """
        with self._changed:
            if list(self._places.values()).count(visitor_id) >= self.max_waiting:
                raise WorldError(f"{self.max_waiting} of your presses are waiting for an answer; wait for one.")
            least = min((self._seconds[other] for other in self._places.values()), default=0.0)
            self._seconds[visitor_id] = max(least, self._seconds.get(visitor_id, 0.0))
            number = next(self._numbers)
            self._places[number] = visitor_id
            self._changed.wait_for(lambda: self._turn is None and self._next() == number)
            self._turn = number
        start = self.clock()
        try:
            yield
        finally:
            with self._changed:
                self._seconds[visitor_id] += self.clock() - start
                del self._places[number]
                self._turn = None
                here = set(self._places.values())
                least = min((self._seconds[other] for other in here), default=float("inf"))
                # Who has used less than anyone who is here will be level with them on coming back.
                self._seconds = {who: used for who, used in self._seconds.items() if who in here or used > least}
                self._changed.notify_all()

    def _next(self) -> int:
        return min(self._places, key=lambda number: (self._seconds[self._places[number]], number))
