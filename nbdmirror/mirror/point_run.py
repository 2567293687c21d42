"""PointRun: the points of one disk, one after the other, in time; and the image that follows them.

    cut -> sending -> committed -> the next cut, an interval after this one at the earliest
                          '-> applying, beside the next one: the image becomes the newest point that
                              is older than the window (window.py), or that is in the way

A disk that does not change gets no points, but those that users ask for: the next cut is for the
first request, and has its name. On the event loop's thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

from nbdmirror.devices.base import AsyncSource, Done
from nbdmirror.disk.changes import Changes
from nbdmirror.errors import Error
from nbdmirror.event_loop import Loop
from nbdmirror.mirror.cut import Cut
from nbdmirror.mirror.far_side import FarSide, JournalRoom
from nbdmirror.mirror.frozen_view import Chunk
from nbdmirror.mirror.point_lag import PointLag
from nbdmirror.mirror.point_request import CommittedPoint, PointRequest
from nbdmirror.mirror.point_sender import PointSender
from nbdmirror.mirror.point_source import NotedSource, PointSource, StoreOptions
from nbdmirror.mirror.window import Window

LATE_PAUSE_S = 1.0
"""Pause after a cut that came too late, so that guests are not held most of the time."""


class PointRunOwner(Protocol):
    def point_committed(self, point: CommittedPoint) -> None:
        """The far side has this point, whatever is lost from now on."""

    def point_broken(self, error: BaseException, name: str) -> None:
        """A point is given up; the next one has its content. `name`: what a user called it."""

    def far_side_failed(self, error: BaseException) -> None:
        """A request to the far side has failed."""

    def source_failed(self, error: BaseException) -> None:
        """The disk could not be read for a point."""

    def run_advanced(self) -> None:
        """Something has ended: look at the state again."""


class PointRun:
    """Begins stopped, and ends with `end`. `first` is called behind the gate of the first cut: then
    `changes` gets what the first copy has left."""

    def __init__(
        self,
        *,
        owner: PointRunOwner,
        changes: Changes,
        source: AsyncSource,
        loop: Loop,
        wall_time_ns: Callable[[], int],
        interval_s: float,
        window: Window,
        first: Callable[[], None],
        store: StoreOptions,
    ) -> None:
        now_s = loop.clock()
        self.changes = changes
        self.window = window
        self.lag = PointLag(changes, loop.clock, now_s - window.newest_age_s)
        self.last: CommittedPoint | None = None
        self.count = 0
        """Points that were committed."""
        self.late_cuts = 0
        """Cuts that were given up, since requests of guests did not end in time."""
        self.sent_bytes = 0
        """What all committed points have of the disk."""
        self._owner = owner
        self._source = NotedSource(source)
        self._loop = loop
        self._wall_time_ns = wall_time_ns
        self._interval_s = interval_s
        self._first: Callable[[], None] | None = first
        self.is_running = False
        """Between `start` and `stop`."""
        self.is_leaving = False
        """No more points are made."""
        self._far: FarSide | None = None
        self._sender: PointSender | None = None
        self._cut: Cut | None = None
        self._point = CommittedPoint(0, 0, 0)
        """The one in progress; without its number."""
        self._requests: deque[PointRequest] = deque()
        """Those that were not taken yet."""
        self._request: PointRequest | None = None
        """That of the point in progress."""
        self._is_sending = self._is_busy_there = False
        self._due_s = self._not_before_s = now_s
        self._points = self._new_source(store)

    def _new_source(self, store: StoreOptions) -> PointSource:
        return PointSource(
            changes=self.changes,
            source=self._source,
            lag=self.lag,
            loop=self._loop,
            store=store,
            on_chunk=self._have_chunk,
            on_more=self._have_more,
            on_broken=self._source_broke,
        )

    @property
    def _sending(self) -> PointSender:
        assert self._sender is not None, "not started"
        return self._sender

    def _have_chunk(self, chunk: Chunk) -> None:
        self._sending.chunk(chunk)

    def _have_more(self) -> None:
        self._sending.pump()

    def _source_broke(self, error: BaseException) -> None:
        self._sending.broken(error)
        self._there.withdraw(error)

    # States.

    @property
    def is_idle(self) -> bool:
        """No cut, no point and no request to the far side is in progress."""
        return self._cut is None and not self._is_sending and not self._is_busy_there

    @property
    def is_quiet(self) -> bool:
        """Nothing at all is on its way to the far side."""
        return self.is_idle and (self._far is None or self._far.is_idle)

    @property
    def has_left(self) -> bool:
        """`leave` was called, and the image holds the last point."""
        return self.is_leaving and self.is_quiet and self.is_applied

    @property
    def is_applied(self) -> bool:
        """The image holds the last point."""
        return self._there.is_applied

    @property
    def is_handed_over(self) -> bool:
        """The image holds the last point, and nobody can have another one any more."""
        return self._there.is_handed_over

    @property
    def point(self) -> CommittedPoint:
        """The one in progress; without its number."""
        return self._point

    @property
    def room(self) -> JournalRoom | None:
        """How full the journal is; None before `start`, or if there is none."""
        return None if self._far is None else self._far.room()

    @property
    def reaches_s(self) -> float:
        """How far back the history reaches, from the oldest point that can be recovered."""
        return self.window.reaches_s(self._there.oldest)

    @property
    def is_window_kept(self) -> bool:
        """No point of the window was applied before its time, since its room was needed."""
        return self._there.oldest <= 1 or self.reaches_s >= self.window.keep_s

    @property
    def left_bytes(self) -> int:
        """What no committed point has, in bytes."""
        frozen = self.changes.frozen
        return self.changes.dirty.dirty_bytes + (frozen.covered.dirty_bytes if frozen else 0)

    @property
    def has_changes(self) -> bool:
        """The next point has something, or was asked for, or is the first one of this run that the
        far side will have."""
        return not self.count or bool(self._requests or self._points.has_changes)

    def has_name(self, name: str) -> bool:
        """A point that can be recovered has this name, or one that was asked for."""
        asked = [*self._requests, *([self._request] if self._request else [])]
        return any(one.name == name for one in asked) or self._there.has_name(name)

    @property
    def _there(self) -> FarSide:
        assert self._far is not None, "not started"
        return self._far

    # From outside.

    def start(self, far: FarSide) -> None:
        """Make points on `far` from now on. Nothing is in progress."""
        assert self.is_idle
        self._far, self.is_running = far, True
        self._sender = PointSender(
            far, self._loop, on_committed=self._committed, on_broken=self._broken
        )

    def stop(self, error: BaseException) -> None:
        """Begin nothing more until `start`; give the point in progress up. The run is over when it
        is idle."""
        self.is_running = False
        if self._cut is not None:
            self._cut.abandon()
            self._cut = None
        self._points.break_off(error)
        self._refuse_requests(error)

    def everything_changed(self, error: BaseException) -> None:
        """The disk may have changed anywhere, by no guest's request."""
        self.changes.dirty.mark_all()
        self._points.break_off(error)

    def end(self) -> None:
        """Make no more points. Nothing is in progress, or never ends."""
        self.is_running = False
        self._points.end()
        error = Error("the job has ended")
        self._refuse_requests(error)
        self._end_request(lambda request: request.fails(error))

    def leave(self, error: BaseException) -> None:
        """Make no more points, and bring the image to the last one. `error`: why no point is made
        of what was asked for."""
        self.is_leaving = True
        self._refuse_requests(error)

    def close(self) -> None:
        """After `leave`: nothing of this run is used any more, and `changes` is free. The lag grows
        from now on."""
        assert self.has_left
        self.is_running = False
        self.lag.stand_still()

    def ask(self, request: PointRequest) -> None:
        """Make a point for `request`, as soon as the one in progress has ended."""
        assert self.is_running
        self._requests.append(request)
        self._owner.run_advanced()

    def withdraw(self, request: PointRequest, error: BaseException) -> None:
        """Make no point for `request`, unless its moment is over."""
        if request in self._requests:
            self._requests.remove(request)
            request.fails(error)

    def look(self) -> None:
        """Call this twenty times a second."""
        self.changes.look()
        self.lag.look()

    def advance(self) -> None:
        """Begin what is due: to apply, and a cut."""
        if not self.is_running:
            return
        if self.is_leaving:
            if self.is_idle and not self.is_applied:
                self._follow(self._there.newest)
            return
        is_due = self._loop.clock() >= self._due_s and self.has_changes
        is_wanted = not self._is_sending and (is_due or bool(self._requests))
        wanted_bytes = max(1, self.changes.dirty.dirty_bytes) if is_wanted else 0
        self._follow(self.window.next(self._there, wanted_bytes))
        if is_wanted and (self.is_applied or not self._there.in_the_way(wanted_bytes)):
            self._begin_cut()

    # For an ending.

    def catch_up(self) -> None:
        """Begin the next step towards an image that has everything. Nothing is in progress."""
        if self.is_handed_over or not self.is_applied:
            self._follow(self._there.newest)
        elif self.has_changes:
            self._begin_cut()

    def cut_here(self) -> None:
        """Begin a point behind a gate that is closed already, with no request in progress."""
        assert self.is_idle and self.is_running
        self._points.prepare()
        self._take()
        self._taken()

    def hand_over(self) -> None:
        """Bring the image to the newest point, and leave it to guests."""
        self._at_far_side(partial(self._there.apply, hands_over=True))

    # Steps.

    def _follow(self, until: int) -> None:
        """Make the image the point `until`; 0: leave it as it is. An image that was handed over is
        taken back first."""
        if self._is_busy_there:
            return
        if self.is_handed_over:
            self._at_far_side(self._there.take_back)
        elif until:
            self._at_far_side(partial(self._there.apply, until=until))

    def _begin_cut(self) -> None:
        is_busy = self.is_handed_over or self._is_sending or self._cut is not None
        if is_busy or self._loop.clock() < self._not_before_s:
            return
        self._due_s = self._loop.clock() + self._interval_s
        self._points.prepare()
        self._cut = Cut(
            [self.changes.disk.ledger],
            loop=self._loop,
            take=self._take,
            on_taken=lambda held_s: self._taken(),
            on_late=lambda held_s: self._late(),
        )
        self._cut.start()

    def _take(self) -> None:
        if self._first is not None:
            self._first()
            self._first = None
        time_ns = self._wall_time_ns()
        self._points.take()
        self._point = CommittedPoint(0, time_ns, 0)

    def _taken(self) -> None:
        self._cut = None
        self._is_sending = True
        frozen = self.changes.frozen
        assert frozen is not None
        self._request = self._requests.popleft() if self._requests else None
        name = self._request.name if self._request else ""
        self._point = CommittedPoint(0, self._point.time_ns, frozen.covered.dirty_bytes, name)
        number = self._there.newest + 1
        self.window.cut(number)
        self._sending.begin(self._points, self._point.time_ns, name=name)
        if self._request is not None and frozen.error is None:
            self._request.begins(self._point, number)

    def _late(self) -> None:
        self._cut = None
        self.late_cuts += 1
        self._not_before_s = self._loop.clock() + LATE_PAUSE_S
        self._owner.run_advanced()

    def _committed(self) -> None:
        self._is_sending = False
        self.lag.is_kept = self._there.is_kept
        self.last = last = replace(self._point, sequence=self._there.newest)
        self.count += 1
        self.sent_bytes += last.changed_bytes
        self._owner.point_committed(last)
        self._end_request(lambda request: request.ends(last))
        self._owner.run_advanced()

    def _broken(self, error: BaseException) -> None:
        self._is_sending = False
        self._owner.point_broken(error, self._point.name)
        self._end_request(lambda request: request.fails(error))
        if self.is_running and error is self._there.error:
            self._owner.far_side_failed(error)
        elif self.is_running and error is self._source.error:
            self._owner.source_failed(error)
        self._owner.run_advanced()

    def _end_request(self, tell: Callable[[PointRequest], None]) -> None:
        request, self._request = self._request, None
        if request is not None:
            tell(request)

    def _refuse_requests(self, error: BaseException) -> None:
        while self._requests:
            self._requests.popleft().fails(error)

    def _at_far_side(self, step: Callable[[Done], None]) -> None:
        self._is_busy_there = True

        def done(error: BaseException | None) -> None:
            self._is_busy_there = False
            if error is not None and self.is_running:
                self._owner.far_side_failed(error)
            self._owner.run_advanced()

        step(done)
