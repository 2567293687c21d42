"""Chronicle: the history of mirrors, and their log lines: how fast they are, how long they have
waited for something, and how the last mirror of each disk ended.

On the event loop's thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from nbdmirror.amounts import size
from nbdmirror.event_loop import Loop
from nbdmirror.events import EventRing
from nbdmirror.mirror.deadline import Deadline, Kept
from nbdmirror.mirror.failure import Cancelled, JobError
from nbdmirror.mirror.job_states import JobStatus
from nbdmirror.mirror.ladder import Rung, Situation, Step, next_step
from nbdmirror.mirror.mirror_job import MirrorJob
from nbdmirror.mirror.options import CopyMode, Ending
from nbdmirror.mirror.outlook import Prediction
from nbdmirror.mirror.points_job import PointsJob
from nbdmirror.mirror.snapshots_job import SnapshotsJob
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.rates import Meter, Rates, Sample
from nbdmirror.state.job_results import Result

LOOK_S = 1.0

FarSide = Callable[[], Sequence[NbdDevice]]
"""Returns the target, and the journal if there is one."""


NEEDED, NEEDED_S = 3.0, 30.0
"""With a throttle a copy takes at most so many times as long as without guests, and so much more
until the throttle is taken."""

SERVER_ENDS = "the server ended"
GOES_ON = "the server ended; the mirror continues when the server starts again"
"""Why jobs are cancelled at the end of a server; GOES_ON with a state directory."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A lost target that is being reconnected."""

    since_s: float
    until_s: float
    """Infinite: without a limit. Both times are of the loop's clock."""
    target: str


class Silence:
    """For how long none of an export's requests in flight was answered."""

    def __init__(self) -> None:
        self._pending: frozenset[object] = frozenset()
        self._since_s = 0.0

    def look(self, pending: frozenset[object], now_s: float) -> None:
        """`pending`: the requests in flight."""
        if not pending or self._pending - pending:
            self._since_s = now_s
        self._pending = pending

    def time_s(self, now_s: float) -> float:
        return now_s - self._since_s if self._pending else 0.0


