"""RateLimit: when a copier may begin its next claim: speed limit, rounds, evenness of a round.

On the event loop's thread.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable

from nbdmirror.disk.bitmap import DirtyBitmap

SLICE_S = 0.1
"""With a speed limit no claim is larger than the limit allows in this time (QEMU's
BLOCK_JOB_SLICE_TIME)."""

LATE_S = 0.01
"""A claim that begins late, as its timer did, is made up for within so much time. Small claims are
limited hundreds of times a second, and would lose a fifth of the limit."""

ROUND_S_MIN, ROUND_S_MAX = 0.05, 0.25
"""Least time of a round after READY: how far the target may lag behind, beside the time that copies
take. QEMU's is 0.1 s. In a long round, regions that guests write again and again are sent less
often; after a short round little is left to send at the end of the job. So a round is the longer,
the more the round before it had to carry."""

ROUND_BYTES = 64 << 20
"""A round that carried so much is followed by one of ROUND_S_MAX. The root of a part makes the
round shorter: with a steady load it converges, whether guests write in a few places or in many."""

CLAIM_BYTES = 32 << 10
"""What a claim costs beside its bytes: a tenth of a millisecond of the loop's time."""

SPREAD = 0.5
"""Within a round, what is dirty is sent at a rate at which all of it would take this part of the
round. A burst at the round's beginning would delay guests' requests."""

TICKS = 25
"""A round has so many ticks. What is due within one tick is sent together."""


class Haste(enum.Enum):
    """How fast a copier works."""

    LAG = "lag"
    """A round over the disk takes at least ROUND_S_MIN: a range that guests write again and again
    is copied once in each round. What is dirty is sent evenly."""

    STEADY = "steady"
    """As fast as the speed limit allows."""

    GUESTS_WAIT = "guests wait"
    """Guests' writes are held: the speed limit is ignored."""


class RateLimit:
    """`pump` is called when a claim that had to wait may begin."""

    def __init__(
        self,
        clock: Callable[[], float],
        call_later: Callable[[float, Callable[[], None]], object],
        pump: Callable[[], None],
        dirty: DirtyBitmap,
    ) -> None:
        self.speed_bytes_per_s = 0
        """0: no limit. As in QEMU the limit holds between claims; requests in flight are not
        delayed."""
        self.haste = Haste.STEADY
        self._clock = clock
        self._call_later = call_later
        self._pump = pump
        self._next_start_s = 0.0
        self._round_not_before_s = 0.0
        self._round_s = ROUND_S_MIN
        self._carried_bytes = 0
        """What this round had to carry so far."""
        self._dirty = dirty
        self._tick_began_s = -math.inf
        self._due_granules = 0
        """That may yet be claimed in this tick; below zero if a claim had more than were due."""
        self._timer_at_s = math.inf

    def set_speed(self, speed_bytes_per_s: int) -> None:
        """Takes effect with the next claim."""
        self.speed_bytes_per_s = speed_bytes_per_s
        self._next_start_s = self._clock()

    @property
    def claim_bytes_max(self) -> int | None:
        """Largest claim in bytes; None: no limit."""
        return max(1, int(self.speed_bytes_per_s * SLICE_S)) if self.speed_bytes_per_s else None

    @property
    def is_limiting(self) -> bool:
        """The speed limit is why a claim may not begin now."""
        if not self.speed_bytes_per_s or self.haste is Haste.GUESTS_WAIT:
            return False
        return self._clock() < self._next_start_s

    def claimed(self, granules: int, length: int) -> None:
        """A claim begins, with `length` bytes to copy."""
        if self.haste is Haste.LAG:
            self._due_granules -= granules
            self._carried_bytes += CLAIM_BYTES + length

    def account(self, length: int) -> None:
        """`length` bytes are being copied."""
        if self.speed_bytes_per_s:
            start_s = max(self._next_start_s, self._clock() - LATE_S)
            self._next_start_s = start_s + length / self.speed_bytes_per_s

    def may_start(self) -> bool:
        """Whether a claim may begin now."""
        if self.haste is Haste.GUESTS_WAIT:
            return True
        if self.speed_bytes_per_s and self._must_wait(self._next_start_s):
            return False
        return self.haste is not Haste.LAG or self._is_due()

    def _is_due(self) -> bool:
        now_s = self._clock()
        tick_s = self._round_s / TICKS
        ticks = (now_s - self._tick_began_s) / tick_s
        if ticks >= 1:
            if not (dirty := self._dirty.dirty_granules):
                self._due_granules = 0
                return False  # without a timer
            share = math.ceil(dirty / TICKS / SPREAD)
            self._due_granules = int(min(share, self._due_granules + share * ticks))
            self._tick_began_s = now_s
        return self._due_granules > 0 or not self._must_wait(self._tick_began_s + tick_s)

    def may_begin_round(self, not_before_s: float) -> bool:
        """Whether a round over the disk may begin now; if so, it begins. `not_before_s`: the copier
        rests, unless guests wait."""
        if self.haste is Haste.GUESTS_WAIT:
            return True
        if self.haste is Haste.STEADY:
            return not self._must_wait(not_before_s)
        if self._must_wait(self._round_not_before_s):
            return False
        part = min(1.0, self._carried_bytes / ROUND_BYTES)
        self._round_s = max(ROUND_S_MIN, ROUND_S_MAX * math.sqrt(part))
        self._carried_bytes = 0
        self._round_not_before_s = self._clock() + self._round_s
        return True

    def _must_wait(self, until_s: float) -> bool:
        """Whether `until_s` is in the future; if so, `pump` is called in time."""
        now_s = self._clock()
        at_s = min(until_s, now_s + SLICE_S)
        if now_s < until_s and at_s < self._timer_at_s:  # one that is set for later fires in vain
            self._timer_at_s = at_s
            self._call_later(at_s - now_s, self._on_timer)
        return now_s < until_s

    def _on_timer(self) -> None:
        self._timer_at_s = math.inf
        self._pump()
