"""Many players on one model: sessions of one pipeline that advance in one pass, whoever of them has sent an action.

B batch.
"""

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..checks import check_count
from .session import FARSession, Frame


class PoolFullError(RuntimeError):
    """A pool has as many players as it may have."""


@dataclass(frozen=True)
class Turn:
    """An action that waits for its frame.

    Args:
        action: As of [`FARSession.step`].
        frame (`Future`): Of the frame that the action leads to, or of the error that it ended in.
    """

    action: Any
    frame: Future


class SessionPool:
    """Sessions of one pipeline that share the model's passes.

    Whoever has sent an action takes part in the next pass, whoever has not holds nobody up. Each player's frames are those of
    the session alone, whatever the others do; a session whose step fails takes nobody along and stays where it was. Between
    passes a session is its owner's, to `rewind`, `fork`, `save` or change; what runs the model (`estimate`, `fork_batch`) is to
    be called inside `paused`.

    A pass is shared by sessions with the same settings (`num_inference_steps`, `guidance_scale` and so on); there is one for
    each kind.

    Args:
        max_players (`int`, defaults to 16): More are refused: each holds a cache, and makes the passes of all longer.
        max_players_per_pass (`int`, *optional*): No more in one pass; who waits longest goes first. All by default.
    """

    def __init__(self, max_players: int = 16, max_players_per_pass: int | None = None):
        check_count("max_players", max_players)
        check_count("max_players_per_pass", max_players_per_pass, optional=True)
        self.max_players = max_players
        self.max_players_per_pass = max_players_per_pass or max_players
        self._sessions: dict[int, FARSession] = {}
        self._turns: dict[int, Turn] = {}  # of players, who waits longest first
        self._num_joined = 0
        self._changed = threading.Condition()  # guards the fields above
        self._model = threading.RLock()  # held while the model runs

    @property
    def players(self) -> dict[int, FARSession]:
        """The sessions by their players."""
        with self._changed:
            return dict(self._sessions)

    @property
    def num_waiting(self) -> int:
        """Players whose actions have no frame yet."""
        return len(self._turns)

    @property
    def num_bytes(self) -> int:
        """Bytes that the sessions hold."""
        return sum(session.num_bytes for session in self.players.values())

    def add(self, session: FARSession) -> int:
        """Let a session join, at any time.

        Args:
            session ([`FARSession`]): Of the same pipeline as the others, with a batch of 1.

        Returns:
            Its player, a number that no other session of this pool ever has.

        Raises:
            PoolFullError: There are `max_players` already.
            ValueError: The session is a batch, of another pipeline, or has joined already.
        """
        session.check_can_join()
        with self._changed:
            others = self._sessions.values()
            if any(session is other for other in others):
                raise ValueError("`session` has joined this pool already; add a `fork` of it for another player.")
            if any(session.rollout.transformer is not other.rollout.transformer for other in others):
                raise ValueError("`session` is of another pipeline than the others; make a pool for each pipeline.")
            if len(self._sessions) >= self.max_players:
                raise PoolFullError(
                    f"The pool is full: {self.max_players} players are in it, which is all there may be. Join again when one has "
                    "left (`remove`), or make the pool with a larger `max_players`."
                )
            self._num_joined += 1
            self._sessions[self._num_joined] = session
            return self._num_joined

    def remove(self, player: int) -> FARSession:
        """Let a player leave, at any time; an action that waits is cancelled. Returns the session, which can go on alone.

        Raises:
            KeyError: There is no such player.
        """
        with self._changed:
            session = self._sessions.pop(self._known(player))
            turn = self._turns.pop(player, None)
        if turn is not None:
            turn.frame.cancel()
        return session

    def submit(self, player: int, action: Any = None) -> Future:
        """Send an action, as of [`FARSession.step`]; it is taken in one of the next passes, see `advance` and `serving`.

        Returns:
            A future of the frame, or of the error in which the step ended.

        Raises:
            KeyError: There is no such player.
            ValueError: The action is missing, superfluous, or of the wrong type or range.
            RuntimeError: The player's last action has no frame yet.
        """
        with self._changed:
            session = self._sessions[self._known(player)]
            if player in self._turns:
                raise RuntimeError(
                    f"Player {player} has sent an action that has no frame yet; wait for its future before the next one."
                )
            session.check_action(action)
            turn = self._turns[player] = Turn(action, Future())
            self._changed.notify_all()
            return turn.frame

    def advance(self) -> int:
        """Take the actions that wait, in one pass for each kind of session; those of `max_players_per_pass` players at most.

        Returns:
            How many players took part.
        """
        with self._model:
            with self._changed:
                players = list(self._turns)[: self.max_players_per_pass]
                taken = [(self._sessions[player], self._turns[player]) for player in players]
            taken = [(session, turn) for session, turn in taken if turn.frame.set_running_or_notify_cancel()]
            try:
                outcomes = _stepped(taken)
            except BaseException as error:  # such as Ctrl-C: no step was taken
                outcomes = [error] * len(taken)
                raise
            finally:
                with self._changed:
                    for player in players:
                        self._turns.pop(player, None)
                for (_, turn), outcome in zip(taken, outcomes):
                    is_error = isinstance(outcome, BaseException)
                    (turn.frame.set_exception if is_error else turn.frame.set_result)(outcome)
            return len(taken)

    def step(self, actions: Mapping[int, Any]) -> dict[int, Frame | Exception]:
        """Take an action for each of some players; the others stay where they are.

        Args:
            actions (mapping): By player; each as of [`FARSession.step`].

        Returns:
            By player, the frame, or the error in which the step of this player ended.
        """
        frames = {}
        for player, action in actions.items():
            try:
                frames[player] = self.submit(player, action)
            except (KeyError, ValueError, RuntimeError) as error:
                frames[player] = Future()
                frames[player].set_exception(error)
        while not all(frame.done() for frame in frames.values()):
            self.advance()
        return {player: frame.exception() or frame.result() for player, frame in frames.items()}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, no pass runs: the model is the caller's."""
        with self._model:
            yield

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Inside, a thread advances as soon as an action waits: players call `submit(...).result()` from threads of their own."""
        is_over = threading.Event()

        def serve() -> None:
            while not is_over.is_set():
                with self._changed:
                    self._changed.wait_for(lambda: self._turns or is_over.is_set())
                self.advance()

        thread = threading.Thread(target=serve, name="SessionPool", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            with self._changed:
                self._changed.notify_all()
            thread.join()

    def _known(self, player: int) -> int:
        if player not in self._sessions:
            raise KeyError(f"There is no player {player!r} in this pool; `add` returned {list(self._sessions)}.")
        return player


def _stepped(turns: list[tuple[FARSession, Turn]]) -> list[Frame | Exception]:
    """The frame of each session, or the error in which its step ended. Where a step of several fails, none was taken: each half
    takes its own, until who fails is alone."""
    try:
        if len(turns) == 1:
            session, turn = turns[0]
            return [session.step(turn.action)]
        return FARSession.step_together([session for session, _ in turns], [turn.action for _, turn in turns])
    except Exception as error:  # of whatever kind: it is the player's
        if len(turns) == 1:
            return [error]
        middle = len(turns) // 2
        return _stepped(turns[:middle]) + _stepped(turns[middle:])
