"""PointsJob: a mirror whose far side always has one moment of the disk, once there was a first one.

The first copy is that of every mirror, in place. When it is in sync, points begin (point_run.py):
the copier ends, and what it had left is in the first point. READY is the first point that is
committed. On the event loop's thread.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from nbdmirror.devices.base import AsyncSource
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.changes import Changes
from nbdmirror.errors import DeviceError, DeviceLost
from nbdmirror.mirror.activity import Activity
from nbdmirror.mirror.far_side import FarSide, NoRoom, PointsRefused, PointsResources
from nbdmirror.mirror.job_states import JobStatus
from nbdmirror.mirror.last_point import LastPoint
from nbdmirror.mirror.mirror_job import MirrorJob
from nbdmirror.mirror.options import Ending
from nbdmirror.mirror.point_group import PointGroup
from nbdmirror.mirror.point_promises import PointPromises
from nbdmirror.mirror.point_request import CommittedPoint, PointRequest
from nbdmirror.mirror.point_run import PointRun
from nbdmirror.mirror.point_source import StoreOptions
from nbdmirror.mirror.stopping import Stopping
from nbdmirror.mirror.window import Window

REQUEST_S_MAX = 30.0
"""A point that was asked for, and could not be begun for so long, is not made: a guest whose file
systems are frozen for this point must continue."""


class PointsJob(MirrorJob):
    """A PointRunOwner. Copies with the tracker first, and then sends `changes`, which are not
    tracked yet."""

    point_group = PointGroup()
    """Of each job another one, by `share_points`."""

    def __init__(
        self,
        *,
        resources: PointsResources,
        changes: Changes,
        source: AsyncSource,
        interval_s: float,
        keep_s: float,
        rpo_s: float,
        store: StoreOptions,
        in_place: bool,
        wall_time_ns: Callable[[], int],
        new_group: Callable[[], int],
        **mirror: Any,
    ) -> None:
        """`source`: the disk, as points are read from it. `keep_s`: how long points are kept.
        `rpo_s`: the promised lag; 0: none. `in_place`: a point that does not fit into the journal
        gives all points up, and does not stop the job. `new_group`: a number for points that are
        of the same cut, which no other cut has.
        `mirror`: as for MirrorJob."""
        super().__init__(resources=resources, **mirror)
        self.interval_s = interval_s
        self.promises = PointPromises(rpo_s=rpo_s, keep_s=keep_s, tell=self._tell_of_points)
        self.run: PointRun | None = None
        """Since the first copy is in sync."""
        self.in_place_since_ns = 0
        """Since this wall time there is no point: the image is copied in place. 0: points are made,
        or have not begun."""
        self._allows_in_place = in_place
        self._is_leaving = False
        """There are no points any more here, and the far side has to be told."""
        self._sent_bytes = 0
        """Of earlier runs."""
        self._far_resources = resources
        self._changes = changes
        self._source = source
        self._store = store
        self._wall_time_ns = wall_time_ns
        self.new_group = new_group
        self._stopping = Stopping(self.copier, self._mode, self._timers, resources.give_up)

    # What queries show.

    @property
    def is_busy(self) -> bool:
        if self.run is not None and self.status is JobStatus.READY:
            return not self.run.is_idle or self.activity.waits_to_try_again
        return super().is_busy

    @property
    def offset(self) -> int:
        return super().offset + self._sent_bytes + (self.run.sent_bytes if self.run else 0)

    @property
    def length(self) -> int:
        return self.offset + self.left_bytes

    @property
    def left_bytes(self) -> int:
        """What the far side lacks."""
        return self.tracker.remaining_bytes if self.run is None else self.run.left_bytes

    # Commands.

    def restore(
        self, mark_tracker: Callable[[], None], mark_changes: Callable[[DirtyBitmap], None]
    ) -> None:
        """For `take_up`: both mark what may differ, of the first copy and of points."""
        mark_tracker()
        mark_changes(self._changes.dirty)
        if self._far_resources.has_begun:
            self._changes.dirty.merge(self.tracker.dirty)
            self._changes.begin()
        else:
            self._changes.hand_back(self.tracker.dirty)

    def ask_for_point(self, name: str = "") -> PointRequest:
        """Make a point as soon as the one in progress has ended, and call it `name`, which can be
        the name of a point. All jobs of the group do, at one moment. Raises CommandError; then
        nothing has changed."""
        request = self.point_group.ask(self, name)
        late = DeviceError(f"no moment was found for it within {REQUEST_S_MAX:g} s")
        timer = self._loop.call_later(REQUEST_S_MAX, partial(request.fails, late))
        request.taken.add_done_callback(lambda _: timer.cancel())
        return request

    # Of the group.

    def share_points(self, points: PointGroup) -> None:
        self.point_group.leave(self)
        self.point_group = points
        points.add(self)

    @property
    def cut_run(self) -> PointRun | None:
        is_able = self.activity in (Activity.COPYING, Activity.POSTPONED) and self.copier.is_idle
        run = None if self._is_to_end or not is_able else self.run
        return run if run is not None and run.is_running and not run.is_leaving else None

    @property
    def _is_to_end(self) -> bool:
        return self.may_end and self.activity is Activity.COPYING

    # The run's owner.

    def point_committed(self, point: CommittedPoint) -> None:
        assert self.run is not None
        self._timers.went_well()
        self.tell_point(point)
        self.lag, self.in_place_since_ns = self.run.lag, 0
        if self.status is JobStatus.RUNNING:
            self.to(JobStatus.READY, "the first point is committed")
            self.tell("BLOCK_JOB_READY")

    def point_broken(self, error: BaseException, name: str) -> None:
        self._tell_of_points("X_NBDMIRROR_POINT_BROKEN", {"reason": str(error)}, name)

    def far_side_failed(self, error: BaseException) -> None:
        assert self.run is not None
        if not isinstance(error, NoRoom):
            self.copy_failed("write", error)
        elif not (error.is_final or self.run.is_applied) or not self.activity.hears_errors:
            return
        # What is free now, or what all points take, is all that will ever be free.
        elif self._allows_in_place:
            self._leave(self.run, error)
        else:
            self.tell_error("write", "stop", error)
            self.io_status = "nospace"
            self.hold()
            self.advance_soon()

    def source_failed(self, error: BaseException) -> None:
        self.copy_failed("read", error)

    def run_advanced(self) -> None:
        self.advance_soon()

    # What differs from other mirrors.

    def copy_failed(self, operation: str, error: BaseException) -> None:
        if isinstance(error, PointsRefused) and self.activity.hears_errors:
            self.tell_error(operation, "report", error)
            self.fail(error)
            self.advance_soon()
        else:
            super().copy_failed(operation, error)

    def target_lost(self) -> None:
        if self.run is None:
            super().target_lost()
        else:
            self.journal_lost(self.target.description)

    def journal_lost(self, description: str) -> None:
        """The connection to the journal broke, or that to the image after the first copy."""
        if not self.is_over:
            self.copy_failed("write", DeviceLost(f"{description}: connection lost"))

    def _may_be_lost(self, operation: str) -> bool:
        """A host that goes takes its exports with it one after the other."""
        lost = self._far_resources.lost_exports if operation == "write" else ()
        return any(self.watch.may_reconnect(operation, export) for export in lost or ("",))

    def source_lost_writes(self) -> None:
        """The source may have lost writes of guests that the far side has. From any thread."""
        self._loop.call_soon(self._mark_all)

    def _mark_all(self) -> None:
        self.log.warning("the source may have lost writes: everything is copied again")
        self.tracker.mark_all()
        if self.is_over:
            return
        if self.run is not None:
            self.run.everything_changed(DeviceError("the source may have lost writes"))
        elif self._far_resources.has_begun:  # the far side of an earlier process is waited for
            self._changes.dirty.mark_all()

    def advance(self) -> None:
        is_ending = self.activity in (Activity.PAUSING, Activity.ABORTING)
        is_idle = self._far_resources.is_idle and (self.run is None or self.run.is_idle)
        if is_ending and not is_idle:
            self._stopping.is_over(for_pause=self.activity is Activity.PAUSING)
        else:
            super().advance()

    def left(self, old: Activity) -> None:
        super().left(old)
        if self.run is not None and old.copies and not self.activity.copies:
            self.run.stop(DeviceError(f"the job is {self.activity.value}", errno.EINTR))

    def detach(self) -> None:
        super().detach()
        self.point_group.leave(self)
        if self.run is not None:
            self.run.end()
        else:  # which an earlier process may have begun
            self._changes.end()

    def _go_on(self) -> None:
        far = self._far_resources
        if self._is_leaving:
            self.become(Activity.COPYING)
            self._begin_in_place()
            return
        if self.run is None and far.far_side is not None and far.far_side.oldest:
            self._continue_points(far.far_side)
        if self.run is not None:
            self.become(Activity.COPYING)
            self._start_run()
            return
        if far.has_begun:  # an earlier process has not committed the first point
            self._changes.hand_back(self.tracker.dirty)
        super()._go_on()

    def _become_ready(self) -> None:
        """The first copy is in sync, and flushed."""
        begin = partial(self._far_resources.begin_points, self.kept_state)
        self._do(begin, self._begin_points, "write")

    def _begin_points(self) -> None:
        self.become(Activity.COPYING)
        self._timers.went_well()
        self.copier.stop()
        self._changes.begin()
        self.run = self._new_run({}, self._take_over)
        self.advance_soon()

    def _continue_points(self, far: FarSide) -> None:
        """Points of an earlier process: `restore` has marked what they lack."""
        has_begun = self._far_resources.has_begun
        if not has_begun:
            self._changes.begin()
        first = self._end_first_copy if has_begun else self._take_over
        self.run = self._new_run(far.times_ns(), first)
        self.lag = self.run.lag
        self.log.info("continues after point %d", far.newest)

    def _new_run(self, before_ns: Mapping[int, int], first: Callable[[], None]) -> PointRun:
        now_ns, window = self._wall_time_ns(), Window(self.promises.keep_s, self._loop.clock)
        window.learn({n: max(0.0, (now_ns - at_ns) / 1e9) for n, at_ns in before_ns.items()})
        return PointRun(
            owner=self,
            changes=self._changes,
            source=self._source,
            loop=self._loop,
            wall_time_ns=self._wall_time_ns,
            interval_s=self.interval_s,
            window=window,
            first=first,
            store=self._store,
        )

    def _take_over(self) -> None:
        """Behind the gate of the first cut. Both bitmaps have been marked since the first copy was
        in sync."""
        self._changes.dirty.merge(self.tracker.may_differ())
        self._end_first_copy()

    def _end_first_copy(self) -> None:
        self.disk.ledger.detach(self.tracker.dirty)
        self.tracker.dirty.clear_all()

    # In place.

    def _leave(self, run: PointRun, error: BaseException) -> None:
        """A point does not fit into the journal: once the image is the last one, the image is
        copied in place, as at first, and points begin anew."""
        if self.activity is Activity.PREPARING:
            return  # what follows fails again
        run.leave(error)
        if self.activity is not Activity.COPYING:
            self.become(Activity.COPYING)
        self.advance_soon()

    def _leave_points(self, run: PointRun) -> None:
        self.disk.ledger.attach(self.tracker.dirty)
        self._changes.hand_back(self.tracker.dirty)
        run.close()
        self._sent_bytes += run.sent_bytes
        self.run, self._is_leaving = None, True
        self.in_place_since_ns = self._wall_time_ns()
        since_s = round(self.in_place_since_ns / 1e9, 3)
        data = {"since-s": since_s, "bytes": self.tracker.dirty.dirty_bytes}
        self._tell_of_points("X_NBDMIRROR_IN_PLACE", data)
        self._begin_in_place()

    def _begin_in_place(self) -> None:
        begin = partial(self._far_resources.begin_in_place, self.kept_state)
        self._do(begin, self._copy_in_place, "write")

    def _copy_in_place(self) -> None:
        self._is_leaving = False
        self.log.warning("no point fits into the journal: the image is copied in place")
        self.release()

    def _advance_in_place(self) -> None:
        self._hurry()
        self.copier.pump()
        if self.tracker.in_sync and self.activity is Activity.COPYING and not self._is_leaving:
            self.become(Activity.FLUSHING)
            self._do(self.copier.flush, self._become_ready, "write")

    def _start_run(self) -> None:
        run, far = self.run, self._far_resources.far_side
        if run is not None and far is not None and not run.is_running and run.is_idle:
            run.start(far)

    def _advance_copying(self) -> None:
        if self.run is None and self.status is not JobStatus.RUNNING:
            self._advance_in_place()
            return
        if self.run is None:
            super()._advance_copying()
            return
        if not self.copier.is_idle:
            return  # what it writes must not come after the first point
        self._start_run()
        if self.run.has_left:
            self._leave_points(self.run)
        elif self._is_to_end and not self.run.is_leaving:
            super()._advance_copying()
        else:
            self.run.advance()

    def _begin_quiesce(self) -> None:
        assert self.run is not None
        self.become(Activity.QUIESCING)
        self._quiesce = LastPoint(
            ledger=self.disk.ledger,
            run=self.run,
            loop=self._loop,
            hands_over=self.ending is Ending.COMPLETE,
            on_level=self._on_level,
            on_timeout=self._on_quiesce_timeout,
        )
        self._quiesce.advance()

    def _is_at_rest(self) -> bool:
        """Never: the points and their lag go by time, also while guests write nothing."""
        return False

    def _look(self) -> None:
        if self.run is not None:
            self.run.look()
        if self.lag is not None:
            self.promises.look_at_lag(self.lag)
            if self.run is not None and self.ending is Ending.NONE:
                self.promises.look_at_window(self.run)
        super()._look()

    def tell_point(self, point: CommittedPoint, **extra: Any) -> None:
        assert self.run is not None
        data = {**point.told(self.run.lag.lag_s), **extra}
        self._tell_of_points("X_NBDMIRROR_POINT", data, point.name)

    def _tell_of_points(self, event: str, data: dict[str, Any], name: str = "") -> None:
        """`name`: of the point, if it has one."""
        named = {"name": name} if name else {}
        self._events.append(event, {"device": self.disk.name, "id": self.id, **data, **named})
