"""Outlook: watches a copier's passes over the disk, and predicts when the mirror will be in sync.

Nothing of it is on a guest's path: the dirty bits, and where the copier is, say what guests change.
After READY nothing is predicted any more. On the event loop's thread.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.mirror.forecast import Forecast, Place, forecast
from nbdmirror.mirror.hot_last import HotLast
from nbdmirror.mirror.working_set import WorkingSet

PLACES = 64
"""Parts of the disk that are looked at one by one."""

LOOK_S = 0.2
COUNT_S = 1.0
"""How often the range that was just copied is looked at, and the whole disk."""

FRESH_MAX = 8
"""Ranges that were just copied, for what guests change within a second or two."""

RATE_S = 10.0
"""The copier's rate is that of so much time."""

RATE_S_MIN = 2.0
"""Nothing is predicted from less."""

NEVER_S = 40.0
"""A mirror whose end is not predicted, and which did not come closer all this time, does not end.
Guests work by turns: most mirrors end while a guest is quiet."""

CLOSER = 0.99
"""A mirror has come closer if less than this part is left of what was left at the best moment, by
more than chance: where guests change some thousand granules at random, their root is chance."""

SPREAD_MIN = 0.05
"""Least relative error of a prediction."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds until the mirror is in sync: likely, and the bounds of its range. None: not known, or
    never."""

    end_s: float | None
    end_s_min: float | None
    end_s_max: float | None
    behind_s: float
    """How many seconds of copying the mirror will stay behind, if it does not get in sync."""
    never: bool
    """It does not get in sync, and has not come closer for NEVER_S."""

    def after(self, passed_s: float) -> Prediction:
        """The same so much later."""
        ends = self.end_s, self.end_s_min, self.end_s_max
        likely, least, most = (None if at is None else max(0.0, at - passed_s) for at in ends)
        return Prediction(likely, least, most, self.behind_s, self.never)


@dataclass(frozen=True, slots=True)
class _Fresh:
    offset: int
    length: int
    time_s: float


