"""Quiesce: bring a target level with its source while guest writes are held, within a bound.

    converging -> flushing ahead -> catching up -> draining -> copying -> flushing -> level
    '-------- the guest writes ------------------' '-------- the gate is closed --- ... release'

As much as possible is done before the gate closes: then little is left to copy, and the target's
last flush has little to do. If what is left then does not fit into the pause that is allowed
(`fits`), all of that is done again, while guests write, or by a new attempt. Rule 15: the count of
dirty bytes is only exact while no guest write is in progress, and is checked again after the flush.
Rule 42: if the target is not level in time, the guest continues and `on_timeout` is called.

Another flush may be in progress when the last one ends. The attempt waits for that one too: a
target that has lost data may report the loss to that flush, and not to one that began later.

On the event loop's thread.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable

from nbdmirror.disk.ledger import Ledger
from nbdmirror.disk.tracker import Tracker
from nbdmirror.event_loop import Loop, Timer
from nbdmirror.mirror.copier import Copier
from nbdmirror.mirror.rate_limit import Haste

LEVEL_BYTES_MIN, LEVEL_BYTES = 256 << 10, 4 << 20
"""Dirty bytes that may be left when guest writes are held: a few milliseconds of copying at most.
The bound begins with the smaller one and doubles after each LEVEL_STEP_S."""

LEVEL_STEP_S = 0.02

CONVERGE_S = 2.0
"""How long the dirty bytes may take to fall below LEVEL_BYTES; after that writes are held."""

CATCH_UP_S = 0.2
"""The same bound for data that was written while the target was flushed ahead."""

OLD_S = 10.0
"""An attempt that finds no moment to hold guests in so much time is old. What was prepared for it
is prepared anew, by the next one."""

LIMIT_S = 1.0
"""Longest time that guest writes are held in one attempt."""


class Step(enum.Enum):
    """The steps of an attempt, in order."""

    CONVERGING = "converging"
    FLUSHING_AHEAD = "flushing ahead"
    CATCHING_UP = "catching up"
    DRAINING = "draining"
    COPYING = "copying"
    FLUSHING = "flushing"
    FLUSHED = "flushed"
    LEVEL = "level"
    OPEN = "open"


class Attempt(ABC):
    """An attempt to make the target level."""

    @abstractmethod
    def advance(self) -> None:
        """Do the next step. Called regularly, and when guests' requests or copies have ended."""

    @abstractmethod
    def release(self) -> float | None:
        """End the attempt in any step, and let the guest continue. Returns how long guest writes
        were held, in seconds; None if they were not held."""


