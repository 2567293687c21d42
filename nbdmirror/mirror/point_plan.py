"""PointPlan: how a job makes points; and RunMaker, the way from its first copy to its points.

On the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nbdmirror.devices.base import AsyncSource
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.changes import Changes
from nbdmirror.disk.disk import Disk
from nbdmirror.disk.tracker import Tracker
from nbdmirror.event_loop import Loop
from nbdmirror.mirror.far_side import FarSide
from nbdmirror.mirror.point_owner import PointRunOwner
from nbdmirror.mirror.point_run import PointRun
from nbdmirror.mirror.point_source import StoreOptions
from nbdmirror.mirror.window import Window


@dataclass(frozen=True, slots=True)
class PointPlan:
    """What points are asked for."""

    changes: Changes
    """Not tracked yet."""
    interval_s: float
    keep_s: float
    """How long points are kept."""
    rpo_s: float
    """The promised lag; 0: none."""
    store: StoreOptions
    in_place: bool
    """A point that does not fit into the journal gives all points up, and does not stop the
    job."""


class RunMaker:
    """Makes the runs of one job with a plan."""

    def __init__(
        self,
        plan: PointPlan,
        *,
        owner: PointRunOwner,
        disk: Disk,
        tracker: Tracker,
        source: AsyncSource,
        loop: Loop,
        wall_time_ns: Callable[[], int],
    ) -> None:
        """`source`: the disk, as points are read from it. `tracker`: of the first copy."""
        self.plan = plan
        self._owner = owner
        self._disk = disk
        self._tracker = tracker
        self._source = source
        self._loop = loop
        self._wall_time_ns = wall_time_ns

    def restore(self, mark_changes: Callable[[DirtyBitmap], None], *, has_begun: bool) -> None:
        """After the tracker has marked what may differ of the first copy: the same of points."""
        changes = self.plan.changes
        mark_changes(changes.dirty)
        if has_begun:
            changes.dirty.merge(self._tracker.dirty)
            changes.begin()
        else:
            changes.hand_back(self._tracker.dirty)

    def begun(self, far: FarSide) -> PointRun:
        """The first copy is in sync, and nothing of it is in flight."""
        self.plan.changes.begin()
        return self._run(far, {}, self._take_over)

    def continued(self, far: FarSide, *, has_begun: bool) -> PointRun:
        """The points of an earlier process: `restore` has marked what they lack."""
        if not has_begun:
            self.plan.changes.begin()
        first = self._end_first_copy if has_begun else self._take_over
        return self._run(far, far.times_ns(), first)

    def hand_back(self, run: PointRun) -> None:
        """The run has left: the tracker has what may differ, and is marked by guests again."""
        self._disk.ledger.attach(self._tracker.dirty)
        self.plan.changes.hand_back(self._tracker.dirty)
        run.close()

    def _run(
        self, far: FarSide, before_ns: Mapping[int, int], first: Callable[[], None]
    ) -> PointRun:
        """`before_ns`: the wall times of earlier points, by their numbers."""
        window, now_s = Window(self.plan.keep_s, self._loop.clock), self._loop.clock()
        now_ns = self._wall_time_ns()
        ages_s = {n: max(0.0, (now_ns - at_ns) / 1e9) for n, at_ns in before_ns.items()}
        window.learn(ages_s, now_s)
        return PointRun(
            owner=self._owner,
            far=far,
            changes=self.plan.changes,
            source=self._source,
            loop=self._loop,
            wall_time_ns=self._wall_time_ns,
            interval_s=self.plan.interval_s,
            window=window,
            first=first,
            store=self.plan.store,
        )

    def _take_over(self) -> None:
        """Behind the gate of the first cut. Both bitmaps have been marked since the first copy was
        in sync."""
        self.plan.changes.dirty.merge(self._tracker.may_differ())
        self._end_first_copy()

    def _end_first_copy(self) -> None:
        self._disk.ledger.detach(self._tracker.dirty)
        self._tracker.dirty.clear_all()