class Course:
    """Observations of one job while it runs."""

    def __init__(
        self,
        job: MirrorJob,
        clock: Callable[[], float],
        time_s: Callable[[], float],
        far_side: FarSide,
    ) -> None:
        """`time_s` returns seconds since 1970."""
        self.lost: Lost | None = None
        self.disk = job.disk.name
        self.target = job.target.description
        self.source = job.disk.source.description
        self.log = job.log
        self.deadline = Deadline(job, clock, time_s)
        self._job = job
        self._mode = job.options.copy_mode
        self._clock = clock
        self._meter = Meter()
        self._ending_since_s: float | None = None
        self._answers: tuple[int, ...] = ()
        self._answered_s = clock()
        self._far_side = far_side
        self._silences: dict[str, Silence] = {}
        self._error: JobError | None = None
        self._error_s = 0.0
        self._cost = job.disk.ledger.latency.cost
        self._late_since_s: float | None = None
        self._throttled_since_s: float | None = None
        """Since when there is a throttle, as was told; None: there is none."""
        self._blocked_since_s: float | None = None
        """The same of writes to what is hot, which wait for the target."""

    def take(self, step: Step) -> None:
        """Do it; the caller says why."""
        if step.rung is Rung.WRITE_BLOCKING:
            self._job.throttle.release("guests wait for the target from now on")
            if step.hot_bytes:
                self._job.mode.turn(synchronous=True, hot=self._job.copier.hot.found.copy())
                self._blocked_since_s = self._clock()
            else:
                self._mode, self._blocked_since_s = CopyMode.WRITE_BLOCKING, None
                self._job.change(self._mode)
        elif step.bytes_per_s is None:
            self._job.throttle.release(step.reason)
            self._throttled_since_s = None
        else:
            self._job.throttle.limit(step.bytes_per_s)
            if self._throttled_since_s is None:
                self._throttled_since_s = self._clock()

    def released(self) -> Step | None:
        """The job has released its throttle, or the writes that waited for the target, by itself,
        since the last call."""
        throttle = self._job.throttle
        if self._blocked_since_s is not None and self._job.mode.hot_bytes is None:
            self._blocked_since_s = None
            if self._job.options.copy_mode is not CopyMode.WRITE_BLOCKING:
                return Step(Rung.WRITE_BLOCKING, "the job was changed, or has stopped", hot_bytes=0)
        if self._throttled_since_s is None or throttle.bytes_per_s is not None:
            return None
        self._throttled_since_s = None
        return Step(Rung.THROTTLE, throttle.why_released)

    @property
    def throttle(self) -> float | None:
        """How many bytes guests may make dirty in a second; None: as many as they like."""
        return self._job.throttle.bytes_per_s

    def look(self) -> None:
        """Update the observations. Called about once a second."""
        now_s, job = self._clock(), self._job
        job.waits.look()
        if job.is_ready:
            job.pivot_pause.look()
        if job.ending is Ending.NONE:
            self._ending_since_s = None
        elif self._ending_since_s is None:
            self._ending_since_s = now_s
        answers = job.copier.answers, job.copier.copied_bytes, job.tracker.written_bytes
        if answers != self._answers or not self._waits_for("read") | self._waits_for("write"):
            self._answers, self._answered_s = answers, now_s
        for device in self._far_side():
            silence = self._silences.setdefault(device.description, Silence())
            silence.look(device.pool.shared.pending, now_s)
        if job.options.copy_mode is not self._mode:
            self._mode = job.options.copy_mode
            job.log.info("copy mode %s", job.options.copy_mode)
        if job.last_error is not self._error:
            self._error, self._error_s = job.last_error, now_s
        self._late_since_s = (self._late_since_s or now_s) if self._is_late else None
        if job.copier.is_running:
            self._meter.add(self._sample())
        else:
            self._meter.start_over()

    @property
    def rates(self) -> Rates | None:
        """None while nothing is copied, and before enough is known."""
        return self._meter.rates(self._sample()) if self._job.copier.is_running else None

    @property
    def prediction(self) -> Prediction | None:
        """When the job will be READY; None if it is, and if nothing is known."""
        job = self._job
        if job.is_ready or not job.copier.is_running:
            return None
        return job.watch.outlook.predict(self._clock())

    @property
    def kept(self) -> Kept:
        """Whether the deadline can be kept; for a job that has one."""
        is_copying = self.lost is None and self._job.copier.is_running
        return self.deadline.kept(self.prediction, is_copying=is_copying)

    @property
    def step(self) -> Step | None:
        """What is to be done now to bring the job to its end."""
        job = self._job
        if not job.options.may:
            return None  # nothing is allowed
        if self.lost is not None or not job.copier.is_running or job.has_done_its_work:
            return None
        prediction = self.prediction
        is_in_vain = job.status is JobStatus.READY and job.pivot_pause.is_copy_too_long
        now_s, rates = self._clock(), self.rates
        rate = job.watch.outlook.rate or (rates.copy_bytes_per_s if rates is not None else None)
        late_since_s, throttled_since_s = self._late_since_s, self._throttled_since_s
        blocked_since_s = self._blocked_since_s
        return next_step(
            job.options,
            Situation(
                is_ready=job.is_ready,
                never=prediction is not None and prediction.never,
                pivot_waits_s=self.ending_for_s if is_in_vain else 0.0,
                is_ending=job.ending is not Ending.NONE,
                late_s=0.0 if late_since_s is None else now_s - late_since_s,
                deadline_left_s=self.deadline.left_s,
                bytes_per_s=rate,
                left_bytes=job.tracker.remaining_bytes,
                throttle=self.throttle,
                throttled_s=0.0 if throttled_since_s is None else now_s - throttled_since_s,
                hot_bytes=job.copier.hot.found.size,
                disk_bytes=job.disk.size,
                blocked_s=None if blocked_since_s is None else now_s - blocked_since_s,
            ),
        )

    @property
    def _is_late(self) -> bool:
        """The deadline will be missed if nothing is done. Where no end is predicted, it is
        waited for until little more time is left than a copy with a throttle takes."""
        job, left_s = self._job, self.deadline.left_s
        if left_s is None or (prediction := self.prediction) is None:
            return False
        if prediction.end_s is not None:
            return prediction.end_s > left_s
        rate = job.watch.outlook.rate
        if not rate:
            return False
        return left_s <= NEEDED * job.tracker.remaining_bytes / rate + NEEDED_S

    @property
    def guests_wait_share(self) -> float | None:
        """The part of the time of guests' changes since the job began that they have waited for
        it; None: not known."""
        return self._job.disk.ledger.latency.cost.share_since(self._cost)

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
        now_s = self._clock()
        if operation == "write" and not self._job.copier.is_running:  # points, or a reconnect
            times_s = [silence.time_s(now_s) for silence in self._silences.values()]
            return max((time_s for time_s in times_s if time_s >= LOOK_S), default=0.0)
        silent_s = now_s - self._answered_s
        return silent_s if silent_s >= LOOK_S and self._waits_for(operation) else 0.0

    def _waits_for(self, operation: str) -> bool:
        """Whether a request waits. A wait for the target hides a wait for the source."""
        copier, waits = self._job.copier, self._job.waits
        is_synchronous = not copier.in_flight and self._job.tracker.in_flight_bytes > 0
        is_writing = waits.is_at_target or is_synchronous
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
            traffic=job.traffic.since_ready if job.traffic is not None else None,
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

    def begin(self, job: MirrorJob, far_side: FarSide = tuple) -> None:
        """Observe a job from its start to its end."""
        course = self.courses[job.id] = Course(job, self._loop.clock, self._time_s, far_side)
        job.when_ended(partial(self._ended, job))
        names = course.disk, course.source, course.target
        text = "mirrors disk %s (%s) to %s, sync %s, %s"
        job.log.info(text, *names, job.options.sync, job.options.copy_mode)
        if not self._is_looking:
            self._is_looking = True
            self._look()

    def _look(self) -> None:
        self._is_looking = bool(self.courses)
        for job_id, course in self.courses.items():
            course.look()
            if (released := course.released()) is not None:
                self._tell(job_id, course, released)
            if (step := course.step) is not None:
                course.take(step)
                self._tell(job_id, course, step)
            self._look_at_deadline(job_id, course)
        if self._is_looking:
            self._loop.call_later(LOOK_S, self._look)

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

    def _look_at_deadline(self, job_id: str, course: Course) -> None:
        if (passed := course.deadline.look()) is None:
            return
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
        )
        self._keep(course.disk, result)
        about: dict[str, object] = {"result": kind, "pivoted": job.pivoted}
        if result.reason:
            about["reason"] = result.reason
        log = job.log.warning if failure is not None else job.log.info
        if job.pivoted:
            text = "pivoted: disk %s is served from %s, before from %s; writes held %.1f ms"
            pause_ms = 1000 * (job.pause_s or 0)
            log(text, course.disk, course.target, course.source, pause_ms, about=about)
        elif kind == "completed":
            text = "ended: %s is a copy; disk %s is served from %s as before"
            log(text, course.target, course.disk, course.source, about=about)
        else:
            text = "%s: %s; %s %s; disk %s is served from %s as before"
            point = job.run.last if isinstance(job, PointsJob) and job.run else None
            state = f"is behind its journal, which has point {point.sequence}" if point else ""
            if isinstance(job, SnapshotsJob) and (number := job.acks.last):
                state = f"is of no moment; the last point that was acknowledged is {number}"
            names = course.target, state or "is unusable", course.disk, course.source
            log(text, kind, result.reason, *names, about=about)
