"""Deadline: until when a mirror is to have ended, whether it can be, and what is done when it has
not.

Two clocks. A user means the wall clock, and a deadline outlives the process, so the wall clock is
what is kept. While a job runs its deadline is a moment of the loop's clock, taken from the wall
clock once: that clock may be stepped, by an administrator or by NTP. A step forward would end a job
at once that has hours left, and a step back would leave it running.

On the event loop's thread.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from nbdmirror.amounts import size
from nbdmirror.mirror.job_states import VERBS, JobStatus
from nbdmirror.mirror.mirror_job import MirrorJob
from nbdmirror.mirror.options import Ending, OnDeadline
from nbdmirror.mirror.outlook import Prediction

BECAUSE = "its deadline has passed"


class Kept(enum.StrEnum):
    """Whether a deadline is kept. The words are those of QMP."""

    YES = "can-be-kept"
    MAYBE = "may-be-missed"
    NO = "cannot-be-kept"
    UNKNOWN = "not-known"
    PASSED = "passed"


class Done(enum.StrEnum):
    """What was done when a deadline had passed. The words are those of QMP."""

    NOTHING = "nothing"
    COMPLETE = "complete"
    COMPLETE_WHEN_READY = "complete-when-ready"
    CANCEL = "cancel"
    CANCEL_BY_FORCE = "cancel-by-force"


@dataclass(frozen=True, slots=True)
class Passed:
    """A deadline has passed."""

    action: OnDeadline
    done: Done
    reason: str


class Deadline:
    """The deadline of one job, if it has one."""

    def __init__(
        self, job: MirrorJob, clock: Callable[[], float], time_s: Callable[[], float]
    ) -> None:
        """`time_s` returns seconds since 1970."""
        self._job = job
        self._clock = clock
        self._time_s = time_s
        self._at_s: float | None = None
        self._until_s = 0.0
        """Of `clock`: `_at_s`."""
        self._acted: tuple[float | None, OnDeadline] | None = None
        """The deadline that has passed, and what was to be done then."""

    @property
    def left_s(self) -> float | None:
        """Seconds that are left, 0 after the deadline; None without one."""
        at_s = self._job.options.deadline_at_s
        if at_s != self._at_s:
            self._at_s = at_s
            self._until_s = self._clock() + (at_s or 0.0) - self._time_s()
        return None if at_s is None else max(0.0, self._until_s - self._clock())

    def kept(self, prediction: Prediction | None, *, is_copying: bool) -> Kept:
        """Whether the job can end in time. `prediction`: when it will be READY. `is_copying`: the
        target is not lost, and the job is not paused."""
        job, left_s = self._job, self.left_s or 0.0
        if left_s <= 0:
            return Kept.PASSED
        if job.has_done_its_work and not job.group.is_finalizing:
            return Kept.UNKNOWN  # its group, or who finalizes it, decides
        if not is_copying:
            return Kept.UNKNOWN
        if job.was_ready:
            if (is_too_long := job.pivot_pause.is_too_long) is None:
                return Kept.UNKNOWN
            return Kept.MAYBE if is_too_long else Kept.YES
        if prediction is None:
            return Kept.UNKNOWN
        if prediction.never or (prediction.end_s_min or 0.0) > left_s:
            return Kept.NO
        latest_s = prediction.end_s_max
        return Kept.YES if latest_s is not None and latest_s <= left_s else Kept.MAYBE

    def look(self, tell: Callable[[Passed], None]) -> None:
        """Call this about once a second. When the deadline has passed, tell what is done now, once,
        and do that: the job may be over afterwards."""
        job, left_s = self._job, self.left_s
        if left_s is None or left_s > 0 or job.activity.is_bad_end:
            return
        if job.status is JobStatus.CREATED:
            return  # of an earlier process: it does not run again yet
        action = job.options.on_deadline
        is_told = self._acted == (self._at_s, action)
        if is_told and action is not OnDeadline.COMPLETE:
            return
        done = Done.NOTHING
        if action is not OnDeadline.REPORT:
            done = self._completion if action is OnDeadline.COMPLETE else self._cancellation
        if not is_told:
            self._acted = self._at_s, action
            left = size(job.tracker.dirty.dirty_bytes + job.tracker.in_flight_bytes)
            state = f"the job is in state {job.status}, and {left} are left to copy"
            tell(Passed(action, done, state))
        if done is Done.COMPLETE:
            job.complete()
        elif done is Done.CANCEL:
            job.cancel(force=False)
        elif done is Done.CANCEL_BY_FORCE:
            job.cancel(force=True, because=BECAUSE)

    @property
    def _completion(self) -> Done:
        """What is to be done now to complete the job. `max-pause` holds as ever."""
        if self._job.ending is not Ending.NONE:
            return Done.NOTHING
        is_possible = self._job.status in VERBS["complete"]
        return Done.COMPLETE if is_possible else Done.COMPLETE_WHEN_READY

    @property
    def _cancellation(self) -> Done:
        """What is to be done now to cancel the job. Without force where that leaves a copy of one
        moment soon: not while the job is paused, and not after `complete`, which only force takes
        back."""
        job = self._job
        if job.ending is Ending.CANCEL:
            return Done.NOTHING
        is_soft = job.status is JobStatus.READY and not job.pause_wanted
        is_soft = is_soft and job.ending is Ending.NONE
        return Done.CANCEL if is_soft else Done.CANCEL_BY_FORCE
