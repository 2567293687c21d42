"""PointsResources: what a job with points runs on: as every job, and its journal.

On the event loop's thread.
"""

from __future__ import annotations

import errno
import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from nbdmirror.devices.base import Done
from nbdmirror.disk.cells import Zeroes
from nbdmirror.disk.changes import Changes, MayDiffer
from nbdmirror.errors import DeviceError, DeviceLost
from nbdmirror.mirror.far_side import FarSide
from nbdmirror.mirror.mirror_job import MirrorJob
from nbdmirror.mirror.point_plan import PointPlan
from nbdmirror.mirror.point_source import StoreOptions
from nbdmirror.mirror.points_job import PointsJob
from nbdmirror.mirror.resources import JobState
from nbdmirror.mirror.spot_check import Mismatch, Read
from nbdmirror.mirror.watched import WatchedExport
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.durable import DurableExport
from nbdmirror.nbdclient.reservations import release
from nbdmirror.points.appliers_block import Watch
from nbdmirror.points.format import JournalError, Point
from nbdmirror.points.ownership import create, is_created, take_over
from nbdmirror.points.recovery import check_samples
from nbdmirror.points.requests import Exports, Program, Side, start
from nbdmirror.points.writer import JournalWriter
from nbdmirror.server.far_side import Beside, JournalSide, refusal_of
from nbdmirror.server.job_resources import JobResources
from nbdmirror.server.mirror_record import points_record
from nbdmirror.server.nodes import Node
from nbdmirror.server.points_checks import PointsOptions
from nbdmirror.server.reconnect import reconnect
from nbdmirror.state.disk_record import PointsRecord
from nbdmirror.state.recovery import RecoveredState
from nbdmirror.state.spill import SpillFile

WAIT_S = 0.02
"""Interval at which the end of earlier requests is looked for."""

LOST_AGAIN_S = 1.0
"""Pause after a connection that was lost at once."""


