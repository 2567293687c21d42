"""Mirrors: makes mirror jobs and owns them: what they are made of, and what becomes of it.

On the event loop's thread, except where it says otherwise.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from nbdmirror.aligned import AlignedDevice
from nbdmirror.bitmap import GRANULARITY_DEFAULT, GRANULARITY_MAX
from nbdmirror.bitmaps import NamedBitmap
from nbdmirror.connection import Connection
from nbdmirror.copier import REQUEST_BYTES_MAX, Copier
from nbdmirror.device import BlockDevice, Done, Extent
from nbdmirror.disk import Disk
from nbdmirror.errors import CommandError, ConfigError, DeviceError
from nbdmirror.events import EventRing
from nbdmirror.filesource import FileSource
from nbdmirror.ledger import Tracker
from nbdmirror.loop import Loop
from nbdmirror.mirror import MirrorJob
from nbdmirror.nodes import Node, Nodes
from nbdmirror.options import MirrorOptions
from nbdmirror.pool import PATIENCE_S
from nbdmirror.remote import RemoteDevice

log = logging.getLogger(__name__)

JOBS_MAX = 256
"""Concluded jobs that nobody dismisses count; a bound on what a client can make us keep."""

RETIRE_POLL_S = 0.005
"""How often a replaced source is looked at for reads that are still on it."""

RECONNECT_S_MIN, RECONNECT_S_MAX = 0.1, 5.0
"""Back-off between attempts to bring a lost target back."""

DRAIN_POLL_S = 0.005
"""How often broken connections are looked at until their requests have come back."""

RECONNECT_TIMEOUT_S = 5.0
"""For one such attempt."""


@dataclass(slots=True, eq=False)
class _Mirror:
    """What belongs to one job beside itself."""

    node: Node
    source: FileSource | RemoteDevice
    bitmap: NamedBitmap | None
    retired: BlockDevice | None = None


class Mirrors:
    """The jobs of a server, by their ids, and what they run on."""

    def __init__(self, *, nodes: Nodes, events: EventRing, loop: Loop) -> None:
        self.jobs: dict[str, MirrorJob] = {}
        self._nodes = nodes
        self._events = events
        self._loop = loop
        self._mirrors: dict[MirrorJob, _Mirror] = {}

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
        source = self._source(disk)
        target = node.device
        tracker = Tracker(disk.size, _granularity(disk, target, options, bitmap))
        piece = min(REQUEST_BYTES_MAX, target.block_size.maximum, disk.source.block_size.maximum)

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
            )

        job = MirrorJob(
            options=options,
            disk=disk,
            target=target,
            tracker=tracker,
            copier=copier,
            loop=self._loop,
            events=self._events,
            owner=self,
            bitmap=bitmap.bitmap if bitmap else None,
        )
        node.job = job
        if bitmap is not None:
            bitmap.is_busy = True
        self.jobs[job.id] = job
        self._mirrors[job] = _Mirror(node, source, bitmap)
        if isinstance(source, RemoteDevice):
            source.pool.attach(self._loop, None)
        target.pool.attach(self._loop, job.target_lost)
        job.create()
        return job

    def begin(self, job: MirrorJob) -> None:
        size, other = job.disk.size, self._mirrors[job].node.device.size
        if size == other or (job.options.allow_larger and other > size):
            job.start()
        else:
            log.error("job %s: the source has %d bytes, the target %d", job.id, size, other)
            job.fail_at_start("Source and target image have different sizes")
            self._events.append(
                "X_NBDMIRROR_SIZES_DIFFER",
                {"device": job.disk.name, "id": job.id, "size": size, "target-size": other},
            )

    def _check(self, disk: Disk, node: Node, options: MirrorOptions) -> None:
        target = node.device
        if len(self.jobs) >= JOBS_MAX:
            raise CommandError(f"There are {JOBS_MAX} jobs already; dismiss concluded ones")
        if node.disk is disk:
            raise CommandError("Can't mirror node into itself")
        if disk.read_only:
            raise CommandError(f"Node '{disk.name}' is read-only: it does not change")
        if self.of(disk) is not None:
            raise CommandError(
                f"Node '{disk.name}' is busy: block device is in use by block job: mirror"
            )
        if node.job is not None or node.disk is not None:
            raise CommandError(f"Node '{node.name}' is in use")
        if options.job_id in self.jobs:
            raise CommandError(f"Job ID '{options.job_id}' already in use")
        if target.is_lost:
            raise CommandError(f"Node '{node.name}' has lost its connection to '{target.uri}'")
        if target.is_own_export():
            raise CommandError(f"Target '{target.uri}' is an export of this server itself")
        source = raw_device(disk.source)
        if (
            isinstance(source, RemoteDevice)
            and not source.is_lost
            and source.is_same_export(target)
        ):
            raise CommandError(f"Target '{target.uri}' is the disk itself")
        if target.read_only:
            raise CommandError(f"Block node is read-only: '{target.uri}'")
        if not target.can_flush and disk.size:
            raise CommandError(
                f"Target '{target.uri}' has no flush: it can promise nothing about its data"
            )
        if disk.size % target.block_size.minimum:
            raise CommandError(
                f"The disk's size {disk.size} is no multiple of the minimum block size "
                f"{target.block_size.minimum} of '{target.uri}'"
            )
        least = max(target.block_size.minimum, disk.source.block_size.minimum)
        if options.granularity and options.granularity < least:
            raise CommandError(
                f"Parameter 'granularity' expects at least the block size {least} of the disks"
            )

    def _source(self, disk: Disk) -> FileSource | RemoteDevice:
        device = raw_device(disk.source)
        if isinstance(device, RemoteDevice):
            return device
        return FileSource(disk.source, self._loop.call_soon)

    # The jobs' owner.

    def pivot(self, job: MirrorJob) -> None:
        mirror = self._mirrors[job]
        device = mirror.node.device
        device.pool.detach()
        device.pool.patience_s = max(PATIENCE_S, job.options.reconnect_delay_s)
        if isinstance(mirror.source, RemoteDevice):
            mirror.source.pool.detach()
        guest_device: BlockDevice = device
        if device.block_size.minimum > 1:
            guest_device = AlignedDevice(device)
        mirror.retired = job.disk.swap(guest_device)
        if (root := self._nodes.root_of(job.disk)) is not None:
            root.disk = None
        mirror.node.disk = job.disk

    def released(self, job: MirrorJob) -> None:
        mirror = self._mirrors.pop(job)
        node = mirror.node
        node.job = None
        if mirror.bitmap is not None:
            mirror.bitmap.is_busy = False
        if isinstance(mirror.source, FileSource):
            mirror.source.close()
        elif mirror.retired is None:
            mirror.source.pool.detach()
        if mirror.retired is not None:
            self._retire(mirror.retired, job.disk)
            return
        node.device.pool.kill_if_busy()
        node.device.pool.detach()
        if node.is_owned:
            self._nodes.forget(node)
            node.device.close()

    def scan(self, job: MirrorJob, done: Done) -> None:
        source, dirty = self._mirrors[job].source, job.tracker.dirty
        ask = source.start_extents
        wanted: Callable[[Extent], bool] = lambda extent: not extent.zero  # noqa: E731
        if job.options.sync == "top":
            if not isinstance(source, RemoteDevice) or not source.can_depth:
                dirty.mark_all()  # no layers: all is the top
                done(None)
                return
            ask = source.start_top_layer
            wanted = lambda extent: not extent.hole  # noqa: E731
        position = 0
        is_inside = is_done = False

        def then(extents: list[Extent] | None, error: BaseException | None) -> None:
            nonlocal position, is_done
            if error is not None or job not in self._mirrors:
                is_done = True
                done(error)
                return
            for extent in extents or []:
                if wanted(extent):
                    dirty.mark(position, extent.length)
                position += extent.length
            if not is_inside:
                step()

        def step() -> None:
            """Answers may come before the question returns: no recursion then."""
            nonlocal is_inside
            is_inside, before = True, -1
            while before < position < source.size and not is_done:
                before = position
                ask(position, source.size - position, then)
            is_inside = False
            if position >= source.size and not is_done:
                done(None)

        step()

    def reconnect(self, job: MirrorJob, done: Done) -> None:
        mirror = self._mirrors[job]
        device = mirror.node.device
        if not device.is_lost:
            done(None)
            return
        device.pool.kill()  # of several connections, the others too: all starts anew
        deadline_s = self._loop.clock() + job.options.reconnect_delay_s

        def work() -> None:
            pause_s = RECONNECT_S_MIN
            while True:
                try:
                    connection = device.pool.reopen(timeout_s=RECONNECT_TIMEOUT_S)
                    self._loop.call_soon(partial(adopt, connection))
                    return
                except ConfigError as error:
                    if not device.is_lost:  # the attempt from before a pause was first
                        self._loop.call_soon(partial(done, None))
                        return
                    left_s = deadline_s - self._loop.clock()
                    if left_s <= 0 or job.is_over:
                        failure = DeviceError(str(error), errno.EIO)
                        self._loop.call_soon(partial(done, failure))
                        return
                time.sleep(min(pause_s, left_s))
                pause_s = min(RECONNECT_S_MAX, pause_s * 2)

        def adopt(connection: Connection) -> None:
            if job not in self._mirrors:
                connection.close()
                return
            if not device.is_lost:  # as above; the job waits for this attempt all the same
                connection.close()
                done(None)
                return
            if device.pool.is_busy:
                self._loop.call_later(DRAIN_POLL_S, partial(adopt, connection))
                return
            device.pool.replace(connection)
            job.tracker.target_came_back()
            done(None)

        threading.Thread(target=work, name="nbdmirror-reconnect", daemon=True).start()

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
                device.close()
                raw = raw_device(device)
                # As in QEMU a node that the user added stays until blockdev-del, closed as it is.
                for node in self._nodes:
                    if node.device is raw and node.is_owned:
                        self._nodes.forget(node)

        look()


def raw_device(device: BlockDevice) -> BlockDevice:
    """The device below an AlignedDevice."""
    return device.inner if isinstance(device, AlignedDevice) else device


def _granularity(
    disk: Disk, target: RemoteDevice, options: MirrorOptions, bitmap: NamedBitmap | None
) -> int:
    """QEMU's choice: the target's cluster size, between 4 and 64 KiB, where it is known, else 64
    KiB; a bitmap's own with sync=bitmap.

    Where not everything is copied, the target may have a backing file that is not in place yet:
    then the first write to a cluster must carry all of it (rule 24), and a granule is at least a
    cluster."""
    least = max(target.block_size.minimum, disk.source.block_size.minimum)
    cluster = options.cluster_bytes
    granularity = options.granularity
    if not granularity and bitmap is not None:
        granularity = min(bitmap.bitmap.granularity, GRANULARITY_MAX)
    if not granularity:
        granularity = min(GRANULARITY_DEFAULT, max(4096, cluster or GRANULARITY_DEFAULT))
    if options.sync != "full":
        preferred = target.block_size.preferred
        is_cluster = not preferred & (preferred - 1) and preferred <= GRANULARITY_MAX
        granularity = max(granularity, cluster or (preferred if is_cluster else 0))
    return max(granularity, least)
