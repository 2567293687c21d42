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

from nbdmirror.bitmap import DirtyBitmap
from nbdmirror.copier import Copier
from nbdmirror.copymode import CopyModeSwitch
from nbdmirror.device import Done
from nbdmirror.disk import Disk
from nbdmirror.errors import CommandError, DeviceLost, errno_of
from nbdmirror.events import EventRing
from nbdmirror.group import HOLD_S
from nbdmirror.job import Cancelled, Job, error_text
from nbdmirror.jobstate import JobStatus, check_verb
from nbdmirror.ledger import Tracker
from nbdmirror.loop import Loop, Timer
from nbdmirror.options import CopyMode, Ending, MirrorOptions, Policy
from nbdmirror.owner import Owner, Target
from nbdmirror.quiesce import Quiesce, Step

log = logging.getLogger(__name__)

POLL_S = 0.05
"""How often new guest writes are looked for when all was in sync. Longer would save more writes to
regions that are written again and again, and let the target lag more."""

RETRY_S_MIN, RETRY_S_MAX = 0.1, 5.0
"""Back-off under the policy `ignore`: first and longest wait before the failed range is tried
again."""

RECONNECT_PAUSE_S = 1.0
"""A target that is lost again within this time after it was brought back is an error."""

CANCEL_GRACE_S = 0.3
"""How long a forced cancel lets requests on the target end by themselves before their connection is
cut."""


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
        self.copier.speed_bytes_per_s = options.speed_bytes_per_s
        self._loop = loop
        self._owner = owner
        self._waits: object | None = None  # for a scan, a reconnect, a flush; can be abandoned
        self._abort: BaseException | None = None
        self._quiesce: Quiesce | None = None
        self._retry_s = RETRY_S_MIN
        self._reconnect_not_before_s = 0.0
        self._timers: dict[str, Timer] = {}
        self._is_scanned = options.sync == "none" or bitmap is not None
        self._mode = CopyModeSwitch(
            disk=disk,
            tracker=tracker,
            target=target,
            whole_granules=options.sync != "full",
            on_error=self._on_synchronous_error,
        )

    def start(self) -> None:
        """Tracking is on before anything is marked or looked at (rule 33)."""
        self.disk.ledger.attach(self.tracker.dirty)
        self.to(JobStatus.RUNNING)
        if self.bitmap is not None:
            self.tracker.dirty.merge(self.bitmap)
        elif self.options.sync == "full" and not self.options.target_is_zero:
            self.tracker.dirty.mark_all()
            self._is_scanned = True
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

    # What queries show.

    @property
    def is_busy(self) -> bool:
        if self.status is JobStatus.READY:
            return self.copier.in_flight > 0 or "retry" in self._timers
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
        return self.offset + self.copier.remaining_bytes

    @property
    def speed_bytes_per_s(self) -> int:
        return self.copier.speed_bytes_per_s

    @property
    def is_level(self) -> bool:
        return self._quiesce is not None and self._quiesce.step is Step.LEVEL

    # The copier's observer; `operation` is "read" for the source, "write" for the target.

    def copy_failed(self, operation: str, error: BaseException) -> None:
        """Rules 20 and 21. The range is dirty again already; what follows an error that was decided
        on, from the requests in flight with it, is part of it."""
        self._mode.note_error()
        if self._abort is not None or self.pause_wanted or "retry" in self._timers or self.is_over:
            return
        if isinstance(error, DeviceLost) and operation == "write" and self._may_reconnect():
            return
        action = self.options.policy(operation).action(errno_of(error))
        if action is Policy.STOP and self.has_done_its_work:
            action = Policy.REPORT  # such a job can be neither paused nor resumed
        log.warning("job %s: %s error (%s): %s", self.id, operation, action, error)
        self._events.append(
            "BLOCK_JOB_ERROR", {"device": self.id, "operation": operation, "action": str(action)}
        )
        self.hold()
        if action is Policy.REPORT:
            self._fail(error)
        elif action is Policy.STOP:
            self.io_status = "nospace" if errno_of(error) == errno.ENOSPC else "failed"
            self.pause_wanted = True
        else:
            self._after("retry", self._retry_s, self._retry)
            self._retry_s = min(RETRY_S_MAX, self._retry_s * 2)
        self.advance_soon()

    def _may_reconnect(self) -> bool:
        """Rule 40: a lost target is brought back before the policy is asked, where a
        reconnect-delay was given; not again at once when that led nowhere."""
        if self._waits is not None:
            return True  # it is being brought back
        now_s = self._loop.clock()
        if not self.options.reconnect_delay_s or now_s < self._reconnect_not_before_s:
            return False
        self._reconnect_not_before_s = now_s + RECONNECT_PAUSE_S
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
        if self._abort is not None:
            if self._nothing_in_flight():
                self._end_aborted(self._abort)
        elif self.pause_wanted:
            if self._nothing_in_flight():
                self.paused()
        elif self._waits is not None or "retry" in self._timers:
            pass
        elif self._quiesce is not None:
            self._quiesce.advance()
        else:
            self._advance_copying()

    def soon(self, call: Callable[[], None]) -> None:
        self._loop.call_soon(call)

    def hold(self) -> None:
        """Start nothing new: no copies, no synchronous writes, no ending."""
        self._waits = None
        self.copier.stop()
        self._mode.turn(synchronous=False)
        self._release_guest()

    def release(self) -> None:
        """Copy, if need be after the target was brought back."""
        self._wait_for(self._owner.reconnect, "write", self._go_on)

    def abort(self) -> None:
        self._fail(Cancelled())
        if "cut" not in self._timers:
            # A hung target: break its connection, so that what is in flight comes back.
            self._after("cut", CANCEL_GRACE_S, self.target.kill)

    def limit_speed(self, speed_bytes_per_s: int) -> None:
        self.copier.set_speed(speed_bytes_per_s)

    def let_go(self) -> None:
        self._owner.released(self)

    def dismissed(self) -> None:
        self._owner.dismissed(self)

    def _go_on(self) -> None:
        if self._is_scanned:
            self.copier.is_running = True
            self._mode.turn(synchronous=self.copy_mode is CopyMode.WRITE_BLOCKING)
        else:
            self._wait_for(self._owner.scan, "read", self._scanned)

    def _scanned(self) -> None:
        self._is_scanned = True
        self._go_on()

    def _advance_copying(self) -> None:
        self.copier.pump()
        in_sync = self.tracker.in_sync
        if in_sync:
            if self.status is JobStatus.READY and not self.may_end:
                self._retry_s = RETRY_S_MIN  # else there is a flush to come, which may fail again
            self._mode.note_in_sync()
        if self.status is JobStatus.RUNNING and in_sync:
            self._wait_for(self._flush, "write", self._become_ready)
        elif self.may_end:
            self._begin_quiesce()

    def _flush(self, _: MirrorJob, done: Done) -> None:
        """Rule 14: the target is flushed before READY, and READY comes once."""
        self.copier.flush(done)

    def _become_ready(self) -> None:
        self._retry_s = RETRY_S_MIN
        self.to(JobStatus.READY)
        self.tell("BLOCK_JOB_READY")

    def _wait_for(
        self, step: Callable[[MirrorJob, Done], None], operation: str, then: Callable[[], None]
    ) -> None:
        """Do `step`, and `then` if it ended well and nothing came between; its error is an error of
        `operation`."""
        token = self._waits = object()

        def done(error: BaseException | None) -> None:
            if self._waits is token:
                self._waits = None
                if error is not None:
                    self.copy_failed(operation, error)
                else:
                    then()
            self.advance()

        step(self, done)

    def _nothing_in_flight(self) -> bool:
        """No copies, no flush, and no write that may have been decided as a synchronous one."""
        return self.copier.is_idle and self._mode.has_drained()

    def _on_synchronous_error(self, error: BaseException) -> None:
        """From a guest's thread."""
        self._loop.call_soon(partial(self.copy_failed, "write", error))

    def _begin_quiesce(self) -> None:
        self._quiesce = Quiesce(
            ledger=self.disk.ledger,
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
        self.tell("X_NBDMIRROR_QUIESCE_TIMEOUT")
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
        self._after("level", HOLD_S, self._held_in_vain)
        self.group.got_level()

    def _held_in_vain(self) -> None:
        self.group.held_in_vain(self)
        self._on_quiesce_timeout()

    def finish(self) -> None:
        if self.bitmap is not None and self.options.clear_bitmap:
            self.bitmap.clear_all()
        if self.ending is Ending.COMPLETE:
            self._owner.pivot(self)
            self.pivoted = True
        self._let_go()
        if self.pivoted:
            pause_ms = round((self.pause_s or 0.0) * 1000, 3)
            data = {"device": self.disk.name, "id": self.id, "pause-ms": pause_ms}
            self._events.append("X_NBDMIRROR_PIVOTED", data)
        self.let_go()
        self.concluded("BLOCK_JOB_COMPLETED")

    def _end_aborted(self, reason: BaseException) -> None:
        if self.status is not JobStatus.ABORTING:
            self.to(JobStatus.ABORTING)
        self._let_go()
        self.let_go()
        if isinstance(reason, Cancelled):
            self.error = "Operation canceled"
            self.concluded("BLOCK_JOB_CANCELLED")
        else:
            self.error = error_text(reason)
            self.concluded("BLOCK_JOB_COMPLETED", error=self.error)

    def _let_go(self) -> None:
        """Of the disk, and last of its guest."""
        self.copier.close()
        self._mode.turn(synchronous=False)
        self.disk.ledger.detach(self.tracker.dirty)
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._release_guest()

    def _release_guest(self) -> None:
        if (timer := self._timers.pop("level", None)) is not None:
            timer.cancel()
        quiesce, self._quiesce = self._quiesce, None
        if quiesce is not None and (held_s := quiesce.release()) is not None:
            self.pause_s = held_s

    def _fail(self, reason: BaseException) -> None:
        """End with an error; the first one wins. What is in flight drains first."""
        if self._abort is None:
            self._abort = reason
            self.hold()
            self.break_group_up()

    def _retry(self) -> None:
        del self._timers["retry"]
        if self._abort is None and not self.pause_wanted:
            self.release()
        self.advance()

    def _poll(self) -> None:
        self._after("poll", POLL_S, self._poll)
        self.advance()

    def _after(self, name: str, delay_s: float, call: Callable[[], None]) -> None:
        self._timers[name] = self._loop.call_later(delay_s, call)
