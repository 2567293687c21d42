"""MirrorJob: starts, watches and ends one mirror. It has no loop over data: that is the copier's.

Everything here happens on the event loop's thread. Commands change what is wanted and call
`_advance`; so does every event (copies settled, a flush done, a timer). `_advance` looks at the
state and does the next step: it may be called at any time, any number of times.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from typing import Protocol

from nbdmirror.copier import Copier
from nbdmirror.device import AsyncTarget
from nbdmirror.disk import Disk
from nbdmirror.errors import CommandError, errno_of
from nbdmirror.events import EventRing
from nbdmirror.jobstate import JobStatus, check_transition, check_verb
from nbdmirror.ledger import Tracker
from nbdmirror.loop import Loop, Timer
from nbdmirror.options import Ending, MirrorOptions, Policy
from nbdmirror.quiesce import Quiesce

log = logging.getLogger(__name__)

POLL_S = 0.05
"""How often new guest writes are looked for when all was in sync. Longer would save more writes to
regions that are written again and again, and let the target lag more."""

RETRY_S_MIN, RETRY_S_MAX = 0.1, 5.0
"""Back-off under the policy `ignore`: first and longest wait before the failed range is tried
again."""

CANCEL_GRACE_S = 0.3
"""How long a forced cancel lets requests on the target end by themselves before their connection is
cut."""


class Target(AsyncTarget, Protocol):
    """What the job asks of its target beside the copying."""

    description: str

    def kill(self) -> None: ...


class Owner(Protocol):
    """Who made the job and takes it away again; called on the loop's thread."""

    def pivot(self, job: MirrorJob) -> None:
        """Guest writes are held and the target is level: serve the disk from the target."""

    def released(self, job: MirrorJob) -> None:
        """The job uses source and target no more; after a pivot the old source is free to be
        closed."""

    def dismissed(self, job: MirrorJob) -> None:
        """The job is to be forgotten."""


