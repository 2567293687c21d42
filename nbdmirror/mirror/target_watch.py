"""TargetWatch: flushes a mirror's target regularly, measures its lag, watches the copier's passes
until READY, and detects that the target does not answer any more. On the event loop's thread."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from nbdmirror.disk.alarm import Alarm
from nbdmirror.disk.tracker import Tracker
from nbdmirror.event_loop import Loop
from nbdmirror.mirror.copier import Copier
from nbdmirror.mirror.lag import Lag
from nbdmirror.mirror.outlook import Outlook
from nbdmirror.mirror.resources import Target
from nbdmirror.threads import start_thread

log = logging.getLogger(__name__)

FLUSH_S = 10.0
"""Interval of flushes, so that little is copied again when the target is lost. QEMU flushes only
for READY and at the end."""

READY_FLUSH_S = 1.0
"""Shortest interval of flushes after READY, where a flush ends the lag. A flush begins when the
data that was dirty at the last look at the lag is copied."""

FLUSH_SHARE = 0.1
"""Part of the time for such flushes: a target with slow flushes gets fewer of them, but at least
one in FLUSH_S."""

FLUSH_TAKES_S = 2.0
FLUSH_BYTES_MIN = 16 << 20
"""If a flush takes longer than FLUSH_TAKES_S, the next one comes after less data, but after at
least FLUSH_BYTES_MIN."""

HUNG_S = 60.0
"""If a target answers nothing for so long, with requests in flight, it is asked for a sign of life:
its server accepts another connection, or the target counts as lost. Only with a `reconnect-delay`,
which says what happens next. (DRBD's ko-count: 42 s. QEMU waits for ever.) Slow is not hung."""

RECONNECT_PAUSE_S = 1.0
"""A side that is lost again within this time after its last loss is not reconnected: an error."""


class TargetWatch:
    """The watch over the target of one mirror."""

    def __init__(
        self,
        *,
        copier: Copier,
        tracker: Tracker,
        target: Target,
        on_flush_error: Callable[[BaseException], None],
        loop: Loop,
        reconnect_delay_s: float,
    ) -> None:
        self._copier = copier
        self._tracker = tracker
        self._target = target
        self._on_flush_error = on_flush_error
        self._loop = loop
        self._clock = clock = loop.clock
        self._reconnect_delay_s = reconnect_delay_s
        self._reconnect_not_before_s: dict[tuple[str, str], float] = {}
        self._began_s = clock()
        self.outlook = Outlook(tracker.dirty)
        """Until READY."""
        self._lag: Lag | None = None
        self._flush_not_before_s = -math.inf
        self._flush_due_s = clock() + FLUSH_S
        self._answers = -1
        self._answered_s = 0.0
        self._asked_s: float | None = None
        """When the last sign of life was requested, if no answer came since `_answered_s`."""
        self._is_asking = False
        self._patience_s = HUNG_S
        self._is_flushing = False
        self._flush_bytes = math.inf
        self._covered_bytes = 0
        """Bytes of data that the flushes so far cover."""
        self._longest_s = 0.0
        """Longest time that an answer has taken."""

    def may_reconnect(self, operation: str, export: str = "") -> bool:
        """Whether a lost side is reconnected before the error policy decides (rule 40): the target
        if it has a reconnect-delay, the source always, since guests wait for it. Not again within
        RECONNECT_PAUSE_S. `export`: of a target that has several, the one that is lost."""
        now_s = self._clock()
        not_before_s = self._reconnect_not_before_s.get((operation, export), 0.0)
        is_waited_for = operation == "read" or self._reconnect_delay_s
        if not is_waited_for or now_s < not_before_s:
            return False
        self._reconnect_not_before_s[operation, export] = now_s + RECONNECT_PAUSE_S
        return True

    def follow(self, alarm: Alarm) -> Lag:
        """The mirror is READY, and its target was just flushed: begin to measure the lag. `alarm`:
        set while the mirror is at rest."""
        self._flush_not_before_s = self._clock() + READY_FLUSH_S
        self._copier.hot.is_ready = True
        self._lag = Lag(self._tracker, self._clock, self._began_s, alarm)
        return self._lag

    def end(self) -> None:
        """The mirror ends: stop measuring the lag."""
        if self._lag is not None:
            self._lag.end()

    @property
    def is_at_rest(self) -> bool:
        """The target's storage has everything, and no request is in flight: `look` need not be
        called."""
        return self._copier.is_idle and self._tracker.is_at_rest

    def rest_ends(self) -> None:
        """Call this before the mirror has requests in flight again. Meanwhile `look` was not
        called, and the target had nothing to answer: it was not silent."""
        if self._lag is not None:
            self._lag.look()
        self._answers, self._answered_s, self._asked_s = self._copier.answers, self._clock(), None

    def look(self, *, may_flush: bool) -> None:
        """Call this several times a second, unless the mirror is at rest."""
        if self._lag is not None:
            self._lag.look()
        if not self._copier.is_running:
            self.outlook.start_over()
            self._copier.hot.start_over(self._copier.cursor)
            return
        now_s, cursor, hot = self._clock(), self._copier.cursor, self._copier.hot
        if self._lag is None:
            sent_bytes = self._copier.written_bytes + self._copier.spared_bytes
            written_bytes = self._tracker.dirty.noted_bytes + self._tracker.written_bytes
            again_bytes = self._tracker.again_bytes
            self.outlook.look(now_s, cursor, sent_bytes, again_bytes, hot, written_bytes)
        hot.look(now_s, cursor, self.outlook.rate)
        if self._copier.is_idle or self._copier.answers != self._answers:
            if self._answers >= 0 and not self._copier.is_idle:
                self._longest_s = max(self._longest_s, now_s - self._answered_s)
            self._answers, self._answered_s, self._asked_s = self._copier.answers, now_s, None
        elif self._reconnect_delay_s and not self._is_asking:
            since_s = self._answered_s if self._asked_s is None else self._asked_s
            if now_s - since_s > self._patience_s:
                self._ask()
        if may_flush and not self._is_flushing and self._is_flush_due(now_s):
            self._flush()

    def _is_flush_due(self, now_s: float) -> bool:
        is_due = self._copier.written_bytes - self._covered_bytes >= self._flush_bytes
        if is_due or now_s >= self._flush_due_s:
            self._flush_due_s = now_s + FLUSH_S
            if not self._tracker.unflushed.is_empty:
                return True
        if self._lag is None or now_s < self._flush_not_before_s:
            return False
        return self._tracker.needs_flush

    def _ask(self) -> None:
        """Ask for a sign of life, on a helper thread, since it may not come."""
        self._is_asking = True
        answers = self._answers

        def work() -> None:
            is_there = self._target.is_server_there()
            self._loop.call_soon(lambda: heard(is_there))

        def heard(is_there: bool) -> None:
            self._is_asking = False
            self._asked_s = self._clock()
            if self._copier.answers != answers or not self._copier.is_running:
                return
            text = "its server is alive: waiting" if is_there else "the connection is given up"
            silence_s, name = self._clock() - self._answered_s, self._target.description
            log.warning("%s: has answered no request for %d s; %s", name, silence_s, text)
            if is_there:
                return
            # A server without room for another connection looks the same: wait longer next time.
            self._patience_s *= 2
            self._answered_s, self._asked_s = self._clock(), None
            self._target.give_up()

        start_thread(work, "nbdmirror-life")

    def _flush(self) -> None:
        """A flush takes longer the more data it covers. After a long flush the next one comes after
        less data, so that a pause, and other answers, do not wait for it."""
        start_s, covered_bytes = self._clock(), self._copier.written_bytes - self._covered_bytes
        self._covered_bytes += covered_bytes
        self._is_flushing = True

        def done(error: BaseException | None) -> None:
            self._is_flushing = False
            took_s = self._clock() - start_s
            self._flush_not_before_s = start_s + max(READY_FLUSH_S, took_s / FLUSH_SHARE)
            if took_s > FLUSH_TAKES_S:
                self._flush_bytes = max(FLUSH_BYTES_MIN, covered_bytes * FLUSH_TAKES_S / took_s)
            else:
                self._flush_bytes *= 2
            if error is not None:
                self._on_flush_error(error)
            else:  # the target makes progress
                self._patience_s = max(HUNG_S, 2 * self._longest_s)

        self._copier.flush(done)
