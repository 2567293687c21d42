"""MirrorJobs: makes mirror jobs and owns them: what they are made of, and what becomes of it.

On the event loop's thread, except where it says otherwise.
"""

from __future__ import annotations

import logging
import math
import random
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from nbdmirror.devices.aligned import for_guests
from nbdmirror.devices.async_file import FileSource
from nbdmirror.devices.base import BlockDevice, Done, raw_device
from nbdmirror.disk.bitmap import check_bits
from nbdmirror.disk.disk import Disk
from nbdmirror.disk.ledger import Tracker
from nbdmirror.errors import CommandError
from nbdmirror.event_loop import Loop
from nbdmirror.events import EventRing
from nbdmirror.mirror.copier import Copier
from nbdmirror.mirror.in_flight import OPENING_BYTES, Crowd
from nbdmirror.mirror.job_states import JobStatus
from nbdmirror.mirror.mirror_job import MirrorJob
from nbdmirror.mirror.options import Ending, MirrorOptions
from nbdmirror.mirror.scan import is_no_hole, is_not_zero, scan
from nbdmirror.mirror.spot_check import find_mismatch
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.pool import RECONNECT_TIMEOUT_S
from nbdmirror.nbdclient.shared_connection import SharedConnection
from nbdmirror.nbdclient.sides import tell_moved, when_whole
from nbdmirror.server.bitmaps import Bitmaps, NamedBitmap, Place
from nbdmirror.server.chronicle import Chronicle
from nbdmirror.server.detour import check_detour
from nbdmirror.server.mirror_record import mirror_record, node_of, options_of
from nbdmirror.server.nodes import Node, Nodes
from nbdmirror.server.reconnect import copy_all, reconnect, reconnect_source
from nbdmirror.server.target_checks import check_target, granularity_of, unit_of
from nbdmirror.state.disk_record import MirrorRecord
from nbdmirror.state.null_store import StateStore
from nbdmirror.state.recovery import RecoveredState
from nbdmirror.state.sealed_files import StateError

log = logging.getLogger(__name__)

JOBS_MAX = 256
"""Concluded jobs that nobody dismisses count; a bound on what a client can make us keep."""

RETIRE_POLL_S = 0.005
"""How often a replaced source is looked at for reads that are still on it."""


@dataclass(slots=True, eq=False)
class _Mirror:
    """What belongs to one job beside itself."""

    node: Node
    source: FileSource | NbdDevice
    bitmap: NamedBitmap | None
    key: str
    record: MirrorRecord | None = None
    """As it was last kept."""
    has_connected_once: bool = True
    """Its target was there once since this process began; until then it is waited for."""
    retired: BlockDevice | None = None
    attempt: object = None
    """To bring the target back: the last one."""


