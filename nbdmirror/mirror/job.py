"""Job: what QEMU's job layer is to a mirror: states, verbs, events, pause, finalize, dismiss.

A subclass does the work; here is what it may do when. Everything happens on the event loop's
thread.
"""

from __future__ import annotations

import errno
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from nbdmirror.devices.base import Done
from nbdmirror.errors import CommandError, errno_of
from nbdmirror.event_loop import Loop
from nbdmirror.events import EventRing
from nbdmirror.mirror.activity import Activity, check_follows
from nbdmirror.mirror.group import Group
from nbdmirror.mirror.job_states import JobStatus, check_transition, check_verb
from nbdmirror.mirror.lag import Lag
from nbdmirror.mirror.options import Ending, MirrorOptions, Policy
from nbdmirror.mirror.traffic import Traffic

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JobError:
    """What BLOCK_JOB_ERROR told, and why."""

    operation: str
    action: str
    reason: str


class Job(ABC):
    """A job's public half: the commands. Each raises CommandError, and changes nothing, if the
    state does not take it."""

    type = "mirror"

    def __init__(self, options: MirrorOptions, events: EventRing, loop: Loop) -> None:
        self.id = options.job_id
        self.options = options
        """As they are now: the speed and the copy mode can be changed."""
        self.status = JobStatus.UNDEFINED
        self.activity = Activity.NOT_STARTED
        self.io_status = "ok"
        self.error: str | None = None
        self.failure: BaseException | None = None
        """Why the job ended badly."""
        self.last_error: JobError | None = None
        self.quiesce_timeouts = 0
        """How often guests were held in vain."""
        self.ending = Ending.NONE
        self.traffic: Traffic | None = None
        self.lag: Lag | None = None
        """Both since READY."""
        self._events = events
        self._loop = loop
        self.group = Group(self)
        self._when_ended: list[Callable[[], None]] = []

    def create(self) -> None:
        self.to(JobStatus.CREATED)

    def discard(self) -> None:
        """Created, and not started: the transaction failed."""
        self.to(JobStatus.ABORTING)
        self.let_go()
        self.error = "Operation canceled"
        self.to(JobStatus.CONCLUDED)
        self.dismiss()

    # Commands.

    def complete(self) -> None:
        """After READY: end with a pivot. On a paused job it is remembered until it is resumed."""
        self.check_complete()
        log.info("job %s: complete requested", self.id)
        self.ending = Ending.COMPLETE
        self.advance_soon()

    def cancel(self, *, force: bool, because: str = "cancelled by force") -> None:
        """Soft after READY: the job ends with a consistent target, unless `complete` came first.
        Otherwise the target is left undefined; `because` says why."""
        self.check_cancel(force=force)
        log.info("job %s: cancel requested%s", self.id, " by force" if force else "")
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
        """Raise what `complete` would."""
        check_verb(self.id, self.status, "complete")
        if self.ending is Ending.CANCEL:
            raise CommandError(f"The active block job '{self.id}' cannot be completed")

    def check_cancel(self, *, force: bool) -> None:
        """Raise what `cancel` would."""
        check_verb(self.id, self.status, "cancel")
        if self.pause_wanted and not force:
            raise CommandError(f"The block job for device '{self.id}' is currently paused")

    def pause(self) -> None:
        check_verb(self.id, self.status, "pause")
        if self.pause_wanted:
            raise CommandError("Job is already paused")
        log.info("job %s: pause requested", self.id)
        self.hold()
        self.advance()

    def resume(self) -> None:
        if not self.pause_wanted:
            raise CommandError("Can't resume a job that was not paused")
        check_verb(self.id, self.status, "resume")
        log.info("job %s: resumed", self.id)
        self.unpause()
        self.release()
        self.advance_soon()

    def set_speed(self, speed_bytes_per_s: int) -> None:
        check_verb(self.id, self.status, "set-speed")
        if speed_bytes_per_s < 0:
            raise CommandError("Parameter 'speed' expects a non-negative value")
        log.info("job %s: speed limit %d bytes per second", self.id, speed_bytes_per_s)
        self.limit_speed(speed_bytes_per_s)

    def finalize(self) -> None:
        """Ends all jobs of its group, which wait in PENDING; `when_ended` tells when that is
        done."""
        check_verb(self.id, self.status, "finalize")
        self.group.finalize()

    def dismiss(self) -> None:
        check_verb(self.id, self.status, "dismiss")
        self.to(JobStatus.NULL)
        self.dismissed()

    def when_ended(self, call: Callable[[], None]) -> None:
        """Have `call` called once the job is concluded; at once if it is."""
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
        """It is held up for its group or for `finalize`: it cannot be paused any more."""
        return self.status in (JobStatus.WAITING, JobStatus.PENDING)

    @property
    def pause_wanted(self) -> bool:
        """By the user or by an error; the job may still be on its way to PAUSED or STANDBY."""
        return self.activity.is_pause

    @property
    def is_level(self) -> bool:
        """Guest writes are held and the target equals the source, durably: `finish` may be
        called."""
        return self.activity is Activity.HELD

    @property
    @abstractmethod
    def offset(self) -> int:
        """Bytes done; never goes back."""

    @property
    @abstractmethod
    def length(self) -> int:
        """`offset` and what is left, in bytes: it grows while the guest writes."""

    # What the work is.

    @abstractmethod
    def advance(self) -> None:
        """Look at the state and do the next step; may be called at any time, any number of
        times."""

    @abstractmethod
    def left(self, old: Activity) -> None:
        """`activity` is another one than `old`: end what belonged to that alone."""

    @abstractmethod
    def changed(self) -> None:
        """What is kept of the job may have become another."""

    @abstractmethod
    def release(self) -> None:
        """A pause ends: go on."""

    @abstractmethod
    def abort(self, because: str) -> None:
        """A forced cancel: give up, within a bound."""

    @abstractmethod
    def commit(self, done: Done) -> None:
        """Level: write down that the job has ended, as `ending` says, where that is kept."""

    @abstractmethod
    def commit_failed(self, *, was_committed: bool) -> None:
        """That of this job, or of another one of its group, could not be written down: go on.
        `was_committed`: this one's was, and has to be taken back."""

    @abstractmethod
    def finish(self) -> None:
        """End well, now, as `ending` says. Cannot fail."""

    @abstractmethod
    def limit_speed(self, speed_bytes_per_s: int) -> None:
        """0 for no limit."""

    @abstractmethod
    def detach(self) -> None:
        """Do nothing with the disk any more, and last let go of its guest."""

    @abstractmethod
    def forget(self, done: Done) -> None:
        """It ends badly: write down that it does not go on, where that is kept; within a bound."""

    @abstractmethod
    def let_go(self) -> None:
        """Use nothing any more."""

    @abstractmethod
    def dismissed(self) -> None:
        """The job is to be forgotten."""

    # For the subclass and the group.

    def become(self, activity: Activity) -> None:
        """End what the job does now, with all that belongs to it, and begin another activity."""
        check_follows(self.activity, activity)
        old, self.activity = self.activity, activity
        self.left(old)

    def hold(self) -> None:
        """A pause: start nothing new. A job that is ending badly goes on with that."""
        if not self.activity.is_bad_end:
            self.become(Activity.PAUSING)
            self.changed()

    def fail(self, reason: BaseException) -> None:
        """End with an error; the first one wins. What is in flight drains first. An end that is
        being written down is not stopped any more."""
        if not (self.activity is Activity.COMMITTING or self.activity.is_bad_end):
            self.become(Activity.ABORTING)
            self.failure = reason
            self.changed()
            self.break_group_up()

    def is_ignored(self, operation: str, error: BaseException) -> bool:
        """Do what the policy says of the error: QEMU's block_job_error_action. True if the job is
        to try again."""
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
        """This job will not end as the group is meant to: the others are cancelled, soon."""
        self._loop.call_soon(partial(self.group.break_up, self))

    @property
    def may_end(self) -> bool:
        """The next step is to get level, and to hold the guest for that."""
        if self.group.is_finalizing:
            return self.group.may_hold(self)
        return self.is_ready and self.ending is not Ending.NONE

    def pend(self) -> None:
        """All of the group have done their work."""
        self.to(JobStatus.PENDING)
        if not self.options.auto_finalize:
            self._events.append("BLOCK_JOB_PENDING", {"type": self.type, "id": self.id})

    def unpause(self) -> None:
        """Back to where a pause found it; nothing is started yet (`release`)."""
        self.io_status = "ok"
        if self.status is JobStatus.PAUSED:
            self.to(JobStatus.RUNNING)
        elif self.status is JobStatus.STANDBY:
            self.to(JobStatus.READY)

    def paused(self) -> None:
        """Nothing is in flight any more."""
        if self.status is JobStatus.RUNNING:
            self.to(JobStatus.PAUSED)
        elif self.status is JobStatus.READY:
            self.to(JobStatus.STANDBY)

    def to(self, status: JobStatus) -> None:
        """Go to `status` and say so."""
        check_transition(self.status, status)
        log.info("job %s: %s -> %s", self.id, self.status, status)
        self.status = status
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
        log.warning("job %s: %s error (%s): %s", self.id, operation, action, error)
        self.last_error = JobError(operation, action, str(error))
        data = {"device": self.id, "operation": operation, "action": action}
        self._events.append("BLOCK_JOB_ERROR", data)

    def tell_quiesce_timeout(self) -> None:
        self.quiesce_timeouts += 1
        self.tell("X_NBDMIRROR_QUIESCE_TIMEOUT")

    def tell_pivoted(self, disk: str, held_s: float) -> None:
        """`held_s`: how long guests' writes were held for it."""
        data = {"device": disk, "id": self.id, "pause-ms": round(held_s * 1000, 3)}
        self._events.append("X_NBDMIRROR_PIVOTED", data)

    def end_badly(self) -> None:
        """Cancelled by force, or failed; nothing is in flight any more."""
        reason = self.failure
        assert reason is not None
        self.to(JobStatus.ABORTING)
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
        """The last events; everything has been let go of."""
        for since_ready in (self.traffic, self.lag):
            if since_ready is not None:
                extra = since_ready.at_the_end() | extra
        self.tell(event, **extra)
        self.to(JobStatus.CONCLUDED)
        if self.options.auto_dismiss:
            self.dismiss()
        for call in self._when_ended:
            call()


class Cancelled(Exception):
    """The reason of a job that was cancelled by force."""


def error_text(error: BaseException) -> str:
    """QEMU's job error is strerror's text alone."""
    return str(error) if isinstance(error, CommandError) else os.strerror(errno_of(error))
