"""PointRequest: a point that a user has asked for, and has perhaps named. On the event loop's
thread; the futures are for any thread.

    asked -> taken (its moment is over) -> committed
      '-----------'------> failed: withdrawn, or broken on its way

Each request gets a point of its own, and only its own: a point that is broken has lost its moment,
and the next one is of another moment.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class CommittedPoint:
    """A point that is on the far side's storage."""

    sequence: int
    time_ns: int
    """Wall time of its cut, nanoseconds since 1970."""
    changed_bytes: int
    """What it has of the disk, in bytes."""
    name: str = ""


class PointRequest:
    """`taken` and `committed` get the point, or the same error."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.taken: Future[CommittedPoint] = Future()
        self.committed: Future[CommittedPoint] = Future()
        for future in (self.taken, self.committed):
            future.set_running_or_notify_cancel()  # nobody can cancel it from here on

    def begins(self, point: CommittedPoint, sequence: int) -> None:
        """The moment is over: guests may change the disk. `sequence`: the number that the point
        gets if it is committed."""
        self.taken.set_result(replace(point, sequence=sequence))

    def ends(self, point: CommittedPoint) -> None:
        self.committed.set_result(point)

    def fails(self, error: BaseException) -> None:
        if not self.taken.done():
            self.taken.set_exception(error)
        self.committed.set_exception(error)
