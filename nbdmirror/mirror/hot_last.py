"""HotLast: a copy leaves for last what guests change again and again.

What is sent while its guest changes it every second is sent in vain, as long as much else is left:
it will be dirty again before the end. So a round over the disk leaves out what is hot (hot.py), if
at least as much is left that is not, and if such rounds get shorter. Rounds without it are shorter,
so guests change less else meanwhile, and the mirror comes to its end sooner. Otherwise a round
takes all.

What is hot is found by the copier's own passes: of a range that it took some time ago, what is
dirty again. How long ago, the time that is left says (PART): in a copy of hours a place that is
changed every minute is hot, and near the end only what is changed every second.

Where little but hot places is left, and rounds leave as much behind as they found, to send them
faster brings the end no closer: only a guest that pauses does. So after STALLED rounds the copier
rests for as long as they took, and sends half as much in vain.

All that changes the order and the time alone, and both within bounds. Rounds that leave something
out become shorter by a fifth each time, so all of them together take five times as long as the
first one, at most; nothing is left out where nothing else is dirty; and a rest is REST_S_MAX at
most. After READY nothing is left out: a round takes a twentieth to a quarter of a second then, and
each place is sent once in it.

No clock, no I/O. On the event loop's thread.
"""

from __future__ import annotations

import math
from collections import deque

from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.hot import HotGranules

LOOK_READY_S = 1.0
"""How often what was passed is looked at after READY, where each look is one at the whole disk: it
takes up to 2 ms where guests write all over 512 GiB."""

AGE_S_MIN = 0.5
PART = 1 / 16
"""What has become dirty again after this part of the time that the rest takes is hot, but after
AGE_S_MIN at least."""

STEPS = 8
"""Ranges that were passed within this part of the age are looked at together."""

PASSED_MAX = 64
"""Ranges that wait for a look. After very short rounds the oldest get none."""

STALLED, CLOSER = 8, 0.9
"""So many rounds that leave more than this part of what the first one has left are stalled."""

STALLED_S = 1.6
"""The same rounds must take so long. Where rounds are shorter, little is sent, and each of them may
be the one after which nothing is left."""

REST_S_MAX = 2.0

SHORTER = 0.8
"""A round that leaves out what is hot must find no more than this part of what the last one of its
kind has found beside that."""


class HotLast:
    """What one copier leaves for last."""

    def __init__(self, dirty: DirtyBitmap) -> None:
        self.found = HotGranules(dirty)
        self.age_s = AGE_S_MIN
        self.held: HotGranules | None = None
        """What the present round leaves out."""
        self.is_ready = False
        """The mirror is READY: the copier does not rest any more."""
        self.rest_until_s = -math.inf
        """No round begins before."""
        self._dirty = dirty
        self._others = math.inf
        """What else was left when a round has left something out, the last time."""
        self._stalled: tuple[int, float, int] | None = None
        """How many rounds have stalled; since when, and what was left then."""
        self._rested_s = 0.0
        self._looked_s = -math.inf
        self._cursor = 0
        self._passed: deque[tuple[float, int, int]] = deque(maxlen=PASSED_MAX)
        """Times, and the ranges that the copier passed then, from begin to end."""

    def look(self, now_s: float, cursor: int, bytes_per_s: float | None) -> None:
        """The copier works, and takes `cursor` next. `bytes_per_s`: what it takes, if that is
        known. Call this several times a second."""
        if self.is_ready and now_s - self._looked_s < LOOK_READY_S:
            return
        self._looked_s = now_s
        before, self._cursor = self._cursor, cursor
        if cursor != before:
            if cursor < before:
                self._pass(now_s, before, self._dirty.size)
                before = 0
            self._pass(now_s, before, cursor)
        left_s = self._dirty.dirty_bytes / bytes_per_s if bytes_per_s else 0.0
        self.age_s = max(AGE_S_MIN, PART * left_s)
        while self._passed and now_s - self._passed[0][0] >= self.age_s:
            _, start, end = self._passed.popleft()
            self.found.look(start, end - start)

    def _pass(self, now_s: float, start: int, end: int) -> None:
        if self._passed:
            at_s, first, last = self._passed[-1]
            if last == start and now_s - at_s < self.age_s / STEPS:
                self._passed[-1] = at_s, first, end
                return
        if start < end:
            self._passed.append((now_s, start, end))

    def start_over(self, cursor: int) -> None:
        """The copier does not work now, and takes `cursor` next. What guests change meanwhile says
        nothing."""
        self._cursor = cursor
        self._passed.clear()

    def rested_s(self, now_s: float) -> float:
        """How long the copier has rested so far."""
        return self._rested_s - max(0.0, self.rest_until_s - now_s)

    def end_round(self, now_s: float) -> None:
        """The copier has passed the disk's end."""
        left = self._dirty.dirty_bytes
        if self.held is not None or self.is_ready or left > 2 * self.found.size:
            self._stalled = None
            return
        if self._stalled is None or left < CLOSER * self._stalled[2]:
            self._stalled = 0, now_s, left
            return
        rounds, since_s, _ = self._stalled
        self._stalled = rounds + 1, *self._stalled[1:]
        if rounds + 1 >= STALLED:
            rest_s = min(REST_S_MAX, now_s - since_s)
            if rest_s < STALLED_S:
                self._stalled = None
                return
            self.rest_until_s = now_s + rest_s
            self._rested_s += rest_s
            self._stalled = None

    def begin_round(self, *, is_hurried: bool) -> None:
        """A round over the disk begins. `is_hurried`: the mirror is to get in sync, and is not only
        kept so."""
        hot_bytes, self.held = self.found.size, None
        others = self._dirty.dirty_bytes - hot_bytes
        if is_hurried and 0 < hot_bytes <= others <= SHORTER * self._others:
            self.held, self._others = self.found, others

    def release(self) -> None:
        """Nothing else is dirty: the present round takes all."""
        self.held = None
