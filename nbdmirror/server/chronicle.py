"""Chronicle: the history of mirrors, and their log lines: what is observed of each (course.py), and
how the last mirror of each disk ended.

On the event loop's thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from nbdmirror.amounts import size
from nbdmirror.errors import CommandError, TargetRefused
from nbdmirror.event_loop import Loop
from nbdmirror.events import EventRing
from nbdmirror.mirror.deadline import Passed
from nbdmirror.mirror.failure import Cancelled
from nbdmirror.mirror.ladder import Rung, Step
from nbdmirror.mirror.mirror_job import MirrorJob
from nbdmirror.mirror.points_job import PointsJob
from nbdmirror.mirror.snapshots_job import SnapshotsJob
from nbdmirror.partial_target import is_partial, target_text
from nbdmirror.server.course import LOOK_S, Course, FarSide, Lost
from nbdmirror.state.disk_record import MirrorRecord
from nbdmirror.state.job_results import Result

SERVER_ENDS = "the server ended"
GOES_ON = "the server ended; the mirror continues when the server starts again"
"""Why jobs are cancelled at the end of a server; GOES_ON with a state directory."""


class Chronicle:
    """The history of all jobs of a server."""

    def __init__(
        self,
        loop: Loop,
        events: EventRing,
        time_s: Callable[[], float],
        keep: Callable[[str, Result], None],
    ) -> None:
        """`time_s` returns seconds since 1970. `keep` saves the result of a disk, given by its
        name, if state is saved."""
        self.results: dict[str, Result] = {}
        """The result of each disk's last job, by the disk's name."""
        self.courses: dict[str, Course] = {}
        """The jobs that have not ended, by their IDs."""
        self._loop = loop
        self._events = events
        self._time_s = time_s
        self._keep = keep
        self._is_looking = False

    def begin(self, job: MirrorJob, far_side: FarSide = tuple) -> None:
        """Observe a job from its start to its end."""
        course = self.courses[job.id] = Course(job, self._loop.clock, self._time_s, far_side)
        job.when_ended(partial(self._ended, job))
        names = course.disk, course.source, course.target
        text = "mirrors disk %s (%s) to %s, sync %s, %s"
        job.log.info(text, *names, job.options.sync, job.options.copy_mode)
        course.look()
        if not self._is_looking:
            self._is_looking = True
            self._loop.call_later(LOOK_S, self._look)

    def _look(self) -> None:
        """At each job by itself: a look may end jobs, and a failure of one is not the others'."""
        self._is_looking = bool(self.courses)
        if self._is_looking:
            self._loop.call_later(LOOK_S, self._look)
        for job_id in self.courses:
            self._loop.call_soon(partial(self._look_at, job_id))

    def _look_at(self, job_id: str) -> None:
        if (course := self.courses.get(job_id)) is None:
            return  # it has ended meanwhile
        course.look()
        if (released := course.released()) is not None:
            self._tell(job_id, course, released)
        if (step := course.step) is not None:
            course.take(step)
            self._tell(job_id, course, step)
        course.deadline.look(partial(self._tell_of_deadline, job_id, course))

    def _tell(self, job_id: str, course: Course, step: Step) -> None:
        """Something is done from now on so that the job ends, or is not done any more."""
        about: dict[str, object] = {"rung": str(step.rung), "reason": step.reason}
        what = "copy mode write-blocking from now on"
        if step.hot_bytes is not None:
            what = "no write waits for the target any more"
            if step.hot_bytes:
                what = f"writes to {size(step.hot_bytes)} that guests change again and again"
                what += " wait for the target from now on"
            about["hot-bytes"] = step.hot_bytes
        if step.rung is Rung.THROTTLE:
            what = "the guest is not throttled any more"
            if step.bytes_per_s is not None:
                what = f"the guest may make {size(step.bytes_per_s)}/s dirty from now on"
                about["bytes-per-s"] = round(step.bytes_per_s)
        course.log.warning("%s: %s", what, step.reason, about=about)
        data: dict[str, object] = {"device": course.disk, "id": job_id}
        self._events.append("X_NBDMIRROR_CONVERGENCE", data | about)

    def _tell_of_deadline(self, job_id: str, course: Course, passed: Passed) -> None:
        about = {"action": str(passed.action), "done": str(passed.done), "reason": passed.reason}
        text = "its deadline has passed: %s; on-deadline %s, done: %s"
        course.log.warning(text, passed.reason, passed.action, passed.done, about=about)
        data: dict[str, object] = {"device": course.disk, "id": job_id}
        self._events.append("X_NBDMIRROR_DEADLINE", data | about)

    def target_lost(self, job_id: str, reconnect_timeout_s: float, target: str) -> None:
        """The job's target, or its journal, is lost. The job reconnects for `reconnect_timeout_s`
        from now on, also if the target was lost already."""
        course, now_s = self.courses[job_id], self._loop.clock()
        before, until_s = course.lost, now_s + reconnect_timeout_s
        course.lost = Lost(before.since_s if before else now_s, until_s, target)
        if before is not None:
            return
        data: dict[str, object] = {"device": course.disk, "id": job_id, "target": target}
        if math.isfinite(reconnect_timeout_s):
            data["wait-s"] = float(reconnect_timeout_s)
        how_long = (
            f"for {reconnect_timeout_s:g} s"
            if math.isfinite(reconnect_timeout_s)
            else "without a limit"
        )
        course.log.warning("target %s is lost: reconnecting %s", target, how_long)
        self._events.append("X_NBDMIRROR_TARGET_LOST", data)

    def target_waited_for(self, job_id: str, *, is_back: bool) -> None:
        """The job does not wait for its lost target any more. `is_back`: the target is
        reconnected."""
        course = self.courses[job_id]
        lost, course.lost = course.lost, None
        if is_back and lost is not None:
            lost_s = round(self._loop.clock() - lost.since_s, 3)
            course.log.info("target %s is back after %g s", lost.target, lost_s)
            data = {"device": course.disk, "id": job_id, "lost-for-s": lost_s}
            self._events.append("X_NBDMIRROR_TARGET_BACK", data)

    def not_continued(self, disk: str, mirror: MirrorRecord, why: str) -> None:
        """The mirror of an earlier process has ended, since this one cannot continue it."""
        reason = f"could not continue after the server's start: {why}"
        ended_at_s = round(self._time_s(), 3)
        names = mirror.job.job_id, mirror.node.uri
        sync = mirror.job.sync
        result = Result(*names, "failed", False, reason, ended_at_s, pause_s=None, sync=sync)
        self.results[disk] = result
        self._keep(disk, result)

    def _ended(self, job: MirrorJob) -> None:
        course = self.courses.pop(job.id)
        if (released := course.released()) is not None:
            self._tell(job.id, course, released)
        failure = job.failure
        if str(failure) == GOES_ON:
            job.log.info("%s", failure)
            return
        kind = "completed" if failure is None else "failed"
        if isinstance(failure, Cancelled):
            kind = "cancelled"
        result = self.results[course.disk] = Result(
            job=job.id,
            target=course.target,
            result=kind,
            pivoted=job.pivoted,
            reason="" if failure is None else str(failure) or (job.error or ""),
            ended_at_s=round(self._time_s(), 3),
            pause_s=job.pause_s,
            sync=job.options.sync,
        )
        self._keep(course.disk, result)
        about: dict[str, object] = {"result": kind, "pivoted": job.pivoted}
        if result.reason:
            about["reason"] = result.reason
        log = job.log.warning if failure is not None else job.log.info
        is_what = target_text(result.sync)
        if job.pivoted:
            text = "pivoted: disk %s is served from %s, before from %s; writes held %.1f ms%s"
            pause_ms = 1000 * (job.pause_s or 0)
            more = f"; {course.target} {is_what}" if is_partial(result.sync) else ""
            log(text, course.disk, course.target, course.source, pause_ms, more, about=about)
        elif kind == "completed":
            text = "ended: %s %s; disk %s is served from %s as before"
            log(text, course.target, is_what, course.disk, course.source, about=about)
        else:
            text = "%s: %s; %s %s; disk %s is served from %s as before"
            point = job.run.last if isinstance(job, PointsJob) and job.run else None
            state = f"is behind its journal, which has point {point.sequence}" if point else ""
            if isinstance(job, SnapshotsJob) and (number := job.acks.last):
                state = f"is of no moment; the last point that was acknowledged is {number}"
            if not state:
                is_untouched = isinstance(failure, (TargetRefused, CommandError))
                state = "was not written to" if is_untouched else "is unusable"
            names = course.target, state, course.disk, course.source
            log(text, kind, result.reason, *names, about=about)
