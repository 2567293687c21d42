"""RateLimit: when a copier may begin its next claim: the speed limit, and rounds.

On the event loop's thread.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

SLICE_S = 0.1
"""With a speed limit no claim is larger than the limit allows in this time (QEMU's
BLOCK_JOB_SLICE_TIME)."""

LAG_S = 0.25
"""Least time of a round after READY: how far the target may lag behind, beside the time that copies
take. With less time, regions that guests write again and again are sent more often. QEMU's is
0.1 s."""


class Haste(enum.Enum):
    """How fast a copier works."""

    LAG = "lag"
    """A round over the disk takes at least LAG_S: a range that guests write again and again is
    copied once in each round."""

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
        self._timer_is_set = False

    def set_speed(self, speed_bytes_per_s: int) -> None:
        """Takes effect with the next claim."""
        self.speed_bytes_per_s = speed_bytes_per_s
        self._next_start_s = self._clock()

    @property
    def claim_bytes_max(self) -> int | None:
        """Largest claim in bytes; None: no limit."""
        return max(1, int(self.speed_bytes_per_s * SLICE_S)) if self.speed_bytes_per_s else None

    def account(self, length: int) -> None:
        """`length` bytes are being copied."""
        if self.speed_bytes_per_s:
            start_s = max(self._next_start_s, self._clock())
            self._next_start_s = start_s + length / self.speed_bytes_per_s

    def may_start(self) -> bool:
        """Whether a claim may begin now."""
        if not self.speed_bytes_per_s or self.haste is Haste.GUESTS_WAIT:
            return True
        return not self._must_wait(self._next_start_s)

    def may_begin_round(self) -> bool:
        """Whether a round over the disk may begin now; if so, it begins."""
        if self.haste is not Haste.LAG:
            return True
        if self._must_wait(self._round_not_before_s):
            return False
        self._round_not_before_s = self._clock() + LAG_S
        return True

    def _must_wait(self, until_s: float) -> bool:
        """Whether `until_s` is in the future; if so, `pump` is called in time."""
        wait_s = until_s - self._clock()
        if wait_s > 0 and not self._timer_is_set:
            self._timer_is_set = True
            self._call_later(min(wait_s, SLICE_S), self._on_timer)
        return wait_s > 0

    def _on_timer(self) -> None:
        self._timer_is_set = False
        self._pump()
