"""MirrorJob: starts, watches and ends one mirror. It has no loop over data: that is the copier's.

Everything here happens on the event loop's thread. Commands change what is wanted and call
`advance`; so does every event (copies settled, a flush done, a timer). `advance` looks at the state
and does the next step.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from functools import partial

from nbdmirror.devices.base import Done
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.disk import Disk
from nbdmirror.disk.ledger import Tracker
from nbdmirror.errors import CommandError, ConfigError, DeviceLost, errno_of
from nbdmirror.event_loop import Loop
from nbdmirror.events import EventRing
from nbdmirror.mirror.copier import Copier
from nbdmirror.mirror.copy_mode import CopyModeSwitch
from nbdmirror.mirror.group import HOLD_S
from nbdmirror.mirror.job import Cancelled, Job
from nbdmirror.mirror.job_states import JobStatus, check_verb
from nbdmirror.mirror.options import CopyMode, Ending, MirrorOptions, Policy
from nbdmirror.mirror.quiesce import Quiesce, Step
from nbdmirror.mirror.rate_limit import Haste
from nbdmirror.mirror.resources import Owner, Target
from nbdmirror.mirror.stopping import Stopping
from nbdmirror.mirror.target_watch import TargetWatch
from nbdmirror.mirror.timers import Waits
from nbdmirror.mirror.traffic import Traffic

log = logging.getLogger(__name__)

POLL_S = 0.05
"""How often new guest writes are looked for when all was in sync."""

OwnersStep = Callable[["MirrorJob", Done], None]


class MirrorJob(Job):
    """A mirror of `disk` to `target`. `copier` is made and stopped; `start` starts it."""

    def __init__(
        self,
        *,
        options: MirrorOptions,
        disk: Disk,
        target: Target,
        tracker: Tracker,
        copier: Callable[[MirrorJob], Copier],
        loop: Loop,
        events: EventRing,
        owner: Owner,
        bitmap: DirtyBitmap | None = None,
    ) -> None:
        """`bitmap`: what sync=bitmap copies; it is cleared when the job completes."""
        super().__init__(options, events)
        self.disk = disk
        self.target = target
        self.tracker = tracker
        self.bitmap = bitmap
        self.copy_mode = options.copy_mode
        self.pause_s: float | None = None
        """How long guest writes were held at the ending, in seconds."""
        self.pivoted = False
        self.copier = copier(self)
        self.copier.set_speed(options.speed_bytes_per_s)
        self._loop = loop
        self._owner = owner
        self._waits = Waits(loop, self.advance)
        self._abort: BaseException | None = None
        self._quiesce: Quiesce | None = None
        self._watch = TargetWatch(
            copier=self.copier,
            tracker=tracker,
            target=target,
            on_flush_error=partial(self.copy_failed, "write"),
            loop=loop,
            reconnect_delay_s=options.reconnect_delay_s,
        )
        self.is_scanned = options.sync == "none" or bitmap is not None
        """What is to be copied is known; before, the source's extents have to be asked."""
        self._mode = CopyModeSwitch(
            disk=disk,
            tracker=tracker,
            target=target,
            whole_granules=options.sync != "full" or target.block_size.minimum > 1,
            # Waited for: no write that follows this one's answer may be on the target.
            on_error=lambda error: loop.call(partial(self.copy_failed, "write", error), HOLD_S),
        )
        self._stopping = Stopping(self.copier, self._mode, self._waits, target.give_up)

    def start(self) -> None:
        """Tracking is on before anything is marked or looked at (rule 33)."""
        self.disk.ledger.attach(self.tracker.dirty)
        self.to(JobStatus.RUNNING)
        if self.bitmap is not None:
            self.tracker.dirty.merge(self.bitmap)
        elif self.options.sync == "full" and not self.options.target_is_zero:
            self.tracker.dirty.mark_all()
            self.is_scanned = True
        self._begin()

    def take_up(
        self, restore: Callable[[DirtyBitmap], None], *, is_scanned: bool, is_paused: bool
    ) -> None:
        """Go on with a mirror of an earlier process: `restore` marks what may differ."""
        self.disk.ledger.attach(self.tracker.dirty)
        self.to(JobStatus.RUNNING)
        restore(self.tracker.dirty)
        self.is_scanned = is_scanned
        self.pause_wanted = is_paused
        self._begin()

    def _begin(self) -> None:
        if not self.pause_wanted:
            self.release()
        self.advance()
        self._poll()

    def fail_at_start(self, reason: str) -> None:
        """The job runs and ends at once with an error, as QEMU has it for unequal sizes."""
        self.to(JobStatus.RUNNING)
        self._fail(CommandError(reason))
        self.advance_soon()

    # Commands beside those that every job has.

    def change(self, copy_mode: CopyMode) -> None:
        """block-job-change. Back to background, which QEMU refuses, is offered as well."""
        check_verb(self.id, self.status, "change")
        self.copy_mode = copy_mode
        if self.copier.is_running:
            self._mode.turn(synchronous=copy_mode is CopyMode.WRITE_BLOCKING)
        self._owner.changed(self)

    # What queries show.

    @property
    def is_busy(self) -> bool:
        if self.status is JobStatus.READY:
            return self.copier.in_flight > 0 or self._waits.is_for_retry
        return self.status is JobStatus.RUNNING

    @property
    def is_actively_synced(self) -> bool:
        """Each write that the guest has had answered is on the target (write-blocking only)."""
        return self._mode.is_actively_synced

    @property
    def offset(self) -> int:
        return self.copier.copied_bytes + self.tracker.written_bytes

    @property
    def length(self) -> int:
        return self.offset + self.tracker.remaining_bytes

    @property
    def is_level(self) -> bool:
        return self._quiesce is not None and self._quiesce.step is Step.LEVEL

    # The copier's observer; `operation` is "read" for the source, "write" for the target.

    def copy_failed(self, operation: str, error: BaseException) -> None:
        """Rules 20 and 21. The range is dirty again already; what follows an error that was decided
        on, from the requests in flight with it, is part of it."""
        self._mode.note_error()
        is_decided = self._abort is not None or self.pause_wanted or self._waits.is_for_retry
        if is_decided or self.is_over or self.group.is_committing:
            return
        if isinstance(error, DeviceLost) and self._may_reconnect(operation):
            return
        action = self.options.policy(operation).action(errno_of(error))
        if action is Policy.STOP and self.has_done_its_work:
            action = Policy.REPORT  # such a job can be neither paused nor resumed
        self.tell_error(operation, str(action), error)
        self.hold()
        if action is Policy.REPORT:
            self._fail(error)
        elif action is Policy.STOP:
            self.io_status = "nospace" if errno_of(error) == errno.ENOSPC else "failed"
            self.pause_wanted = True
        else:
            self._waits.retry(self._retry)
        self.advance_soon()

    def _may_reconnect(self, operation: str) -> bool:
        if self.copier.is_running or not self._waits.is_for_step:  # else it is being brought back
            if not self._watch.may_reconnect(operation):
                return False
            self.hold()
            self.release()
        return True

    def copy_settled(self) -> None:
        self.advance()

    def target_lost(self) -> None:
        """The target's connection broke. Requests in flight report that themselves."""
        if not self.copier.in_flight and not self.is_over:
            self.copy_failed("write", DeviceLost(f"{self.target.description}: connection lost"))

    # Steps.

    def advance(self) -> None:
        if self.is_over or self.status in (JobStatus.UNDEFINED, JobStatus.CREATED):
            return
        if self.status is JobStatus.ABORTING:
            pass  # until that is written down
        elif self._abort is not None:
            if self._stopping.is_over():
                self.end_badly(self._abort)
        elif self.pause_wanted:
            if self._stopping.is_over(for_pause=True):
                self.paused()
        elif self._waits.is_for_step or self._waits.is_for_retry:
            pass
        elif self._quiesce is not None:
            self._quiesce.advance()
        else:
            self._advance_copying()

    def soon(self, call: Callable[[], None]) -> None:
        self._loop.call_soon(call)

    def hold(self) -> None:
        """Start nothing new: no copies, no synchronous writes, no ending."""
        self._waits.abandon_step()
        self.copier.stop()
        self._mode.turn(synchronous=False)
        self._release_guest()
        self._owner.changed(self)

    def release(self) -> None:
        """Copy, if need be after source and target were brought back."""
        self._owner.changed(self)
        then = partial(self._do, self._owner.reconnect, self._go_on, "write")
        self._do(self._owner.reconnect_source, then, "read")

    def abort(self, because: str) -> None:
        self._fail(Cancelled(because))
        self._stopping.hurry()

    def limit_speed(self, speed_bytes_per_s: int) -> None:
        self.speed_bytes_per_s = speed_bytes_per_s
        self.copier.set_speed(speed_bytes_per_s)
        self._owner.changed(self)

    def forget(self, done: Done) -> None:
        self._owner.forget(self, done)

    def let_go(self) -> None:
        self._owner.released(self)

    def dismissed(self) -> None:
        self._owner.dismissed(self)

    def _go_on(self) -> None:
        if self.is_scanned:
            self._mode.turn(synchronous=self.copy_mode is CopyMode.WRITE_BLOCKING)
            self._hurry()
            self.copier.start()
        else:
            self._do(self._owner.scan, self._scanned, "read")

    def _scanned(self) -> None:
        self.is_scanned = True
        self.release()

    def _hurry(self) -> None:
        is_hurried = self.status is JobStatus.RUNNING or self.may_end
        self.copier.set_haste(Haste.STEADY if is_hurried else Haste.LAG)

    def _advance_copying(self) -> None:
        self._hurry()
        self.copier.pump()
        in_sync = self.tracker.in_sync
        if in_sync:
            if self.status is JobStatus.READY and not self.may_end:
                self._waits.went_well()  # else there is a flush to come, which may fail again
            self._mode.note_in_sync()
        if self.status is JobStatus.RUNNING and in_sync:
            self._do(lambda _, done: self.copier.flush(done), self._become_ready, "write")
        elif self.may_end:
            prepare = partial(self._owner.prepare, self)
            self._waits.do(prepare, self._begin_quiesce, self._not_written_down)

    def _become_ready(self) -> None:
        """Rule 14: after a flush, and once."""
        self._waits.went_well()
        self.tracker.refine()
        self.traffic = Traffic(self.copier, self.tracker)
        self.to(JobStatus.READY)
        self.tell("BLOCK_JOB_READY")

    def _do(self, step: OwnersStep, then: Callable[[], None], operation: str) -> None:
        """Do `step`, and `then` if it ends well; its error is one of `operation`."""
        self._waits.do(partial(step, self), then, partial(self.copy_failed, operation))

    def _begin_quiesce(self) -> None:
        self._quiesce = Quiesce(
            ledger=self.disk.ledger,
            tracker=self.tracker,
            copier=self.copier,
            loop=self._loop,
            on_level=self._on_level,
            on_timeout=self._on_quiesce_timeout,
            on_flush_error=partial(self.copy_failed, "write"),
        )
        self._quiesce.advance()

    def _on_quiesce_timeout(self) -> None:
        """The guest writes faster than the rest could be copied: it goes on, and so do we."""
        self._release_guest()
        self.tell_quiesce_timeout()
        self.advance_soon()

    def _on_level(self) -> None:
        """Guest writes are held and the target equals the source, durably."""
        if self.status is JobStatus.READY:
            self.to(JobStatus.WAITING)
            self.group.arrived()
            if not (self.is_finalizing and self.group.is_level):
                # QEMU holds the guest until then; here the mirror goes on.
                self._release_guest()
                return
        self._waits.after("level", HOLD_S, self._held_in_vain)
        self.group.got_level()

    def _held_in_vain(self) -> None:
        self.group.held_in_vain(self)
        self._on_quiesce_timeout()

    def _not_written_down(self, error: BaseException) -> None:
        """The job cannot end before it can be kept that it has; it goes on, and tries again."""
        self._release_guest()
        if isinstance(error, ConfigError):  # the target cannot be the disk
            self._fail(error)
            self.advance_soon()
            return
        log.warning("job %s: continues, because its end cannot be recorded: %s", self.id, error)
        self._waits.retry(self._retry)

    def commit(self, done: Done) -> None:
        self._waits.cancel("level")
        self._owner.commit(self, done)

    def commit_failed(self, *, was_committed: bool) -> None:
        if was_committed:
            self._owner.uncommit(self)
        self._not_written_down(OSError(errno.EIO, "the state directory failed"))

    def finish(self) -> None:
        if self.bitmap is not None and self.options.clear_bitmap:
            self.bitmap.clear_all()
        if self.ending is Ending.COMPLETE:
            self._owner.pivot(self)
            self.pivoted = True
        self.detach()
        if self.pivoted:
            self.tell_pivoted(self.disk.name, self.pause_s or 0.0)
        self.let_go()
        self.concluded("BLOCK_JOB_COMPLETED")

    def detach(self) -> None:
        self._mode.turn(synchronous=False)
        self.disk.ledger.detach(self.tracker.dirty)
        self._release_guest()
        self.copier.close()
        self._waits.cancel_all()

    def _release_guest(self) -> None:
        self._waits.cancel("level")
        quiesce, self._quiesce = self._quiesce, None
        if quiesce is not None and (held_s := quiesce.release()) is not None:
            self.pause_s = held_s

    def _fail(self, reason: BaseException) -> None:
        """Drain, and end with an error, the first one. An end being written down is not stopped."""
        if self._abort is None and not self.group.is_committing:
            self._abort = reason
            self.hold()
            self.break_group_up()

    def _retry(self) -> None:
        if self._abort is None and not self.pause_wanted:
            self.release()
        self.advance()

    def _poll(self) -> None:
        self._waits.after("poll", POLL_S, self._poll)
        self.tracker.look()
        if self.copier.is_running:
            self._watch.look()
        self.advance()
