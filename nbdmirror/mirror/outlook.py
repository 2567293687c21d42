"""Outlook: watches a copier's passes over the disk, and predicts when the mirror will be in sync.

Nothing of it is on a guest's path: the dirty bits, and where the copier is, say what guests change.
After READY nothing is predicted any more. On the event loop's thread.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from itertools import pairwise

from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.mirror.areas import PLACES
from nbdmirror.mirror.forecast import Forecast, Guests, Place, forecast
from nbdmirror.mirror.guest_watch import GuestWatch
from nbdmirror.mirror.hot_last import HotLast

LOOK_S = 0.2
COUNT_S = 1.0
"""How often it is looked where the copier is, and what is dirty: twice while a place is copied,
within these bounds."""

RATE_S, STEPS_MIN, RATE_S_MAX = 10.0, 4, 60.0
"""The copier's rate is that of so much time, and of so many steps in which data was sent; of no
more than RATE_S_MAX."""

RATE_S_MIN = 2.0
"""Nothing is predicted from less, or from one step."""

NEVER_S, NEVER_PART = 40.0, 1 / 10
"""A mirror whose end is not predicted, and which did not come closer all this time, or this part of
the time that is left, does not end. Nor does one whose end was predicted again and again, and has
not come. Guests work by turns: most mirrors end while a guest is quiet."""

CLOSER = 0.99
"""A mirror has come closer if less than this part is left of what was left at the best moment, by
more than chance: where guests change some thousand granules at random, their root is chance."""

SPREAD_MIN, SPREAD_MAX = 0.05, 0.95
"""Least and largest relative error of the copier's rate."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds until the mirror is in sync: likely, and the bounds of its range. None: not known, or
    never. The earliest one may be known alone."""

    end_s: float | None
    end_s_min: float | None
    end_s_max: float | None
    behind_s: float
    """How many seconds of copying the mirror will stay behind, if it does not get in sync."""
    never: bool
    """It does not get in sync, and has not come closer for long."""

    def after(self, passed_s: float) -> Prediction:
        """The same so much later."""
        ends = self.end_s, self.end_s_min, self.end_s_max
        likely, least, most = (None if at is None else max(0.0, at - passed_s) for at in ends)
        return Prediction(likely, least, most, self.behind_s, self.never)


class Outlook:
    """The outlook of one mirror, from its start until it is READY."""

    def __init__(self, dirty: DirtyBitmap) -> None:
        self._dirty = dirty
        self._guests = GuestWatch(dirty)
        self._looked_s = math.nan
        self._count_due_s = -math.inf
        self._sent: deque[tuple[float, int]] = deque()
        """When data had been sent, and how much: from piece to piece, so that a copy in large
        pieces at long intervals is as steady as one in small pieces."""
        self._again = 0
        self.rate: float | None = None
        """Bytes a second that the copier sends when nothing holds it back but a speed limit; the
        last that is known. None: not known, or no data was sent for long."""
        self._least_left = math.inf
        self._closer_s = 0.0
        self._predicted_s = -math.inf
        self._prediction: Prediction | None = None

    def look(
        self,
        now_s: float,
        cursor: int,
        sent_bytes: int,
        again_bytes: int,
        hot: HotLast | None = None,
        written_bytes: int = 0,
    ) -> None:
        """The copier works, and takes `cursor` next; it has sent so much data. `again_bytes` became
        dirty without a guest. `hot`: what the copier leaves for last, if it does. `written_bytes`:
        what guests have written, whatever was dirty already. Call this often; it does something
        every LOOK_S."""
        if again_bytes != self._again:
            self._again = again_bytes
            self._guests.areas.forget()
        if now_s - self._looked_s < LOOK_S:
            return
        self._looked_s = now_s
        self._guests.areas.moved(now_s, cursor, hot)
        if now_s >= self._count_due_s:
            self._count(now_s, written_bytes)
            self._count_due_s = now_s + self._count_s
        self._measure(now_s - (hot.rested_s(now_s) if hot is not None else 0.0), sent_bytes)

    @property
    def _left_s(self) -> float:
        return self._dirty.dirty_bytes / self.rate if self.rate else 0.0

    @property
    def _count_s(self) -> float:
        return min(COUNT_S, max(LOOK_S, self._left_s / PLACES / 2))

    def _count(self, now_s: float, written_bytes: int) -> None:
        self._guests.count(now_s, written_bytes, self._left_s)
        left = self._dirty.dirty_granules
        if left + math.sqrt(left) < CLOSER * self._least_left:
            self._least_left, self._closer_s = left, now_s

    def _measure(self, work_s: float, sent_bytes: int) -> None:
        """`work_s`: a clock without the copier's rests."""
        sent = self._sent
        if not sent or (sent_bytes != sent[-1][1] and work_s > sent[-1][0]):
            sent.append((work_s, sent_bytes))
        while sent and work_s - sent[0][0] > (RATE_S if len(sent) > STEPS_MIN + 1 else RATE_S_MAX):
            sent.popleft()
        if not sent:
            self.rate = None
        elif len(sent) > 1:
            longest_s = max(after[0] - before[0] for before, after in pairwise(sent))
            until_s = work_s if work_s - sent[-1][0] > longest_s else sent[-1][0]
            if until_s - sent[0][0] >= COUNT_S:
                self.rate = (sent[-1][1] - sent[0][1]) / (until_s - sent[0][0])

    def start_over(self) -> None:
        """The copier does not work now. What guests change meanwhile counts."""
        self._sent.clear()
        self._guests.areas.start_over()
        self._looked_s, self._prediction = math.nan, None
        self._least_left = math.inf

    def forget_rate(self) -> None:
        """The speed limit was changed, and no data may be sent for long."""
        self._sent.clear()
        self.rate = self._prediction = None

    def predict(self, now_s: float) -> Prediction | None:
        """None: not enough is known. Predicted anew every COUNT_S."""
        if now_s - self._predicted_s >= COUNT_S or self._prediction is None:
            self._predicted_s, self._prediction = now_s, self._predict(now_s)
        found = self._prediction
        return None if found is None else found.after(now_s - self._predicted_s)

    def _predict(self, now_s: float) -> Prediction | None:
        rate, sent = self.rate, self._sent
        if not rate or len(sent) < 3 or sent[-1][0] - sent[0][0] < RATE_S_MIN:
            return None
        spread, guests = min(max(SPREAD_MIN, self._spread(rate)), SPREAD_MAX), self._guests
        places = guests.places(now_s)
        likely = self._follow(places, rate, guests.likely)
        least = self._follow(places, rate * (1 + spread), guests.least)
        if self._is_stalled(now_s - self._closer_s, likely.end_s):
            return Prediction(None, None, None, likely.behind_s or self._left_s, never=True)
        if likely.end_s is None:
            return Prediction(None, least.end_s, None, likely.behind_s, never=False)
        most = self._follow(places, rate * (1 - spread), guests.most)
        return Prediction(likely.end_s, least.end_s, most.end_s, 0.0, never=False)

    def _is_stalled(self, stalled_s: float, end_s: float | None) -> bool:
        """Whether the mirror does not end; it did not come closer for `stalled_s`."""
        patience_s = max(NEVER_S, self._left_s * NEVER_PART)
        return stalled_s >= patience_s and (end_s is None or end_s < stalled_s)

    def _follow(self, places: list[Place], rate: float, guests: Guests) -> Forecast:
        here = self._guests.areas.here
        return forecast(places, here, rate, self._dirty.granularity, guests)

    def _spread(self, rate: float) -> float:
        """The standard error of the rate, relative."""
        total = 0.0
        for (then_s, before), (at_s, after) in pairwise(self._sent):
            total += (after - before - rate * (at_s - then_s)) ** 2 / (at_s - then_s)
        span_s = self._sent[-1][0] - self._sent[0][0]
        return math.sqrt(total / span_s / (len(self._sent) - 1)) / rate