class Outlook:
    """The outlook of one mirror, from its start until it is READY."""

    def __init__(self, dirty: DirtyBitmap) -> None:
        granules = -(-dirty.size // dirty.granularity)
        self.working_set = WorkingSet(granules)
        self._dirty = dirty
        count = max(1, min(PLACES, granules))
        edges = [index * granules // count * dirty.granularity for index in range(count)]
        self._starts, self._ends = edges, [*edges[1:], dirty.size]
        self._visited_s: list[float | None] = [None] * count
        self._is_left_out = [False] * count
        """The last visit has left out what is hot: not all of the place was clean then."""
        self._hot: HotLast | None = None
        self._cursor, self._cursor_s = 0, math.nan
        self._entered_s = math.nan
        """When the copier entered the place that it is in."""
        self._counted_s = -math.inf
        self._fresh: deque[_Fresh] = deque(maxlen=FRESH_MAX)
        self._sent: deque[tuple[float, int]] = deque()
        self._again = 0
        self.rate: float | None = None
        """Bytes a second that the copier sends when nothing holds it back; the last that is known.
        None: not known."""
        self._least_left = math.inf
        self._closer_s = 0.0
        self._predicted_s = self._said_s = -math.inf
        """For which look at the disk there is a prediction, and when it was made."""
        self._prediction: Prediction | None = None

    def look(
        self,
        now_s: float,
        cursor: int,
        sent_bytes: int,
        again_bytes: int,
        hot: HotLast | None = None,
    ) -> None:
        """The copier works, and takes `cursor` next; it has sent so much data. `again_bytes` became
        dirty without a guest. `hot`: what the copier leaves for last, if it does. Call this often;
        it does something every LOOK_S."""
        self._hot = hot
        if again_bytes != self._again:
            self._again = again_bytes
            self._visited_s = [None] * len(self._visited_s)
            self._fresh.clear()
        if now_s - self._cursor_s < LOOK_S:
            return
        if not math.isnan(self._cursor_s):
            self._moved(now_s, cursor)
        else:
            self._entered_s = now_s
        self._cursor, self._cursor_s = cursor, now_s
        for fresh in self._fresh:
            self._note(now_s - fresh.time_s, fresh.offset, fresh.length)
        if now_s - self._counted_s >= COUNT_S:
            self._count(now_s)
            left = self._dirty.dirty_granules
            if left + math.sqrt(left) < CLOSER * self._least_left:
                self._least_left, self._closer_s = left, now_s
            work_s = now_s - hot.rested_s(now_s) if hot is not None else now_s
            if not self._sent or work_s > self._sent[-1][0]:
                self._sent.append((work_s, sent_bytes))
            while work_s - self._sent[0][0] > RATE_S:
                self._sent.popleft()
            if (span_s := work_s - self._sent[0][0]) >= COUNT_S:
                self.rate = (sent_bytes - self._sent[0][1]) / span_s

    def start_over(self) -> None:
        """The copier does not work now. What guests change meanwhile counts."""
        self._sent.clear()
        self._cursor_s, self._prediction = math.nan, None
        self._least_left = math.inf

    def predict(self, now_s: float) -> Prediction | None:
        """None: not enough is known. Predicted anew every COUNT_S."""
        if self._predicted_s != self._counted_s:
            self._predicted_s, self._prediction = self._counted_s, self._predict(now_s)
            self._said_s = now_s
        found = self._prediction
        return None if found is None else found.after(now_s - self._said_s)

    def _predict(self, now_s: float) -> Prediction | None:
        if not self._sent or self._sent[-1][0] - self._sent[0][0] < RATE_S_MIN:
            return None
        rate = self.rate
        if not rate:
            return None
        spread = max(SPREAD_MIN, self._spread(rate))
        places = self._places(now_s)
        likely = self._follow(places, rate)
        if likely.end_s is not None:
            least, most = (self._follow(places, rate * (1 + sign * spread)) for sign in (1, -1))
            return Prediction(likely.end_s, least.end_s, most.end_s, 0.0, never=False)
        is_sure = now_s - self._closer_s >= NEVER_S
        return Prediction(None, None, None, likely.behind_s, never=is_sure)

    def _follow(self, places: list[Place], rate: float) -> Forecast:
        index = sum(end <= self._cursor for end in self._ends[:-1])
        return forecast(places, index, rate, self.working_set, self._dirty.granularity)

    @property
    def _is_held(self) -> bool:
        return self._hot is not None and self._hot.held is not None

    def _spread(self, rate: float) -> float:
        """The standard error of the rate, relative."""
        steps = [
            (after[1] - before[1]) / (after[0] - before[0])
            for before, after in zip(self._sent, list(self._sent)[1:], strict=False)
        ]
        variance = sum((step - rate) ** 2 for step in steps) / len(steps)
        return math.sqrt(variance / len(steps)) / rate

    def _places(self, now_s: float) -> list[Place]:
        return [
            Place(
                end - start,
                self._dirty.bytes_in(start, end - start),
                None if visited_s is None else now_s - visited_s,
                self._hot.found.bytes_in(start, end - start) if self._hot and is_left_out else 0,
            )
            for start, end, visited_s, is_left_out in self._visits()
        ]

    def _visits(self) -> Iterator[tuple[int, int, float | None, bool]]:
        return zip(self._starts, self._ends, self._visited_s, self._is_left_out, strict=True)

    def _moved(self, now_s: float, cursor: int) -> None:
        """The copier went on, perhaps past the disk's end and on from its start."""
        before, since_s = self._cursor, self._cursor_s
        is_around = cursor < before
        way = cursor - before + (self._dirty.size if is_around else 0)
        if not way:
            return
        last = len(self._ends) - 1
        passed = [(end, i) for i, end in enumerate(self._ends) if end > before and i < last]
        if is_around:
            passed += [(self._dirty.size, last)]
            passed += [(end + self._dirty.size, i) for i, end in enumerate(self._ends) if i < last]
        for end, index in passed:
            if end - before > way:
                break
            left_s = since_s + (now_s - since_s) * (end - before) / way
            self._visited_s[index] = (self._entered_s + left_s) / 2
            self._is_left_out[index] = self._is_held
            self._entered_s = left_s
        if not is_around and not self._is_held:
            start = -(-before // self._dirty.granularity) * self._dirty.granularity
            if cursor > start:
                self._fresh.append(_Fresh(start, cursor - start, (since_s + now_s) / 2))

    def _count(self, now_s: float) -> None:
        if not math.isinf(self._counted_s):
            self.working_set.fade(now_s - self._counted_s)
        self._counted_s = now_s
        for start, end, visited_s, is_left_out in self._visits():
            if visited_s is not None and not is_left_out:
                self._note(now_s - visited_s, start, end - start)

    def _note(self, age_s: float, offset: int, length: int) -> None:
        part = self._dirty.bytes_in(offset, length) / length
        self.working_set.note(age_s, part, length / self._dirty.size)
