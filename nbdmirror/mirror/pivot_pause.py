"""PivotPause: how long a pivot may hold guests' writes, and how long one would now.

Without a limit of the user the pause is bounded by quiesce.LIMIT_S alone: writes are held, and
continue if the target is not level in time. With one, writes are held only while the rest fits:
what is left, at the speed of the copier, and a flush. An estimate can be wrong, so the limit is a
bound too. After an attempt that failed guests are left alone for a while.

On the event loop's thread.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Protocol

from nbdmirror.backoff import Backoff
from nbdmirror.devices.base import Done
from nbdmirror.disk.disk import Disk
from nbdmirror.disk.throttle import Throttle
from nbdmirror.disk.tracker import Tracker
from nbdmirror.event_loop import Loop
from nbdmirror.mirror.copier import Copier
from nbdmirror.mirror.group import HOLD_S
from nbdmirror.mirror.options import MirrorOptions
from nbdmirror.mirror.quiesce import LEVEL_BYTES, LIMIT_S, Quiesce
from nbdmirror.mirror.target_watch import TargetWatch
from nbdmirror.mirror.waits import Waits

RECENT = 5
"""Between two attempts guests leave a good moment now and then: of so many looks at what is left,
a second apart, the best one counts."""

ALONE_S = 1.0, 16.0
"""After the first attempt that failed, and at most, guests are not held for so long."""


class Mirror(Protocol):
    """What is used of a mirror job."""

    disk: Disk
    tracker: Tracker
    copier: Copier
    throttle: Throttle
    waits: Waits
    watch: TargetWatch

    @property
    def options(self) -> MirrorOptions: ...


class PivotPause:
    """The pause of one mirror's pivot."""

    def __init__(self, mirror: Mirror, loop: Loop) -> None:
        self._mirror = mirror
        self._loop = loop
        self._left: deque[int] = deque(maxlen=RECENT)
        self._record_s = 0.0
        """How long it took to prepare the record of the end. To commit it takes no longer."""
        self._attempt: Quiesce | None = None
        """The last one."""
        self._alone = Backoff(*ALONE_S)
        self._not_before_s = -math.inf

    @property
    def limit_s(self) -> float:
        """Longest time that guests' writes are held in one attempt, without the record's."""
        allowed_s = self._mirror.options.max_pause_s
        return LIMIT_S if allowed_s is None else max(0.0, allowed_s - self._record_s)

    @property
    def hold_s(self) -> float:
        """How much longer a level mirror may hold its guest."""
        if self._mirror.options.max_pause_s is None or self._attempt is None:
            return HOLD_S
        return min(HOLD_S, max(0.0, self.limit_s - self._attempt.held_s))

    def timed(self, prepare: Callable[[Done], None]) -> Callable[[Done], None]:
        """The step that prepares the record of the end."""

        def step(done: Done) -> None:
            began_s = self._loop.clock()

            def then(error: BaseException | None) -> None:
                self._record_s = self._loop.clock() - began_s
                done(error)

            prepare(then)

        return step

    def attempt(
        self,
        *,
        on_level: Callable[[], None],
        on_timeout: Callable[[], None],
        on_flush_error: Callable[[BaseException], None],
    ) -> Quiesce:
        """An attempt to bring the target level, within the limit."""

        def timed_out() -> None:
            self._not_before_s = self._loop.clock() + self._alone.next_s()
            on_timeout()

        mirror = self._mirror
        self._attempt = Quiesce(
            ledger=mirror.disk.ledger,
            tracker=mirror.tracker,
            copier=mirror.copier,
            loop=self._loop,
            on_level=on_level,
            on_timeout=timed_out,
            on_flush_error=on_flush_error,
            limit_s=lambda: self.limit_s,
            fits=self._fits,
            before_hold=lambda: mirror.throttle.release("guests' writes are held for the pivot"),
        )
        return self._attempt

    def look(self) -> None:
        """Call this about once a second, after READY."""
        self._left.append(self._left_bytes)

    @property
    def predicted_s(self) -> float | None:
        """How long a pivot would hold guests' writes; None if not known."""
        return self._pause_s(min([*self._left, self._left_bytes]))

    @property
    def is_too_long(self) -> bool:
        """A pivot would hold guests' writes for longer than is allowed, or has done so in vain."""
        allowed_s, pause_s = self._mirror.options.max_pause_s, self.predicted_s
        if allowed_s is None:
            return self._not_before_s > -math.inf
        return pause_s is not None and pause_s > allowed_s

    @property
    def is_copy_too_long(self) -> bool:
        """What is left to copy is why writes may not be held now, or were held in vain. (A flush of
        the target may be the reason too: less to copy does not help then.)"""
        allowed_s = self._mirror.options.max_pause_s
        if allowed_s is None:
            return self._not_before_s > -math.inf
        without_s = self._pause_s(0)
        return without_s is not None and without_s <= allowed_s and not self._fits()

    @property
    def _left_bytes(self) -> int:
        return self._mirror.tracker.dirty.dirty_bytes + self._mirror.tracker.in_flight_bytes

    def _pause_s(self, left_bytes: int) -> float | None:
        rate = self._mirror.watch.outlook.rate
        if rate is None and left_bytes > LEVEL_BYTES:
            return None
        copy_s = left_bytes / rate if rate else 0.0
        return self._record_s + copy_s + self._mirror.waits.last_flush_s

    def _fits(self) -> bool:
        """Whether guests' writes may be held now."""
        allowed_s = self._mirror.options.max_pause_s
        if allowed_s is None:
            return True
        pause_s = self._pause_s(self._left_bytes)
        is_short = pause_s is not None and pause_s <= allowed_s
        return is_short and self._loop.clock() >= self._not_before_s
