"""Job: QEMU's job layer for a mirror: states, verbs, events, pause, finalize, dismiss.

A subclass does the work. This class decides what is allowed in which state. All methods run on the
event loop's thread.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

from nbdmirror.devices.base import Done
from nbdmirror.errors import CommandError, errno_of
from nbdmirror.event_loop import Loop
from nbdmirror.events import EventRing
from nbdmirror.mirror.activity import Activity, check_follows
from nbdmirror.mirror.failure import Cancelled, JobError, error_text
from nbdmirror.mirror.group import Group
from nbdmirror.mirror.job_states import JobStatus, check_transition, check_verb
from nbdmirror.mirror.lag import BaseLag
from nbdmirror.mirror.options import Ending, MirrorOptions, Policy
from nbdmirror.mirror.point_group import PointGroup
from nbdmirror.mirror.traffic import Traffic
from nbdmirror.mirror.waits import Waits
from nbdmirror.subject_log import SubjectLog


class Job(ABC):
    """A job. Each command raises CommandError, with QEMU's text, if the state does not allow the
    command; then nothing has changed."""

    type = "mirror"

    def __init__(
        self, options: MirrorOptions, events: EventRing, loop: Loop, log: SubjectLog
    ) -> None:
        self.id = options.job_id
        self.log = log
        self.options = options
        """The present options: speed and copy mode can be changed."""
        self.status = JobStatus.UNDEFINED
        self.activity = Activity.NOT_STARTED
        self.io_status = "ok"
        self.error: str | None = None
        self.failure: BaseException | None = None
        """Why the job ended badly."""
        self.last_error: JobError | None = None
        self.waits = Waits(loop.clock)
        self.quiesce_timeouts = 0
        """How often guests were held without success at an ending."""
        self.ending = Ending.NONE
        self.traffic: Traffic | None = None
        self.lag: BaseLag | None = None
        """Both since READY."""
        self._events = events
        self._loop = loop
        self.group = Group(self)
        self._when_ended: list[Callable[[], None]] = []

    def create(self) -> None:
        self.to(JobStatus.CREATED, "requested")

    def discard(self) -> None:
        """Remove a job that was created and not started, since its transaction failed."""
        because = "another part of its transaction failed"
        self.to(JobStatus.ABORTING, because)
        self.let_go()
        self.error = "Operation canceled"
        self.to(JobStatus.CONCLUDED, because)
        self.dismiss()

    # Commands.

    def complete(self) -> None:
        """After READY: end with a pivot. In STANDBY, remembered until the job is resumed."""
        self.check_complete()
        self.log.info("complete requested")
        self.ending = Ending.COMPLETE
        self.advance_soon()

    def cancel(self, *, force: bool, because: str = "cancelled by force") -> None:
        """Without `force` after READY: end with a consistent target, unless `complete` came first.
        Otherwise end with an undefined target; `because` is the reason for the log."""
        self.check_cancel(force=force)
        self.log.info("cancel requested%s", " by force" if force else "")
        if self.status is JobStatus.READY and not force:
            if self.ending is Ending.NONE:
                self.ending = Ending.CANCEL
                self.break_group_up()
            self.advance_soon()
            return
        if self.pause_wanted:
            self.unpause()
        self.abort(because if force else "cancelled before it was ready")
        if self.has_done_its_work:
            self.advance()
        else:
            self.advance_soon()  # the command's answer goes first, then the events of the end

    def check_complete(self) -> None:
        """Raise the error that `complete` would raise."""
        check_verb(self.id, self.status, "complete")
        if self.ending is Ending.CANCEL:
            raise CommandError(f"The active block job '{self.id}' cannot be completed")

    def check_cancel(self, *, force: bool) -> None:
        """Raise the error that `cancel` would raise."""
        check_verb(self.id, self.status, "cancel")
        if self.pause_wanted and not force:
            raise CommandError(f"The block job for device '{self.id}' is currently paused")

    def pause(self) -> None:
        """Pause: PAUSED or STANDBY follows when nothing is in flight."""
        check_verb(self.id, self.status, "pause")
        if self.pause_wanted:
            raise CommandError("Job is already paused")
        self.log.info("pause requested")
        self.hold()
        self.advance()

    def resume(self) -> None:
        """Continue after a pause by the user or by an error."""
        if not self.pause_wanted:
            raise CommandError("Can't resume a job that was not paused")
        check_verb(self.id, self.status, "resume")
        self.log.info("resumed")
        self.unpause()
        self.release()
        self.advance_soon()

    def set_speed(self, speed_bytes_per_s: int) -> None:
        """Limit copying from now on; 0: no limit."""
        check_verb(self.id, self.status, "set-speed")
        if speed_bytes_per_s < 0:
            raise CommandError("Parameter 'speed' expects a non-negative value")
        self.log.info("speed limit %d bytes per second", speed_bytes_per_s)
        self.limit_speed(speed_bytes_per_s)

    def finalize(self) -> None:
        """End all jobs of the group, which wait in PENDING. `when_ended` reports the end of each
        job."""
        check_verb(self.id, self.status, "finalize")
        self.group.finalize()

    def dismiss(self) -> None:
        check_verb(self.id, self.status, "dismiss")
        self.to(JobStatus.NULL, "dismissed")
        self.dismissed()

    def when_ended(self, call: Callable[[], None]) -> None:
        """Call `call` when the job is concluded; at once if it already is."""
        if self.is_over:
            call()
        else:
            self._when_ended.append(call)

    # What queries show.

    @property
    def is_over(self) -> bool:
        return self.status in (JobStatus.CONCLUDED, JobStatus.NULL)

    @property
    def is_ready(self) -> bool:
        return self.status in (JobStatus.READY, JobStatus.STANDBY)

    @property
    def has_done_its_work(self) -> bool:
        """The job waits for its group or for `finalize`, and cannot be paused any more."""
        return self.status in (JobStatus.WAITING, JobStatus.PENDING)

    @property
    def was_ready(self) -> bool:
        """The job was in sync once, and has not ended."""
        return self.is_ready or self.has_done_its_work

    @property
    def pause_wanted(self) -> bool:
        """The user or an error pauses the job, which may not be PAUSED or STANDBY yet."""
        return self.activity.is_pause

    @property
    def is_level(self) -> bool:
        """Guest writes are held and the target equals the source, durably: `finish` may be
        called."""
        return self.activity is Activity.HELD

    @property
    @abstractmethod
    def offset(self) -> int:
        """Bytes done; never decreases."""

    @property
    @abstractmethod
    def length(self) -> int:
        """`offset` plus the bytes that are left: grows while the guest writes."""

    # What the work is.

    @abstractmethod
    def advance(self) -> None:
        """Look at the state and do the next step; may be called at any time, any number of
        times."""

    @abstractmethod
    def left(self, old: Activity) -> None:
        """`activity` has changed from `old`: end everything that belongs to `old` only."""

    @abstractmethod
    def changed(self) -> None:
        """The job's saved state may have changed."""

    @abstractmethod
    def release(self) -> None:
        """Continue after a pause."""

    @abstractmethod
    def abort(self, because: str) -> None:
        """A forced cancel: end within a bound. `because`: the reason for the log."""

    @abstractmethod
    def commit(self, done: Done) -> None:
        """The target is level: record the end that `ending` names, if state is kept."""

    @abstractmethod
    def commit_failed(self, *, was_committed: bool) -> None:
        """The end of this job, or of another job of its group, could not be recorded: continue.
        `was_committed`: this job's end was recorded, and must be revoked."""

    @abstractmethod
    def finish(self) -> None:
        """End well, now, as `ending` says. Never fails."""

    @abstractmethod
    def limit_speed(self, speed_bytes_per_s: int) -> None:
        """Limit copying to so many bytes per second; 0: no limit."""

    @abstractmethod
    def detach(self) -> None:
        """Stop using the disk, and at last release its guest."""

    @abstractmethod
    def forget(self, done: Done) -> None:
        """The job ends badly: record that it does not continue. `done` comes within a bound."""

    @abstractmethod
    def let_go(self) -> None:
        """Release all resources of the job."""

    @abstractmethod
    def dismissed(self) -> None:
        """Remove the job from all lists."""

    # For the subclass and the group.

    def become(self, activity: Activity) -> None:
        """End the present activity with everything that belongs to it, and begin another one."""
        check_follows(self.activity, activity)
        old, self.activity = self.activity, activity
        self.waits.doing(activity, is_error=self.io_status != "ok")
        self.left(old)

    def hold(self) -> None:
        """Pause: start nothing new. A job that is ending badly continues to end."""
        if not self.activity.is_bad_end:
            self.become(Activity.PAUSING)
            self.changed()

    def fail(self, reason: BaseException) -> None:
        """End with an error, after requests in flight have ended. The first error wins. Has no
        effect while a good end is being recorded."""
        if not (self.activity is Activity.COMMITTING or self.activity.is_bad_end):
            self.become(Activity.ABORTING)
            self.failure = reason
            self.changed()
            self.break_group_up()

    def is_ignored(self, operation: str, error: BaseException) -> bool:
        """Apply the error policy: QEMU's block_job_error_action. Returns whether the job tries
        again."""
        action = self.options.policy(operation).action(errno_of(error))
        if action is Policy.STOP and self.has_done_its_work:
            action = Policy.REPORT  # such a job can be neither paused nor resumed
        self.tell_error(operation, str(action), error)
        if action is Policy.REPORT:
            self.fail(error)
        elif action is Policy.STOP:
            self.io_status = "nospace" if errno_of(error) == errno.ENOSPC else "failed"
            self.hold()
        return action is Policy.IGNORE

    def advance_soon(self) -> None:
        self._loop.call_soon(self.advance)

    def break_group_up(self) -> None:
        """This job will not end as its group should: cancel the other jobs, soon."""
        self._loop.call_soon(partial(self.group.break_up, self))

    @property
    def may_end(self) -> bool:
        """The next step is to make the target level, for which the guest is held."""
        if self.group.is_finalizing:
            return self.group.may_hold(self)
        return self.is_ready and self.ending is not Ending.NONE

    def pend(self) -> None:
        """All jobs of the group have done their work."""
        self.to(JobStatus.PENDING, "all jobs of its group have done their work")
        if not self.options.auto_finalize:
            self._events.append("BLOCK_JOB_PENDING", {"type": self.type, "id": self.id})

    def share_points(self, points: PointGroup) -> None:  # noqa: B027 - most jobs make none
        """The job makes its points, if there are any, with those of this group from now on."""

    def unpause(self) -> None:
        """Return to the state before the pause. `release` starts the work."""
        self.io_status = "ok"
        if self.status is JobStatus.PAUSED:
            self.to(JobStatus.RUNNING, "resumed")
        elif self.status is JobStatus.STANDBY:
            self.to(JobStatus.READY, "resumed")

    def paused(self) -> None:
        """Nothing is in flight any more: the pause is complete."""
        error = self.last_error if self.io_status != "ok" else None
        because = "paused by a user" if error is None else error.reason
        if self.status is JobStatus.RUNNING:
            self.to(JobStatus.PAUSED, because)
        elif self.status is JobStatus.READY:
            self.to(JobStatus.STANDBY, because)

    def to(self, status: JobStatus, because: str) -> None:
        """Change to `status`, with a log line and an event."""
        check_transition(self.status, status)
        old, self.status = self.status, status
        about = {"state": str(status), "before": str(old), "reason": because}
        self.log.info("%s -> %s", old, status, about=about)
        self._events.append("JOB_STATUS_CHANGE", {"status": str(status), "id": self.id})

    def tell(self, event: str, **extra: object) -> None:
        """A BLOCK_JOB_... event with QEMU's fields, and `extra`."""
        data = {
            "type": self.type,
            "device": self.id,
            "len": self.length,
            "offset": self.offset,
            "speed": self.options.speed_bytes_per_s,
        }
        self._events.append(event, {**data, **extra})

    def tell_error(self, operation: str, action: str, error: BaseException) -> None:
        about = {"operation": operation, "action": action, "reason": str(error)}
        self.log.warning("%s error (%s): %s", operation, action, error, about=about)
        self.last_error = JobError(operation, action, str(error))
        data = {"device": self.id, "operation": operation, "action": action}
        self._events.append("BLOCK_JOB_ERROR", data)

    def tell_quiesce_timeout(self) -> None:
        self.quiesce_timeouts += 1
        self.tell("X_NBDMIRROR_QUIESCE_TIMEOUT")

    def tell_pivoted(self, disk: str, held_s: float) -> None:
        """`held_s`: how long guests' writes were held, in seconds."""
        data = {"device": disk, "id": self.id, "pause-ms": round(held_s * 1000, 3)}
        self._events.append("X_NBDMIRROR_PIVOTED", data)

    def end_badly(self) -> None:
        """Conclude a job that failed or was cancelled by force; nothing is in flight any more."""
        reason = self.failure
        assert reason is not None
        self.to(JobStatus.ABORTING, str(reason))
        self.become(Activity.CLEANING)
        self.detach()

        def conclude(_: BaseException | None) -> None:
            self.let_go()
            if isinstance(reason, Cancelled):
                self.error = "Operation canceled"
                self.concluded("BLOCK_JOB_CANCELLED")
            else:
                self.error = error_text(reason)
                self.concluded("BLOCK_JOB_COMPLETED", error=self.error)

        self.forget(conclude)

    def concluded(self, event: str, **extra: object) -> None:
        """Send the last events; all resources are released."""
        for since_ready in (self.traffic, self.lag):
            if since_ready is not None:
                extra = since_ready.at_the_end() | extra
        self.tell(event, **extra)
        kind = "completed" if self.ending is Ending.COMPLETE else "ended with a copy"
        self.to(JobStatus.CONCLUDED, str(self.failure or kind))
        if self.options.auto_dismiss:
            self.dismiss()
        for call in self._when_ended:
            call()
