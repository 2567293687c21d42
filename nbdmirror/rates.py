"""Rates: how fast a mirror copies and its guest writes, from samples of the last seconds.

Data and zeroes are counted separately: a hole of a terabyte is copied in one request, and says
nothing about the time for data. Data that is sent again, since a lost target may have lost it, does
not count as a guest's write.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

WINDOW_S = 5.0
"""Rates are averages of so many seconds."""

RATE_S_MIN = 0.2
"""Samples that are closer together are not used."""

LAG_S_MAX = 2.0
"""A mirror that is so far behind its guest, and does not come closer, falls behind."""


EVEN = 0.9
"""If guests change more than this part of what is copied, an end that is predicted from the
difference of the two has a larger error than itself."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A mirror at one moment. All but the time are bytes."""

    time_s: float
    offset: int
    """Copied so far, with zeroes and synchronous writes."""
    data: int
    """The data alone, counted when it is sent."""
    left: int
    """Dirty, or in flight."""
    in_flight: int
    again: int
    """Bytes that became dirty for another reason than a guest's write, so far."""
    traffic: tuple[int, int] | None = None
    """Bytes of data sent, and changed by guests, since READY; None before that. The other figures
    are of whole granules."""


@dataclass(frozen=True, slots=True)
class Rates:
    copy_bytes_per_s: int
    """Data, without zeroes. After READY only the parts of granules that were sent count."""
    zero_bytes_per_s: int
    dirty_bytes_per_s: int
    """Bytes that the guest makes dirty; after READY, the bytes that the guest writes."""
    left_s: float | None
    """Seconds until nothing is left, if the rest is all data; None if not known."""
    falls_behind: bool
    """At these rates the mirror never gets in sync."""


class Meter:
    """The rates of one mirror. Call `add` about once a second."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque()

    def add(self, sample: Sample) -> None:
        self._samples.append(sample)
        while len(self._samples) > 2 and sample.time_s - self._samples[1].time_s >= WINDOW_S:
            self._samples.popleft()

    def start_over(self) -> None:
        """The mirror copies nothing now: drop the samples."""
        self._samples.clear()

    def rates(self, now: Sample) -> Rates | None:
        """The present rates; None if too little is known."""
        if not self._samples or now.time_s - self._samples[0].time_s < RATE_S_MIN:
            return None
        then = self._samples[0]
        span_s = now.time_s - then.time_s
        copied = now.offset - then.offset
        data = min(copied, now.data - then.data)
        # Requests in flight at the first sample were already counted as data.
        zeroes = max(0, copied - data - then.in_flight)
        again = now.again - then.again
        dirtied = max(0, copied + now.left - then.left - again)
        is_steady = span_s >= WINDOW_S and bool(dirtied) and now.left >= then.left
        falls_behind = is_steady and not again and now.left > LAG_S_MAX * copied / span_s
        sent, changed = data, dirtied
        # Of a mirror that falls behind the granules say why: what is changed again costs nothing.
        if now.traffic is not None and then.traffic is not None and not falls_behind:
            sent, changed = (b - a for a, b in zip(then.traffic, now.traffic, strict=True))
        return Rates(
            copy_bytes_per_s=int(sent / span_s),
            zero_bytes_per_s=int(zeroes / span_s),
            dirty_bytes_per_s=int(changed / span_s),
            left_s=self._left_s(now.left, data, dirtied, span_s),
            falls_behind=falls_behind,
        )

    def _left_s(self, left: int, data: int, dirtied: int, span_s: float) -> float | None:
        if not left:
            return 0.0
        return left / (data - dirtied) * span_s if dirtied < EVEN * data else None
