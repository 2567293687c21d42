"""Depth: how much of a copier's work may be in flight now. On the event loop's thread."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

QUICK_BYTES = 4 << 20
"""In flight to targets that answer quickly, of all mirrors together: 4 MiB stay in the processor's
cache on their way to a local server, 16 do not, and copies take a tenth longer; with four mirrors
of 4 MiB each, half as long again."""

QUICK_WRITE_S = 0.002
"""A target that has answered within this is quick: 4 MiB each 2 ms are more than such a link
carries. Times the number of mirrors that copy just then, since they wait for each other. To a
slower one as much is in flight as fits into buf-size."""

GROWTH = 3
"""With 1 a copy over a link of 20 ms takes two round trips more to get going."""

COPYING_PROCESSORS = 2
"""What copies with more than one large request in flight keep busy: one reads and sends, one takes
it at the target. Where there are no more than these, guests would wait for one of them."""

YIELDING_BYTES_PER_S = 1e9
"""What is in flight then carries so much, if the target answers as quickly as it did once: one
large request to a local target, one or two small ones, more over a network."""

CONVERGING = 0.6
"""A round that begins with more than this part of what the last one began with does not yield: with
a guest that writes faster than that, no round would be the last."""

BACKLOG_BYTES = 64 << 20
"""The same for a mirror that is only kept in sync, four rounds a second."""

LOOK_S = 0.1
WORKING = range(10, 1000)
"""So many requests within LOOK_S are of guests at work. Fewer are a journal's write now and then;
more are of guests that keep a processor busy by themselves."""


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
    def guests_need_room(self) -> bool:
        """Guests are at work, and a copy at full speed would leave them no processor."""
        if self._processors > COPYING_PROCESSORS:
            return False
        now_s = self._clock()
        if now_s >= self._next_look_s:
            self._next_look_s = now_s + LOOK_S
            self._guests_work = self._new_requests() in WORKING
        return self._guests_work


class Depth:
    """Begins with one request, whose answer tells how far the target is: several would wait for
    each other, and a local target would be taken for a distant one, with fresh memory for each. To
    one that was never quick, GROWTH more with each answer, so four times as many each round trip.
    """

    def __init__(self, request_bytes: int, crowd: Crowd) -> None:
        """`request_bytes`: the largest request."""
        self._request_bytes = request_bytes
        self._crowd = crowd
        self._quickest_s = math.inf
        self._grown = 0
        self._may_yield = True
        self._round_bytes = math.inf

    def begin_round(self, dirty_bytes: int, *, is_kept_in_sync: bool) -> None:
        """A round over the disk while guests need room; `is_kept_in_sync`: it was in sync before,
        and need not be so as soon as may be."""
        if is_kept_in_sync:
            self._may_yield = dirty_bytes <= BACKLOG_BYTES
            self._round_bytes = math.inf
        else:
            self._may_yield = dirty_bytes <= self._round_bytes * CONVERGING
            self._round_bytes = dirty_bytes

    def has_room(self, in_flight_bytes: int) -> bool:
        """For a claim more."""
        if self._quickest_s >= QUICK_WRITE_S:
            return in_flight_bytes < self._request_bytes * (1 + self._grown)
        mirrors = max(1, self._crowd.count)
        room = max(1, QUICK_BYTES // mirrors // self._request_bytes) * self._request_bytes
        if self._may_yield and self._crowd.guests_need_room:
            room = min(room, int(self._quickest_s * YIELDING_BYTES_PER_S) // mirrors)
        return in_flight_bytes < max(1, room)

    def answered(self, took_s: float) -> None:
        """A write of data was answered. (Zeroing takes its time, and needs no buffers.)"""
        self._quickest_s = min(self._quickest_s, took_s / max(1, self._crowd.count))
        self._grown += GROWTH
