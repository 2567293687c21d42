"""GuestWatch: learns from a copier's passes what guests do, for a forecast of the passes to come.

Dirty bits say little. Of what the copier was not at yet all is dirty, whoever writes there, so what
is learned of the places that were copied is taken to hold for all others: as far as it is the same
in all places. And guests do not go on for ever as they did. So there are three answers: what guests
will likely do, the least, and the most.

On the event loop's thread.
"""

from __future__ import annotations

import math

from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.mirror.area import Area, Change, hazard
from nbdmirror.mirror.areas import Areas
from nbdmirror.mirror.forecast import Guests, Place
from nbdmirror.mirror.working_set import WorkingSet

FADE_S = 60.0
"""What was seen so much time ago counts a third, or at the time that is left, if that is more."""

FLOW_S = 1.0, 5.0
FLOW_PART = 1 / 8
"""The same of streams: this part of the time since the start, within the bounds, or of the time
that is left. A stream is one place at a time, so it is seen by fits and starts: at first it must be
known soon, and later on the average."""

DOUBT = 0.3
"""Guests may do so much more or less than was learned, as part of that: so much do those that work
by turns of some seconds."""

SURE = 8.0
"""A place is as different from the average as so many changes more or fewer say: a few can be
chance."""

RECENT = 0.25
"""This part of the places, those that were copied last, is the nearest to what will be copied."""

CLEAN_MIN = 0.02
"""Nothing is concluded for the whole disk from a smaller part that is clean."""


class GuestWatch:
    """What the guests of one disk do."""

    def __init__(self, dirty: DirtyBitmap) -> None:
        self.areas = Areas(dirty)
        self._dirty = dirty
        self._clear, self._all = WorkingSet(), WorkingSet()
        """Without, and with what is unclear."""
        self._counted_s: float | None = None
        self._began_s = 0.0
        self._written = 0
        self._flow = [0.0] * 4
        """Seconds; and what became dirty in them by streams, and by others; and what was
        written."""

    def count(self, now_s: float, written_bytes: int, left_s: float) -> None:
        """Look at the whole disk. `left_s`: what is dirty is copied in this time.
        `written_bytes`: what guests have written so far, also where all was dirty."""
        if self._counted_s is None:
            self._counted_s = self._began_s = now_s
            self._written = written_bytes
        span_s, self._counted_s = now_s - self._counted_s, now_s
        for curve in (self._clear, self._all):
            curve.fade(span_s, max(FADE_S, left_s))
        streamed = steady = 0.0
        for change in self.areas.look(now_s):
            streamed, steady = streamed + change.streamed, steady + change.steady
            self._note(change)
        recent_s = min(FLOW_S[1], (now_s - self._began_s) * FLOW_PART)
        third_s = max(FLOW_S[0], recent_s, left_s * FLOW_PART)
        factor = math.exp(-span_s / third_s)
        news = span_s, streamed, steady, written_bytes - self._written
        self._flow = [factor * old + new for old, new in zip(self._flow, news, strict=True)]
        self._written = written_bytes

    def _note(self, change: Change) -> None:
        size = self._dirty.size
        for curve, changed in ((self._all, change.steady), (self._clear, change.clear)):
            curve.note(change.age_s, change.span_s, change.clean / size, changed / size)

    @property
    def _streams(self) -> float:
        """Bytes a second."""
        return self._flow[1] / self._flow[0] if self._flow[0] else 0.0

    @property
    def likely(self) -> Guests:
        return Guests(self._clear, self._streams, elsewhere=self._sameness)

    @property
    def least(self) -> Guests:
        return Guests(self._clear, self._streams, elsewhere=0.0, times=1 - DOUBT)

    @property
    def most(self) -> Guests:
        return Guests(self._all, self._streams + self._unseen, times=1 + DOUBT)

    def places(self, now_s: float) -> list[Place]:
        """The disk, for a forecast."""
        return [
            Place(
                area.length,
                dirty,
                None if area.taken_s is None else now_s - area.taken_s,
                self._factor(area, now_s),
            )
            for area, dirty in zip(self.areas.places, self.areas.dirty_bytes(), strict=True)
        ]

    @staticmethod
    def _found(area: Area) -> float:
        """The part that steady guests have changed."""
        return min(1.0, max(0.0, area.clear / area.length))

    def _factor(self, area: Area, now_s: float) -> float:
        if area.taken_s is None or area.left_out:
            return 1.0
        granules = area.length / self._dirty.granularity
        usual = self._clear.hazard(now_s - area.taken_s) * granules
        return (hazard(self._found(area)) * granules + SURE) / (usual + SURE)

    @property
    def _sameness(self) -> float:
        """1 if all places are changed alike; if all changes are in one of n, 1/n. Less if those
        that were copied last are changed less than the others."""
        now_s, granularity = self._counted_s or 0.0, self._dirty.granularity
        total = squares = 0.0
        both = []
        for area in self.areas.places:
            if area.taken_s is None or area.left_out:
                continue
            granules = area.length / granularity
            usual = granules * (1 - math.exp(-self._clear.hazard(now_s - area.taken_s)))
            found = granules * self._found(area)
            both.append((area.taken_s, usual, found))
            if usual > 0:
                total += usual
                squares += found * max(0.0, found - 1) / usual  # without chance: Poisson's
        recent = sorted(both)[-max(1, int(len(both) * RECENT)) :]
        ratio = (sum(f for *_, f in recent) + SURE) / (sum(u for _, u, _ in recent) + SURE)
        return min(1.0, ratio, total / squares if squares else 1.0)

    @property
    def _unseen(self) -> float:
        """What guests write in a second that became dirty nowhere: where all was dirty. Of steady
        guests as much is expected everywhere, as they write where it can be seen."""
        seconds, streamed, steady, written = self._flow
        if not seconds or all(place.taken_s is not None for place in self.areas.places):
            return 0.0
        clean = max(CLEAN_MIN, 1 - self._dirty.dirty_bytes / self._dirty.size)
        return max(0.0, written - streamed - steady / clean) / seconds
