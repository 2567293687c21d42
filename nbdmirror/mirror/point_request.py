"""PointRequest: a point that a user has asked for, and has perhaps named. On the event loop's
thread; the futures are for any thread.

    asked -> taken (its moment is over) -> committed
      '-----------'------> failed: withdrawn, or broken on its way

Each request gets a point of its own, and only its own: a point that is broken has lost its moment,
and the next one is of another moment. The jobs of a point group are asked together (`joined`), and
get points of one moment, or none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial

from nbdmirror.errors import Error
from nbdmirror.mirror.lag import round_up


@dataclass(frozen=True, slots=True)
class CommittedPoint:
    """A point that is on the far side's storage."""

    sequence: int
    time_ns: int
    """Wall time of its cut, nanoseconds since 1970."""
    changed_bytes: int
    """What it has of the disk, in bytes."""
    name: str = ""
    group: int = 0
    """The number of the moment that all jobs of its group have; 0: there is none."""

    def told(self, lag_s: float) -> dict[str, float]:
        """As the event X_NBDMIRROR_POINT has it, without the name. `lag_s`: how old it is."""
        return {
            "sequence": self.sequence,
            "time-s": round(self.time_ns / 1e9, 3),
            "bytes": self.changed_bytes,
            "lag-s": round_up(lag_s),
            **({"group": self.group} if self.group else {}),
        }


class PointRequest:
    """`taken` and `committed` get the point, or the same error."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.taken: Future[CommittedPoint] = Future()
        self.committed: Future[CommittedPoint] = Future()
        self.others: Sequence[PointRequest] = ()
        """Those to the other jobs of the group, or to all of them."""
        for future in (self.taken, self.committed):
            future.set_running_or_notify_cancel()  # nobody can cancel it from here on

    def begins(self, point: CommittedPoint, sequence: int) -> None:
        """The moment is over: guests may change the disk. `sequence`: the number that the point
        gets if it is committed."""
        self.taken.set_result(replace(point, sequence=sequence))

    def ends(self, point: CommittedPoint) -> None:
        self.committed.set_result(point)

    def fails(self, error: BaseException) -> None:
        """The others fail too, unless their moment is over."""
        if self.committed.done():
            return
        if not self.taken.done():
            self.taken.set_exception(error)
        self.committed.set_exception(error)
        for other in self.others:
            if not other.taken.done():
                other.fails(error)


def joined(parts: Mapping[str, PointRequest]) -> PointRequest:
    """Of `parts`, by the IDs of their jobs: a request that is taken, and committed, when all are.
    It gets the point of the first one."""
    requests = list(parts.values())
    if len(requests) == 1:
        return requests[0]
    whole = PointRequest(requests[0].name)
    for request in requests:
        request.others = [other for other in requests if other is not request]
    whole.others = requests
    _when_all({job_id: one.taken for job_id, one in parts.items()}, whole.taken)
    _when_all({job_id: one.committed for job_id, one in parts.items()}, whole.committed)
    return whole


def _when_all(futures: Mapping[str, Future[CommittedPoint]], whole: Future[CommittedPoint]) -> None:
    first, *_ = futures.values()

    def look(job_id: str, future: Future[CommittedPoint]) -> None:
        if whole.done():
            return
        error = future.exception()
        if error is not None and future is not first:
            error = Error(f"job '{job_id}' of its group: {error}")
        if error is not None:
            whole.set_exception(error)
        elif all(one.done() for one in futures.values()):
            whole.set_result(first.result())

    for job_id, future in futures.items():
        future.add_done_callback(partial(look, job_id))


class PointRequests:
    """Those to one job, in order."""

    def __init__(self) -> None:
        self._waiting: deque[PointRequest] = deque()
        """Those that were not taken yet."""
        self._taken: PointRequest | None = None
        """That of the point in progress."""

    @property
    def is_waiting(self) -> bool:
        """A point is asked for."""
        while self._waiting and self._waiting[0].committed.done():  # it failed with another job's
            self._waiting.popleft()
        return bool(self._waiting)

    def has_name(self, name: str) -> bool:
        """A point that was asked for, or is in progress, has this name."""
        asked = [*self._waiting, *([self._taken] if self._taken else [])]
        return any(one.name == name and not one.committed.done() for one in asked)

    def add(self, request: PointRequest) -> None:
        self._waiting.append(request)

    def take(self, *, is_common: bool) -> str:
        """The next request gets the point that is cut now. `is_common`: so do those to the other
        jobs of the group; else a request for all of them fails. Returns the point's name."""
        self._taken = None
        if self.is_waiting and (is_common or not self._waiting[0].others):
            self._taken = self._waiting.popleft()
        elif self.is_waiting:
            text = "the jobs of its group cannot make a point at one moment now"
            self._waiting.popleft().fails(Error(text))
        return self._taken.name if self._taken else ""

    def begins(self, point: CommittedPoint, number: int) -> None:
        """The moment of the point is over."""
        if self._taken is not None:
            self._taken.begins(point, number)

    def ends(self, point: CommittedPoint) -> None:
        """The point is committed."""
        request, self._taken = self._taken, None
        if request is not None:
            request.ends(point)

    def breaks(self, error: BaseException) -> None:
        """The point is given up."""
        request, self._taken = self._taken, None
        if request is not None:
            request.fails(error)

    def refuse(self, error: BaseException) -> None:
        """Make no point for those that were not taken yet."""
        while self._waiting:
            self._waiting.popleft().fails(error)
