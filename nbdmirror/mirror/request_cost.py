"""RequestCost: what a request costs a target, in bytes. On the event loop's thread."""

from __future__ import annotations

import math

SMALL_BYTES = 16 << 10
"""A write of up to so many bytes is a small one, whose cost is mostly that of a request."""

WAITED = 3
"""A write that took so many times the least that any took has waited behind others. So the target
was busy, and the time between two answers is what one of them costs. Where fewer are under way than
a link can hold, that time is the link's, and says nothing."""

SAMPLES_MIN, SAMPLES_MAX = 16, 64


class _Mean:
    """Of the last SAMPLES_MAX writes or so."""

    def __init__(self) -> None:
        self.count = 0
        self.cost_s = 0.0
        self.length = 0.0

    def add(self, cost_s: float, length: int) -> None:
        self.count = min(SAMPLES_MAX, self.count + 1)
        self.cost_s += (cost_s - self.cost_s) / self.count
        self.length += (length - self.length) / self.count


class RequestCost:
    """Compares small writes with large ones, while writes wait for each other at the target."""

    def __init__(self) -> None:
        self._least_s = math.inf
        self._answered_s = -math.inf
        self._small, self._large = _Mean(), _Mean()

    def answered(self, began_s: float, now_s: float, length: int) -> None:
        """A write of `length` bytes of data, which began at `began_s`."""
        took_s, before_s = now_s - began_s, self._answered_s
        self._answered_s = now_s
        self._least_s = min(self._least_s, took_s)
        if began_s < before_s and took_s >= WAITED * self._least_s:
            mean = self._small if length <= SMALL_BYTES else self._large
            mean.add(now_s - before_s, length)

    @property
    def in_bytes(self) -> int:
        """So many bytes more in a request cost as much as one request more: 0 as long as that is
        not known, and 64 KiB at most."""
        small, large = self._small, self._large
        if min(small.count, large.count) < SAMPLES_MIN:
            return 0
        byte_s = (large.cost_s - small.cost_s) / (large.length - small.length)
        request_s = small.cost_s - small.length * byte_s
        most = 64 << 10
        return most if byte_s * most <= request_s else max(0, int(request_s / byte_s))
