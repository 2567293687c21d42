"""Forecast: when a mirror will be in sync, and whether, by following its next passes over the disk.

A copier goes over the disk again and again, and takes what is dirty there. A pass takes as long as
what it finds takes to copy; what it finds is what guests have changed since the last pass was at
the same place, which the working set knows (working_set.py). If each pass is shorter than the one
before, the mirror ends. If the passes become as long as each other, the mirror stays that far
behind: the target takes a pass's time for what guests change in a pass's time.

Pure: no clock, no I/O, no lock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nbdmirror.mirror.working_set import WorkingSet, hazard

PASSES_MAX = 64
"""After so many passes a mirror that still comes closer is as good as one that does not."""

PASS_S_MIN = 0.05
"""A pass that is shorter than this is followed by none: the mirror is in sync."""

EVEN = 0.995
"""A pass of more than this part of the one before: passes do not become shorter any more."""

SURE = 8.0
"""A place is as different from the average as so many changes more or fewer say: a few can be
chance."""


@dataclass(frozen=True, slots=True)
class Place:
    """A part of the disk. Lengths are bytes."""

    length: int
    dirty: int
    age_s: float | None
    """Since the copier was here; None: it was not yet, or more became dirty than guests change."""
    left_out: int = 0
    """What the copier left dirty then (hot_last.py)."""

    def factor(self, working_set: WorkingSet, granularity: int) -> float:
        """How much more often than the average guests change this part."""
        if self.age_s is None:
            return 1.0
        length = self.length - self.left_out
        granules = length / granularity
        usual = working_set.hazard(self.age_s) * granules
        found = hazard(max(0, self.dirty - self.left_out) / length) if length else 0.0
        return (found * granules + SURE) / (usual + SURE)

    def dirty_in(self, later_s: float, working_set: WorkingSet, factor: float) -> float:
        """How much is dirty so much later, if the copier does not come before."""
        age_s = self.age_s or 0.0
        then, now = (working_set.part(age, factor) for age in (age_s, age_s + later_s))
        news = (now - then) / (1 - then) if then < 1 else 0.0
        return self.dirty + (self.length - self.dirty) * news


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the passes come to."""

    end_s: float | None
    """Seconds until the mirror is in sync; None: never, as long as nothing changes."""
    behind_s: float
    """The time that it takes to copy what is dirty in the end, on the average: how far behind the
    mirror stays; 0 for one that gets in sync."""


def forecast(
    places: Sequence[Place],
    next_place: int,
    bytes_per_s: float,
    working_set: WorkingSet,
    granularity: int,
) -> Forecast:
    """Follow the passes. `places`: the disk, in order; the copier takes `next_place` next, at
    `bytes_per_s`."""
    factors = [place.factor(working_set, granularity) for place in places]
    visits_s: list[float | None] = [None] * len(places)
    now_s, shortest_s, is_even = 0.0, math.inf, False
    for first in (next_place, *[0] * PASSES_MAX):
        began_s = now_s
        for index in range(first, len(places)):
            place, factor, visit_s = places[index], factors[index], visits_s[index]
            visits_s[index] = now_s
            if visit_s is None:
                now_s += place.dirty_in(now_s, working_set, factor) / bytes_per_s
            else:
                part = working_set.part(now_s - visit_s, factor)
                now_s += place.length * part / bytes_per_s
        length_s = now_s - began_s
        if length_s <= PASS_S_MIN and not first:
            return Forecast(now_s, 0.0)
        if first:
            continue  # the rest of a pass
        if length_s > EVEN * shortest_s:
            if is_even:
                break
            is_even = True
        else:
            shortest_s, is_even = length_s, False
    left = 0.0
    for place, factor, visit_s in zip(places, factors, visits_s, strict=True):
        left += place.length * working_set.part(now_s - (visit_s or 0.0), factor)
    return Forecast(None, left / bytes_per_s)
