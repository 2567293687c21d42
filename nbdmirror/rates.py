"""Rates: how fast a mirror copies and its guest writes, from samples of the last seconds.

Data and zeroes are counted apart: a hole of a terabyte is copied in one request, and says nothing
of the time that data take. What is sent again, since a target that was lost may have lost it, is
no write of the guest's.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

WINDOW_S = 5.0
"""Rates are those of the last seconds."""

RATE_S_MIN = 0.2
"""Samples that are closer together say nothing."""

LAG_S_MAX = 2.0
"""A mirror that is this far behind its guest, and gets no closer, falls behind."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A mirror at one moment. All but the time are bytes."""

    time_s: float
    offset: int
    """Copied so far, zeroes included, and written synchronously."""
    data: int
    """Of that the data, counted as they are sent."""
    left: int
    """Dirty, or in flight."""
    in_flight: int
    again: int
    """What became dirty for another reason than a guest's write, so far."""


@dataclass(frozen=True, slots=True)
class Rates:
    copy_bytes_per_s: int
    """Data alone."""
    zero_bytes_per_s: int
    dirty_bytes_per_s: int
    """What the guest makes dirty."""
    left_s: float | None
    """Until nothing is left, if all that is left is data; None where that cannot be said."""
    falls_behind: bool
    """At these rates the end never comes."""


class Meter:
    """Of one mirror. `add` about once a second."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque()

    def add(self, sample: Sample) -> None:
        self._samples.append(sample)
        while len(self._samples) > 2 and sample.time_s - self._samples[1].time_s >= WINDOW_S:
            self._samples.popleft()

    def start_over(self) -> None:
        """The mirror stands still: rates of before are none of now."""
        self._samples.clear()

    def rates(self, now: Sample) -> Rates | None:
        """None where too little has been seen."""
        if not self._samples or now.time_s - self._samples[0].time_s < RATE_S_MIN:
            return None
        then = self._samples[0]
        span_s = now.time_s - then.time_s
        copied = now.offset - then.offset
        data = min(copied, now.data - then.data)
        # What was in flight at first was counted as data when it was sent.
        zeroes = max(0, copied - data - then.in_flight)
        again = now.again - then.again
        dirtied = max(0, copied + now.left - then.left - again)
        is_steady = span_s >= WINDOW_S and bool(dirtied) and now.left >= then.left
        return Rates(
            copy_bytes_per_s=int(data / span_s),
            zero_bytes_per_s=int(zeroes / span_s),
            dirty_bytes_per_s=int(dirtied / span_s),
            left_s=self._left_s(now.left, data, dirtied, span_s),
            falls_behind=is_steady and not again and now.left > LAG_S_MAX * copied / span_s,
        )

    def _left_s(self, left: int, data: int, dirtied: int, span_s: float) -> float | None:
        if not left:
            return 0.0
        return left / (data - dirtied) * span_s if data > dirtied else None
