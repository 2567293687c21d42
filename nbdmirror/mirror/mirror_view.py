"""MirrorView: what queries, events and the log show of a mirror job, and what is saved of it."""

from __future__ import annotations

from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.cells import DiskMap
from nbdmirror.disk.disk import Disk
from nbdmirror.disk.throttle import Throttle
from nbdmirror.disk.tracker import Tracker
from nbdmirror.event_loop import Loop
from nbdmirror.events import EventRing
from nbdmirror.mirror.copier import Copier
from nbdmirror.mirror.copy_mode import CopyModeSwitch
from nbdmirror.mirror.job import Job
from nbdmirror.mirror.job_states import JobStatus
from nbdmirror.mirror.options import MirrorOptions
from nbdmirror.mirror.resources import JobState, Target
from nbdmirror.mirror.traffic import Traffic
from nbdmirror.subject_log import job_log


class MirrorView(Job):
    """A job that copies `disk` to `target`. The subclass sets `copier`, `mode` and
    `is_scanned`."""

    copier: Copier
    mode: CopyModeSwitch
    is_scanned: bool

    def __init__(
        self,
        options: MirrorOptions,
        disk: Disk,
        target: Target,
        tracker: Tracker,
        bitmap: DirtyBitmap | None,
        loop: Loop,
        events: EventRing,
    ) -> None:
        super().__init__(options, events, loop, job_log(options.job_id, disk.name))
        self.disk = disk
        self.target = target
        self.tracker = tracker
        self.bitmap = bitmap
        self.throttle = Throttle(disk.ledger, tracker.dirty, loop.clock)
        self.pause_s: float | None = None
        """How long guest writes were held at the ending, in seconds."""
        self.pivoted = False

    @property
    def is_busy(self) -> bool:
        if self.status is JobStatus.READY:
            return self.copier.in_flight > 0 or self.activity.waits_to_try_again
        return self.status is JobStatus.RUNNING

    @property
    def is_actively_synced(self) -> bool:
        """Each answered write of a guest is on the target (write-blocking only)."""
        return self.mode.is_actively_synced

    @property
    def kept_state(self) -> JobState:
        is_paused = self.pause_wanted and self.io_status == "ok"
        return JobState(self.options, self.is_scanned, is_paused)

    def count_traffic(self) -> None:
        """The job is READY: from now on."""
        self.traffic = self.traffic or Traffic(self.copier, self.tracker)

    @property
    def makes_points(self) -> bool:
        """Points are made now, and there was one: what is sent is theirs."""
        return False

    def map(self, cells_max: int) -> DiskMap:
        """As Tracker.map."""
        return self.tracker.map(cells_max)

    @property
    def in_flight_bytes(self) -> int:
        """On its way to the target's storage."""
        return self.tracker.in_flight_bytes

    @property
    def offset(self) -> int:
        return self.copier.copied_bytes + self.tracker.written_bytes

    @property
    def length(self) -> int:
        return self.offset + self.tracker.remaining_bytes
