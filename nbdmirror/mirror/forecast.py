"""Forecast: when a mirror will be in sync, and whether, by following its next passes over the disk.

A copier goes over the disk again and again, and takes what is dirty there. A pass takes as long as
what it finds takes to copy; what it finds is what guests have changed since the last pass was at
the same place, which the working set knows (working_set.py), and what streams have written
meanwhile (area.py). If each pass is shorter than the one before, the mirror ends. If the passes
become as long as each other, the mirror stays that far behind: the target takes a pass's time for
what guests change in a pass's time.

Pure: no clock, no I/O, no lock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nbdmirror.mirror.working_set import WorkingSet

PASSES_MAX = 64
"""After so many passes a mirror that still comes closer is as good as one that does not."""

PASS_S_MIN, PASS_GRANULES_MIN = 0.05, 4
"""A pass that is shorter than this, or takes fewer granules, is followed by none: the mirror is in
sync, or will be by chance."""

EVEN = 0.995
"""A pass of more than this part of the one before: passes do not become shorter any more."""


@dataclass(frozen=True, slots=True)
class Place:
    """A part of the disk. Lengths are bytes."""

    length: int
    dirty: int
    age_s: float | None
    """Since the copier was here; None: it was not yet, or more became dirty than guests change."""
    factor: float = 1.0
    """How much more often than the average guests change this part, until the copier is here
    again."""


@dataclass(frozen=True, slots=True)
class Guests:
    """What guests do."""

    working_set: WorkingSet
    stream_bytes_per_s: float = 0.0
    elsewhere: float = 1.0
    """How much more they change where the copier was not yet than where it was."""
    times: float = 1.0
    """All of this is to be taken so many times."""

    def part(self, age_s: float, later_s: float, factor: float) -> float:
        """The part of what is clean at this age that becomes dirty in the time after that."""
        hazard = self.working_set.hazard
        return 1 - math.exp(-self.times * factor * (hazard(age_s + later_s) - hazard(age_s)))

    def later(self, place: Place) -> float:
        """As Place.factor, after the copier's next visit."""
        return 1.0 if place.age_s is not None else self.elsewhere


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
    granularity: int,
    guests: Guests,
) -> Forecast:
    """Follow the passes. `places`: the disk, in order; the copier takes `next_place` next, at
    `bytes_per_s`."""
    # What streams write has to be copied as well, so all else is copied more slowly.
    rate = bytes_per_s - guests.times * guests.stream_bytes_per_s
    if rate <= 0:
        return Forecast(None, sum(place.dirty for place in places) / bytes_per_s)
    short_s = max(PASS_S_MIN, PASS_GRANULES_MIN * granularity / bytes_per_s)
    visits_s: list[float | None] = [None] * len(places)
    now_s, shortest_s, is_even = 0.0, math.inf, False
    for first in (next_place, *[0] * PASSES_MAX):
        began_s = now_s
        for index in range(first, len(places)):
            place, visit_s = places[index], visits_s[index]
            visits_s[index] = now_s
            if visit_s is None:
                news = guests.part(place.age_s or 0.0, now_s, place.factor)
                now_s += (place.dirty + (place.length - place.dirty) * news) / rate
            else:
                part = guests.part(0.0, now_s - visit_s, guests.later(place))
                now_s += place.length * part / rate
        length_s = now_s - began_s
        if first:
            continue  # the rest of a pass
        if length_s <= short_s:
            return Forecast(now_s, 0.0)
        if length_s > EVEN * shortest_s:
            if is_even:
                break
            is_even = True
        else:
            shortest_s, is_even = length_s, False
    behind_s = 0.0
    for place, visit_s in zip(places, visits_s, strict=True):
        part = guests.part(0.0, now_s - (visit_s or 0.0), guests.later(place))
        behind_s += place.length * part / rate
    return Forecast(None, behind_s)
