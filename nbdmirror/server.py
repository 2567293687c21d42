"""Server: the disks, the target nodes and the jobs of one process, and the loop that they live on.

The doors (commands, http) call it; it calls none of them. Methods are for the loop's thread unless
they say otherwise.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from nbdmirror.aligned import AlignedDevice
from nbdmirror.bitmap import GRANULARITY_DEFAULT
from nbdmirror.copier import REQUEST_BYTES_MAX, Copier
from nbdmirror.device import BlockDevice
from nbdmirror.disk import Disk
from nbdmirror.errors import IO_ERRORS, CommandError
from nbdmirror.events import EventRing
from nbdmirror.file import FileSource
from nbdmirror.job import MirrorJob
from nbdmirror.ledger import Tracker
from nbdmirror.loop import Loop
from nbdmirror.options import MirrorOptions
from nbdmirror.remote import CONNECTIONS_MAX, RemoteDevice

log = logging.getLogger(__name__)

STOP_S_MAX = 2.0
"""How long a server that ends waits for its jobs: a forced cancel takes less than one second."""

JOBS_MAX = 256
"""Concluded jobs that nobody dismisses count; a bound on what a client can make us keep."""

RETIRE_POLL_S = 0.005
"""How often a replaced source is looked at for reads that are still on it."""

EXPAND_TIMEOUT_S = 1.0
"""For each further connection: a server that is full answers late or never."""


@dataclass(slots=True, eq=False)
class Node:
    """A target that was added: QEMU's block node."""

    name: str
    device: RemoteDevice
    is_owned: bool = False
    """Made by drive-mirror for one job: goes when the job goes."""
    job: MirrorJob | None = None
    disk: Disk | None = None
    """The disk that is served from this node since a pivot."""


@dataclass(slots=True, eq=False)
class _Mirror:
    """What belongs to one job beside itself."""

    node: Node
    source: FileSource | RemoteDevice
    retired: BlockDevice | None = None


@dataclass(frozen=True, slots=True)
class TargetRules:
    """What is asked of a target beyond QEMU's rules."""

    allow_larger: bool = False


