"""PivotPause: how long a pivot may hold guests' writes, and how long one would now.

Without a limit of the user the pause is bounded by quiesce.LIMIT_S alone: writes are held, and
continue if the target is not level in time. With one, writes are held only while the rest fits:
what is left, at the speed of the copier, and a flush. An estimate can be wrong, so the limit is a
bound too.

The speed is that of the copy before READY, or the one since, in the time in which copies were in
flight: the higher of both, since a copier with little to do is slower than it can be. A speed that
is too low would keep the pivot for ever, and one that is too high has the bound. A speed limit ends
when writes are held. So the speed of a copier that has one is a lower bound, and counts where much
is left; little takes no time.

After an attempt that failed guests are left alone for a while. One that finds no good
moment for long ends, and the record is prepared anew: one slow preparation says little of the next.

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

STEP_S, STEPS = 0.25, 8
"""The speed since READY is that of so many steps, in each of which copies were in flight for so
long."""

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
        self._steps: deque[tuple[float, int, int]] = deque(maxlen=STEPS + 1)
        """For how long copies were in flight, and the bytes of data that were sent, and answered,
        until then."""
        self._limit = 0
        """The speed limit of the steps, bytes a second."""
        self._record_s = 0.0
        """How long the last preparation of the record took. To commit takes no longer."""
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
        on_old: Callable[[], None],
        on_flush_error: Callable[[BaseException], None],
    ) -> Quiesce:
        """An attempt to bring the target level, within the limit. `on_old`: see Quiesce."""

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
            on_old=on_old,
            on_flush_error=on_flush_error,
            limit_s=lambda: self.limit_s,
            fits=self._fits,
            before_hold=lambda: mirror.throttle.release("guests' writes are held for the pivot"),
        )
        return self._attempt

    def look(self) -> None:
        """Call this about once a second, after READY."""
        self._left.append(self._left_bytes)
        mirror = self._mirror
        copier, tracker, spent_s = mirror.copier, mirror.tracker, mirror.waits.copying_s
        limit = mirror.options.speed_bytes_per_s
        if limit != self._limit:
            self._steps.clear()
            self._limit = limit
        if not self._steps or spent_s - self._steps[-1][0] >= STEP_S:
            sent_bytes = copier.written_bytes + copier.spared_bytes
            self._steps.append((spent_s, sent_bytes, sent_bytes - tracker.in_flight_bytes))

    @property
    def predicted_s(self) -> float | None:
        """How long a pivot would hold guests' writes; None if not known."""
        return self._pause_s(min([*self._left, self._left_bytes]))

    @property
    def is_too_long(self) -> bool | None:
        """A pivot would hold guests' writes for longer than is allowed, or has done so in vain.
        None: not known."""
        allowed_s, pause_s = self._mirror.options.max_pause_s, self.predicted_s
        if allowed_s is None:
            return self._not_before_s > -math.inf
        return None if pause_s is None else pause_s > allowed_s

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

    @property
    def _rate(self) -> float | None:
        """Bytes a second; None: not known."""
        return max(filter(None, (self._mirror.watch.outlook.rate, self._rate_since)), default=None)

    @property
    def _rate_since(self) -> float | None:
        """The same, since READY alone: of what was sent and answered in that time."""
        if len(self._steps) < 2 or self._limit != self._mirror.options.speed_bytes_per_s:
            return None
        (began_s, sent, _), (ended_s, _, answered) = self._steps[0], self._steps[-1]
        return max(0, answered - sent) / (ended_s - began_s)

    def _pause_s(self, left_bytes: int) -> float | None:
        rate, is_much = self._rate, left_bytes > LEVEL_BYTES
        if rate is None and is_much:
            return None
        is_limited = bool(self._mirror.options.speed_bytes_per_s)
        copy_s = left_bytes / rate if rate and (is_much or not is_limited) else 0.0
        return self._record_s + copy_s + self._mirror.waits.last_flush_s

    def _fits(self) -> bool:
        """Whether guests' writes may be held now."""
        allowed_s = self._mirror.options.max_pause_s
        if allowed_s is None:
            return True
        pause_s = self._pause_s(self._left_bytes)
        is_short = pause_s is not None and pause_s <= allowed_s
        return is_short and self._loop.clock() >= self._not_before_s