@dataclass(slots=True, eq=False, kw_only=True)
class PointsResources(JobResources):
    """A mirror.far_side.PointsResources. `points`: None: the job makes no points."""

    points: PointsOptions | None = None
    changes: Changes | None = None
    has_begun: bool = False
    """The first copy has ended, perhaps in an earlier process."""
    known_point: tuple[int, int] = (0, 0)
    far_side: FarSide | None = field(default=None, init=False)
    _spill: SpillFile | None = field(default=None, init=False)
    _has_journal: bool = field(default=False, init=False)
    """The journal was connected in this process. Until then the job waits for it without a
    limit."""
    _turn: object = field(default=None, init=False)
    """The last call of `reconnect`."""
    _is_opening: bool = field(default=False, init=False)
    _watch: Watch = field(default_factory=Watch, init=False)

    @property
    def wanted(self) -> PointsOptions:
        assert self.points is not None, "the job makes no points"
        return self.points

    @property
    def tracked(self) -> Changes:
        assert self.changes is not None, "the job makes no points"
        return self.changes

    @property
    def journal(self) -> Node:
        assert self.wanted.journal is not None, "snapshots_resources has no journal"
        return self.wanted.journal

    @property
    def plan(self) -> PointPlan | None:
        points = self.points
        if points is None:
            return None
        store = StoreOptions(points.store_bytes, self._spill, points.breaks_guest_writes)
        return PointPlan(
            changes=self.tracked,
            interval_s=points.interval_s,
            keep_s=points.keep_s,
            rpo_s=points.rpo_s,
            store=store,
            in_place=points.in_place,
        )

    @property
    def is_idle(self) -> bool:
        return not self._is_opening and (self.far_side is None or self.far_side.is_idle)

    @property
    def lost_exports(self) -> list[str]:
        devices = [self.node.device]
        if self.points is not None:
            devices.append(self.journal.device)
        return [device.description for device in devices if device.is_lost]

    def make_spill(self) -> None:
        """Create the spill file, if one is wanted. Before `acquire`."""
        if size := self.wanted.spill_bytes:
            self._spill = self.store.new_spill(size, self.loop.call_soon)

    def found(self, state: RecoveredState) -> None:
        """Continue a mirror of an earlier process."""
        record = state.definition.mirror
        assert record is not None and record.points is not None
        self.has_begun = record.points.has_begun
        is_known = not state.problem and record.points.key in state.bits
        if is_known:  # else all is sent again
            self.known_point = state.newest_point, state.newest_point_ns

    def acquire(self, job: MirrorJob) -> None:
        assert isinstance(job, PointsJob)
        JobResources.acquire(self, job)
        if self.points is not None:
            self._acquire_points(job)

    def _acquire_points(self, job: PointsJob) -> None:
        if isinstance(self.source, NbdDevice):
            self.source.on_lost_writes = job.source_lost_writes
        self._acquire_journal(job)

    def add_points(self, job: PointsJob, points: PointsOptions, changes: Changes) -> PointPlan:
        """A job without points is to make some."""
        self.points, self.changes = points, changes
        self.make_spill()
        self.has_begun, self.known_point, self.far_side = False, (0, 0), None
        self._acquire_points(job)
        plan = self.plan
        assert plan is not None
        return plan

    def drop_points(self) -> None:
        self._release_points()
        self.tracked.end()
        self.points = self.changes = self.far_side = None
        self.has_begun, self.known_point = False, (0, 0)

    def _acquire_journal(self, job: PointsJob) -> None:
        self._has_journal = self.has_connected_once
        device = self.journal.device
        self.journal.job = job
        device.pool.attach(self.loop, partial(job.journal_lost, device.description))
        self.store.note_point(*self.known_point)

    def released(self) -> None:
        if self.points is not None:
            self._release_points()
        JobResources.released(self)

    def _release_points(self) -> None:
        self._release_journal()
        if self._spill is not None:
            self._spill.close()
            self._spill = None

    def _release_journal(self) -> None:
        device = self.journal.device
        self.journal.job = None
        self.nodes.leave(device)
        release(device)
        device.pool.detach()
        if self.journal.is_owned:
            self.nodes.forget(self.journal)
            device.close()

    def _points_record(self) -> PointsRecord | None:
        if self.points is None:
            return None
        job = self.node.job
        assert isinstance(job, PointsJob)
        return points_record(
            self.points,
            self.tracked.granularity,
            has_begun=self.has_begun,
            group=job.point_group.key,
        )

    def _kept_changes(self) -> dict[str, MayDiffer]:
        kept = JobResources._kept_changes(self)
        return kept if self.points is None else {**kept, self.points.key: self.tracked}

    def begin_points(self, state: JobState, done: Done) -> None:
        self.has_begun = True
        self._save(state, done)

    def begin_in_place(self, state: JobState, done: Done) -> None:
        def begun(error: BaseException | None) -> None:
            if error is not None or not self._is_in_use:
                done(error)
            else:
                self.has_begun = False
                self._save(state, done)

        assert self.far_side is not None
        self.far_side.begin_in_place(begun)

    def _save(self, state: JobState, done: Done) -> None:
        self.changed(state)
        saved = self.store.saved()  # a failure is reported there, and repeated
        saved.add_done_callback(lambda _: self.loop.call_soon(partial(done, None)))

    def give_up(self) -> None:
        self.node.device.give_up()
        if self.points is not None:
            self.journal.device.give_up()

    def reconnect(self, has_copied: bool, done: Done) -> None:
        """Also reconnect the journal, and open the far side."""
        if self.points is None:
            JobResources.reconnect(self, has_copied, done)
            return
        turn = self._turn = object()  # earlier attempts give up
        deadline_s = self.loop.clock() + self._delay_s

        def is_wanted() -> bool:
            return self._is_in_use and self._turn is turn

        def again() -> None:
            if is_wanted():
                JobResources.reconnect(self, True, image_is_there)

        def image_is_there(error: BaseException | None) -> None:
            if error is not None:
                done(error)
            elif is_wanted():
                self._reconnect_journal(is_wanted, journal_is_there)

        def journal_is_there(error: BaseException | None) -> None:
            if error is not None:
                done(error)
            else:
                self._open(is_wanted, ended)

        def ended(error: BaseException | None) -> None:
            if error is None and self.lost_exports:  # one went while the other one came back
                error = DeviceLost(f"{self.lost_exports[0]}: connection lost")
            if isinstance(error, DeviceLost) and self.loop.clock() < deadline_s:
                self.loop.call_later(LOST_AGAIN_S, again)
            elif isinstance(error, DeviceLost):
                done(DeviceError(str(error), errno.EIO))
            else:
                done(error)

        JobResources.reconnect(self, has_copied, image_is_there)

    @property
    def _delay_s(self) -> float:
        """How long a lost far side is waited for."""
        is_known = self._has_journal and self.has_connected_once
        return self.options.reconnect_delay_s if is_known else math.inf

    def _reconnect_journal(self, is_wanted: Callable[[], bool], done: Done) -> None:
        device, job_id = self.journal.device, self.options.job_id
        if not device.is_lost:
            done(None)
            return

        def came_back() -> None:
            self._has_journal = True

        def ended(error: BaseException | None) -> None:
            if is_wanted():
                self.chronicle.target_waited_for(job_id, is_back=error is None)
            done(error)

        delay_s = self._delay_s
        self.chronicle.target_lost(job_id, delay_s, device.description)
        reconnect(
            device,
            self.loop,
            reconnect_timeout_s=delay_s,
            is_wanted=is_wanted,
            difference=lambda read: None,  # the journal says itself what it is
            came_back=came_back,
            done=ended,
        )

    def _open(self, is_wanted: Callable[[], bool], done: Done) -> None:
        if not is_wanted():
            return
        if not self.is_idle:  # two writers of one process would spoil the journal
            self.loop.call_later(WAIT_S, partial(self._open, is_wanted, done))
            return
        self._is_opening = True
        journal = DurableExport(self.journal.device)
        exports: Exports = {Side.IMAGE: self._image(), Side.JOURNAL: self._watched(journal)}

        def opened(writer: JournalWriter | None, error: BaseException | None) -> None:
            self._is_opening = False
            if writer is not None:
                self.far_side = JournalSide(
                    writer, exports, time.time_ns, self._committed, self._beside
                )
                self._committed(writer.newest)
            done(None if error is None else refusal_of(error))

        start(self._take_over(exports), exports, opened)

    @property
    def _beside(self) -> Beside:
        forget = partial(self.tracker.zeroes.remove, 0, self.disk.size)
        return Beside(self._watch, self.loop.call_later, self.loop.clock, forget)

    def _image(self) -> WatchedExport:
        return self._watched(DurableExport(self.node.device), self.tracker.zeroes)

    def _watched(self, export: DurableExport, zeroes: Zeroes | None = None) -> WatchedExport:
        job = self.node.job
        assert isinstance(job, PointsJob)
        return WatchedExport(export, job.waits, job.point_traffic, zeroes)

    def _take_over(self, exports: Exports) -> Program[JournalWriter]:
        journal = exports[Side.JOURNAL]
        name = journal.description
        newest, _ = self.known_point
        if not newest and not (yield from is_created(name, self.wanted.disk_id)):
            yield from create(
                name,
                journal.size,
                disk_bytes=self.disk.size,
                now_ns=time.time_ns(),
                disk_id=self.wanted.disk_id,
            )
        before = self.far_side.writer if isinstance(self.far_side, JournalSide) else None
        writer = yield from take_over(exports, disk_id=self.wanted.disk_id, before=before)
        there = writer.newest.sequence
        if there < newest:
            text = f"ends with point {there}, and point {newest} was committed"
            raise JournalError(f"{name}: has lost points: it {text}")
        if not there:
            yield from writer.seed(time.time_ns())
        elif self.far_side is None:  # an earlier process made them
            yield from check_samples(name, writer.superblocks.current)
        return writer

    def _committed(self, point: Point) -> None:
        """The point is committed, and known to be."""
        self.known_point = point.sequence, point.time_ns
        self.store.note_point(*self.known_point)

    def _difference(self) -> Callable[[Read], Mismatch | None]:
        """After the first copy the image is what the journal says, and not what the disk is."""
        if self.points is None or not self.has_begun:
            return JobResources._difference(self)
        samples = self.far_side.samples if isinstance(self.far_side, JournalSide) else ()

        def difference(read: Read) -> Mismatch | None:
            for sample in samples:
                buf = memoryview(bytearray(sample.length))
                read(buf, sample.offset)
                if zlib.crc32(buf) != sample.crc:
                    return Mismatch(sample.offset)
            return None

        return difference
