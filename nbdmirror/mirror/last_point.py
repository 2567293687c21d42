"""LastPoint: how a job with points ends: the image becomes the last point.

    converging -> draining -> sending -> handing over -> level      (complete)
    '- guests -'  '------- the gate is closed ------- ... release'

    converging -> level                                             (cancel)

With a pivot guests are held from the last cut on, so that the image has all that they have changed.
Without one nobody is held, and the last point has all that was answered before the attempt began: a
guest may have been shut down before. So a point that is in progress then is not the last one: it
was cut before. As Quiesce, the attempt has a bound: then guests continue, and `on_timeout` is
called. On the event loop's thread.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

from nbdmirror.disk.ledger import Ledger
from nbdmirror.event_loop import Loop, Timer
from nbdmirror.mirror.point_run import PointRun
from nbdmirror.mirror.quiesce import CONVERGE_S, LEVEL_BYTES_MIN, LIMIT_S, Attempt


class LastStep(enum.Enum):
    """The steps, in order."""

    CONVERGING = "converging"
    DRAINING = "draining"
    SENDING = "sending"
    HANDING_OVER = "handing over"
    LEVEL = "level"
    OPEN = "open"


class LastPoint(Attempt):
    """One attempt, which begins with `advance`. One of `on_level` and `on_timeout` is called once,
    unless `release` comes first; errors go to the owner of `run`."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        run: PointRun,
        loop: Loop,
        hands_over: bool,
        is_cut: bool = False,
        on_level: Callable[[], None],
        on_timeout: Callable[[], None],
    ) -> None:
        """`hands_over`: the job pivots to the image. `is_cut`: the point in progress is the last
        one, if there is no pivot."""
        self.step = LastStep.CONVERGING
        self._ledger = ledger
        self._run = run
        self._loop = loop
        self._hands_over = hands_over
        self._on_level = on_level
        self._on_timeout = on_timeout
        self._since_s = loop.clock()
        self._count = run.count if is_cut else None
        """Of the points that were committed before the last one; None: one may be in progress."""
        self._closed_at_s = 0.0
        self._timer: Timer | None = None

    def advance(self) -> None:
        run = self._run
        if not run.is_idle:
            return
        if self.step is LastStep.CONVERGING:
            self._converge()
        elif self.step is LastStep.DRAINING and self._ledger.is_idle:
            self.step = LastStep.SENDING
            self.advance()
        elif self.step is LastStep.SENDING and run.has_changes:
            if run.is_free:
                run.cut_here()
            else:  # there is no room for the last point yet
                run.apply_all()
        elif self.step in (LastStep.SENDING, LastStep.HANDING_OVER) and not run.is_handed_over:
            self.step = LastStep.HANDING_OVER
            run.hand_over()
        elif self.step is LastStep.HANDING_OVER and run.left_bytes:
            self._time_out()  # the disk has changed by itself, behind the gate
        elif self.step is LastStep.HANDING_OVER:
            self._level()

    def release(self) -> float | None:
        step, self.step = self.step, LastStep.OPEN
        if self._timer is None or step is LastStep.OPEN:
            return None
        self._timer.cancel()
        self._ledger.open_gate()
        return self._loop.clock() - self._closed_at_s

    def _converge(self) -> None:
        run = self._run
        if self._count is None:
            self._count = run.count
        has_point = run.count > self._count or not run.has_changes
        if not self._hands_over:
            if has_point and run.is_applied and run.is_quiet:
                self._level()
            elif not (has_point and run.is_applied):
                run.catch_up()
            return
        is_close = run.is_applied and has_point and run.left_bytes <= LEVEL_BYTES_MIN
        is_late = self._loop.clock() - self._since_s >= CONVERGE_S
        is_late = is_late and not run.waits_for_applier  # guests are not held for what that does
        if not run.is_handed_over and run.count and (is_close or is_late):
            self._close_gate()
        else:
            run.catch_up()

    def _close_gate(self) -> None:
        self.step = LastStep.DRAINING
        self._closed_at_s = self._loop.clock()
        self._timer = self._loop.call_later(LIMIT_S, self._time_out)
        self._ledger.close_gate(lambda: self._loop.call_soon(self.advance))
        self.advance()

    def _level(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.step = LastStep.LEVEL
        self._on_level()

    def _time_out(self) -> None:
        if self.step not in (LastStep.LEVEL, LastStep.OPEN):
            self.release()
            self._on_timeout()
