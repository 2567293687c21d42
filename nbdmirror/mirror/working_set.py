"""WorkingSet: how much guests change in so much time, each place counted once.

A rate does not say that. A guest that writes 500 MB/s to 20 MB of its disk changes 20 MB in any
time, and a mirror of that guest keeps up with any target. So the curve is measured: for each age,
the part of what was clean at that age that is dirty now. A copier's passes over the disk give such
ranges for nothing: what the copier has taken some seconds ago was clean then.

Ages are seconds. Pure: no clock, no I/O, no lock.
"""

from __future__ import annotations

import math

AGE_S_MIN = 0.05
STEPS = 2
"""Classes of ages per doubling."""

FADE_S = 60.0
"""A sample of so much time ago counts a third: guests change what they do."""

LEAST = 1e-6
"""Samples of less weight than this part of the disk are forgotten."""

CHANGES_MIN = 16
"""Ages with fewer changes are taken together: a few can be chance."""

FULL = 0.999
"""A part that is dirty to more than this is dirty as a whole: its hazard is not known better."""


def hazard(part: float) -> float:
    """The expected number of changes of a place, where `part` of all places has changed."""
    return -math.log(1 - min(FULL, part))


class WorkingSet:
    """The curve of one disk."""

    def __init__(self, granules: int) -> None:
        self._granules = granules
        self._classes: dict[int, list[float]] = {}
        """By class of age: sums of weight, weight * age, and weight * dirty part."""
        self._points: list[tuple[float, float]] = []
        """Age and hazard, both ascending: the curve."""

    def note(self, age_s: float, part: float, weight: float) -> None:
        """Of a range that was clean `age_s` ago, `part` is dirty. `weight`: the range's length, as
        part of the disk."""
        age_s = max(age_s, AGE_S_MIN)
        sums = self._classes.setdefault(round(STEPS * math.log2(age_s / AGE_S_MIN)), [0.0] * 3)
        for index, value in enumerate((1.0, age_s, part)):
            sums[index] += weight * value

    def fade(self, passed_s: float) -> None:
        """`passed_s` have passed since the last call: the samples of that time follow, or have
        been noted. The curve is made anew."""
        factor = math.exp(-passed_s / FADE_S)
        for sums in self._classes.values():
            sums[:] = [value * factor for value in sums]
        self._classes = {key: sums for key, sums in self._classes.items() if sums[0] > LEAST}
        self._points = [(sums[1] / sums[0], hazard(sums[2] / sums[0])) for sums in self._pooled()]

    def _pooled(self) -> list[list[float]]:
        """The classes in order, pooled so that each has enough changes, and none has a smaller part
        than a younger one: what has changed stays changed. (Isotonic regression.)"""
        found: list[list[float]] = []
        for _, sums in sorted(self._classes.items()):
            found.append(list(sums))
            while len(found) > 1 and (
                found[-2][2] * self._granules < CHANGES_MIN
                or found[-2][2] / found[-2][0] > found[-1][2] / found[-1][0]
            ):
                last = found.pop()
                found[-1] = [a + b for a, b in zip(found[-1], last, strict=True)]
        return found

    def hazard(self, age_s: float) -> float:
        """How often a place changes in this time, on the average: linear between the ages that
        were measured, and beyond the highest as in the upper half of them."""
        before = high = (0.0, 0.0)
        for point in self._points:
            if point[0] >= age_s:
                return before[1] + (point[1] - before[1]) * (
                    (age_s - before[0]) / (point[0] - before[0])
                )
            before = high = point
        if not high[0]:
            return 0.0
        middle = self.hazard(high[0] / 2)
        return high[1] + (high[1] - middle) / (high[0] / 2) * (age_s - high[0])

    def part(self, age_s: float, factor: float = 1.0) -> float:
        """The part of the disk that guests change in this time. `factor`: how much more often than
        the average the places in question are changed."""
        return 1 - math.exp(-factor * self.hazard(age_s))
