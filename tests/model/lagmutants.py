"""Mutants of the lag: each is told too small, and the machine of lagmachine.py must catch it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from model.lagworld import LagWorld

from nbdmirror.disk.alarm import Alarm
from nbdmirror.disk.backlog import Backlog
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.claim import Claim, Range
from nbdmirror.disk.fine import FineBitmap
from nbdmirror.disk.tracker import Tracker
from nbdmirror.mirror.lag import Lag


def with_backlog(backlog: type[Backlog]) -> type[Tracker]:
    class BrokenTracker(Tracker):
        def __init__(self, size: int, granularity: int, **options: Any) -> None:
            super().__init__(size, granularity, **options)
            self._backlog = backlog(size, granularity)

    return BrokenTracker


class _NoClaims(Backlog):
    def begin(self, dirty: Any, claims: Any, unflushed: Any, flushing: Any) -> None:
        super().begin(dirty, (), unflushed, flushing)


class ForgetsCopiesInFlight(LagWorld):
    """A claim in flight at that moment."""

    tracker_class = with_backlog(_NoClaims)


class _NothingUnflushed(Backlog):
    def begin(self, dirty: Any, claims: Any, unflushed: Any, flushing: Any) -> None:
        super().begin(dirty, claims, DirtyBitmap(unflushed.size, unflushed.granularity), flushing)


class ForgetsTheUnflushed(LagWorld):
    """What the target has, and not on its storage."""

    tracker_class = with_backlog(_NothingUnflushed)


class _NoFlushes(Backlog):
    def begin(self, dirty: Any, claims: Any, unflushed: Any, flushing: Any) -> None:
        super().begin(dirty, claims, unflushed, ())


class ForgetsFlushesUnderWay(LagWorld):
    """What a flush covers that has not ended."""

    tracker_class = with_backlog(_NoFlushes)


class _OnlySorted(Backlog):
    def begin(self, dirty: Any, claims: Any, unflushed: Any, flushing: Any) -> None:
        assert isinstance(dirty, FineBitmap)
        known = dirty.copy()
        for offset, length in dirty._notes or ():
            granule = offset & -dirty.granularity
            if granule >> dirty._shift not in dirty._details:
                known.clear(granule, offset + length - granule + dirty.granularity)
        super().begin(known, claims, unflushed, flushing)


class ForgetsNotes(LagWorld):
    """What guests have noted and nobody has sorted (fine.py)."""

    tracker_class = with_backlog(_OnlySorted)


class _Unowned(Backlog):
    def took(self, claim: Claim, offset: int, length: int) -> None:
        self._dirty.clear(offset, length)


class CountsClaimsAsCopied(LagWorld):
    """A claim that began afterwards, as soon as it begins."""

    tracker_class = with_backlog(_Unowned)


class _NeverGivenBack(Backlog):
    def gave_back(self, claim: Claim, parts: Iterable[Range]) -> None:
        pass


class ForgetsWhatFailed(LagWorld):
    """A copy that failed, or gave a part of its claim back."""

    tracker_class = with_backlog(_NeverGivenBack)


class _AnyFlush(Backlog):
    def flush_begins(self, flushing: Iterable[DirtyBitmap]) -> None:
        if self._flushes is None:
            self._flushes = list(flushing)


class CountsAFlushTooEarly(LagWorld):
    """One that began before all was copied."""

    tracker_class = with_backlog(_AnyFlush)


class _BegunIsDone(Backlog):
    def flush_begins(self, flushing: Iterable[DirtyBitmap]) -> None:
        if self.needs_flush:
            self._flushes = []


class CountsAFlushAtItsBegin(LagWorld):
    """Not at its end."""

    tracker_class = with_backlog(_BegunIsDone)


class _NothingLost(Backlog):
    def may_be_lost(self, bitmap: DirtyBitmap) -> None:
        self._flushes = []


class ForgetsAFailedFlush(LagWorld):
    """A flush that failed counts as one that did not."""

    tracker_class = with_backlog(_NothingLost)


class ForgetsWhatALostTargetLost(LagWorld):
    """A target that came back may have lost what was not flushed."""

    loses_target = True

    class tracker_class(Tracker):
        def target_came_back(self) -> None:
            backlog, self._backlog = self._backlog, Backlog(self.size, self.granularity)
            super().target_came_back()
            self._backlog = backlog


class LooksAtTheClockAfterwards(LagWorld):
    """A write between the look at what is dirty and the look at the clock."""

    class lag_class(Lag):
        def look(self) -> None:
            if self._ended_s is None and self._tracker.renew_backlog():
                self._covered_s, self._backlog_s = self._backlog_s, self._clock()


class CountsFromTheEnd(LagWorld):
    """As if the target had all as of when the backlog ended, and not as of when it began."""

    class lag_class(Lag):
        def look(self) -> None:
            now_s = self._clock()
            if self._ended_s is None and self._tracker.renew_backlog():
                self._covered_s = self._backlog_s = now_s


class CountsFromTheWaking(LagWorld):
    """As if nothing was answered before the loop's thread heard the alarm."""

    class alarm_class(Alarm):
        def quiet_until_s(self) -> float | None:
            return self._clock() if self.is_set else None


LAG_MUTANTS = (
    CountsFromTheWaking,
    ForgetsCopiesInFlight,
    ForgetsTheUnflushed,
    ForgetsFlushesUnderWay,
    ForgetsNotes,
    CountsClaimsAsCopied,
    ForgetsWhatFailed,
    CountsAFlushTooEarly,
    CountsAFlushAtItsBegin,
    ForgetsAFailedFlush,
    ForgetsWhatALostTargetLost,
    LooksAtTheClockAfterwards,
    CountsFromTheEnd,
)
