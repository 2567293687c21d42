"""Area: a range of the disk that the copier took at some moment, and what became dirty since.

Only counts of dirty bits are known, and they do not say which guest has written. But guests that do
different things differ in when an area becomes dirty:

- *Steady*: each place is changed as often as ever, whether that is seldom or all the time. Then an
  area becomes dirty fast at first, and slower later, when what is changed often is dirty already.
- *A stream*: a guest that writes from one end to the other. Its area stays as clean as it was, and
  becomes dirty within a moment when the guest gets there. No steady guest does that.
- *Unclear*: an area that is dirty almost at once. It is hot, or a stream has followed the copier.
  If it is so again after the next visit, it is hot.

Lengths are bytes. Pure: no clock, no I/O, no lock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SURE, SURE_SIGMAS = 3.0, 2.0
"""A stream is told from chance by so many granules more than a steady guest makes dirty, and so
many standard deviations."""

UNCLEAR = 0.25
"""An area of which more than this part is dirty before anything can be compared is unclear."""

GRANULES_MIN = 16
"""A smaller area is neither unclear nor part of a stream: it can be dirty by chance."""

FULL = 0.999
"""A part that is dirty to more than this is dirty as a whole: its hazard is not known better."""


def hazard(part: float) -> float:
    """The expected number of changes of a place, where `part` of all places has changed."""
    return -math.log(1 - min(FULL, part))


@dataclass(frozen=True, slots=True)
class Change:
    """What became dirty in an area between two looks. `clean`: what was clean, on the average.
    Negative: what was told before is taken back. Where the copier has left something out, only
    streams are told."""

    age_s: float
    """Since the copier was there."""
    span_s: float
    clean: float
    steady: float
    """Perhaps unclear."""
    clear: float
    """Without what is unclear."""
    streamed: float


class Area:
    """One range, of whole granules."""

    def __init__(self, start: int, length: int, granularity: int) -> None:
        self.start = start
        self.length = length
        self._granularity = granularity
        self.is_unclear = self._was_unclear = False
        self.forget()

    def forget(self) -> None:
        """It is not known any more what guests have changed here."""
        self.taken_s: float | None = None
        """When the copier was here; None: not known."""
        self.left_out = 0
        """What the copier left dirty then (hot_last.py)."""
        self.dirty = 0
        """Beside that, at the last look."""
        self.streamed = 0.0
        self.clear = 0.0
        self._seen_s = 0.0
        self._marks: list[tuple[float, float]] = []
        """Ages, each twice the one before or more, and the part that was dirty then. The last
        two."""

    def take(self, at_s: float, left_out: int = 0) -> None:
        """The copier was here, and has left out so much."""
        self._was_unclear = self.is_unclear
        self.forget()
        self.taken_s = self._seen_s = at_s
        self.left_out, self.is_unclear = left_out, False

    def look(self, now_s: float, dirty: int) -> Change | None:
        """`dirty` is dirty now. None: it is not known what was clean."""
        length = self.length - self.left_out
        if self.taken_s is None or now_s <= self._seen_s or length <= 0:
            return None
        age_s, span_s = now_s - self.taken_s, now_s - self._seen_s
        before, self.dirty, self._seen_s = self.dirty, max(0, dirty - self.left_out), now_s
        streamed = self._look_for_a_stream(age_s, self.dirty / length, length)
        if self.left_out:
            return Change(age_s, span_s, 0.0, 0.0, 0.0, streamed)
        clean = length - (before + self.dirty) / 2
        steady = max(0, self.dirty - before) - streamed
        is_clear = self._was_unclear or not self.is_unclear
        clear = steady if is_clear else -self.clear
        self.clear += clear
        return Change(age_s, span_s, clean, steady, clear, streamed)

    def _look_for_a_stream(self, age_s: float, part: float, length: int) -> float:
        """What is found to be of a stream, and was not before. `part` of `length`, which was clean,
        is dirty. A steady guest makes no more places dirty, of those that are clean, in the second
        half of a time than in the first."""
        granules = length / self._granularity
        if granules < GRANULES_MIN:
            return 0.0
        found, marks = 0.0, self._marks
        old = next((mark for mark in reversed(marks) if mark[0] <= age_s / 2), None)
        if old is None:
            self.is_unclear = self.is_unclear or part > UNCLEAR
        else:
            times = age_s / old[0]
            steady = 1 - math.exp(-times * hazard(old[1]))
            chance = times * (SURE + SURE_SIGMAS * math.sqrt(granules * old[1]))
            if (part - steady) * granules > chance:
                found = max(0.0, (part - old[1]) * length - self.streamed)
                self.streamed += found
        if not marks or age_s >= 2 * marks[-1][0]:
            marks.append((age_s, part))
            del marks[:-2]
        return found
