"""Poll: when a mirror looks for what guests have written. Their writes call nothing, except for the
first one after the mirror came to rest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from nbdmirror.disk.alarm import Alarm
from nbdmirror.disk.ledger import Ledger
from nbdmirror.event_loop import Loop
from nbdmirror.mirror.timers import JobTimers

POLL_S = 0.05
"""Interval at which a mirror that is not at rest looks for new guest writes."""


class Poll:
    """Calls `look` every POLL_S, until `is_at_rest` is true: then nothing happens before a guest
    changes the disk, or `wake` is called. `look` follows at once on a change, and after POLL_S on a
    call of `wake`. `on_wake` is called before."""

    def __init__(
        self,
        *,
        timers: JobTimers,
        loop: Loop,
        ledger: Ledger,
        look: Callable[[], None],
        is_at_rest: Callable[[], bool],
        on_wake: Callable[[], None],
    ) -> None:
        self.alarm = Alarm(ledger, loop.clock, partial(loop.call_soon, self._rung))
        self._timers = timers
        self._look = look
        self._is_at_rest = is_at_rest
        self._on_wake = on_wake

    def begin(self) -> None:
        """Look now, and from now on."""
        self._timers.after("poll", POLL_S, self.begin)
        self._look()
        if self._is_at_rest() and self.alarm.set(self._is_at_rest):
            self._timers.cancel("poll")

    def wake(self) -> None:
        """What the mirror has to do has changed: it is not at rest any more."""
        if self._rouse():
            self._timers.after("poll", POLL_S, self.begin)

    def end(self) -> None:
        """The mirror ends."""
        self.alarm.stop()
        self._timers.cancel("poll")

    def _rung(self) -> None:
        if self._rouse():
            self.begin()

    def _rouse(self) -> bool:
        """Returns whether the mirror was at rest."""
        if was_at_rest := self.alarm.is_set:
            self._on_wake()  # may ask the alarm since when the mirror is not at rest
            self.alarm.stop()
        return was_at_rest
