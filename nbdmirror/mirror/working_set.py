"""WorkingSet: how much guests change in so much time, each place counted once.

A rate does not say that. A guest that writes 500 MB/s to 20 MB of its disk changes 20 MB in any
time, and a mirror of that guest keeps up with any target. So a curve is measured: for each age, how
much of what is clean at that age becomes dirty in the next moment. A copier's passes over the disk
give areas of each age for nothing (area.py).

What is changed often becomes dirty soon after it was copied, and is not among what is clean at
higher ages. So the curve falls, whatever places guests prefer. (Nelson's and Aalen's estimator of
the hazard, and the best curve of those that fall.)

Ages are seconds. Pure: no clock, no I/O, no lock.
"""

from __future__ import annotations

import math
from bisect import bisect_right

AGE_S_MIN = 0.05
STEPS = 2
"""Classes of ages per doubling. The first one has all ages that are less."""

LEAST = 1e-6
"""Samples of less weight than this are forgotten."""


class WorkingSet:
    """The curve of one disk."""

    def __init__(self) -> None:
        self._classes: dict[int, list[float]] = {}
        """By class of age: what became dirty, and what was clean, times seconds."""
        self._curve = [(0.0, 0.0, 0.0)]
        """From which age on; the hazard until then; and what is added to that in a second."""

    def note(self, age_s: float, span_s: float, clean: float, changed: float) -> None:
        """`clean` was clean in the last `span_s`, on the average, and had an age of `age_s` in the
        end; `changed` of it became dirty. Both are parts of the disk."""
        start_s = max(0.0, age_s - span_s)
        for index in range(_class_of(start_s), _class_of(age_s) + 1):
            end_s = min(age_s, _begin_of(index + 1))
            sums = self._classes.setdefault(index, [0.0, 0.0])
            sums[0] += changed * (end_s - start_s) / span_s
            sums[1] += clean * (end_s - start_s)
            start_s = end_s

    def fade(self, passed_s: float, third_s: float) -> None:
        """`passed_s` have passed since the last call: a sample of `third_s` ago counts a third,
        since guests change what they do. The curve is made anew."""
        factor = math.exp(-passed_s / third_s)
        for sums in self._classes.values():
            sums[:] = [value * factor for value in sums]
        self._classes = {key: sums for key, sums in self._classes.items() if sums[1] > LEAST}
        self._curve = []
        for begin_s, rate in self._falling() or [(0.0, 0.0)]:
            until = self.hazard(begin_s) if self._curve else 0.0
            self._curve.append((begin_s, until, rate))

    def _falling(self) -> list[tuple[float, float]]:
        """From which age on, and the hazard of a second: less each time. (Isotonic regression.)"""
        pooled: list[tuple[float, float, float]] = []
        for index, (changed, clean_s) in sorted(self._classes.items()):
            begin_s = _begin_of(index) if pooled else 0.0
            while pooled and changed * pooled[-1][2] >= pooled[-1][1] * clean_s:
                begin_s, more, more_s = pooled.pop()
                changed, clean_s = changed + more, clean_s + more_s
            pooled.append((begin_s, changed, clean_s))
        return [(begin_s, max(0.0, changed / clean_s)) for begin_s, changed, clean_s in pooled]

    def hazard(self, age_s: float) -> float:
        """How often a place changes in this time, on the average."""
        begin_s, until, rate = self._curve[bisect_right(self._curve, (age_s, math.inf)) - 1]
        return until + rate * (age_s - begin_s)


def _class_of(age_s: float) -> int:
    return max(0, math.floor(STEPS * math.log2(age_s / AGE_S_MIN)) + 1) if age_s > 0 else 0


def _begin_of(index: int) -> float:
    return AGE_S_MIN * 2 ** ((index - 1) / STEPS) if index > 0 else 0.0
