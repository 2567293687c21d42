"""PointSender: brings the points of one disk to the far side's writer, one after the other.

    begin -> sending -> committing -> on_committed
               '------------'-------> on_broken, when nothing of the point is in flight any more

On the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from nbdmirror.devices.base import Done, Run
from nbdmirror.errors import Error
from nbdmirror.event_loop import Loop
from nbdmirror.mirror.frozen_view import Chunk, FrozenView
from nbdmirror.mirror.point_source import PointSource

IN_FLIGHT_BYTES = 16 << 20
"""Content that is in memory on its way to the far side."""

CHUNKS_MAX, TURN_S = 64, 0.001
"""Chunks that are read in one turn of the loop, and seconds after which a turn takes no more of
them. Guests that were held at the cut wait for the interpreter meanwhile, and others of the loop
for their turn."""


class PointWriter(Protocol):
    """What is needed of points.writer.JournalWriter, which documents the calls."""

    def begin(self, time_ns: int, *, bytes_max: int, name: str = "", group: int = 0) -> object: ...

    def put(self, runs: Sequence[Run], done: Done) -> None: ...

    def commit(self, done: Done) -> None: ...

    def give_up(self, done: Done) -> None: ...


class PointSender:
    """`chunk`, `pump` and `broken` are the callbacks of the PointSource. One of `on_committed` and
    `on_broken` is called for each point that was begun; then the next cut is allowed."""

    def __init__(
        self,
        writer: PointWriter,
        loop: Loop,
        *,
        on_committed: Callable[[], None],
        on_broken: Callable[[BaseException], None],
    ) -> None:
        self.writer = writer
        self._loop = loop
        self._on_committed = on_committed
        self._on_broken = on_broken
        self._points: PointSource | None = None
        """While a point is in progress."""
        self._is_open = self._is_committing = self._is_pumping = False
        self._is_due = False
        """The next turn is posted."""
        self._error: BaseException | None = None
        """Why the point was broken while it was committed."""

    def begin(self, points: PointSource, time_ns: int, *, name: str = "", group: int = 0) -> None:
        """Send the point that `points` has just taken. `time_ns`: the wall time of its cut. A point
        that does not fit is broken, with the writer's error."""
        frozen = points.changes.frozen
        assert self._points is None and frozen is not None, "one point after the other"
        self._points = points
        try:
            bytes_max = frozen.covered.dirty_bytes
            self.writer.begin(time_ns, bytes_max=bytes_max, name=name, group=group)
        except Error as error:
            points.break_off(error)
            return
        self._is_open = True
        self.pump()

    def pump(self) -> None:
        """Read and send as much as may be in flight; commit the point when all is acknowledged."""
        points = self._points
        if self._is_pumping or not self._is_open or points is None or points.view is None:
            return
        self._is_pumping = True
        try:
            self._read(points.view, self._loop.clock() + TURN_S)
        finally:
            self._is_pumping = False
        if points.view.is_settled:
            self._is_open, self._is_committing = False, True
            self.writer.commit(self._committed)

    def _read(self, view: FrozenView, until_s: float) -> None:
        for _ in range(CHUNKS_MAX):
            if view.in_flight_bytes >= IN_FLIGHT_BYTES or not view.read_next():
                return
            if self._loop.clock() >= until_s:
                break
        self._pump_soon()

    def _pump_soon(self) -> None:
        """Once, for all chunks that end in this turn: hundreds may have gone as one request."""
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._is_due = False
        self.pump()

    def chunk(self, chunk: Chunk) -> None:
        """Send a chunk of the point."""
        points = self._points
        assert points is not None
        view = points.view

        def ended(error: BaseException | None) -> None:
            if error is not None:
                points.break_off(error)
            elif view is not None and view is points.view:
                view.settled(chunk)
                self._pump_soon()

        self.writer.put(chunk.runs, ended)

    def broken(self, error: BaseException) -> None:
        """The point is given up on this side: nothing more of it is sent."""
        if self._is_open:
            self._is_open = False
            self.writer.give_up(lambda _: self._end(error))
        elif self._is_committing:
            self._error = error
        else:
            self._end(error)

    def _committed(self, error: BaseException | None) -> None:
        points = self._points
        assert points is not None
        self._is_committing = False
        if error is None and points.committed():
            self._points = None
            self._on_committed()
        elif self._error is not None:
            self._end(self._error)
        elif error is not None:
            points.break_off(error)
        # else it was broken just now. In both cases `broken` follows.

    def _end(self, error: BaseException) -> None:
        self._points = self._error = None
        self._on_broken(error)
