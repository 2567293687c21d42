"""PointsView: what is shown of a job with points, what it tells, and the group that it makes its
points with. On the event loop's thread."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from nbdmirror.devices.base import AsyncSource
from nbdmirror.disk.cells import Cells, DiskMap, map_of
from nbdmirror.disk.changes import Changes
from nbdmirror.errors import CommandError, DeviceError
from nbdmirror.mirror.activity import Activity
from nbdmirror.mirror.far_side import JournalRoom, PointsResources
from nbdmirror.mirror.job_states import JobStatus
from nbdmirror.mirror.lag import StandingLag
from nbdmirror.mirror.mirror_job import MirrorJob
from nbdmirror.mirror.outage import Outage
from nbdmirror.mirror.point_group import PointGroup
from nbdmirror.mirror.point_lag import PointLag
from nbdmirror.mirror.point_plan import PointPlan, RunMaker
from nbdmirror.mirror.point_promises import PointPromises
from nbdmirror.mirror.point_request import CommittedPoint, PointRequest
from nbdmirror.mirror.point_run import PointRun
from nbdmirror.mirror.traffic import PointTraffic, Traffic
from nbdmirror.mirror.watched import WatchedSource
from nbdmirror.point_sentences import of_applier

REQUEST_S_MAX = 30.0
"""A point that was asked for, and could not be begun for so long, is not made: a guest whose file
systems are frozen for this point must continue."""

STALLED_S = 5.0
"""A copy in place that has come no closer to its end for so long is left to the next point."""


class PointsView(MirrorJob):
    """A PointMember, also without points."""

    point_group = PointGroup()
    """Of each job with points another one, by `share_points`."""
    _maker: RunMaker | None = None
    """None: no points are made."""

    def __init__(
        self,
        *,
        resources: PointsResources,
        plan: PointPlan | None,
        source: AsyncSource,
        wall_time_ns: Callable[[], int],
        new_group: Callable[[], int],
        **mirror: Any,
    ) -> None:
        """`plan`: None: the job makes no points. `source`: the disk, as points are read from it.
        `new_group`: a number for points that are of the same cut, which no other cut has.
        `mirror`: as for MirrorJob."""
        super().__init__(resources=resources, **mirror)
        self._far_resources = resources
        self.run: PointRun | None = None
        """Since the first copy is in sync."""
        self.earlier: CommittedPoint | None = None
        """The last point of an earlier process, as far as is known."""
        self.in_place_since_ns = 0
        """Since this wall time there is no point: the image is copied in place. 0: points are made,
        or have not begun."""
        self.new_group = new_group
        self._wall_time_ns = wall_time_ns
        self._sent_bytes = 0
        """Of earlier runs."""
        self._least_bytes, self._least_s = math.inf, 0.0
        """The least that was left of the copy in place, and since when."""
        self.point_traffic = PointTraffic()
        self._new_maker = partial(
            RunMaker,
            owner=self,  # type: ignore[arg-type]  # PointsJob is one
            disk=self.disk,
            tracker=self.tracker,
            source=WatchedSource(source, self.waits),
            loop=self._loop,
            wall_time_ns=wall_time_ns,
        )
        if plan is not None:
            self._adopt(plan)

    def _count_from(self, earlier: CommittedPoint, changes: Changes) -> None:
        """The last point of an earlier process is as old as the wall clock says. The far side may
        not be there for long."""
        self.earlier = earlier
        clock = self._loop.clock
        now_s = clock()  # first: the lag is never too small
        age_s = max(0.0, (self._wall_time_ns() - earlier.time_ns) / 1e9)
        self.lag = PointLag(changes, clock, now_s - age_s)

    @property
    def _is_rest_for_a_point(self) -> bool:
        """The copy in place has come no closer to its end for STALLED_S, and what is left fits into
        one point, also if it becomes twice as much until the cut."""
        tracker, now_s = self.tracker, self._loop.clock()
        left_bytes = tracker.dirty.dirty_bytes + tracker.in_flight_bytes
        if left_bytes < self._least_bytes:
            self._least_bytes, self._least_s = left_bytes, now_s
        room = self.journal_room
        fits = room is None or min(2 * left_bytes, self.disk.size) <= room.point_bytes
        return fits and now_s - self._least_s >= STALLED_S

    def _cover_nothing(self) -> None:
        """There is no point: what was covered until now is, and the lag grows."""
        if self.lag is not None:
            self.lag = StandingLag(self._loop.clock, self._loop.clock() - self.lag.lag_s)

    def _adopt(self, plan: PointPlan) -> None:
        self._maker = self._new_maker(plan)
        self.point_traffic.follow(plan.changes)
        self.promises = PointPromises(
            rpo_s=plan.rpo_s,
            keep_s=plan.keep_s,
            outage=Outage(plan.changes, self._loop.clock),
            tell=self._tell_of_points,
            log=self.log,
        )
        self.share_points(self.group.points)

    @property
    def plan(self) -> PointPlan | None:
        """None: the job makes no points."""
        return self._maker.plan if self._maker is not None else None

    @property
    def interval_s(self) -> float:
        """Of the points."""
        return self._points.plan.interval_s

    @property
    def _points(self) -> RunMaker:
        assert self._maker is not None, "the job makes no points"
        return self._maker

    # What queries show.

    @property
    def is_busy(self) -> bool:
        if self.run is not None and self.status is JobStatus.READY:
            return not self.run.is_idle or self.activity.waits_to_try_again
        return super().is_busy

    @property
    def makes_points(self) -> bool:
        run = self.run
        return run is not None and run.is_running and self.traffic is not None

    def map(self, cells_max: int) -> DiskMap:
        """A point that is on its way is in flight, as a whole. What is sent is durable then."""
        if self.run is None:
            return super().map(cells_max)
        changes = self.run.changes
        cells = Cells(changes.size, changes.granularity, cells_max)
        frozen = changes.frozen
        in_flight = cells.sum_of([frozen.covered] if frozen is not None else [])
        zeroes = self.tracker.zeroes
        return map_of(cells, dirty=changes.dirty, in_flight=in_flight, zeroes=zeroes)

    @property
    def in_flight_bytes(self) -> int:
        frozen = self.run.changes.frozen if self.run is not None else None
        return super().in_flight_bytes + (frozen.covered.dirty_bytes if frozen is not None else 0)

    def count_traffic(self) -> None:
        self.traffic = self.traffic or Traffic(self.copier, self.tracker, self.point_traffic)

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

    # Endings.

    def check_applier(self) -> None:
        """For a user's `complete`: raise CommandError if it would wait for an applier that is
        gone."""
        room = self.journal_room
        if room is not None and (text := of_applier(room.applier_silent_s)):
            raise CommandError(f"Job '{self.id}': {text}")

    # What the far side has.

    @property
    def has_begun(self) -> bool:
        """The first copy has ended: the far side has a point, or gets its first one."""
        return self._far_resources.has_begun

    @property
    def journal_room(self) -> JournalRoom | None:
        """None: there is no journal, or none yet."""
        far = self._far_resources.far_side
        return far.room() if far is not None else None

    # Points that users ask for.

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
        """Has no effect on a job without points."""
        if self._maker is None:
            return
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

    # Events.

    def tell_point(self, point: CommittedPoint, **extra: Any) -> None:
        assert self.run is not None
        data = {**point.told(self.run.lag.lag_s), **extra}
        self._tell_of_points("X_NBDMIRROR_POINT", data, point.name)

    def _tell_of_points(self, event: str, data: dict[str, Any], name: str = "") -> None:
        """`name`: of the point, if it has one."""
        named = {"name": name} if name else {}
        self._events.append(event, {"device": self.disk.name, "id": self.id, **data, **named})
