"""PointsJob: a mirror whose far side always has one moment of the disk, once there was a first one.

The first copy is that of every mirror, in place. When it is in sync, points begin (point_run.py):
the copier ends, and what it had left is in the first point. READY is the first point that is
committed.

A job may also have no points, and be as every mirror: before it is changed to make some, and after
it was changed to another copy mode. On the event loop's thread.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.errors import CommandError, DeviceError, DeviceLost
from nbdmirror.mirror.activity import Activity
from nbdmirror.mirror.far_side import FarSide, NoRoom, PointsRefused, PointsResources
from nbdmirror.mirror.job_states import JobStatus, check_verb
from nbdmirror.mirror.last_point import LastPoint
from nbdmirror.mirror.options import CopyMode, Ending
from nbdmirror.mirror.point_plan import PointPlan
from nbdmirror.mirror.point_request import CommittedPoint
from nbdmirror.mirror.point_run import PointRun
from nbdmirror.mirror.points_view import PointsView
from nbdmirror.mirror.rate_limit import Haste
from nbdmirror.mirror.stopping import Stopping


class PointsJob(PointsView):
    """A PointRunOwner. Copies with the tracker first, and then sends the changes of its plan."""

    def __init__(self, *, resources: PointsResources, **points: Any) -> None:
        """`points`: as for PointsView."""
        super().__init__(resources=resources, **points)
        self._is_leaving = False
        """There are no points any more here, and the far side has to be told."""
        self._catches_up = False
        """The job was READY, and what the target lacks is copied before points begin, or, without
        points, before the job is as every mirror that is READY."""
        self._gives_up = self.plan is not None and not self._is_of_points
        """The copy mode was changed to another one, perhaps in an earlier process. That begins when
        the image is the last point."""
        self._is_dropping = False
        self._stopping = Stopping(self.copier, self.mode, self._timers, resources.give_up)

    # Commands.

    def restore(
        self, mark_tracker: Callable[[], None], mark_changes: Callable[[DirtyBitmap], None]
    ) -> None:
        """For `take_up`: both mark what may differ, of the first copy and of points."""
        mark_tracker()
        self._points.restore(mark_changes, has_begun=self.has_begun)
        number, time_ns = self._far_resources.known_point
        if self.has_begun and time_ns:
            self._count_from(CommittedPoint(number, time_ns, 0), self._points.plan.changes)

    def change(self, copy_mode: CopyMode, **options: Any) -> None:
        """Also from points to another copy mode: the image becomes the last point first, and is
        copied in place from then on."""
        is_as_before = copy_mode is CopyMode.POINTS and not self._gives_up
        if self._maker is None or is_as_before:
            super().change(copy_mode, **options)
            return
        self.check_settled()
        super().change(copy_mode, **options)
        self._gives_up = True
        self.advance_soon()

    def make_points(self, plan: PointPlan) -> None:
        """Change from another copy mode to points. The resources have the journal. `check_settled`
        was called before."""
        self.log.info("makes points from now on")
        self.options = replace(self.options, copy_mode=CopyMode.POINTS)
        self.throttle.release("the job was changed")
        self._adopt(plan)
        self._cover_nothing()
        self.watch.end()
        self._catches_up = self.status is JobStatus.READY
        self.release()
        self.advance_soon()

    def check_settled(self) -> None:
        """Raise CommandError if the job cannot change to points, or from points, now."""
        check_verb(self.id, self.status, "change")
        is_leaving = self._gives_up or self._is_leaving
        is_still = self.activity is Activity.COPYING
        if self.run is None:
            is_still = is_still and self._far_resources.is_idle
        else:
            is_still = is_still and self.run.is_running
        if self.ending is not Ending.NONE:
            raise CommandError(f"Job '{self.id}' is ending: its copy mode cannot be changed")
        if is_leaving or not is_still:
            now = "leaving its points" if is_leaving else self.activity.value
            text = f"its copy mode cannot be changed now: it is {now}"
            raise CommandError(f"Job '{self.id}': {text}")

    @property
    def _is_of_points(self) -> bool:
        return self.options.copy_mode is CopyMode.POINTS

    def _drop_points(self) -> None:
        """No point is in progress, and nothing is in flight to the journal. First what is in no
        point must be kept as what is dirty: then nothing else says that it differs."""
        if not self._is_dropping:
            self._do(self._far_resources.keep_changes, self._dropped, "write")
            self._is_dropping = True

    def _dropped(self) -> None:
        self._maker, self._gives_up, self.in_place_since_ns = None, False, 0
        self.point_group.leave(self)
        self.promises.outage.end()
        self.point_traffic.follow(None)
        self._far_resources.drop_points()
        self.log.info("makes no points any more: the image is copied in place")
        self.release()

    # The run's owner.

    def point_committed(self, point: CommittedPoint) -> None:
        assert self.run is not None
        self._timers.went_well()
        self.tell_point(point)
        self.lag, self.in_place_since_ns = self.run.lag, 0
        if self.status is JobStatus.RUNNING:
            self.count_traffic()
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
        elif self._points.plan.in_place:
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
        if not self.is_over and self._maker is not None:
            self.copy_failed("write", DeviceLost(f"{description}: connection lost"))

    def _may_be_lost(self, operation: str) -> bool:
        """A host that goes takes its exports with it one after the other."""
        lost = self._far_resources.lost_exports if operation == "write" else ()
        return any(self.watch.may_reconnect(operation, export) for export in lost or ("",))

    def source_lost_writes(self) -> None:
        """The source may have lost writes of guests that the far side has. From any thread."""
        self.disk.lose_writes()
        self._loop.call_soon(self._mark_all)

    def _mark_all(self) -> None:
        self.log.warning("the source may have lost writes: everything is copied again")
        self.tracker.mark_all()
        if self.is_over:
            return
        if self.run is not None:
            self.run.everything_changed(DeviceError("the source may have lost writes"))
        elif self.has_begun:  # the far side of an earlier process is waited for
            self._points.plan.changes.dirty.mark_all()

    def advance(self) -> None:
        is_ending = self.activity in (Activity.PAUSING, Activity.ABORTING)
        is_idle = self._far_resources.is_idle and (self.run is None or self.run.is_idle)
        if is_ending and not is_idle:
            self._stopping.is_over(for_pause=self.activity is Activity.PAUSING)
        else:
            super().advance()

    def left(self, old: Activity) -> None:
        super().left(old)
        self._is_dropping = False
        if self.run is not None and old.copies and not self.activity.copies:
            self.run.stop(DeviceError(f"the job is {self.activity.value}", errno.EINTR))

    def detach(self) -> None:
        super().detach()
        self.point_group.leave(self)
        if self._maker is not None:
            self.promises.outage.end()
        if self.run is not None:
            self.run.end()
        elif self._maker is not None:  # which an earlier process may have begun
            self._maker.plan.changes.end()

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
            self._points.plan.changes.hand_back(self.tracker.dirty)
        if self._gives_up:
            self.become(Activity.COPYING)
            self.advance_soon()
        else:
            super()._go_on()

    def _become_ready(self) -> None:
        """The first copy is in sync, and flushed."""
        if self._maker is None:
            is_again, self._catches_up = self._catches_up, False
            if is_again:
                self.follow()
            else:
                super()._become_ready()
            return
        begin = partial(self._far_resources.begin_points, self.kept_state)
        self._do(begin, self._begin_points, "write")

    def _begin_points(self) -> None:
        self.become(Activity.COPYING)
        self._timers.went_well()
        self._catches_up = False
        self.copier.stop()
        assert self.disk.synchronous is None, "guests would change the image beside the points"
        far = self._far_resources.far_side
        assert far is not None, "points begin where the far side was opened"
        self.run = self._points.begun(far)
        self.advance_soon()

    def _continue_points(self, far: FarSide) -> None:
        self.run = self._points.continued(far, has_begun=self.has_begun)
        self.lag = self.run.lag
        self.log.info("continues after point %d", far.newest)

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
        self._cover_nothing()
        self._points.hand_back(run)
        self._sent_bytes += run.sent_bytes
        self.run, self._is_leaving, self._least_bytes = None, True, math.inf
        self._catches_up = self.status is JobStatus.READY
        if not self._gives_up:
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
        if self._gives_up:
            self.advance_soon()
        else:
            self.log.warning("no point fits into the journal: the image is copied in place")
            self.release()

    def _hurry(self) -> None:
        if self._catches_up:  # at leisure a busy guest would always be ahead
            self.copier.set_haste(Haste.STEADY)
        else:
            super()._hurry()

    def _advance_in_place(self) -> None:
        """Until the image is in sync, or a point can take the rest: so a guest that is faster than
        the target has points, too."""
        self._hurry()
        self.copier.pump()
        is_over = self.tracker.in_sync or (self._maker and self._is_rest_for_a_point)
        if is_over and self.activity is Activity.COPYING and not self._is_leaving:
            self.become(Activity.FLUSHING)
            self._do(self.copier.flush, self._become_ready, "write")

    def _start_run(self) -> None:
        run, far = self.run, self._far_resources.far_side
        if run is not None and far is not None and not run.is_running and run.is_idle:
            run.start(far)

    def _advance_copying(self) -> None:
        if self.run is None and self._gives_up and not self._is_leaving:
            self._drop_points()
            return
        if self.run is None:
            if self._catches_up or (self._maker and self.status is JobStatus.RUNNING):
                self._advance_in_place()
            else:
                super()._advance_copying()
            return
        if not self.copier.is_idle:
            return  # what it writes must not come after the first point
        self._start_run()
        if self._gives_up and not self.run.is_leaving:
            self.run.leave(DeviceError(f"the copy mode was changed to {self.options.copy_mode}"))
        if self.run.has_left:
            self._leave_points(self.run)
        elif self._is_to_end and not self.run.is_leaving:
            super()._advance_copying()
        else:
            self.run.advance()

    def _begin_quiesce(self) -> None:
        if self.run is None:
            super()._begin_quiesce()
            return
        self.become(Activity.QUIESCING)
        self._quiesce = LastPoint(
            ledger=self.disk.ledger,
            run=self.run,
            loop=self._loop,
            hands_over=self.ending is Ending.COMPLETE,
            is_cut=self._is_last_cut,
            on_level=self._on_level,
            on_timeout=self._on_quiesce_timeout,
        )
        self._quiesce.advance()

    @property
    def _is_last_cut(self) -> bool:
        """The point in progress is the last one of a job that does not pivot."""
        return False

    def _is_at_rest(self) -> bool:
        """Not with points: they and their lag go by time, also while guests write nothing."""
        return self._maker is None and not self._catches_up and super()._is_at_rest()

    def _look(self) -> None:
        if self.run is not None:
            self.run.look()
        if self.lag is not None and self._maker is not None:
            self.promises.look_at_lag(self.lag)
            if self.run is not None and self.ending is Ending.NONE:
                self.promises.look_at_window(self.run)
        if self._maker is not None:
            room = self.journal_room
            self.promises.look_at_journal(self.run, room)
            self.promises.look_at_applier(room)
        super()._look()
