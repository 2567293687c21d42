"""Throttle: lets guests change a disk only so fast that a mirror comes to its end.

A token bucket, but of what becomes dirty, and not of what is written: a granule that is dirty
already costs nothing, since a copy carries it once. So a guest that writes to the same places again
and again is hardly slowed down, and what is left to copy never grows faster than the throttle
allows, whatever the guest does.

The throttle stands in the ledger in front of the mirror's bitmap, and is marked as a bitmap is. So
each write, zeroing and trim meets the throttle at its end, before the range is marked and the guest
is answered; and guests pay for a throttle only while there is one. A request that waits here is in
progress, as the invariant of `ledger` wants it.

No request waits for longer than WAIT_S_MAX, whatever it has changed. `release` ends all waits at
once: call that before a gate is closed, which waits for the requests in progress.

`mark` is for guests' threads, all else for the event loop's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.latency import Held
from nbdmirror.disk.ledger import Ledger

BURST_S = 0.1
"""A guest that was quiet may change as much at once as in so much time."""

WAIT_S_MAX = 5.0
"""Longest wait of one request. The rest of what it has changed is not counted: guests give up a
request after 30 s or later."""


class Throttle:
    """The throttle of one mirror's guest; released at first."""

    def __init__(self, ledger: Ledger, dirty: DirtyBitmap, clock: Callable[[], float]) -> None:
        self.bytes_per_s: float | None = None
        """What may become dirty; None while released."""
        self.why_released = ""
        self._ledger = ledger
        self._dirty = dirty
        self._clock = clock
        self._lock = threading.Lock()
        self._due_s = 0.0
        """When everything so far has become dirty, at the rate that is allowed."""
        self._released = threading.Event()
        self.wait: Callable[[float], object] = self._released.wait
        """Wait for so many seconds, or until `release`. A test whose clock stands still has
        another."""

    def limit(self, bytes_per_s: float) -> None:
        """Allow so many bytes a second from now on."""
        if self.bytes_per_s is None:
            self._due_s = self._clock()
            self._released.clear()
            self.bytes_per_s = bytes_per_s
            self._ledger.attach(self, is_first=True)
        self.bytes_per_s = bytes_per_s

    def release(self, why: str) -> None:
        """Allow everything, and let all guests go that wait."""
        if self.bytes_per_s is not None:
            self.bytes_per_s, self.why_released = None, why
            self._ledger.detach(self)
            self._released.set()

    def mark(self, offset: int, length: int) -> None:
        """A guest has changed a range, in bytes, and is not answered yet: wait."""
        bytes_per_s = self.bytes_per_s
        if bytes_per_s is None:
            return  # a request that has just read the ledger's bitmaps
        fresh = self._fresh_bytes(offset, length)
        with self._lock:
            now_s = self._clock()
            due_s = max(self._due_s, now_s - BURST_S) + fresh / bytes_per_s
            self._due_s = min(due_s, now_s + WAIT_S_MAX)
            wait_s = self._due_s - now_s
        if fresh and wait_s > 0:
            latency = self._ledger.latency
            began_ns = latency.clock_ns()
            self.wait(wait_s)
            latency.waited(Held.THROTTLE, latency.clock_ns() - began_ns)

    def _fresh_bytes(self, offset: int, length: int) -> int:
        """How much of the range is not dirty yet, in whole granules."""
        granularity = self._dirty.granularity
        start = offset // granularity * granularity
        stop = min(self._dirty.size, -(-(offset + length) // granularity) * granularity)
        return stop - start - self._dirty.bytes_in(start, stop - start)
