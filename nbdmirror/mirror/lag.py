"""Lag: the age of the oldest answered write of a guest that the target's storage does not have:
what a disaster would cost now (RPO). On the event loop's thread.

Guests' writes have no times: to read a clock for each would cost more than the mark. So one moment
after the other is followed. At a moment the tracker notes what is dirty, in flight or not flushed
(backlog.py). When the target's storage has all of that, it has every write that was answered before
that moment. It may have later writes too, so the lag is a bound: never too small, and too large by
at most the time of two backlogs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

from nbdmirror.disk.alarm import Alarm
from nbdmirror.disk.tracker import Tracker


class BaseLag(ABC):
    """What every lag is: the time since a moment before which no answered write would be lost."""

    def __init__(self, clock: Callable[[], float], began_s: float) -> None:
        """`began_s`: when the job began, by `clock`. No write that was answered before that would
        be lost."""
        self._clock = clock
        self._covered_s = began_s
        """No write that was answered before this time would be lost."""
        self._ended_s: float | None = None

    @abstractmethod
    def look(self) -> None:
        """Call this several times a second, whatever the job does."""

    @property
    def lag_s(self) -> float:
        """The lag in seconds. Does not change any more after `end`."""
        now_s = self._clock() if self._ended_s is None else self._ended_s
        for _ in range(2):  # if the far side has everything, the second look sees it
            self.look()
        return max(0.0, now_s - self._covered_s)

    def end(self) -> None:
        """The mirror ends. Later writes do not count."""
        if self._ended_s is None:
            self._ended_s = self._covered_s + self.lag_s

    def at_the_end(self) -> dict[str, object]:
        """The lag as a member of the job's last event."""
        return {"x-nbdmirror-lag-s": round_up(self.lag_s)}


class Lag(BaseLag):
    """The lag of a mirror that is READY. All writes that were answered before `began_s` are durable
    at READY."""

    def __init__(
        self, tracker: Tracker, clock: Callable[[], float], began_s: float, alarm: Alarm
    ) -> None:
        """`alarm`: set while the mirror is at rest. Then the target's storage has everything, and
        `look` need not be called."""
        super().__init__(clock, began_s)
        self._tracker = tracker
        self._alarm = alarm
        self._backlog_s = began_s
        """The moment that is being followed."""
        self.look()

    def look(self) -> None:
        if self._ended_s is None:
            if (quiet_s := self._alarm.quiet_until_s()) is not None:
                self._backlog_s = max(self._backlog_s, quiet_s)
            now_s = self._clock()  # first: writes that are answered from here on do not count
            if self._tracker.renew_backlog():
                self._covered_s, self._backlog_s = self._backlog_s, now_s


class StandingLag(BaseLag):
    """The lag while nothing is covered: it grows."""

    def look(self) -> None:
        """Nothing becomes covered."""


def round_up(seconds: float) -> float:
    """Round up to milliseconds, so that the result is never too small."""
    return math.ceil(seconds * 1000) / 1000
