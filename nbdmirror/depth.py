"""Depth: how many of a copier's claims may be in flight now. On the event loop's thread."""

from __future__ import annotations

import os
from collections.abc import Callable

QUICK_MAX = 4
"""Claims in flight to targets that answer quickly, of all mirrors together: 4 MiB stay in the
processor's cache on their way to a local server, 16 do not, and copies take a tenth longer; with
four mirrors of 4 MiB each, half as long again."""

QUICK_WRITE_S = 0.002
"""A target that has answered within this is quick: 4 MiB each 2 ms are more than such a link
carries. Times the number of mirrors that copy just then, since they wait for each other. To a
slower one as much is in flight as fits into buf-size."""

GROWTH = 3
"""With 1 a copy over a link of 20 ms takes two round trips more to get going."""

COPYING_PROCESSORS = 2
"""What copies with more than one claim in flight keep busy: one reads and sends, one takes it at
the target. Where there are no more than these, guests would wait for one of them."""

LOOK_S = 0.1
WORKING = range(10, 1000)
"""So many requests within LOOK_S are of guests at work. Fewer are a journal's write now and then;
more are of guests that keep a processor busy by themselves, and soil the disk as fast as it is
copied: were the copy slowed down, it might never end."""


class Crowd:
    """What the copiers of one event loop share with each other, and with the guests.

    `new_requests`: how many requests of guests have begun since it was last called.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        new_requests: Callable[[], int],
        processors: int | None = None,
    ) -> None:
        """`processors`: None for what this process may run on."""
        self.count = 0
        """How many copiers have claims in flight."""
        self._clock = clock
        self._new_requests = new_requests
        self._processors = processors or len(os.sched_getaffinity(0))
        self._next_look_s = 0.0
        self._guests_work = False

    @property
    def each_max(self) -> int:
        """How many claims each copier may have in flight to a quick target."""
        alone = 1 if self._guests_need_room() else QUICK_MAX
        return max(1, alone // max(1, self.count))

    def _guests_need_room(self) -> bool:
        if self._processors > COPYING_PROCESSORS:
            return False
        now_s = self._clock()
        if now_s >= self._next_look_s:
            self._next_look_s = now_s + LOOK_S
            self._guests_work = self._new_requests() in WORKING
        return self._guests_work


class Depth:
    """Begins with one claim, whose answer tells how far the target is: several would wait for each
    other, and a local target would be taken for a distant one, with fresh memory for each claim. To
    one that was never quick, GROWTH more with each answer, so four times as many each round trip.
    """

    def __init__(self, slots: int, crowd: Crowd) -> None:
        """`slots`: the most."""
        self._slots = slots
        self._crowd = crowd
        self._is_quick = False
        self._grown = 0

    @property
    def now(self) -> int:
        if self._is_quick:
            return min(self._slots, self._crowd.each_max)
        return min(self._slots, 1 + self._grown)

    def answered(self, took_s: float) -> None:
        """A write of data was answered. (Zeroing takes its time, and needs no buffers.)"""
        self._is_quick = self._is_quick or took_s < QUICK_WRITE_S * max(1, self._crowd.count)
        self._grown += GROWTH