@dataclass(slots=True)
class Server:
    disks: dict[str, Disk]
    events: EventRing
    loop: Loop
    nodes: dict[str, Node] = field(default_factory=dict)
    jobs: dict[str, MirrorJob] = field(default_factory=dict)
    _mirrors: dict[MirrorJob, _Mirror] = field(default_factory=dict)

    def start(self) -> None:
        """Start the loop's thread; after nbdkit has forked."""
        self.loop.start()
        for disk in self.disks.values():
            if isinstance(device := _raw(disk.source), RemoteDevice):
                self._expand(device)

    def cancel_jobs(self, when_done: Callable[[], None]) -> None:
        """Cancel every job by force; `when_done` is called, on the loop, when the last one has
        ended."""
        left = set(self._mirrors)
        if not left:
            when_done()

        def ended(job: MirrorJob) -> None:
            left.discard(job)
            if not left:
                when_done()

        for job in list(left):
            job.when_ended(partial(ended, job))
            job.cancel(force=True)

    def end_jobs(self) -> None:
        """`cancel_jobs`, waited for within a bound. From any thread but the loop's."""
        ended = threading.Event()
        self.loop.call_soon(lambda: self.cancel_jobs(ended.set))
        if not ended.wait(STOP_S_MAX):
            log.error("jobs did not end within %g s; going on without them", STOP_S_MAX)

    def stop(self) -> None:
        """Stop the loop; flush and close the disks. From any thread but the loop's; the jobs have
        ended and no guest request is under way."""
        self.loop.stop(STOP_S_MAX)
        for disk in self.disks.values():
            try:
                if not disk.read_only:
                    disk.source.flush()
                disk.source.close()
            except IO_ERRORS as error:
                log.error("%s: flush at the end failed: %s", disk.name, error)
        for node in self.nodes.values():
            node.device.kill()

    # Look-ups, with QEMU's errors.

    def find_disk(self, name: str) -> Disk:
        """The disk called `name`, or that is served from the node `name`."""
        node = self.nodes.get(name)
        disk = self.disks.get(name) or (node.disk if node else None)
        if disk is None:
            raise CommandError(f"Cannot find device='{name}' nor node-name='{name}'")
        return disk

    def find_node(self, name: str) -> Node:
        if name not in self.nodes:
            raise CommandError(f"Cannot find device='{name}' nor node-name='{name}'")
        return self.nodes[name]

    def job_of(self, disk: Disk) -> MirrorJob | None:
        """The job that mirrors `disk` now."""
        return next((job for job in self._mirrors if job.disk is disk), None)

    def add_node(self, node: Node) -> None:
        self.check_node_name(node.name)
        self.nodes[node.name] = node

    def check_node_name(self, name: str) -> None:
        if name in self.nodes or name in self.disks:
            raise CommandError(f"Duplicate nodes with node-name='{name}'")

    def remove_node(self, name: str) -> Node:
        """Take a node away; the caller closes its device."""
        node = self.nodes.get(name)
        if node is None:
            if name in self.disks:
                raise CommandError(f"Node {name} is in use")
            raise CommandError(f"Failed to find node with node-name='{name}'")
        if node.job is not None or node.disk is not None:
            raise CommandError(f"Node {name} is in use")
        return self.nodes.pop(name)

    # Mirrors.

    def start_mirror(
        self, disk: Disk, node: Node, options: MirrorOptions, rules: TargetRules
    ) -> None:
        """Create and start a job. Raises CommandError; then there is no job and nothing was
        touched."""
        self._check_mirror(disk, node, options)
        source = self._copy_source(disk)
        target = node.device
        tracker = Tracker(disk.size, self._granularity(disk, target, options))
        piece = min(REQUEST_BYTES_MAX, target.block_size.maximum, disk.source.block_size.maximum)

        def copier(job: MirrorJob) -> Copier:
            return Copier(
                source=source,
                target=target,
                tracker=tracker,
                observer=job,
                clock=self.loop.clock,
                call_later=self.loop.call_later,
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
            loop=self.loop,
            events=self.events,
            owner=self,
        )
        node.job = job
        self.jobs[job.id] = job
        self._mirrors[job] = _Mirror(node, source)
        if isinstance(source, RemoteDevice):
            source.attach(self.loop, lambda: None)
        target.attach(self.loop, job.target_lost)
        if target.size == disk.size or (rules.allow_larger and target.size > disk.size):
            job.start()
        else:
            log.error(
                "job %s: the source has %d bytes, the target %d", job.id, disk.size, target.size
            )
            job.fail_at_start("Source and target image have different sizes")

    def _check_mirror(self, disk: Disk, node: Node, options: MirrorOptions) -> None:
        target = node.device
        if len(self.jobs) >= JOBS_MAX:
            raise CommandError(f"There are {JOBS_MAX} jobs already; dismiss concluded ones")
        if options.job_id in self.jobs:
            raise CommandError(f"Job ID '{options.job_id}' already in use")
        if node.disk is disk:
            raise CommandError("Can't mirror node into itself")
        if self.job_of(disk) is not None:
            raise CommandError(
                f"Node '{disk.name}' is busy: block device is in use by block job: mirror"
            )
        if node.job is not None or node.disk is not None:
            raise CommandError(f"Node '{node.name}' is in use")
        if target.is_own_export():
            raise CommandError(f"Target '{target.uri}' is an export of this server itself")
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

    def _granularity(self, disk: Disk, target: RemoteDevice, options: MirrorOptions) -> int:
        """QEMU's choice: the target's cluster size between 4 and 64 KiB where it is known, else 64
        KiB."""
        least = max(target.block_size.minimum, disk.source.block_size.minimum)
        if options.granularity:
            if options.granularity < least:
                raise CommandError(
                    f"Parameter 'granularity' expects at least the block size {least} of the disks"
                )
            return options.granularity
        if target.preferred_is_announced:
            return max(least, min(GRANULARITY_DEFAULT, max(4096, target.block_size.preferred)))
        return max(least, GRANULARITY_DEFAULT)

    def _copy_source(self, disk: Disk) -> FileSource | RemoteDevice:
        device = _raw(disk.source)
        if isinstance(device, RemoteDevice):
            return device
        return FileSource(disk.source, self.loop.call_soon)

    # The jobs' owner.

    def pivot(self, job: MirrorJob) -> None:
        mirror = self._mirrors[job]
        device = mirror.node.device
        device.detach()
        if isinstance(mirror.source, RemoteDevice):
            mirror.source.detach()
        guest_device: BlockDevice = device
        if device.block_size.minimum > 1:
            guest_device = AlignedDevice(device)
        mirror.retired = job.disk.swap(guest_device)
        for node in self.nodes.values():
            if node.disk is job.disk:
                node.disk = None
        mirror.node.disk = job.disk

    def released(self, job: MirrorJob) -> None:
        mirror = self._mirrors.pop(job)
        node, node.job = mirror.node, None
        if isinstance(mirror.source, FileSource):
            mirror.source.close()
        elif mirror.retired is None:
            mirror.source.detach()
        if mirror.retired is not None:
            self._retire(mirror.retired, job.disk)
            self._expand(node.device)
            return
        node.device.kill_if_busy()
        node.device.detach()
        if node.is_owned:
            del self.nodes[node.name]
            node.device.close()

    def dismissed(self, job: MirrorJob) -> None:
        self.jobs.pop(job.id, None)

    def _retire(self, device: BlockDevice, disk: Disk) -> None:
        """Close a replaced source once the reads that were on it have gone."""
        readers = disk.ledger.readers()

        def look() -> None:
            nonlocal readers
            readers = disk.ledger.have_left(readers)
            if readers:
                self.loop.call_later(RETIRE_POLL_S, look)
            else:
                device.close()
                raw = _raw(device)
                # As in QEMU a node that the user added stays until blockdev-del, closed as it is.
                for node in [n for n in self.nodes.values() if n.device is raw and n.is_owned]:
                    del self.nodes[node.name]

        look()

    def _expand(self, device: RemoteDevice) -> None:
        """More connections for the guests' threads; it takes a while, and they go on with one
        meanwhile."""

        def work() -> None:
            for _ in range(CONNECTIONS_MAX - device.connections):
                connection = device.open_another(timeout_s=EXPAND_TIMEOUT_S)
                if connection is None:
                    return
                self.loop.call_soon(partial(device.adopt, connection))

        threading.Thread(target=work, name="nbdmirror-expand", daemon=True).start()


def _raw(device: BlockDevice) -> BlockDevice:
    """The device below an AlignedDevice."""
    return device.inner if isinstance(device, AlignedDevice) else device
