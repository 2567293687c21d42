"""PointRun: the points of one disk, one after the other, in time; and the image that follows them.

    cut -> sending -> committed -> the next cut, an interval after this one at the earliest
                          '-> applying, beside the next one: the image becomes the newest point that
                              is older than the window (window.py), or that is in the way

A disk that does not change gets no points, but those that users ask for: the next cut is for the
first request, and has its name. On the event loop's thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from nbdmirror.devices.base import AsyncSource, Done
from nbdmirror.disk.changes import Changes
from nbdmirror.disk.ledger import Ledger
from nbdmirror.errors import Error
from nbdmirror.event_loop import Loop
from nbdmirror.mirror.far_side import FarSide
from nbdmirror.mirror.frozen_view import Chunk
from nbdmirror.mirror.point_group import CommonCut, CutRun, Moment
from nbdmirror.mirror.point_lag import PointLag
from nbdmirror.mirror.point_owner import PointRunOwner
from nbdmirror.mirror.point_request import CommittedPoint, PointRequest, PointRequests
from nbdmirror.mirror.point_sender import PointSender
from nbdmirror.mirror.point_source import NotedSource, PointSource, StoreOptions
from nbdmirror.mirror.window import Window

LATE_PAUSE_S = 1.0
"""Pause after a cut that came too late, so that guests are not held most of the time."""


CHECK_S = 5.0
"""A far side of which nothing was heard for so long is asked whether it is as it was: a disk that
does not change makes no points, and they may be recovered there meanwhile."""


class PointRun(CutRun):
    """Begins stopped, and ends with `end`. `first` is called behind the gate of the first cut: then
    `changes` gets what the first copy has left."""

    def __init__(
        self,
        *,
        owner: PointRunOwner,
        far: FarSide,
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
        self.interval_s = interval_s
        self._first: Callable[[], None] | None = first
        self.is_running = False
        """Between `start` and `stop`."""
        self.is_leaving = False
        """No more points are made."""
        self._far = far
        """Where points go. Each `start` may name another one."""
        self._sender: PointSender | None = None
        self._cut: CommonCut | None = None
        self._point = CommittedPoint(0, 0, 0)
        """The one in progress; without its number."""
        self._requests = PointRequests()
        self._is_sending = self._is_busy_there = False
        self._heard_s = now_s
        """When the far side last did something."""
        self.tried_s = self._held_up_until_s = -math.inf
        self.common_number = math.inf if window.is_empty else 0
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
        self._far.withdraw(error)

    # States.

    @property
    def is_idle(self) -> bool:
        """No cut, no point and no request to the far side is in progress."""
        return self._cut is None and not self._is_sending and not self._is_busy_there

    @property
    def is_quiet(self) -> bool:
        """Nothing at all is on its way to the far side."""
        return self.is_idle and self._far.is_idle

    @property
    def has_left(self) -> bool:
        """`leave` was called, and the image holds the last point."""
        return self.is_leaving and self.is_quiet and self.is_applied

    @property
    def is_applied(self) -> bool:
        """The image holds the last point."""
        return self._far.is_applied

    @property
    def waits_for_applier(self) -> bool:
        """A process beside the image makes the image a later point now."""
        return self._far.waits_for_applier

    @property
    def is_handed_over(self) -> bool:
        """The image holds the last point, and nobody can have another one any more."""
        return self._far.is_handed_over

    @property
    def point(self) -> CommittedPoint:
        """The one in progress; without its number."""
        return self._point

    @property
    def reaches_s(self) -> float:
        """How far back the history reaches, from the oldest point that can be recovered."""
        return self.window.reaches_s(self._far.oldest)

    @property
    def is_window_kept(self) -> bool:
        """No point of the window was applied before its time, since its room was needed."""
        return self._far.oldest <= 1 or self.reaches_s >= self.window.keep_s

    @property
    def left_bytes(self) -> int:
        """What no committed point has, in bytes."""
        frozen = self.changes.frozen
        return self.changes.dirty.dirty_bytes + (frozen.covered.dirty_bytes if frozen else 0)

    @property
    def has_changes(self) -> bool:
        """The next point has something, or was asked for, or is the first one of this run that the
        far side will have."""
        return not self.count or self.is_asked or self._points.has_changes

    @property
    def is_asked(self) -> bool:
        return self._requests.is_waiting

    @property
    def is_held_up(self) -> bool:
        return self._loop.clock() < self._held_up_until_s

    @property
    def is_free(self) -> bool:
        if self.is_handed_over or self._is_sending or self._cut is not None:
            return False
        return self.is_applied or not self._far.in_the_way(self._wanted_bytes)

    @property
    def ledger(self) -> Ledger:
        return self.changes.disk.ledger

    @property
    def _wanted_bytes(self) -> int:
        """Of the next point, at most."""
        return max(1, self.changes.dirty.dirty_bytes)

    def has_name(self, name: str) -> bool:
        """A point that can be recovered has this name, or one that was asked for."""
        return self._requests.has_name(name) or self._far.has_name(name)

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
        self._points.break_off(error)
        self._requests.refuse(error)

    def everything_changed(self, error: BaseException) -> None:
        """The disk may have changed anywhere, by no guest's request."""
        self.changes.dirty.mark_all()
        self._points.break_off(error)

    def end(self) -> None:
        """Make no more points. Nothing is in progress, or never ends."""
        self.is_running = False
        self._points.end()
        error = Error("the job has ended")
        self._requests.refuse(error)
        self._requests.breaks(error)

    def leave(self, error: BaseException) -> None:
        """Make no more points, and bring the image to the last one. `error`: why no point is made
        of what was asked for."""
        self.is_leaving = True
        self._requests.refuse(error)

    def close(self) -> None:
        """After `leave`: nothing of this run is used any more, and `changes` is free. The lag of
        this run is not right from now on."""
        assert self.has_left
        self.is_running = False

    def ask(self, request: PointRequest) -> None:
        """Make a point for `request`, as soon as the one in progress has ended."""
        assert self.is_running
        self._requests.add(request)
        self._owner.run_advanced()

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
                self.apply_all()
            return
        due = self._owner.point_group.due(self, self._loop.clock())
        is_wanted = self in due and not self._is_sending
        until = self.common_number if self._owner.point_group.is_common else math.inf
        self._follow(self.window.next(self._far, self._wanted_bytes if is_wanted else 0, until))
        if is_wanted and all(run.is_free for run in due):
            self._begin_cut(due)
        if self.is_idle and self._loop.clock() - self._heard_s >= CHECK_S:
            self._at_far_side(self._far.check)

    # For an ending.

    def catch_up(self) -> None:
        """Begin the next step towards an image that has everything. Nothing is in progress."""
        if self.is_handed_over or not self.is_applied:
            self.apply_all()
        elif self.has_changes and not self.is_held_up:
            self._begin_cut([self])

    def apply_all(self) -> None:
        """Make the image the newest point; then the space of all points can be used again."""
        self._follow(self._far.newest)

    def cut_here(self) -> None:
        """Begin a point behind a gate that is closed already, with no request in progress."""
        assert self.is_idle and self.is_running
        self._points.prepare()
        self.take(Moment(self._wall_time_ns(), 0))
        self.taken(is_common=False)

    def hand_over(self) -> None:
        """Bring the image to the newest point, and leave it to guests."""
        self._at_far_side(partial(self._far.apply, hands_over=True))

    # Steps.

    def _follow(self, until: int) -> None:
        """Make the image the point `until`; 0: leave it as it is. An image that was handed over is
        taken back first."""
        if self._is_busy_there:
            return
        if self.is_handed_over:
            self._at_far_side(self._far.take_back)
        elif until:
            self._at_far_side(partial(self._far.apply, until=until))

    def _begin_cut(self, runs: Sequence[CutRun]) -> None:
        def moment() -> Moment:
            is_common = self._owner.point_group.cutting(runs)
            return Moment(self._wall_time_ns(), self._owner.new_group() if is_common else 0)

        CommonCut(runs, loop=self._loop, moment=moment).start()

    def cutting(self, cut: CommonCut) -> None:
        self.tried_s, self._cut = self._loop.clock(), cut
        self._points.prepare()

    def take(self, moment: Moment) -> None:
        if self._first is not None:
            self._first()
            self._first = None
        self._points.take()
        self._point = CommittedPoint(0, moment.time_ns, 0, group=moment.group)

    def taken(self, *, is_common: bool) -> None:
        self._cut = None
        self._is_sending = True
        frozen = self.changes.frozen
        assert frozen is not None
        name, changed_bytes = self._requests.take(is_common=is_common), frozen.covered.dirty_bytes
        self._point = point = replace(self._point, changed_bytes=changed_bytes, name=name)
        number = self._far.newest + 1
        self.window.cut(number)
        self._sending.begin(self._points, point.time_ns, name=name, group=point.group)
        if frozen.error is None:
            self._requests.begins(self._point, number)

    def late(self, *, is_cause: bool) -> None:
        self._cut = None
        self.late_cuts += 1
        if is_cause:
            self._held_up_until_s = self._loop.clock() + LATE_PAUSE_S
        self._owner.run_advanced()

    def abandoned(self) -> None:
        self._cut, self.tried_s = None, -math.inf
        self._owner.run_advanced()

    def _committed(self) -> None:
        self._is_sending = False
        self._heard_s = self._loop.clock()
        self.lag.is_kept = self._far.is_kept
        self.last = last = replace(self._point, sequence=self._far.newest)
        self.count += 1
        self.sent_bytes += last.changed_bytes
        self._owner.point_group.committed(self, last.group, last.sequence)
        self._owner.point_committed(last)
        self._requests.ends(last)
        self._owner.run_advanced()

    def _broken(self, error: BaseException) -> None:
        self._is_sending = False
        self._owner.point_broken(error, self._point.name)
        self._requests.breaks(error)
        if self.is_running and error is self._far.error:
            self._owner.far_side_failed(error)
        elif self.is_running and error is self._source.error:
            self._owner.source_failed(error)
        self._owner.run_advanced()

    def _at_far_side(self, step: Callable[[Done], None]) -> None:
        self._is_busy_there = True

        def done(error: BaseException | None) -> None:
            self._is_busy_there = False
            self._heard_s = self._loop.clock()
            if error is not None and self.is_running:
                self._owner.far_side_failed(error)
            self._owner.run_advanced()

        step(done)
