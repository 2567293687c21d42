"""TargetWatch: what a mirror does about its target now and then: flushes it, and notices that it
does not answer any more. On the event loop's thread."""

from __future__ import annotations

from collections.abc import Callable

from nbdmirror.copier import Copier

FLUSH_S = 10.0
"""How often what the target has acknowledged is flushed, so that little is copied again when it is
lost. QEMU flushes for READY and at the end only."""

HUNG_S = 60.0
"""A target that answers nothing for so long, with requests in flight, is taken for lost where a
`reconnect-delay` says what then. (DRBD's ko-count: 42 s. QEMU waits for ever.) Slow is not hung:
any answer counts."""

RECONNECT_PAUSE_S = 1.0
"""What is lost again within this time after it was brought back is an error."""


class TargetWatch:
    def __init__(
        self,
        *,
        copier: Copier,
        kill: Callable[[], None],
        on_flush_error: Callable[[BaseException], None],
        clock: Callable[[], float],
        reconnect_delay_s: float,
    ) -> None:
        """`kill` breaks the target's connections."""
        self._copier = copier
        self._kill = kill
        self._on_flush_error = on_flush_error
        self._clock = clock
        self._reconnect_delay_s = reconnect_delay_s
        self._reconnect_not_before_s = {"read": 0.0, "write": 0.0}
        self._flush_not_before_s = clock() + FLUSH_S
        self._answers = -1
        self._answered_s = 0.0

    def may_reconnect(self, operation: str) -> bool:
        """Rule 40: a lost target is brought back before the policy is asked, where a
        reconnect-delay was given; a lost source, which guests wait for, always. Not again at once
        when that led nowhere."""
        now_s = self._clock()
        is_waited_for = operation == "read" or self._reconnect_delay_s
        if not is_waited_for or now_s < self._reconnect_not_before_s[operation]:
            return False
        self._reconnect_not_before_s[operation] = now_s + RECONNECT_PAUSE_S
        return True

    def look(self) -> None:
        """To be called several times a second while the mirror copies."""
        now_s = self._clock()
        if self._copier.is_idle or self._copier.answers != self._answers:
            self._answers, self._answered_s = self._copier.answers, now_s
        elif self._reconnect_delay_s and now_s - self._answered_s > HUNG_S:
            self._answered_s = now_s
            self._kill()
        if now_s >= self._flush_not_before_s:
            self._flush_not_before_s = now_s + FLUSH_S
            if not self._copier.tracker.unflushed.is_empty:
                self._copier.flush(self._flushed)

    def _flushed(self, error: BaseException | None) -> None:
        if error is not None:
            self._on_flush_error(error)
