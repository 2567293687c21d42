"""PointLag: the age of the oldest answered write of a guest that is in no committed point: what a
disaster would cost now (RPO). On the event loop's thread.

A guest's write marks before it is answered. So if nothing is dirty at a look, each write that was
answered before that look is in a point that was cut. The lag is a bound: never too small, and too
large by at most the time between two looks.
"""

from __future__ import annotations

from collections.abc import Callable

from nbdmirror.disk.changes import Changes
from nbdmirror.mirror.lag import BaseLag


class PointLag(BaseLag):
    """The lag of a mirror that makes points. `began_s`: as for Lag, of the last committed point."""

    def __init__(self, changes: Changes, clock: Callable[[], float], began_s: float) -> None:
        super().__init__(clock, began_s)
        self._changes = changes
        self._cut_s = began_s
        """The point in progress has every write that was answered before this time."""
        self._kept_s = began_s
        """The last point that the far side keeps while the next one is made has every write that
        was answered before this time."""
        self.is_kept = True
        """The last committed point is such a point."""

    def look(self) -> None:
        """Call this several times a second, whatever the job does."""
        if self._ended_s is None:
            now_s = self._clock()  # first: writes that are answered from here on do not count
            if self._changes.dirty.is_empty:
                self._cut_s = now_s
                point = self._changes.frozen
                if point is None or point.covered.is_empty:
                    self._covered_s = now_s

    def cut(self, at_s: float) -> None:
        """A point begins: everything that was answered before this time is in this point, or in an
        earlier one. `at_s`: by the clock, behind the closed gate."""
        if self.is_kept:
            self._kept_s = self._covered_s
        self._covered_s = self._kept_s
        self._cut_s = at_s

    def committed(self) -> None:
        """The point in progress is committed."""
        self._covered_s = self._cut_s

    def broken(self) -> None:
        """The point in progress is broken: its writes are in no point."""
        self._cut_s = self._covered_s
