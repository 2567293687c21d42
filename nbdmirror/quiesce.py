"""Quiesce: bring a target level with its source while guest writes are held, within a bound.

    draining  ->  copying  ->  flushing  ->  level      (the gate stays closed until `release`)

Rule 15 of a mirror job's ending: counting is only true while no guest write is under way, and it is done again after the
flush. Rule 42: if it does not get there in time, the guest has its I/O back and the owner is told.

On the event loop's thread.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

from nbdmirror.copier import Copier
from nbdmirror.ledger import Ledger
from nbdmirror.loop import Loop, Timer


class Step(enum.Enum):
    DRAINING = "draining"
    COPYING = "copying"
    FLUSHING = "flushing"
    LEVEL = "level"
    OPEN = "open"


class Quiesce:
    """One attempt; starts at once. Exactly one of `on_level`, `on_timeout`, `on_flush_error` is called, unless
    `release` comes first. After `on_level` the guest is held until `release`."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        copier: Copier,
        loop: Loop,
        limit_s: float,
        on_level: Callable[[], None],
        on_timeout: Callable[[], None],
        on_flush_error: Callable[[BaseException], None],
    ) -> None:
        self._ledger = ledger
        self._copier = copier
        self._loop = loop
        self._on_level = on_level
        self._on_timeout = on_timeout
        self._on_flush_error = on_flush_error
        self.step = Step.DRAINING
        self.closed_at_s = loop.clock()
        self._timer: Timer = loop.call_later(limit_s, self._time_out)
        copier.is_urgent = True
        ledger.close_gate(self._on_idle)
        self.advance()

    def advance(self) -> None:
        """Do what can be done; called when guests have left and when copies have settled."""
        if self.step is Step.DRAINING and self._ledger.is_idle:
            self.step = Step.COPYING
        if self.step is Step.COPYING:
            self._copier.pump()
            if self._copier.tracker.in_sync:
                self.step = Step.FLUSHING
                self._copier.target.start_flush(self._flushed)

    def release(self) -> float:
        """Give the guest its I/O back, whatever the step; returns how long it was held, in seconds."""
        if self.step is not Step.OPEN:
            self.step = Step.OPEN
            self._timer.cancel()
            self._copier.is_urgent = False
            self._ledger.open_gate()
        return self._loop.clock() - self.closed_at_s

    def _on_idle(self) -> None:
        """From a guest's thread."""
        self._loop.call_soon(self.advance)

    def _flushed(self, error: BaseException | None) -> None:
        if self.step is not Step.FLUSHING:
            return  # released meanwhile
        if error is not None:
            self.release()
            self._on_flush_error(error)
        elif self._copier.tracker.in_sync:
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
