"""Latency: how long guests' requests take, as histograms, and how much of that is a mirror's doing.

Reads and writes are sampled: one of SAMPLED is timed, which the others do not feel. All other
requests are timed, and so is each wait that a mirror causes: those are rare, or cost much more than
a look at the clock. A request's own time is without such waits.

All calls are for any thread. A time is left as a note, by one atomic call, and counted later: so no
guest waits for another one here.
"""

from __future__ import annotations

import enum
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SAMPLED = 251
"""A prime number, so that guests that do the same things by turns have all of them timed."""

NOTES_MAX = 4096
"""With so many notes the guest that leaves the next one counts them."""

TIMED_MIN = 20
"""A share is not told of fewer requests."""

BUCKETS = 25
"""The first bucket has times of less than 1 microsecond, each other one those of less than twice
the bound before; the last one everything else, from 8.4 s on."""


class Kind(enum.StrEnum):
    """Of requests."""

    READ = "read"
    WRITE = "write"
    ZERO = "zero"
    TRIM = "trim"
    FLUSH = "flush"


class Held(enum.StrEnum):
    """What a guest's request waits for that it would not wait for without a mirror."""

    PIVOT = "pivot"
    """A swap of source and target."""
    CUT = "cut"
    """The moment of a point."""
    SAVE = "save"
    """Old content is saved for a point, before it is overwritten."""
    THROTTLE = "throttle"
    TARGET = "target"
    """Write-blocking: the target has the write as well."""


class Histogram:
    """Times in nanoseconds, by their size."""

    def __init__(self) -> None:
        self.buckets = [0] * BUCKETS
        self.sum_ns = 0
        self._notes: deque[int] = deque()
        self._lock = threading.Lock()  # a leaf

    def add(self, ns: int) -> None:
        self._notes.append(ns)
        if len(self._notes) > NOTES_MAX:
            self.count()

    def count(self) -> None:
        """Bring `buckets` and `sum_ns` up to date."""
        with self._lock:
            for _ in range(len(self._notes)):
                ns = self._notes.popleft()
                self.buckets[min((ns // 1000).bit_length(), BUCKETS - 1)] += 1
                self.sum_ns += ns


@dataclass(frozen=True, slots=True)
class Cost:
    """What guests' changes and flushes have taken so far."""

    own_ns: int
    """Without waits for a mirror. Writes are reckoned by those that were timed."""
    waits_ns: int
    timed: int
    """How many were."""

    def share_since(self, then: Cost) -> float | None:
        """The part that waits for a mirror had since then; None: too few requests were timed."""
        waits_ns, own_ns = self.waits_ns - then.waits_ns, self.own_ns - then.own_ns
        is_known = self.timed - then.timed >= TIMED_MIN and waits_ns + own_ns > 0
        return waits_ns / (waits_ns + own_ns) if is_known else None


class _Share(threading.local):
    """Of the request that this thread serves."""

    ns = 0
    """What a mirror had it wait."""


class Latency:
    """The times of one disk's requests."""

    def __init__(self) -> None:
        self.clock_ns: Callable[[], int] = lambda: 0
        """Nanoseconds, monotonic; set when the disk is made to be served."""
        self.took = {kind: Histogram() for kind in Kind}
        self.own = {kind: Histogram() for kind in Kind}
        """The same requests, without the waits in `held`."""
        self.held = {cause: Histogram() for cause in Held}
        self._share = _Share()

    def timed(self, kind: Kind, request: Callable[..., None], *args: Any) -> None:
        """Do a guest's request, and note how long it took, well or not."""
        share = self._share
        share.ns, began_ns = 0, self.clock_ns()
        try:
            request(*args)
        finally:
            ns = self.clock_ns() - began_ns
            self.took[kind].add(ns)
            self.own[kind].add(max(0, ns - share.ns))

    @property
    def cost(self) -> Cost:
        """Reads are no part of it: they wait for no mirror."""
        own_ns = timed = 0
        for kind, times in self.own.items():
            if kind is not Kind.READ:
                times.count()
                own_ns += times.sum_ns * (SAMPLED if kind is Kind.WRITE else 1)
                timed += sum(times.buckets)
        for waits in self.held.values():
            waits.count()
        return Cost(own_ns, sum(waits.sum_ns for waits in self.held.values()), timed)

    def waited(self, cause: Held, ns: int) -> None:
        """The request that this thread serves has waited for so long."""
        self._share.ns += ns
        self.held[cause].add(ns)
