"""Lag: how old the oldest write is that a guest had answered and that the target's storage does not
have: what a disaster now would cost (RPO). On the event loop's thread.

Guests' writes have no times: a clock for each would cost them more than the mark. So moments are
followed, one after the other. At a moment the tracker notes what is dirty, in flight or not flushed
(backlog.py); when the target's storage has all of that, it has all that was answered until then.
What was answered later may be there too, so the lag is a bound: never too small, and too large by
the time that two backlogs take at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from nbdmirror.disk.tracker import Tracker


class Lag:
    """Of a mirror that is READY."""

    def __init__(self, tracker: Tracker, clock: Callable[[], float], began_s: float) -> None:
        """`began_s`: when the job began, by `clock`. All that was answered until then is durable at
        READY."""
        self._tracker = tracker
        self._clock = clock
        self._point_s = began_s
        """The target's storage has all that was answered until then."""
        self._backlog_s = began_s
        """The moment that is followed."""
        self._ended_s: float | None = None
        self.look()

    def look(self) -> None:
        """To be called several times a second, whatever the job does."""
        if self._ended_s is None:
            now_s = self._clock()  # first: what is answered from here on is not counted on
            if self._tracker.renew_backlog():
                self._point_s, self._backlog_s = self._backlog_s, now_s

    @property
    def lag_s(self) -> float:
        """Seconds. It does not change any more after `end`."""
        now_s = self._clock() if self._ended_s is None else self._ended_s
        for _ in range(2):  # where the target has all, the second one sees that of the first
            self.look()
        return max(0.0, now_s - self._point_s)

    def end(self) -> None:
        """The mirror ends. What guests are answered from now on is nothing of its."""
        if self._ended_s is None:
            self._ended_s = self._point_s + self.lag_s

    def at_the_end(self) -> dict[str, object]:
        """What the job's last event says of it."""
        return {"x-nbdmirror-lag-s": round_up(self.lag_s)}


def round_up(seconds: float) -> float:
    """To milliseconds; never too small."""
    return math.ceil(seconds * 1000) / 1000
