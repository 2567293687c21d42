"""Waits: what a mirror spends its time on, in shares that add up to one. On the loop's thread.

Each moment belongs to the first of these that applies:

  1. The job does not copy: paused, stopped by an error, a server is lost (`doing`).
  2. Something is dirty, and the copier may not claim it yet: the speed limit, or room that is left
     to guests' requests (`hold`). Requests may be in flight meanwhile; they are not the reason.
  3. Requests are in flight: source, target's writes and target's flushes, in proportion to their
     numbers. A copier keeps its slots full, so most copies are where a copy takes longest: the
     numbers are to each other as these times are (Little's law). Points have no copier: their
     requests to disk, image and journal count one by one (`begins`), and so does the wait for an
     acknowledgement.
  4. Nothing is in flight: nothing to do. What is dirty may not be due yet: after READY a copier
     spreads its work (rate_limit.py).

No clock is read for guests' requests. A copy adds its times to sums; the time is divided only when
the first request begins, the last one ends, or 1 or 2 change. Between two such moments the sums of
`count * time` give the proportions, so the copies in between need not be looked at. That includes
requests that are still in flight, such as those of a target that hangs.
"""

from __future__ import annotations

import enum
import operator
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nbdmirror.mirror.activity import Activity

RECENT_S = 60.0
LOOK_S = 5.0
"""The recent shares are those of RECENT_S, exact to LOOK_S."""

NOW_S = 1.0
"""What a job waits for now is what it waited for most in so much time, or up to LOOK_S more."""

DIGITS = 4


class Cause(enum.StrEnum):
    """What a moment was spent on."""

    SOURCE_READ = "source-read"
    TARGET_WRITE = "target-write"
    TARGET_FLUSH = "target-flush"
    SPEED_LIMIT = "speed-limit"
    YIELDING = "yielding"
    """Few requests are in flight, so that guests' requests are not delayed."""
    ACKNOWLEDGEMENT = "acknowledgement"
    """Of a point: somebody makes a snapshot, and nothing may be written until there is one."""
    NOTHING_TO_DO = "nothing-to-do"
    PAUSED = "paused"
    ERROR = "error"
    """Paused by an error, or waiting to try again."""
    RECONNECTING = "reconnecting"
    """A side is lost; or the target is checked before the first write."""


_DOING = {
    Activity.RECONNECTING: Cause.RECONNECTING,
    Activity.SCANNING: Cause.SOURCE_READ,
    Activity.BACKING_OFF: Cause.ERROR,
    Activity.PAUSING: Cause.PAUSED,
    Activity.PAUSED: Cause.PAUSED,
}
_INDEX = {cause: index for index, cause in enumerate(Cause)}
_READ, _WRITE, _FLUSH = (
    _INDEX[cause] for cause in (Cause.SOURCE_READ, Cause.TARGET_WRITE, Cause.TARGET_FLUSH)
)
_NOTHING, _YIELDING = _INDEX[Cause.NOTHING_TO_DO], _INDEX[Cause.YIELDING]

_NOT_COPYING = frozenset({Cause.PAUSED, Cause.ERROR, Cause.RECONNECTING})


@dataclass(frozen=True, slots=True)
class Shares:
    """Parts of the time by cause, each map with all causes and adding up to one."""

    now: Cause
    recent: Mapping[Cause, float]
    """Over the last RECENT_S seconds."""
    total: Mapping[Cause, float]
    seconds: Mapping[Cause, float]
    """Since the job began."""


