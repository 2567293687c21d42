"""JobResources: what one mirror job runs on, and what happens to it when the job ends.

On the event loop's thread, unless a docstring says otherwise.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from nbdmirror.devices.aligned import for_guests
from nbdmirror.devices.async_file import FileSource
from nbdmirror.devices.base import BlockDevice, Done, raw_device
from nbdmirror.disk.changes import MayDiffer
from nbdmirror.disk.disk import Disk
from nbdmirror.disk.tracker import Tracker
from nbdmirror.errors import DeviceLost
from nbdmirror.event_loop import Loop
from nbdmirror.mirror.copier import Copier
from nbdmirror.mirror.in_flight import OPENING_BYTES, CopierLoad
from nbdmirror.mirror.job_states import VERBS
from nbdmirror.mirror.mirror_job import MirrorJob
from nbdmirror.mirror.options import Ending, MirrorOptions
from nbdmirror.mirror.resources import JobState
from nbdmirror.mirror.scan import is_no_hole, is_not_zero, scan
from nbdmirror.mirror.spot_check import Mismatch, Read, SpotCheck
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.pool import RECONNECT_TIMEOUT_S
from nbdmirror.nbdclient.reservations import release
from nbdmirror.nbdclient.sides import tell_moved, when_whole
from nbdmirror.server.bitmaps import NamedBitmap
from nbdmirror.server.chronicle import Chronicle
from nbdmirror.server.detour import check_detour
from nbdmirror.server.history import check_history
from nbdmirror.server.mirror_record import mirror_record
from nbdmirror.server.nodes import Node, Nodes
from nbdmirror.server.reconnect import copy_all, reconnect, reconnect_source
from nbdmirror.server.rings import check_ring
from nbdmirror.server.sources import Sources
from nbdmirror.state.disk_record import MirrorRecord, PointsRecord
from nbdmirror.state.null_store import StateStore

KEEP_AGAIN_S = 1.0
"""Pause after the state directory has failed."""


@dataclass(slots=True, eq=False, kw_only=True)
class JobResources:
    """A MirrorResources. In use from `acquire` to `released`."""

    options: MirrorOptions
    """The options at the job's creation; those that can change are not used here."""
    disk: Disk
    node: Node
    source: FileSource | NbdDevice
    bitmap: NamedBitmap | None
    tracker: Tracker
    key: str
    """Names the mirror's saved content."""
    store: StateStore
    sources: Sources
    nodes: Nodes
    loop: Loop
    chronicle: Chronicle
    has_connected_once: bool
    """The target was connected in this process. Until then the job waits for it without a limit."""
    on_dismissed: Callable[[], object]
    _is_in_use: bool = field(default=False, init=False)
    _record: MirrorRecord | None = field(default=None, init=False)
    """The record that was saved last."""
    _is_scan_kept: bool = field(default=True, init=False)
    """What the scan has marked is on disk as well: until then the next process scans again."""
    _retired: BlockDevice | None = field(default=None, init=False)
    """The disk's source before the pivot."""
    _attempt: object = field(default=None, init=False)
    """The last attempt to reconnect the target."""
    spot_check: SpotCheck = field(default_factory=SpotCheck, init=False)

    def new_copier(self, load: CopierLoad, job: MirrorJob) -> Copier:
        """The job's copier. `load`: shared by all copiers of the server."""
        target = self.node.device
        piece = min(OPENING_BYTES, target.block_size.maximum, self.disk.source.block_size.maximum)
        return Copier(
            source=self.source,
            target=target,
            tracker=self.tracker,
            observer=job,
            clock=self.loop.clock,
            call_later=self.loop.call_later,
            buffer_bytes=self.options.buffer_bytes,
            request_bytes_max=1 << (piece.bit_length() - 1),
            unmap=self.options.unmap,
            load=load,
            waits=job.waits,
        )

    def acquire(self, job: MirrorJob) -> None:
        """Let the loop drive both sides' connections, which report losses to the job."""
        self._is_in_use = True
        self.node.job = job
        if self.bitmap is not None:
            self.bitmap.is_busy = True
        if isinstance(self.source, NbdDevice):
            self.source.pool.attach(self.loop, None)
            self.source.on_lost_writes = partial(copy_all, job.log, self.tracker, self.disk)
        self.node.device.pool.attach(self.loop, job.target_lost)

    def changed(self, state: JobState) -> None:
        if not self._is_in_use or not self.store.is_lasting:
            return
        is_scanned = state.is_scanned and self._is_scan_kept
        record = mirror_record(
            replace(state, is_scanned=is_scanned),
            self.node,
            granularity=self.tracker.granularity,
            key=self.key,
            bitmap=self.bitmap.name if self.bitmap else "",
            points=self._points_record(),
        )
        if record != self._record:
            self._record = record
            self.store.keep_mirror(record, self._kept_changes())

    def keep_changes(self, done: Done) -> None:
        """What is dirty now is on disk when `done` is called; with an error if the job has ended
        by then."""

        def kept(failure: BaseException | None) -> None:
            if not self._is_in_use:
                done(DeviceLost("the job has ended"))
            elif failure is None:
                done(None)
            else:  # the state directory fails, which is reported there
                self.loop.call_later(KEEP_AGAIN_S, partial(self.keep_changes, done))

        saved = self.store.bits_saved()
        saved.add_done_callback(lambda end: self.loop.call_soon(partial(kept, end.exception())))

    def _points_record(self) -> PointsRecord | None:
        return None

    def _kept_changes(self) -> dict[str, MayDiffer]:
        """By the keys in the record."""
        return {self.key: self.tracker}

    def check_end(self, ending: Ending, done: Done) -> None:
        if ending is Ending.COMPLETE:
            when_whole(self.node.device, self.loop, done, writes_all=self.options.writes_all)
        else:
            done(None)

    def prepare(self, ending: Ending, done: Done) -> None:
        pivot_to = self.node.device.uri if ending is Ending.COMPLETE else ""
        self.store.prepare_end(pivot_to, done)

    def commit(self, done: Done) -> None:
        self.store.commit_end(done)

    def uncommit(self, done: Done) -> None:
        self._record = None
        self.store.undo_end(done)

    def forget(self, done: Done) -> None:
        self.store.forget_mirror(done)

    def pivot(self) -> None:
        device = self.node.device
        device.pool.detach()
        device.pool.reconnect_timeout_s = max(RECONNECT_TIMEOUT_S, self.options.reconnect_delay_s)
        if isinstance(self.source, NbdDevice):
            self.source.pool.detach()
        self._retired = self.disk.swap(for_guests(device))
        self.nodes.pivoted(self.disk, self.node, raw_device(self._retired))

    def released(self) -> None:
        node, source = self.node, self.source
        self._is_in_use = False
        node.job = None
        self.tracker.close()
        self.store.end_is_final()
        if self.bitmap is not None:
            self.bitmap.is_busy = False
        if isinstance(source, NbdDevice):
            source.on_lost_writes = self.disk.lose_writes if self._retired is None else None
            if self._retired is None:
                source.pool.detach()
        if self._retired is not None:
            tell_moved(node.device)  # before the job is reported as completed
            self.sources.retire(self._retired, self.disk)
            return
        self.nodes.leave(node.device)
        release(node.device)
        node.device.pool.detach()
        if node.is_owned:
            self.nodes.forget(node)
            node.device.close()

    def dismissed(self) -> None:
        self.on_dismissed()

    def scan(self, done: Done) -> None:
        self._is_scan_kept = False

        def scanned(error: BaseException | None) -> None:
            if error is None:
                self.keep_changes(self._scan_was_kept)
            done(error)

        source, dirty = self.source, self.tracker.dirty
        ask, is_copied = source.start_extents, is_not_zero
        if self.options.sync == "top":
            if not isinstance(source, NbdDevice) or not source.announced.can_depth:
                dirty.mark_all()  # no layers: everything is the top layer
                scanned(None)
                return
            ask, is_copied = source.start_top_layer, is_no_hole
        scan(ask, dirty, is_copied=is_copied, is_wanted=lambda: self._is_in_use, done=scanned)

    def _scan_was_kept(self, error: BaseException | None) -> None:
        """The copy has begun meanwhile, or the end: what that records stays as it is."""
        job = self.node.job
        if error is None and job is not None:
            self._is_scan_kept = True
            if job.status in VERBS["change"]:
                self.changed(job.kept_state)

    def reconnect_source(self, done: Done) -> None:
        if isinstance(self.source, NbdDevice) and self.source.pool.shared.is_lost:
            reconnect_source(self.source, self.loop, done)
        else:
            done(None)

    def reconnect(self, has_copied: bool, done: Done) -> None:
        device = self.node.device
        if not device.is_lost:
            if has_copied:
                done(None)
            else:  # nothing was written to the target yet
                self._check_content(device, done)
            return
        attempt = self._attempt = object()  # earlier attempts, before a pause, give up

        def is_wanted() -> bool:
            return self._is_in_use and self._attempt is attempt

        def came_back() -> None:
            self.has_connected_once = True
            self.tracker.target_came_back()

        def ended(error: BaseException | None) -> None:
            if is_wanted():
                self.chronicle.target_waited_for(self.options.job_id, is_back=error is None)
            done(error)

        reconnect_timeout_s = (
            self.options.reconnect_delay_s if self.has_connected_once else math.inf
        )
        job_id, name = self.options.job_id, device.description
        self.chronicle.target_lost(job_id, reconnect_timeout_s, name)
        reconnect(
            device,
            self.loop,
            reconnect_timeout_s=reconnect_timeout_s,
            is_wanted=is_wanted,
            difference=self._difference(),
            came_back=came_back,
            done=ended,
        )

    def _check_content(self, device: NbdDevice, done: Done) -> None:
        """Whether the target leads back to the disk, in either way, or is a journal."""

        def no_ring(error: BaseException | None) -> None:
            if error is not None:
                done(error)
            elif self._is_in_use:
                check_history(device, self.loop, no_journal)

        def no_journal(error: BaseException | None) -> None:
            if error is not None:
                done(error)
            elif self._is_in_use:
                check_detour(self.disk, self.source, device, self.loop, done)

        check_ring(self.disk, device, self.loop, no_ring)

    def _difference(self) -> Callable[[Read], Mismatch | None]:
        """The check whether a target is the same as before. Only in a full copy clean means equal,
        and only once all that differs is marked, so others are not checked."""
        job = self.node.job
        if self.options.sync != "full" or (job is not None and not job.is_scanned):
            return lambda read: None
        suspects = self.tracker.may_differ()

        def difference(read: Read) -> Mismatch | None:
            rng = random.Random()
            recent = tuple(self.tracker.flushed_last)
            return self.spot_check.find_mismatch(
                self.disk, read, self.tracker, suspects, rng, recent
            )

        return difference
