"""Depth: how many of a copier's claims may be in flight now. On the event loop's thread."""

from __future__ import annotations

QUICK_MAX = 4
"""Claims in flight to targets that answer quickly, of all mirrors together: 4 MiB stay in the
processor's cache on their way to a local server, 16 do not, and copies take a tenth longer; with
four mirrors of 4 MiB each, half as long again."""

QUICK_WRITE_S = 0.002
"""What answers within this is quick: 4 MiB each 2 ms are more than such a link carries. To a slower
one as much is in flight as fits into buf-size."""


GROWTH = 3
"""With 1 a copy over a link of 20 ms takes two round trips more to get going."""


class Crowd:
    """How many copiers have claims in flight: those of one event loop share it."""

    def __init__(self) -> None:
        self.count = 0


class Depth:
    """Begins as for a quick target; to one that was never quick, GROWTH more with each answer, so
    four times as many each round trip. On a busy machine a local target seems slow at first: were
    all allowed at once, it would cost fresh memory for each."""

    def __init__(self, slots: int, crowd: Crowd) -> None:
        """`slots`: the most."""
        self._slots = slots
        self._crowd = crowd
        self._is_quick = False
        self._grown = 0

    @property
    def now(self) -> int:
        gentle = max(1, QUICK_MAX // max(1, self._crowd.count))
        return min(self._slots, gentle if self._is_quick else gentle + self._grown)

    def answered(self, took_s: float) -> None:
        """A write of data was answered. (Zeroing takes its time, and needs no buffers.)"""
        self._is_quick = self._is_quick or took_s < QUICK_WRITE_S
        self._grown += GROWTH
