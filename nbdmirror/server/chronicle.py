"""Chronicle: the history of mirrors, and their log lines: how fast they are, how long they have
waited for something, and how the last mirror of each disk ended.

On the event loop's thread.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from nbdmirror.event_loop import Loop
from nbdmirror.events import EventRing
from nbdmirror.mirror.job import Cancelled, JobError
from nbdmirror.mirror.mirror_job import MirrorJob
from nbdmirror.mirror.options import Ending
from nbdmirror.rates import Meter, Rates, Sample
from nbdmirror.state.job_results import Result

log = logging.getLogger(__name__)

LOOK_S = 1.0


SERVER_ENDS = "the server ended"
GOES_ON = "the server ended; the mirror continues when the server starts again"
"""Why jobs are cancelled at the end of a server; GOES_ON with a state directory."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A lost target that is being reconnected."""

    since_s: float
    until_s: float
    """Infinite: without a limit. Both times are of the loop's clock."""


class Course:
    """Observations of one job while it runs."""

    def __init__(self, job: MirrorJob, clock: Callable[[], float]) -> None:
        self.lost: Lost | None = None
        self.disk = job.disk.name
        self.target = job.target.description
        self.source = job.disk.source.description
        self._job = job
        self._mode = job.options.copy_mode
        self._clock = clock
        self._meter = Meter()
        self._ending_since_s: float | None = None
        self._answers: tuple[int, ...] = ()
        self._answered_s = clock()
        self._error: JobError | None = None
        self._error_s = 0.0

    def look(self) -> None:
        """Update the observations. Called about once a second."""
        now_s, job = self._clock(), self._job
        if job.ending is Ending.NONE:
            self._ending_since_s = None
        elif self._ending_since_s is None:
            self._ending_since_s = now_s
        answers = job.copier.answers, job.copier.copied_bytes, job.tracker.written_bytes
        if answers != self._answers or not self._waits_for("read") | self._waits_for("write"):
            self._answers, self._answered_s = answers, now_s
        if job.options.copy_mode is not self._mode:
            self._mode = job.options.copy_mode
            log.info("job %s: copy mode %s", job.id, job.options.copy_mode)
        if job.last_error is not self._error:
            self._error, self._error_s = job.last_error, now_s
        if job.copier.is_running:
            self._meter.add(self._sample())
        else:
            self._meter.start_over()

    @property
    def rates(self) -> Rates | None:
        """None while nothing is copied, and before enough is known."""
        return self._meter.rates(self._sample()) if self._job.copier.is_running else None

    @property
    def ending_for_s(self) -> float:
        """Seconds since the ending was requested; exact to LOOK_S."""
        since_s = self._ending_since_s
        return 0.0 if since_s is None else self._clock() - since_s

    @property
    def error_ago_s(self) -> float:
        """Seconds since the last error; exact to LOOK_S."""
        return self._clock() - self._error_s if self._job.last_error is self._error else 0.0

    def silent_for_s(self, operation: str) -> float:
        """Seconds that requests have waited for an answer: of the source ("read") or of the target
        ("write"); exact to LOOK_S, 0 if no request waits."""
        silent_s = self._clock() - self._answered_s
        return silent_s if silent_s >= LOOK_S and self._waits_for(operation) else 0.0

    def _waits_for(self, operation: str) -> bool:
        """Whether a request waits. A wait for the target hides a wait for the source."""
        copier, tracker = self._job.copier, self._job.tracker
        is_writing = copier.is_writing or (not copier.in_flight and tracker.in_flight_bytes > 0)
        return is_writing if operation == "write" else copier.in_flight > 0 and not is_writing

    def _sample(self) -> Sample:
        job, tracker = self._job, self._job.tracker
        return Sample(
            time_s=self._clock(),
            offset=job.offset,
            data=job.copier.written_bytes + job.copier.spared_bytes + tracker.written_bytes,
            left=job.tracker.remaining_bytes,
            in_flight=tracker.in_flight_bytes,
            again=tracker.again_bytes,
        )


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

    def begin(self, job: MirrorJob) -> None:
        """Observe a job from its start to its end."""
        course = self.courses[job.id] = Course(job, self._loop.clock)
        job.when_ended(partial(self._ended, job))
        log.info(
            "job %s: mirrors disk %s (%s) to %s, sync %s, %s",
            *(job.id, course.disk, course.source, course.target),
            *(job.options.sync, job.options.copy_mode),
        )
        if not self._is_looking:
            self._is_looking = True
            self._look()

    def _look(self) -> None:
        self._is_looking = bool(self.courses)
        for course in self.courses.values():
            course.look()
        if self._is_looking:
            self._loop.call_later(LOOK_S, self._look)

    def target_lost(self, job_id: str, reconnect_timeout_s: float) -> None:
        """The job's target is lost. The job reconnects for `reconnect_timeout_s` from now on, also
        if the target was lost already."""
        course, now_s = self.courses[job_id], self._loop.clock()
        before, course.lost = course.lost, Lost(now_s, now_s + reconnect_timeout_s)
        if before is not None:
            course.lost = Lost(before.since_s, now_s + reconnect_timeout_s)
            return
        data: dict[str, object] = {"device": course.disk, "id": job_id, "target": course.target}
        if math.isfinite(reconnect_timeout_s):
            data["wait-s"] = float(reconnect_timeout_s)
        how_long = (
            f"for {reconnect_timeout_s:g} s"
            if math.isfinite(reconnect_timeout_s)
            else "without a limit"
        )
        log.warning("job %s: target %s is lost: reconnecting %s", job_id, course.target, how_long)
        self._events.append("X_NBDMIRROR_TARGET_LOST", data)

    def target_waited_for(self, job_id: str, *, is_back: bool) -> None:
        """The job does not wait for its lost target any more. `is_back`: the target is
        reconnected."""
        course = self.courses[job_id]
        lost, course.lost = course.lost, None
        if is_back and lost is not None:
            lost_s = round(self._loop.clock() - lost.since_s, 3)
            log.info("job %s: target %s is back after %g s", job_id, course.target, lost_s)
            data = {"device": course.disk, "id": job_id, "lost-for-s": lost_s}
            self._events.append("X_NBDMIRROR_TARGET_BACK", data)

    def _ended(self, job: MirrorJob) -> None:
        course = self.courses.pop(job.id)
        failure = job.failure
        if str(failure) == GOES_ON:
            log.info("job %s: %s", job.id, failure)
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
        )
        self._keep(course.disk, result)
        if job.pivoted:
            text = "job %s: pivoted: disk %s is served from %s, before from %s; writes held %.1f ms"
            pause_ms = 1000 * (job.pause_s or 0)
            log.info(text, job.id, course.disk, course.target, course.source, pause_ms)
        elif kind == "completed":
            text = "job %s: ended: %s is a copy; disk %s is served from %s as before"
            log.info(text, job.id, course.target, course.disk, course.source)
        else:
            text = "job %s: %s: %s; %s is unusable; disk %s is served from %s as before"
            names = course.target, course.disk, course.source
            log.warning(text, job.id, kind, result.reason, *names)