class Quiesce(Attempt):
    """One attempt, which begins with `advance`. One of `on_level`, `on_timeout`, `on_old` and
    `on_flush_error` is called once, unless `release` comes first. After `on_level` the guest is
    held until `release`; at `on_old` it was not held."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        tracker: Tracker,
        copier: Copier,
        loop: Loop,
        on_level: Callable[[], None],
        on_timeout: Callable[[], None],
        on_flush_error: Callable[[BaseException], None],
        on_old: Callable[[], None] = lambda: None,
        limit_s: Callable[[], float] = lambda: LIMIT_S,
        fits: Callable[[], bool] = lambda: True,
        before_hold: Callable[[], None] = lambda: None,
    ) -> None:
        """`limit_s`: how long guests may be held until the target is level. `fits`: whether they
        may be held now. `before_hold` is called in that moment."""
        self.step = Step.CONVERGING
        self._limit_s = limit_s
        self._fits = fits
        self._before_hold = before_hold
        self._ledger = ledger
        self._tracker = tracker
        self._copier = copier
        self._loop = loop
        self._on_level = on_level
        self._on_timeout = on_timeout
        self._on_flush_error = on_flush_error
        self._on_old = on_old
        self._began_s = self._since_s = loop.clock()
        self._closed_at_s = 0.0
        self._timer: Timer | None = None
        copier.on_settled = self._copy_settled

    def advance(self) -> None:
        self._copier.pump()
        if self.step is Step.CONVERGING and self._is_close(LEVEL_BYTES, CONVERGE_S):
            self.step = Step.FLUSHING_AHEAD
            self._copier.flush(self._flushed_ahead)
        elif self.step is Step.CATCHING_UP and self._is_close(self._level_bytes, CATCH_UP_S):
            if self._fits():
                self._close_gate()
            elif self._is_late(CATCH_UP_S):
                self._do_again()
        elif self.step is Step.DRAINING and self._ledger.is_idle:
            self.step = Step.COPYING
            self.advance()
        elif self.step is Step.COPYING and self._tracker.in_sync:
            self.step = Step.FLUSHING
            self._copier.flush(self._flushed)
        elif self.step is Step.FLUSHED and self._copier.is_idle:
            self._look_again()

    def _do_again(self) -> None:
        self.step, self._since_s = Step.CONVERGING, self._loop.clock()
        if self._since_s - self._began_s >= OLD_S:
            self.release()
            self._on_old()

    def release(self) -> float | None:
        step, self.step = self.step, Step.OPEN
        self._copier.on_settled = None
        if self._timer is None or step is Step.OPEN:
            return None
        self._timer.cancel()
        self._copier.set_haste(Haste.STEADY)
        self._ledger.open_gate()
        return self.held_s

    @property
    def held_s(self) -> float:
        """For how long guests' writes have been held, in seconds."""
        return self._loop.clock() - self._closed_at_s

    @property
    def _level_bytes(self) -> int:
        steps = int((self._loop.clock() - self._since_s) / LEVEL_STEP_S)
        return min(LEVEL_BYTES, LEVEL_BYTES_MIN << min(steps, LEVEL_BYTES.bit_length()))

    def _is_close(self, level_bytes: int, patience_s: float) -> bool:
        left_bytes = self._tracker.dirty.dirty_bytes + self._tracker.in_flight_bytes
        return self._is_late(patience_s) or left_bytes <= level_bytes

    def _is_late(self, patience_s: float) -> bool:
        return self._loop.clock() - self._since_s >= patience_s

    def _copy_settled(self) -> None:
        """Other copies are in flight, so that something is left: perhaps little enough by now. In
        the first moments of catching up the target is mostly level soon, and guests are held for a
        shorter time then."""
        is_long = self.step is Step.CATCHING_UP and self._is_late(LEVEL_STEP_S)
        if is_long or self.step is Step.CONVERGING:
            self.advance()

    def _flushed_ahead(self, error: BaseException | None) -> None:
        if self.step is not Step.FLUSHING_AHEAD:
            return  # released meanwhile
        if error is not None:
            self.release()
            self._on_flush_error(error)
        else:
            self.step = Step.CATCHING_UP
            self._since_s = self._loop.clock()
            self.advance()

    def _close_gate(self) -> None:
        self._before_hold()
        self.step = Step.DRAINING
        self._closed_at_s = self._loop.clock()
        self._timer = self._loop.call_later(self._limit_s(), self._time_out)
        self._copier.set_haste(Haste.GUESTS_WAIT)
        self._ledger.close_gate(self._on_idle)
        self.advance()

    def _on_idle(self) -> None:
        """From a guest's thread."""
        self._loop.call_soon(self.advance)

    def _flushed(self, error: BaseException | None) -> None:
        if self.step is not Step.FLUSHING:
            return  # released meanwhile
        if error is not None:
            self.release()
            self._on_flush_error(error)
        else:
            self.step = Step.FLUSHED
            self.advance()

    def _look_again(self) -> None:
        if self._tracker.is_level:
            assert self._timer is not None
            self._timer.cancel()
            self.step = Step.LEVEL
            self._on_level()
        else:
            self.step = Step.COPYING
            self.advance()

    def _time_out(self) -> None:
        if self.step not in (Step.LEVEL, Step.OPEN):
            self.release()
            self._on_timeout()
