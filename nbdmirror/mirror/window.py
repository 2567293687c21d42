"""Window: which points the journal keeps, and which the image becomes. On the event loop's thread.

A point is the state of the disk until the cut of the next one. So of the points that are older than
the window the newest one is still needed: the image becomes that point, and has it on offer. All
later ones stay in the journal, unless the next point needs their room. Then the image becomes an
older one of them before its time, and not a later one than the room needs.

Ages are by a monotonic clock: a wall clock that jumps ends the time of no point.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol


class Journal(Protocol):
    """What is asked of the far side."""

    @property
    def newest(self) -> int:
        """The number of the last point that is committed; 0: there is none."""

    @property
    def base(self) -> int:
        """The number of the point that the image holds; 0: none."""

    def in_the_way(self, bytes_max: int) -> int:
        """The image must become the point of this number, so that one of `bytes_max` fits. 0: it
        fits as it is, or in no case."""


class Window:
    """`keep_s`: for how long points stay. 0: the image follows each point."""

    def __init__(self, keep_s: float, clock: Callable[[], float]) -> None:
        self.keep_s = keep_s
        self._clock = clock
        self._cuts: deque[tuple[int, float]] = deque()
        """Numbers of points, and when their cuts were, in order. Those before the window were
        dropped, but for the newest of them."""

    def cut(self, number: int) -> None:
        """The point that has just been cut gets this number if it is committed. One of this number
        that was cut before has come to nothing."""
        while self._cuts and self._cuts[-1][0] >= number:
            self._cuts.pop()
        self._cuts.append((number, self._clock()))

    def learn(self, ages_s: Mapping[int, float], now_s: float) -> None:
        """Earlier processes cut these points, so many seconds ago, by their numbers, ascending. A
        wall clock that was set meanwhile makes their time longer or shorter. `now_s`: by the clock,
        from before the ages were found, so that no point is taken for newer than it is."""
        at_s = -math.inf
        for number, age_s in ages_s.items():
            at_s = min(now_s, max(at_s, now_s - age_s))
            self._cuts.append((number, at_s))

    @property
    def newest_age_s(self) -> float:
        """How long ago the newest point was cut that `learn` told of; 0 if none was."""
        return self._clock() - self._cuts[-1][1] if self._cuts else 0.0

    @property
    def is_empty(self) -> bool:
        """No point is known."""
        return not self._cuts

    def next(self, journal: Journal, bytes_wanted: int, until: float = math.inf) -> int:
        """The number of the point that the image has to become now; 0: it stays as it is.
        `bytes_wanted`: of the point that is to be made now, at most; 0: none is. `until`: the last
        point that it may become, unless room is wanted."""
        number = self._due(int(min(journal.newest, until)))
        if bytes_wanted:
            number = max(number, journal.in_the_way(bytes_wanted))
        return number if number > journal.base else 0

    def reaches_s(self, oldest: int) -> float:
        """How far back the history reaches that begins with the point `oldest`."""
        at_s = next((at_s for number, at_s in self._cuts if number >= oldest), None)
        return 0.0 if at_s is None else max(0.0, self._clock() - at_s)

    def _due(self, newest: int) -> int:
        """The newest point, up to `newest`, that is older than the window; 0: there is none."""
        end_s = self._clock() - self.keep_s
        cuts = self._cuts
        while len(cuts) > 1 and cuts[1][0] <= newest and cuts[1][1] <= end_s:
            cuts.popleft()
        is_due = bool(cuts) and cuts[0][0] <= newest and cuts[0][1] <= end_s
        return cuts[0][0] if is_due else 0
