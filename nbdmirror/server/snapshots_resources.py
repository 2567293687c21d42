"""SnapshotsResources: what a job runs on whose points are snapshots of its target: as every job
with points, but without a journal.

On the event loop's thread.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from nbdmirror.devices.base import Done
from nbdmirror.mirror.acknowledgements import Acknowledgements
from nbdmirror.mirror.points_job import PointsJob
from nbdmirror.mirror.spot_check import Mismatch, Read
from nbdmirror.server.job_resources import JobResources
from nbdmirror.server.points_resources import WAIT_S, PointsResources
from nbdmirror.server.snapshot_side import SnapshotSide
from nbdmirror.state.disk_record import PointsRecord
from nbdmirror.state.recovery import RecoveredState


@dataclass(slots=True, eq=False, kw_only=True)
class SnapshotsResources(PointsResources):
    """A mirror.far_side.PointsResources."""

    acks: Acknowledgements = field(default_factory=Acknowledgements, init=False)
    _job: PointsJob | None = field(default=None, init=False)

    @property
    def lost_exports(self) -> list[str]:
        device = self.node.device
        return [device.description] if device.is_lost else []

    def found(self, state: RecoveredState) -> None:
        PointsResources.found(self, state)
        mirror = state.definition.mirror
        assert mirror is not None and mirror.points is not None
        kept = mirror.points
        self.acks = Acknowledgements(kept.announced, kept.acknowledged, kept.acknowledged_ns)
        self.known_point = kept.acknowledged, kept.acknowledged_ns

    def _acquire_journal(self, job: PointsJob) -> None:
        self._job = job
        self.acks.write_down = self._write_down

    def _release_journal(self) -> None:
        pass

    def _points_record(self) -> PointsRecord:
        acks, record = self.acks, PointsResources._points_record(self)
        assert record is not None
        return replace(
            record,
            announced=acks.newest,
            acknowledged=acks.last,
            acknowledged_ns=acks.last_ns,
        )

    def _write_down(self, done: Done) -> None:
        assert self._job is not None
        self._save(self._job.kept_state, done)

    def give_up(self) -> None:
        self.node.device.give_up()

    def reconnect(self, has_copied: bool, done: Done) -> None:
        """Also open the far side."""
        turn = self._turn = object()  # earlier attempts give up

        def is_there(error: BaseException | None) -> None:
            if error is not None:
                done(error)
            elif self._is_in_use and self._turn is turn:
                open_side()

        def open_side() -> None:
            if self.is_idle:
                self.far_side = self._new_side()
                done(None)
            else:  # what is late there must not come over the next point
                self.loop.call_later(WAIT_S, partial(is_there, None))

        JobResources.reconnect(self, has_copied, is_there)

    def _new_side(self) -> SnapshotSide:
        return SnapshotSide(self._image(), self.acks, may_trim=self.options.unmap)

    def _difference(self) -> Callable[[Read], Mismatch | None]:
        """What neither guests nor a point in progress have changed is the same on both sides."""
        is_copied = self._job is not None and self._job.run is not None
        tracked = self.tracked if is_copied else self.tracker
        suspects = self.tracker.may_differ()
        suspects.merge(self.tracked.may_differ())

        def difference(read: Read) -> Mismatch | None:
            rng = random.Random()
            return self.spot_check.find_mismatch(self.disk, read, tracked, suspects, rng)

        return difference
