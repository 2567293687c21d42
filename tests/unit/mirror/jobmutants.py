"""What the mutants of test_job_mutants do instead of what the job's rules say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nbdmirror.mirror import quiesce, timers
from nbdmirror.mirror.activity import Activity
from nbdmirror.mirror.copier import Copier
from nbdmirror.mirror.job import Job
from nbdmirror.mirror.job_states import JobStatus
from nbdmirror.mirror.mirror_job import MirrorJob
from nbdmirror.mirror.options import Ending, Policy
from nbdmirror.mirror.quiesce import Quiesce
from nbdmirror.mirror.stopping import Stopping
from nbdmirror.mirror.timers import JobTimers


def flush_never(self: Copier, done: Callable[[BaseException | None], None]) -> None:
    done(None)


def ready_at_once(self: MirrorJob) -> None:
    """Rule 14: without the flush."""
    MirrorJob._hurry(self)
    self.copier.pump()
    if self.status is JobStatus.RUNNING and self.tracker.in_sync:
        self._become_ready()
    elif self.may_end:
        self._begin_quiesce()


def close_without_a_look(self: Quiesce) -> None:
    """Rule 15: requests under way are not waited for."""
    self.step = quiesce.Step.DRAINING
    self._closed_at_s = self._loop.clock()
    self._timer = self._loop.call_later(quiesce.LIMIT_S, self._time_out)
    self._ledger.close_gate(self._on_idle)
    self.step = quiesce.Step.COPYING
    self.advance()


def level_after_the_flush(self: Quiesce, error: BaseException | None) -> None:
    """Rule 15: not counted again, and errors of the flush not heard."""
    if self.step is quiesce.Step.FLUSHING:
        assert self._timer is not None
        self._timer.cancel()
        self.step = quiesce.Step.LEVEL
        self._on_level()


def cancel_forgets_softness(self: Job, *, force: bool, because: str = "") -> None:
    """Rule 17: a soft cancel after READY ends as a forced one."""
    self.check_cancel(force=force)
    self.abort(because)
    self.advance_soon()


def cancel_overrules(self: Job, *, force: bool, because: str = "cancelled by force") -> None:
    """Rule 17: a soft cancel takes a complete back."""
    if self.status is JobStatus.READY and not force:
        self.ending = Ending.CANCEL
        self.advance_soon()
    else:
        self.abort(because)
        self.advance_soon()


def over_at_once(self: Stopping, *, for_pause: bool = False) -> bool:
    """Rules 21 and 22: what is in flight is not waited for."""
    return True


def for_ever(self: Stopping) -> None:
    """Rule 19: nothing is given up."""


def skip(self: MirrorJob, operation: str, error: BaseException) -> None:
    """Rule 20: an ignored error is forgotten, with the range."""
    self.tell_error(operation, "ignore", error)
    self.tracker.dirty.clear_all()


def last_error_wins(self: MirrorJob, reason: BaseException) -> None:
    """Rule 21."""
    if self.activity is not Activity.ABORTING:
        self.become(Activity.ABORTING)
    self.failure = reason


def ends_at_any_time(self: MirrorJob, reason: BaseException) -> None:
    """While the end is being written down, too."""
    self.activity, self.failure = Activity.ABORTING, reason


def always_report(self: Policy, error_number: int) -> Policy:
    return Policy.REPORT


def each_error_is_told(self: MirrorJob, operation: str, error: BaseException) -> None:
    """Rule 21: stop, with an event for each request that was in flight."""
    self.tell_error(operation, "stop", error)
    self.io_status = "failed"
    if not self.pause_wanted:
        self.hold()
    self.advance_soon()


def commit_cannot_fail(self: MirrorJob, *, was_committed: bool) -> None:
    self.finish()


def not_taken_back(self: MirrorJob, *, was_committed: bool) -> None:
    self._not_written_down(OSError("the state directory failed"))


def unpause_keeps_the_status(self: Job) -> None:
    self.io_status = "ok"


def never(*_: Any, **__: Any) -> bool:
    return False


def always(*_: Any, **__: Any) -> bool:
    return True


def nothing(*_: Any, **__: Any) -> None:
    return None


def retry_at_once(self: JobTimers, call: Callable[[], None]) -> None:
    """Rule 42: no back-off."""
    self.after(timers.RETRY, 0.01, call)
