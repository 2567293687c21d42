"""Stopping: how what a job has in flight ends when nothing of it is to be in flight any more: by
itself, or given up. On the event loop's thread."""

from __future__ import annotations

from collections.abc import Callable

from nbdmirror.mirror.copier import Copier
from nbdmirror.mirror.copy_mode import CopyModeSwitch
from nbdmirror.mirror.timers import JobTimers

CANCEL_GRACE_S = 0.3
"""How long a forced cancel lets requests end by themselves before the target's connection is
given up."""

SOURCE_GRACE_S = 2.0
"""How long a pause, or an end with an error, waits for the source. For the target it has to wait:
what is in flight there may change it yet."""

CUT, DISOWN = "cut", "disown"


class Stopping:
    """`give_up` has what is in flight at the target fail, whatever becomes of it there."""

    def __init__(
        self, copier: Copier, mode: CopyModeSwitch, timers: JobTimers, give_up: Callable[[], None]
    ) -> None:
        self._copier = copier
        self._mode = mode
        self._timers = timers
        self._give_up = give_up
        self._is_late = False

    def is_over(self, *, for_pause: bool = False) -> bool:
        """No copies, no flush, and no write that may have been decided as a synchronous one. To be
        asked until then, with the copier stopped. A pause does not wait long for a flush, which
        changes nothing."""
        is_flush_left = for_pause and self._is_late and not self._copier.in_flight
        if (self._copier.is_idle or is_flush_left) and self._mode.has_drained():
            self._timers.cancel(DISOWN)
            return True
        if not self._timers.has(DISOWN):
            self._is_late = False
            self._timers.after(DISOWN, SOURCE_GRACE_S, self._disown)
        return False

    def hurry(self) -> None:
        """A forced cancel. A hung target: give its connection up, so that what is in flight
        comes back."""
        if not self._timers.has(CUT):
            self._timers.after(CUT, CANCEL_GRACE_S, self._cut)

    def _cut(self) -> None:
        self._give_up()
        self._disown()

    def _disown(self) -> None:
        """A hung source: what it was asked for is dirty, and not waited for."""
        self._is_late = True
        if not self._copier.is_running:
            self._mode.disown()
            self._copier.disown()