class MirrorJob:
    """A mirror of `disk` to `target`. `copier` is made and stopped; `start` starts it."""

    type = "mirror"

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
    ) -> None:
        self.options = options
        self.id = options.job_id
        self.disk = disk
        self.target = target
        self.tracker = tracker
        self.status = JobStatus.UNDEFINED
        self.io_status = "ok"
        self.error: str | None = None
        self.pause_s: float | None = None
        """How long guest writes were held at the ending, in seconds."""
        self.ending = Ending.NONE
        self.pivoted = False
        self._loop = loop
        self._events = events
        self._owner = owner
        self.copier = copier(self)
        self.copier.speed_bytes_per_s = options.speed_bytes_per_s
        self._pause_wanted = False
        self._was_ready = False
        self._is_flushing = False
        self._is_finalizing = False
        self._abort: BaseException | None = None
        self._quiesce: Quiesce | None = None
        self._retry_s = RETRY_S_MIN
        self._retry_timer: Timer | None = None
        self._poll_timer: Timer | None = None
        self._when_ended: list[Callable[[], None]] = []

    # Commands. Each raises CommandError and changes nothing if the state does not take it.

    def start(self) -> None:
        """created, running. Tracking is on before anything is marked or looked at (rule 33)."""
        self._to(JobStatus.CREATED)
        self.disk.ledger.attach(self.tracker.dirty)
        if self.options.sync != "none":
            self.tracker.dirty.mark_all()
        self._to(JobStatus.RUNNING)
        self.copier.is_running = True
        self._advance()
        self._poll()

    def fail_at_start(self, reason: str) -> None:
        """The job is created and ends at once with an error, as QEMU has it for unequal sizes."""
        self._to(JobStatus.CREATED)
        self._to(JobStatus.RUNNING)
        self._abort = CommandError(reason)
        self._loop.call_soon(self._advance)

    def complete(self) -> None:
        check_verb(self.id, self.status, "complete")
        if self.ending is Ending.CANCEL:
            raise CommandError(f"The active block job '{self.id}' cannot be completed")
        self._end(Ending.COMPLETE)

    def cancel(self, *, force: bool) -> None:
        """Soft after READY: the job ends with a consistent target. Otherwise the target is
        undefined."""
        check_verb(self.id, self.status, "cancel")
        if self._pause_wanted and not force:
            raise CommandError(f"The block job for device '{self.id}' is currently paused")
        if self.status is JobStatus.READY and not force:
            if self.ending is Ending.NONE:
                self._end(Ending.CANCEL)
            return
        if self._pause_wanted:
            self._resume()
        self._fail(_Cancelled())
        if self.status is JobStatus.PENDING:
            self._advance()
        else:
            # The command's answer goes first; then the events of the end.
            self._loop.call_soon(self._advance)

    def pause(self) -> None:
        check_verb(self.id, self.status, "pause")
        if self._pause_wanted:
            raise CommandError("Job is already paused")
        self._pause()

    def resume(self) -> None:
        if not self._pause_wanted:
            raise CommandError("Can't resume a job that was not paused")
        check_verb(self.id, self.status, "resume")
        self._resume()
        self._loop.call_soon(self._advance)

    def set_speed(self, speed_bytes_per_s: int) -> None:
        check_verb(self.id, self.status, "set-speed")
        if speed_bytes_per_s < 0:
            raise CommandError("Parameter 'speed' expects a non-negative value")
        self.copier.set_speed(speed_bytes_per_s)

    def finalize(self) -> None:
        """Ends the job that waits in PENDING; `when_ended` tells when that is done."""
        check_verb(self.id, self.status, "finalize")
        self._is_finalizing = True
        self._begin_quiesce()

    def dismiss(self) -> None:
        check_verb(self.id, self.status, "dismiss")
        self._dismiss()

    def when_ended(self, call: Callable[[], None]) -> None:
        """Have `call` called once the job is concluded; at once if it is."""
        if self.status in (JobStatus.CONCLUDED, JobStatus.NULL):
            call()
        else:
            self._when_ended.append(call)

    # What queries show.

    @property
    def is_paused(self) -> bool:
        """By the user or by an error; it may still be on its way there. Pending counts, in QEMU."""
        return self._pause_wanted or self.status is JobStatus.PENDING

    @property
    def is_ready(self) -> bool:
        return self.status in (JobStatus.READY, JobStatus.STANDBY)

    @property
    def is_busy(self) -> bool:
        if self.status is JobStatus.READY:
            return self.copier.in_flight > 0 or self._retry_timer is not None
        return self.status is JobStatus.RUNNING

    @property
    def offset(self) -> int:
        return self.copier.copied_bytes

    @property
    def length(self) -> int:
        """QEMU's `len`: what was copied and what is left. It grows while the guest writes."""
        return self.offset + (0 if self.is_over else self.copier.remaining_bytes)

    @property
    def is_over(self) -> bool:
        return self.status in (JobStatus.CONCLUDED, JobStatus.NULL)

    # The copier's observer.

    def copy_failed(self, operation: str, error: BaseException) -> None:
        if self._abort is not None or self._pause_wanted or self._retry_timer is not None:
            return  # decided already: this one was in flight then, and its range is dirty again
        policy = (
            self.options.on_source_error if operation == "read" else self.options.on_target_error
        )
        action = policy.action(operation, errno_of(error))
        if action is Policy.STOP and self.status is JobStatus.PENDING:
            action = Policy.REPORT  # a pending job can be neither paused nor resumed
        log.warning("job %s: %s error (%s): %s", self.id, operation, action, error)
        self._events.append(
            "BLOCK_JOB_ERROR", {"device": self.id, "operation": operation, "action": str(action)}
        )
        self.copier.stop()
        self._release_guest()
        if action is Policy.REPORT:
            self._fail(error)
        elif action is Policy.STOP:
            self.io_status = "nospace" if errno_of(error) == errno.ENOSPC else "failed"
            self._pause()
        else:
            self._retry_timer = self._loop.call_later(self._retry_s, self._retry)
            self._retry_s = min(RETRY_S_MAX, self._retry_s * 2)
        self._loop.call_soon(self._advance)

    def copy_settled(self) -> None:
        self._advance()

    def target_lost(self) -> None:
        """The target's connection broke. Requests in flight report that themselves."""
        if not self.copier.in_flight and not self.is_over:
            self.copy_failed("write", ConnectionError(errno.ENOTCONN, "connection lost"))

    # Steps.

    def _advance(self) -> None:
        if self.is_over or self.status is JobStatus.UNDEFINED:
            return
        if self._abort is not None:
            self._advance_abort()
        elif self._pause_wanted:
            self._advance_pause()
        elif self._retry_timer is not None:
            pass
        elif self._quiesce is not None:
            self._quiesce.advance()
        else:
            self.copier.pump()
            if self.status is JobStatus.RUNNING and self.tracker.in_sync:
                self._flush_for_ready()
            elif self._is_finalizing or (self.is_ready and self.ending is not Ending.NONE):
                self._begin_quiesce()

    def _advance_abort(self) -> None:
        if self.copier.in_flight or self._is_flushing:
            return
        self._release_guest()
        if self.status is not JobStatus.ABORTING:
            self._to(JobStatus.ABORTING)
        if not isinstance(self._abort, _Cancelled):
            self.error = _text(self._abort)
            self._conclude("BLOCK_JOB_COMPLETED", error=self.error)
        else:
            self.error = "Operation canceled"
            self._conclude("BLOCK_JOB_CANCELLED")

    def _advance_pause(self) -> None:
        if self.copier.in_flight or self._is_flushing:
            return
        if self.status is JobStatus.RUNNING:
            self._to(JobStatus.PAUSED)
        elif self.status is JobStatus.READY:
            self._to(JobStatus.STANDBY)

    def _flush_for_ready(self) -> None:
        """Rule 14: the target is flushed before READY, and READY comes once."""
        if self._is_flushing:
            return

        def then(error: BaseException | None) -> None:
            self._is_flushing = False
            if error is not None:
                self.copy_failed("write", error)
            elif self._abort is None and not self._pause_wanted and not self._was_ready:
                self._was_ready = True
                self._retry_s = RETRY_S_MIN
                self._to(JobStatus.READY)
                self._event("BLOCK_JOB_READY")
            self._advance()

        self._is_flushing = True
        self.copier.flush(then)

    def _end(self, ending: Ending) -> None:
        self.ending = ending
        self._loop.call_soon(self._advance)

    def _begin_quiesce(self) -> None:
        self._quiesce = Quiesce(
            ledger=self.disk.ledger,
            copier=self.copier,
            loop=self._loop,
            on_level=self._on_level,
            on_timeout=self._on_quiesce_timeout,
            on_flush_error=self._on_flush_error,
        )
        self._quiesce.advance()

    def _on_quiesce_timeout(self) -> None:
        """The guest writes faster than the rest could be copied: it goes on, and so do we."""
        self._quiesce = None
        self._event("X_NBDMIRROR_QUIESCE_TIMEOUT")
        self._advance()

    def _on_flush_error(self, error: BaseException) -> None:
        self._quiesce = None
        self.copy_failed("write", error)

    def _on_level(self) -> None:
        """Guest writes are held and the target equals the source, durably."""
        if self.status is JobStatus.READY:
            self._to(JobStatus.WAITING)
            self._to(JobStatus.PENDING)
            if not self.options.auto_finalize:
                self._events.append("BLOCK_JOB_PENDING", {"type": self.type, "id": self.id})
                self._release_guest()
                return
        if self.ending is Ending.COMPLETE:
            self._owner.pivot(self)
            self.pivoted = True
        self.copier.stop()
        self.disk.ledger.detach(self.tracker.dirty)
        self._release_guest()
        if self.pivoted:
            pause_ms = round((self.pause_s or 0.0) * 1000, 3)
            self._events.append(
                "X_NBDMIRROR_PIVOTED",
                {"device": self.disk.name, "id": self.id, "pause-ms": pause_ms},
            )
        self._conclude("BLOCK_JOB_COMPLETED")

    def _release_guest(self) -> None:
        quiesce, self._quiesce = self._quiesce, None
        if quiesce is not None and (held_s := quiesce.release()) is not None:
            self.pause_s = held_s

    def _conclude(self, event: str, **extra: str) -> None:
        self.copier.stop()
        self.disk.ledger.detach(self.tracker.dirty)
        for timer in (self._poll_timer, self._retry_timer):
            if timer is not None:
                timer.cancel()
        self._owner.released(self)
        self._event(event, **extra)
        self._to(JobStatus.CONCLUDED)
        for call in self._when_ended:
            call()
        if self.options.auto_dismiss:
            self._dismiss()

    def _dismiss(self) -> None:
        self._to(JobStatus.NULL)
        self._owner.dismissed(self)

    def _fail(self, reason: BaseException) -> None:
        """End with an error; the first one wins. What is in flight drains first."""
        if self._abort is None:
            self._abort = reason
            self.copier.stop()
            self._release_guest()
            if isinstance(reason, _Cancelled):
                self._loop.call_later(CANCEL_GRACE_S, self._cut)

    def _cut(self) -> None:
        """The target hangs: break its connection, so that what is in flight comes back."""
        if not self.is_over:
            self.target.kill()

    def _pause(self) -> None:
        self._pause_wanted = True
        self.copier.stop()
        self._release_guest()
        self._advance()

    def _resume(self) -> None:
        self._pause_wanted = False
        self.io_status = "ok"
        if self.status is JobStatus.PAUSED:
            self._to(JobStatus.RUNNING)
        elif self.status is JobStatus.STANDBY:
            self._to(JobStatus.READY)
        self.copier.is_running = True

    def _retry(self) -> None:
        self._retry_timer = None
        if self._abort is None and not self._pause_wanted:
            self.copier.is_running = True
        self._advance()

    def _poll(self) -> None:
        self._poll_timer = self._loop.call_later(POLL_S, self._poll)
        self._advance()

    def _to(self, status: JobStatus) -> None:
        check_transition(self.status, status)
        log.info("job %s: %s -> %s", self.id, self.status, status)
        self.status = status
        self._events.append("JOB_STATUS_CHANGE", {"status": str(status), "id": self.id})

    def _event(self, name: str, **extra: str) -> None:
        data = {
            "type": self.type,
            "device": self.id,
            "len": self.length,
            "offset": self.offset,
            "speed": self.copier.speed_bytes_per_s,
        }
        self._events.append(name, {**data, **extra})


class _Cancelled(Exception):
    """The job was cancelled; no error to speak of."""


def _text(error: BaseException | None) -> str:
    """QEMU's job error is strerror's text alone."""
    return (
        str(error) if isinstance(error, CommandError) else os.strerror(errno_of(error or OSError()))
    )
