"""RateLimit: when a copier may begin its next claim: the speed limit, and rounds.

On the event loop's thread.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

SLICE_S = 0.1
"""With a speed limit no claim is larger than what is allowed in one slice (QEMU's
BLOCK_JOB_SLICE_TIME)."""

LAG_S = 0.25
"""Of a round, after READY: so far the target may lag behind, beside the time that copies take.
Shorter writes more to regions that guests write to again and again; QEMU looks each 0.1 s."""


class Haste(enum.Enum):
    """How much a copier hurries."""

    LAG = "lag"
    """A round over the disk takes LAG_S at least: what is written again and again is copied once a
    round."""

    STEADY = "steady"
    """As fast as the speed limit allows."""

    GUESTS_WAIT = "guests wait"
    """Guests' writes are held: the speed limit does not hold."""


class RateLimit:
    """`pump` is called when what was to wait may begin."""

    def __init__(
        self,
        clock: Callable[[], float],
        call_later: Callable[[float, Callable[[], None]], object],
        pump: Callable[[], None],
    ) -> None:
        self.speed_bytes_per_s = 0
        """0: no limit. It holds between claims, as QEMU's: what is in flight is not held back."""
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
        """None: no limit."""
        return max(1, int(self.speed_bytes_per_s * SLICE_S)) if self.speed_bytes_per_s else None

    def account(self, length: int) -> None:
        """So many bytes are on their way."""
        if self.speed_bytes_per_s:
            start_s = max(self._next_start_s, self._clock())
            self._next_start_s = start_s + length / self.speed_bytes_per_s

    def may_start(self) -> bool:
        """A claim."""
        if not self.speed_bytes_per_s or self.haste is Haste.GUESTS_WAIT:
            return True
        return not self._must_wait(self._next_start_s)

    def may_begin_round(self) -> bool:
        """If so, it begins."""
        if self.haste is not Haste.LAG:
            return True
        if self._must_wait(self._round_not_before_s):
            return False
        self._round_not_before_s = self._clock() + LAG_S
        return True

    def _must_wait(self, until_s: float) -> bool:
        """If so, what was to begin is tried again in time."""
        wait_s = until_s - self._clock()
        if wait_s > 0 and not self._timer_is_set:
            self._timer_is_set = True
            self._call_later(min(wait_s, SLICE_S), self._on_timer)
        return wait_s > 0

    def _on_timer(self) -> None:
        self._timer_is_set = False
        self._pump()
