"""Cut: one moment at which no guest's change is in progress, on one disk or on several.

    start -> draining -> taken (`take`, in one step of the loop) -> open
                 '-----> late: nothing was taken, try again later

Changing requests are held until those in progress have ended, for a bound. Flushes are neither held
nor waited for: they do not change the content. Several disks are cut at one moment: behind the
gates of all of them, when all are idle.

On the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nbdmirror.disk.ledger import Ledger
from nbdmirror.event_loop import Loop, Timer

CUT_LIMIT_S = 0.05
"""Longest time that guests' changes are held for one attempt."""


class Cut:
    """One attempt. One of `on_taken` and `on_late` is called once, after the gates were opened,
    with how long guests' changes were held, in seconds; neither after `abandon`."""

    def __init__(
        self,
        ledgers: Sequence[Ledger],
        *,
        loop: Loop,
        take: Callable[[], None],
        on_taken: Callable[[float], None],
        on_late: Callable[[float], None],
        limit_s: float = CUT_LIMIT_S,
    ) -> None:
        """`take` is called behind the closed gates. It must be quick, and must not fail."""
        self._ledgers = ledgers
        self._loop = loop
        self._take = take
        self._on_taken = on_taken
        self._on_late = on_late
        self._limit_s = limit_s
        self._closed_at_s = 0.0
        self._timer: Timer | None = None
        self.late: list[Ledger] = []
        """Those with requests that had not ended at the bound."""

    def start(self) -> None:
        """Close the gates."""
        self._closed_at_s = self._loop.clock()
        self._timer = self._loop.call_later(self._limit_s, self._time_out)
        for ledger in self._ledgers:
            ledger.close_gate(self._on_idle, holds_flushes=False)
        self._look()

    def abandon(self) -> None:
        """Open the gates, if they are closed. For an attempt that is not needed any more."""
        self._open()

    def _on_idle(self) -> None:
        """From a guest's thread, or from `start`."""
        self._loop.call_soon(self._look)

    def _look(self) -> None:
        if self._timer is not None and all(ledger.is_idle for ledger in self._ledgers):
            self._take()
            self._on_taken(self._open())

    def _time_out(self) -> None:
        self.late = [ledger for ledger in self._ledgers if not ledger.is_idle] or [*self._ledgers]
        self._on_late(self._open())

    def _open(self) -> float:
        timer, self._timer = self._timer, None
        if timer is None:
            return 0.0
        timer.cancel()
        for ledger in self._ledgers:
            ledger.open_gate()
        return self._loop.clock() - self._closed_at_s