class MirrorJobs:
    """The jobs of a server, by their ids, and what they run on."""

    def __init__(
        self,
        *,
        nodes: Nodes,
        events: EventRing,
        loop: Loop,
        kept: Mapping[Disk, StateStore],
        chronicle: Chronicle,
    ) -> None:
        """`kept`: what is to outlive the process of each disk."""
        self.jobs: dict[str, MirrorJob] = {}
        self._kept = kept
        self._chronicle = chronicle
        self._crowd = Crowd(loop.clock, lambda: sum(disk.ledger.new_requests() for disk in kept))
        self._nodes = nodes
        self._events = events
        self._loop = loop
        self._mirrors: dict[MirrorJob, _Mirror] = {}
        self._file_sources: dict[BlockDevice, FileSource] = {}
        """Kept for later mirrors: a disk that hangs has so many threads and no more."""

    @property
    def running(self) -> list[MirrorJob]:
        """The jobs that have not ended."""
        return list(self._mirrors)

    def of(self, disk: Disk) -> MirrorJob | None:
        """The job that mirrors `disk` now."""
        return next((job for job in self._mirrors if job.disk is disk), None)

    def create(
        self, disk: Disk, node: Node, options: MirrorOptions, bitmap: NamedBitmap | None = None
    ) -> MirrorJob:
        """A job that can be started (`begin`) or discarded. Raises CommandError; then there is no
        job and nothing was touched."""
        self._check(disk, node, options)
        granularity = granularity_of(disk, node.device, options, bitmap)
        check_bits(disk.size, granularity)
        return self._make(disk, node, options, bitmap, granularity, f"mirror-{uuid.uuid4().hex}")

    def _make(
        self,
        disk: Disk,
        node: Node,
        options: MirrorOptions,
        bitmap: NamedBitmap | None,
        granularity: int,
        key: str,
    ) -> MirrorJob:
        source = self._source(disk)
        target = node.device
        unit = unit_of(disk, target, options, granularity)
        tracker = Tracker(disk.size, granularity, self._kept[disk].new_bitmap(key), unit)
        piece = min(OPENING_BYTES, target.block_size.maximum, disk.source.block_size.maximum)

        def copier(job: MirrorJob) -> Copier:
            return Copier(
                source=source,
                target=target,
                tracker=tracker,
                observer=job,
                clock=self._loop.clock,
                call_later=self._loop.call_later,
                buffer_bytes=options.buffer_bytes,
                request_bytes_max=1 << (piece.bit_length() - 1),
                unmap=options.unmap,
                crowd=self._crowd,
            )

        job = MirrorJob(
            options=options,
            disk=disk,
            target=target,
            tracker=tracker,
            copier=copier,
            loop=self._loop,
            events=self._events,
            resources=self,
            bitmap=bitmap.bitmap if bitmap else None,
        )
        node.job = job
        if bitmap is not None:
            bitmap.is_busy = True
        self.jobs[job.id] = job
        self._mirrors[job] = _Mirror(node, source, bitmap, key)
        self._attach(job, source, target)
        job.create()
        return job

    def _attach(self, job: MirrorJob, source: FileSource | NbdDevice, target: NbdDevice) -> None:
        """Have the loop drive both sides' connections, and the job hear of what is lost."""
        if isinstance(source, NbdDevice):
            source.pool.attach(self._loop, None)
            source.on_lost_writes = partial(copy_all, job.id, job.tracker)
        target.pool.attach(self._loop, job.target_lost)

    def begin(self, job: MirrorJob) -> None:
        self._chronicle.begin(job)
        size, other = job.disk.size, self._mirrors[job].node.device.size
        if size == other or (job.options.allow_larger and other > size):
            job.start()
            self.changed(job)
        else:
            log.error("job %s: the source has %d bytes, the target %d", job.id, size, other)
            job.fail_at_start("Source and target image have different sizes")
            self._events.append(
                "X_NBDMIRROR_SIZES_DIFFER",
                {"device": job.disk.name, "id": job.id, "size": size, "target-size": other},
            )

    def take_up(self, disk: Disk, found: RecoveredState, bitmaps: Bitmaps) -> None:
        """Go on with the mirror of an earlier process. Raises StateError."""
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
        job = self._make(disk, node, options, bitmap, record.granularity, record.key)
        self._mirrors[job].has_connected_once = False
        log.info("job %s: continues where the previous process ended", job.id)
        self._chronicle.begin(job)
        job.take_up(
            partial(found.restore, key=record.key),
            is_scanned=record.is_scanned,
            is_paused=record.is_paused,
        )
        self.changed(job)

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
        if user := self._nodes.user_of(node.device):
            raise CommandError(f"Target '{node.device.uri}' is in use: '{user}' is the same export")

    def _source(self, disk: Disk) -> FileSource | NbdDevice:
        device = raw_device(disk.source)
        if isinstance(device, NbdDevice):
            return device
        new = FileSource(disk.source, self._loop.call_soon)
        return self._file_sources.setdefault(disk.source, new)

    # What the jobs are made of.

    def changed(self, job: MirrorJob) -> None:
        mirror, kept = self._mirrors.get(job), self._kept[job.disk]
        if mirror is None or not kept.is_lasting or job.status is JobStatus.CREATED:
            return
        name = mirror.bitmap.name if mirror.bitmap else ""
        record = mirror_record(job, mirror.node, key=mirror.key, bitmap=name)
        if record != mirror.record:
            mirror.record = record
            kept.keep_mirror(record, job.tracker)

    def prepare(self, job: MirrorJob, done: Done) -> None:
        device, prepare = self._mirrors[job].node.device, self._kept[job.disk].prepare_end

        def checked(error: BaseException | None) -> None:
            if error is not None:
                done(error)
            elif self._is_running(job):
                prepare(device.uri, done)

        if job.ending is Ending.COMPLETE:
            when_whole(device, self._loop, checked, writes_all=job.options.writes_all)
        else:
            prepare("", done)

    def commit(self, job: MirrorJob, done: Done) -> None:
        self._kept[job.disk].commit_end(done)

    def uncommit(self, job: MirrorJob) -> None:
        self._kept[job.disk].undo_end()
        self._mirrors[job].record = None
        self.changed(job)

    def forget(self, job: MirrorJob, done: Done) -> None:
        self._kept[job.disk].forget_mirror(done)

    def pivot(self, job: MirrorJob) -> None:
        mirror = self._mirrors[job]
        device = mirror.node.device
        device.pool.detach()
        device.pool.reconnect_timeout_s = max(RECONNECT_TIMEOUT_S, job.options.reconnect_delay_s)
        if isinstance(mirror.source, NbdDevice):
            mirror.source.pool.detach()
        mirror.retired = job.disk.swap(for_guests(device))
        self._nodes.pivoted(job.disk, mirror.node, raw_device(mirror.retired))

    def released(self, job: MirrorJob) -> None:
        mirror = self._mirrors.pop(job)
        node = mirror.node
        node.job = None
        job.tracker.close()
        if mirror.bitmap is not None:
            mirror.bitmap.is_busy = False
        if isinstance(mirror.source, NbdDevice):
            mirror.source.on_lost_writes = None
            if mirror.retired is None:
                mirror.source.pool.detach()
        if mirror.retired is not None:
            tell_moved(node.device)  # before anybody hears that the job has completed
            self._retire(mirror.retired, job.disk)
            return
        self._nodes.leave(node.device)
        node.device.pool.detach()
        if node.is_owned:
            self._nodes.forget(node)
            node.device.close()

    def scan(self, job: MirrorJob, done: Done) -> None:
        source = self._mirrors[job].source
        dirty = job.tracker.dirty
        ask, is_copied = source.start_extents, is_not_zero
        if job.options.sync == "top":
            if not isinstance(source, NbdDevice) or not source.can_depth:
                dirty.mark_all()  # no layers: all is the top
                done(None)
                return
            ask, is_copied = source.start_top_layer, is_no_hole
        is_wanted = partial(self._is_running, job)
        scan(ask, dirty, is_copied=is_copied, is_wanted=is_wanted, done=done)

    def reconnect_source(self, job: MirrorJob, done: Done) -> None:
        source = self._mirrors[job].source
        if isinstance(source, NbdDevice) and source.pool.shared.is_lost:
            reconnect_source(source, self._loop, done)
        else:
            done(None)

    def reconnect(self, job: MirrorJob, done: Done) -> None:
        mirror = self._mirrors[job]
        device = mirror.node.device
        if not device.is_lost:
            if job.copier.answers:
                done(None)
            else:  # nothing was written there yet
                check_detour(job.disk, mirror.source, device, self._loop, done)
            return
        attempt = mirror.attempt = object()  # those before, if it was paused meanwhile, give up

        def is_wanted() -> bool:
            return job in self._mirrors and mirror.attempt is attempt

        def came_back() -> None:
            mirror.has_connected_once = True
            job.tracker.target_came_back()

        def ended(error: BaseException | None) -> None:
            if is_wanted():
                self._chronicle.target_waited_for(job.id, is_back=error is None)
            done(error)

        reconnect_timeout_s = (
            job.options.reconnect_delay_s if mirror.has_connected_once else math.inf
        )
        self._chronicle.target_lost(job.id, reconnect_timeout_s)
        reconnect(
            device,
            self._loop,
            reconnect_timeout_s=reconnect_timeout_s,
            is_wanted=is_wanted,
            difference=self._difference(job),
            came_back=came_back,
            done=ended,
        )

    def _difference(self, job: MirrorJob) -> Callable[[SharedConnection], int | None]:
        """What tells whether a target is the one that it was. Only of a full copy clean means the
        same."""
        if job.options.sync != "full":
            return lambda connection: None
        suspects = job.tracker.may_differ()

        def difference(connection: SharedConnection) -> int | None:
            rng = random.Random()
            return find_mismatch(job.disk, connection.read, job.tracker, suspects, rng)

        return difference

    def _is_running(self, job: MirrorJob) -> bool:
        return job in self._mirrors

    def dismissed(self, job: MirrorJob) -> None:
        self.jobs.pop(job.id, None)

    def _retire(self, device: BlockDevice, disk: Disk) -> None:
        """Close a replaced source once the reads that were on it have gone."""
        reads = disk.ledger.reads()

        def look() -> None:
            nonlocal reads
            reads = disk.ledger.reads_left(reads)
            if reads:
                self._loop.call_later(RETIRE_POLL_S, look)
            else:
                self._file_sources.pop(device, device).close()
                raw = raw_device(device)
                # As in QEMU a node that the user added stays until blockdev-del, closed as it is.
                for node in self._nodes:
                    if node.device is raw and node.is_owned:
                        self._nodes.forget(node)

        look()