class Waits:
    """The waits of one job, from its creation until `doing(Activity.ENDED)`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._divided_s = clock()
        self._seconds = [0.0] * len(Cause)  # by index: the hash of an Enum's member is slow
        self._activity: Cause | None = None
        self._hold: Cause | None = None
        self._is_over = False
        self._copies = self._writes = self._flushes = 0
        """Requests in flight; a copy's write is one of its copies."""
        self.last_flush_s = 0.0
        """How long the last flush took."""
        self._flush_began_s = 0.0
        self._others = [0] * len(Cause)
        """What else is waited for, by the index of its cause."""
        self._count = 0
        """The sum of these."""
        self.answers = 0
        """How much of that has ended."""
        self._copies_s = self._writes_s = self._flushes_s = 0.0
        """The time of these requests since the last division: each subtracts the time when it
        begins, and adds the time when it ends. For those in flight, the present time is missing."""
        self._others_s = [0.0] * len(Cause)
        self._looks: deque[tuple[float, tuple[float, ...]]] = deque()
        self.look()

    # What the job and its copier report.

    def doing(self, activity: Activity, *, is_error: bool) -> None:
        """The job's activity changes. `is_error`: an error has paused the job."""
        self._divide(self._clock())
        cause = _DOING.get(activity)
        self._activity = Cause.ERROR if cause is Cause.PAUSED and is_error else cause
        self._is_over = activity is Activity.ENDED

    def hold(self, cause: Cause | None) -> None:
        """The copier is held back by `cause`; None: by its requests in flight, or by nothing."""
        if cause is not self._hold:
            self._divide(self._clock())
            self._hold = cause

    def copy_begins(self) -> None:
        """A claim is on its way, at the source first."""
        now_s = self._clock()
        if not (self._copies or self._flushes or self._count):
            self._divide(now_s)
        self._copies += 1
        self._copies_s -= now_s

    def copy_ends(self) -> None:
        now_s = self._clock()
        if self._copies == 1 and not (self._flushes or self._count):
            self._divide(now_s)
        self._copies -= 1
        self._copies_s += now_s

    def write_begins(self, now_s: float) -> None:
        """A copy goes from the source to the target, until `write_ends`."""
        self._writes += 1
        self._writes_s -= now_s

    def write_ends(self, now_s: float) -> None:
        self._writes -= 1
        self._writes_s += now_s

    def flush_begins(self) -> None:
        now_s = self._clock()
        self._divide(now_s)
        if not self._flushes:
            self._flush_began_s = now_s
        self._flushes += 1
        self._flushes_s -= now_s

    def flush_ends(self) -> None:
        now_s = self._clock()
        self._divide(now_s)
        self.last_flush_s = now_s - self._flush_began_s
        self._flushes -= 1
        self._flushes_s += now_s

    def begins(self, cause: Cause) -> None:
        """A request that is no copy's, or something else that is waited for, until `ends`."""
        now_s, index = self._clock(), _INDEX[cause]
        if not (self._copies or self._flushes or self._count):
            self._divide(now_s)
        self._count += 1
        self._others[index] += 1
        self._others_s[index] -= now_s

    def ends(self, cause: Cause) -> None:
        now_s, index = self._clock(), _INDEX[cause]
        if self._count == 1 and not (self._copies or self._flushes):
            self._divide(now_s)
        self._count -= 1
        self._others[index] -= 1
        self._others_s[index] += now_s
        self.answers += 1

    # What queries show.

    @property
    def flushes(self) -> int:
        """Flushes of the target in flight."""
        return self._flushes

    @property
    def is_at_target(self) -> bool:
        """A write or a flush waits for the target's answer."""
        others = self._others[_WRITE] + self._others[_FLUSH]
        return self._flushes > 0 or self._writes > 0 or others > 0

    @property
    def is_at_source(self) -> bool:
        """A read that is no copy's waits for the source's answer."""
        return self._others[_READ] > 0

    @property
    def copying_s(self) -> float:
        """Seconds since the job began in which copies were in flight, and no speed limit was the
        reason for a wait."""
        self._divide(self._clock())
        return self._seconds[_READ] + self._seconds[_WRITE] + self._seconds[_YIELDING]

    def look(self) -> None:
        """Call this about once a second."""
        now_s = self._clock()
        if not self._looks or now_s - self._looks[-1][0] >= LOOK_S:
            self._divide(now_s)
            self._looks.append((now_s, tuple(self._seconds)))
            while len(self._looks) > 1 and now_s - self._looks[1][0] >= RECENT_S:
                self._looks.popleft()

    @property
    def shares(self) -> Shares:
        self._divide(self._clock())
        last_s = self._divided_s
        near = next((look for look in reversed(self._looks) if last_s - look[0] >= NOW_S), None)
        return Shares(
            now=self._activity or self._most(near[1] if near is not None else ()),
            recent=self._since(self._looks[0][1]),
            total=self._since(()),
            seconds=self._spent(()),
        )

    def _most(self, before: tuple[float, ...]) -> Cause:
        """What a job that copies has spent most time on since then."""
        spent = self._spent(before)
        causes = [cause for cause in Cause if cause not in _NOT_COPYING]
        return max(causes, key=lambda cause: (spent[cause], cause is Cause.NOTHING_TO_DO))

    def _since(self, before: tuple[float, ...]) -> dict[Cause, float]:
        return _as_shares(self._spent(before), self._activity or Cause.NOTHING_TO_DO)

    def _spent(self, before: tuple[float, ...]) -> dict[Cause, float]:
        """Seconds since `before`; () is the start."""
        then = before or (0.0,) * len(Cause)
        return dict(zip(Cause, map(operator.sub, self._seconds, then), strict=True))

    def _divide(self, now_s: float) -> None:
        """Give the time since the last call to its causes."""
        passed_s = now_s - self._divided_s
        if passed_s <= 0:
            return  # the sums have not grown
        copies_s = self._copies_s + self._copies * now_s
        writes_s = self._writes_s + self._writes * now_s
        flushes_s = self._flushes_s + self._flushes * now_s
        others_s = [s + n * now_s for s, n in zip(self._others_s, self._others, strict=True)]
        self._copies_s -= copies_s
        self._writes_s -= writes_s
        self._flushes_s -= flushes_s
        self._others_s = [s - of_s for s, of_s in zip(self._others_s, others_s, strict=True)]
        if self._is_over:
            return
        self._divided_s = now_s
        seconds, all_s = self._seconds, copies_s + flushes_s + sum(others_s)
        if (cause := self._activity or self._hold) is not None:
            seconds[_INDEX[cause]] += passed_s
        elif not (self._copies or self._flushes or self._count) or all_s <= 0:
            # The end of the last request was divided, so what the sums still have is rounding.
            seconds[_NOTHING] += passed_s
        else:
            parts_s = others_s
            parts_s[_WRITE] += writes_s
            parts_s[_FLUSH] += flushes_s
            parts_s[_READ] += max(0.0, copies_s - writes_s)
            for index, part_s in enumerate(parts_s):
                seconds[index] += passed_s * part_s / all_s


def _as_shares(spent: Mapping[Cause, float], at_once: Cause) -> dict[Cause, float]:
    """Parts of one, rounded; the largest one gets what rounding leaves. `at_once`: where no time
    has passed yet."""
    whole = sum(spent.values())
    if whole <= 0:
        return {cause: float(cause is at_once) for cause in Cause}
    shares = {cause: round(seconds / whole, DIGITS) for cause, seconds in spent.items()}
    largest = max(shares, key=lambda cause: shares[cause])
    others = sum(share for cause, share in shares.items() if cause is not largest)
    shares[largest] = round(1 - others, DIGITS)
    return shares
