"""Stopping: how a job's requests in flight end before a pause or a bad end: by themselves, or given
up. On the event loop's thread."""

from __future__ import annotations

from collections.abc import Callable

from nbdmirror.mirror.copier import Copier
from nbdmirror.mirror.copy_mode import CopyModeSwitch
from nbdmirror.mirror.timers import JobTimers

CANCEL_GRACE_S = 0.3
"""How long a forced cancel lets requests end by themselves before the target's connection is
given up."""

SOURCE_GRACE_S = 2.0
"""How long a pause, or an end with an error, waits for the source. It has to wait for the target
without a bound: requests in flight there may still change the target."""

CUT, DISOWN = "cut", "disown"


class Stopping:
    """`give_up` makes the requests in flight at the target fail; the target may still do them."""

    def __init__(
        self, copier: Copier, mode: CopyModeSwitch, timers: JobTimers, give_up: Callable[[], None]
    ) -> None:
        self._copier = copier
        self._mode = mode
        self._timers = timers
        self._give_up = give_up
        self._is_late = False
        self.cancelled = ""
        """Why the job was cancelled by force. While an end is being recorded that has no effect,
        but it has if the end cannot be recorded."""

    def is_over(self, *, for_pause: bool = False) -> bool:
        """Whether nothing is in flight: no copy, no flush, and no guest write that may be
        synchronous. Call this repeatedly, with the copier stopped, until it returns True. A pause
        does not wait long for a flush, which changes no data."""
        is_flush_left = for_pause and self._is_late and not self._copier.in_flight
        if (self._copier.is_idle or is_flush_left) and self._mode.has_drained():
            self._timers.cancel(DISOWN)
            return True
        if not self._timers.has(DISOWN):
            self._is_late = False
            self._timers.after(DISOWN, SOURCE_GRACE_S, self._disown)
        return False

    def hurry(self) -> None:
        """For a forced cancel: after CANCEL_GRACE_S give up a target that hangs, so that its
        requests in flight fail."""
        if not self._timers.has(CUT):
            self._timers.after(CUT, CANCEL_GRACE_S, self._cut)

    def _cut(self) -> None:
        self._give_up()
        self._disown()

    def _disown(self) -> None:
        """For a source that hangs: the ranges of its reads are dirty, and nothing waits for it."""
        self._is_late = True
        if not self._copier.is_running:
            self._mode.disown()
            self._copier.disown()
