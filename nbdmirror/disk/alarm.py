"""Alarm: rings when a guest changes the disk for the first time since a mirror is at rest.

A mirror that has nothing to do looks at nothing: a guest's change wakes it. The alarm stands in the
ledger beside the mirror's bitmap, and behind it, and is marked as a bitmap is. So guests pay for
the alarm only while it is set, and take no lock.

No change is missed, because of one order on each side:

    a guest announces itself, changes, reads which bitmaps to mark, marks them, and withdraws;
    `set` attaches the alarm, sees that no guest is announced, and then that nothing is marked.

A guest that `set` does not see has withdrawn before, and its mark is seen, or announces itself
later, and finds the alarm. (A guest that marks looks again for what was attached meanwhile, so the
ledger alone would do. But a mirror is not at rest beside a change that is in progress.)
"""

from __future__ import annotations

from collections.abc import Callable

from nbdmirror.disk.ledger import Ledger


class Alarm:
    """The alarm of one mirror. `mark` is for guests' threads, all else for the event loop's."""

    def __init__(
        self, ledger: Ledger, clock: Callable[[], float], on_ring: Callable[[], None]
    ) -> None:
        """`on_ring` is called on a guest's thread, perhaps more than once; it must not block."""
        self._ledger = ledger
        self._clock = clock
        self._on_ring = on_ring
        self.is_set = False
        self._rung_s: list[float] = []
        """Of the first changes; more than one if they ended at the same time."""

    def set(self, is_at_rest: Callable[[], bool]) -> bool:
        """Ring at the next change, if none is in progress now, and `is_at_rest` is true then.
        Returns whether the alarm is set."""
        self._rung_s = []
        self._ledger.attach(self)
        self.is_set = not self._ledger.writes() and is_at_rest()
        if not self.is_set:
            self._ledger.detach(self)
        return self.is_set

    def stop(self) -> None:
        """Do not ring any more."""
        self.is_set = False
        self._ledger.detach(self)

    def mark(self, offset: int, length: int) -> None:
        """A guest's change has ended, and is marked. The guest was not answered yet."""
        if not self._rung_s:
            self._rung_s.append(self._clock())
            self._on_ring()

    def quiet_until_s(self) -> float | None:
        """No change was answered between `set` and this time, which is now if the alarm has not
        rung. None if the alarm is not set."""
        now_s = self._clock()  # first
        return min(self._rung_s, default=now_s) if self.is_set else None
