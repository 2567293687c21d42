"""MirrorJobs: creates the mirror jobs of a server, and finds them. On the event loop's thread."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from functools import partial
from typing import Any

from nbdmirror.disk.bitmap import check_bits
from nbdmirror.disk.disk import Disk
from nbdmirror.disk.tracker import Tracker
from nbdmirror.errors import CommandError
from nbdmirror.event_loop import Loop
from nbdmirror.events import EventRing
from nbdmirror.local_servers import one_look
from nbdmirror.mirror.activity import Activity
from nbdmirror.mirror.in_flight import CopierLoad
from nbdmirror.mirror.mirror_job import MirrorJob
from nbdmirror.mirror.options import MirrorOptions
from nbdmirror.mirror.point_group import PointGroup
from nbdmirror.mirror.points_job import PointsJob
from nbdmirror.mirror.snapshots_job import SnapshotsJob
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.reservations import release
from nbdmirror.server.bitmaps import Bitmaps, NamedBitmap, Place
from nbdmirror.server.chronicle import Chronicle
from nbdmirror.server.mirror_record import node_of, options_of, points_of
from nbdmirror.server.nodes import Node, Nodes
from nbdmirror.server.points_checks import (
    PointsOptions,
    changes_of,
    check_content,
    check_journal,
    new_group,
)
from nbdmirror.server.points_resources import PointsResources
from nbdmirror.server.snapshots_resources import SnapshotsResources
from nbdmirror.server.sources import Sources
from nbdmirror.server.target_checks import check_target, granularity_of, unit_of
from nbdmirror.state.null_store import StateStore
from nbdmirror.state.recovery import RecoveredState
from nbdmirror.state.sealed_files import StateError

JOBS_MAX = 256
"""Most jobs, including concluded ones that were not dismissed: a bound on a client's use of
memory."""


def _points_resources(points: PointsOptions, **parts: Any) -> PointsResources:
    kind = PointsResources if points.journal is not None else SnapshotsResources
    return kind(points=points, **parts)


class MirrorJobs:
    """The jobs of a server, by their IDs."""

    def __init__(
        self,
        *,
        nodes: Nodes,
        events: EventRing,
        loop: Loop,
        stores: Mapping[Disk, StateStore],
        chronicle: Chronicle,
    ) -> None:
        """`stores`: where the state of each disk is saved."""
        self.jobs: dict[str, PointsJob] = {}
        """All jobs that were not dismissed yet, by their IDs."""
        self._resources: dict[str, PointsResources] = {}
        self._stores = stores
        self._chronicle = chronicle
        self._load = CopierLoad(
            loop.clock, lambda: sum(disk.ledger.new_requests() for disk in stores)
        )
        self._nodes = nodes
        self._events = events
        self._loop = loop
        self._sources = Sources(nodes, loop)
        self._point_groups: dict[str, PointGroup] = {}
        """Those of earlier processes, by their keys."""

    @property
    def running(self) -> list[MirrorJob]:
        """The jobs that have not ended."""
        return [job for job in self.jobs.values() if job.activity is not Activity.ENDED]

    def of(self, disk: Disk) -> MirrorJob | None:
        """The job that mirrors `disk` now."""
        return next((job for job in self.running if job.disk is disk), None)

    def journal_of(self, disk: Disk) -> str:
        """The ID of `disk` in the journal that has its points, in hexadecimal; "": none has."""
        job = self.of(disk)
        points = self._resources[job.id].points if job is not None else None
        return points.disk_id.hex() if points is not None else ""

    @one_look()
    def create(
        self,
        disk: Disk,
        node: Node,
        options: MirrorOptions,
        bitmap: NamedBitmap | None = None,
        points: PointsOptions | None = None,
    ) -> MirrorJob:
        """A job that can be started (`begin`) or discarded; `points`: with copy mode points. Raises
        CommandError; then no job exists and nothing has changed."""
        used = [node, *([points.journal] if points is not None and points.journal else [])]
        self._check(disk, node, options)
        try:
            if points is not None:
                self._check_points(disk, node, options, points)
            granularity = granularity_of(disk, node.device, options, bitmap)
            check_bits(disk.size, granularity)
            key = f"mirror-{uuid.uuid4().hex}"
            return self._make(disk, node, options, bitmap, granularity, key, points=points)
        except CommandError:
            for one in used:
                release(one.device)
            raise

    def _make(
        self,
        disk: Disk,
        node: Node,
        options: MirrorOptions,
        bitmap: NamedBitmap | None,
        granularity: int,
        key: str,
        *,
        points: PointsOptions | None = None,
        found: RecoveredState | None = None,
    ) -> MirrorJob:
        """`found`: what an earlier process has left of this mirror."""
        store = self._stores[disk]
        unit = unit_of(disk, node.device, options, granularity)
        # What a target with points lacks is told by its points.
        remainder = store.remainder(key) if points is None else None
        tracker = Tracker(disk.size, granularity, store.new_bitmap(key), unit, remainder)
        parts: dict[str, Any] = {
            "options": options,
            "disk": disk,
            "node": node,
            "source": self._sources.of(disk),
            "bitmap": bitmap,
            "tracker": tracker,
            "key": key,
            "store": store,
            "sources": self._sources,
            "nodes": self._nodes,
            "loop": self._loop,
            "chronicle": self._chronicle,
            "has_connected_once": found is None,
            "on_dismissed": partial(self._dismissed, options.job_id),
        }
        if points is None:
            resources = PointsResources(**parts)
        else:
            new_bitmap = store.new_bitmap(points.key)
            changes = changes_of(disk, options, granularity, unit, new_bitmap)
            resources = _points_resources(points, changes=changes, **parts)
            resources.make_spill()
            if found is not None:
                resources.found(found)
        job = self._job(resources, bitmap)
        resources.acquire(job)
        self.jobs[job.id], self._resources[job.id] = job, resources
        job.create()
        return job

    def _job(
        self,
        resources: PointsResources,
        bitmap: NamedBitmap | None,
    ) -> PointsJob:
        parts: dict[str, Any] = {
            "options": resources.options,
            "disk": resources.disk,
            "target": resources.node.device,
            "tracker": resources.tracker,
            "copier": partial(resources.new_copier, self._load),
            "loop": self._loop,
            "events": self._events,
            "resources": resources,
            "bitmap": bitmap.bitmap if bitmap else None,
            "plan": resources.plan,
            "source": resources.source,
            "wall_time_ns": time.time_ns,
            "new_group": new_group,
        }
        if isinstance(resources, SnapshotsResources):
            return SnapshotsJob(acks=resources.acks, **parts)
        return PointsJob(**parts)

    def _dismissed(self, job_id: str) -> None:
        del self.jobs[job_id], self._resources[job_id]

    def make_points(self, job: PointsJob, points: PointsOptions) -> None:
        """A job that copies, and makes no points, makes some from now on. Raises CommandError; then
        nothing has changed."""
        resources, disk = self._resources[job.id], job.disk
        self._check_points(disk, resources.node, job.options, points)
        try:
            job.group.points.check_interval(points.interval_s)
            new_bitmap = self._stores[disk].new_bitmap(points.key)
            granularity = job.tracker.granularity
            unit = unit_of(disk, resources.node.device, job.options, granularity)
            changes = changes_of(disk, job.options, granularity, unit, new_bitmap)
            job.make_points(resources.add_points(job, points, changes))
        except CommandError:
            if points.journal is not None:
                release(points.journal.device)
            raise

    def begin(self, job: MirrorJob) -> None:
        """Start the job; with unequal sizes it fails at once, as in QEMU."""
        self._observe(job)
        size, other = job.disk.size, job.target.size
        if size == other or (job.options.allow_larger and other > size):
            job.start()
            job.changed()
        else:
            job.log.error("the source has %d bytes, the target %d", size, other)
            job.fail_at_start("Source and target image have different sizes")
            self._events.append(
                "X_NBDMIRROR_SIZES_DIFFER",
                {"device": job.disk.name, "id": job.id, "size": size, "target-size": other},
            )

    def _observe(self, job: MirrorJob) -> None:
        resources = self._resources[job.id]

        def far_side() -> list[NbdDevice]:
            journal = resources.points.journal if resources.points is not None else None
            return [node.device for node in (resources.node, journal) if node is not None]

        self._chronicle.begin(job, far_side)

    def take_up(self, disk: Disk, found: RecoveredState, bitmaps: Bitmaps) -> None:
        """Continue the mirror of an earlier process. Raises StateError if the target's size does
        not fit."""
        record = found.definition.mirror
        if record is None:
            return
        options, node = options_of(record), node_of(record)
        size, other = disk.size, node.device.size
        if other != size and not (options.allow_larger and other > size):
            raise StateError(f"the target has {other} bytes, the disk {size}")
        named = bitmaps.of(Place(disk))
        bitmap = next((one for one in named if one.name == record.bitmap), None)
        self._nodes.add_again(node)
        granularity, key = record.granularity, record.key
        points = points_of(record)
        if points is not None and points.journal is not None:
            self._nodes.add_again(points.journal)
        job = self._make(disk, node, options, bitmap, granularity, key, points=points, found=found)
        job.log.info("continues where the previous process ended")
        self._observe(job)
        restore = partial(found.restore_mirror, job.tracker, key)
        if points is not None:
            assert isinstance(job, PointsJob)
            if points.group:
                kept = self._point_groups.setdefault(points.group, PointGroup(points.group))
                job.share_points(kept)
            restore_changes = partial(found.restore, key=points.key)
            restore = partial(job.restore, restore, restore_changes)
        job.take_up(restore, is_scanned=record.is_scanned, is_paused=record.is_paused)
        job.changed()

    def _check_points(
        self, disk: Disk, node: Node, options: MirrorOptions, points: PointsOptions
    ) -> None:
        journal = points.journal
        if points.spill_bytes and not self._stores[disk].is_lasting:
            needs = "needs a server with a state directory"
            raise CommandError(f"Parameter 'x-nbdmirror-spill-bytes' {needs}")
        if journal is None:
            check_content(disk)
            return
        if journal.device is node.device or journal.device.is_same_export(node.device):
            raise CommandError(f"Journal '{journal.device.uri}' is the target itself")
        try:
            if self._nodes.is_used(journal):
                raise CommandError(f"Node '{journal.name}' is in use")
            self._nodes.check_left(journal.device.uri, journal.device)
            check_journal(disk, journal, options)
            self._nodes.check_unused(journal.device)
            self._nodes.reserve(journal.device)
        except CommandError as error:
            raise CommandError(f"Journal: {error}") from error

    def _check(self, disk: Disk, node: Node, options: MirrorOptions) -> None:
        if len(self.jobs) >= JOBS_MAX:
            raise CommandError(f"There are {JOBS_MAX} jobs already; dismiss concluded ones")
        if disk.read_only:
            raise CommandError(f"Node '{disk.name}' is read-only: it does not change")
        if self.of(disk) is not None:
            raise CommandError(
                f"Node '{disk.name}' is busy: block device is in use by block job: mirror"
            )
        if self._nodes.is_used(node):
            raise CommandError(f"Node '{node.name}' is in use")
        if options.job_id in self.jobs:
            raise CommandError(f"Job ID '{options.job_id}' already in use")
        self._nodes.check_left(node.device.uri, node.device)
        check_target(disk, node, options)
        try:
            self._nodes.check_unused(node.device)
            self._nodes.reserve(node.device)
        except CommandError as error:
            raise CommandError(f"Target {error}") from error
