"""Depth: how many of a copier's claims may be in flight now. On the event loop's thread."""

from __future__ import annotations

from collections.abc import Callable

QUICK_MAX = 4
"""Claims in flight to targets that answer quickly, of all mirrors together: 4 MiB stay in the
processor's cache on their way to a local server, 16 do not, and copies take a tenth longer; with
four mirrors of 4 MiB each, half as long again."""

QUICK_WRITE_S = 0.002
"""What answers within this is quick: 4 MiB each 2 ms are more than such a link carries. To a slower
one as much is in flight as fits into buf-size."""


class Crowd:
    """How many copiers have claims in flight: those of one event loop share it."""

    def __init__(self) -> None:
        self.count = 0


class Depth:
    def __init__(
        self,
        slots: int,
        crowd: Crowd,
        clock: Callable[[], float],
        call_later: Callable[[float, Callable[[], None]], object],
        pump: Callable[[], None],
    ) -> None:
        """`slots`: the most. `pump` is called when more may be in flight than before."""
        self._slots = slots
        self._crowd = crowd
        self._clock = clock
        self._call_later = call_later
        self._pump = pump
        self._first_write_s: float | None = None
        self._quickest_s: float | None = None

    @property
    def now(self) -> int:
        """At first gently; one that has not answered its first write in time is slow."""
        is_quick = True
        if self._quickest_s is not None:
            is_quick = self._quickest_s < QUICK_WRITE_S
        elif self._first_write_s is not None:
            is_quick = self._clock() - self._first_write_s < QUICK_WRITE_S
        if not is_quick:
            return self._slots
        return min(self._slots, max(1, QUICK_MAX // max(1, self._crowd.count)))

    def wrote(self) -> None:
        """A write was sent."""
        if self._first_write_s is None:
            self._first_write_s = self._clock()
            self._call_later(QUICK_WRITE_S, self._pump)

    def answered(self, took_s: float) -> None:
        """A write was answered."""
        self._quickest_s = took_s if self._quickest_s is None else min(self._quickest_s, took_s)
