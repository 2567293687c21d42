"""Course: what is observed of one mirror while it runs: how fast it is, for how long it has waited
for something, and what is to be done to bring it to its end.

On the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nbdmirror.mirror.deadline import Deadline, Kept
from nbdmirror.mirror.failure import JobError
from nbdmirror.mirror.job_states import JobStatus
from nbdmirror.mirror.ladder import Rung, Situation, Step, next_step
from nbdmirror.mirror.mirror_job import MirrorJob
from nbdmirror.mirror.options import CopyMode, Ending
from nbdmirror.mirror.outlook import Prediction
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.rates import Meter, Rates, Sample

LOOK_S = 1.0

FarSide = Callable[[], Sequence[NbdDevice]]
"""Returns the target, and the journal if there is one."""


NEEDED, NEEDED_S = 3.0, 30.0
"""With a throttle a copy takes at most so many times as long as without guests, and so much more
until the throttle is taken."""


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
        self._of_points = False
        """The meter's samples are."""
        self._ending_since_s: float | None = None
        self._answers: tuple[int, ...] = ()
        self._answered_s = clock()
        self.far_side = far_side
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
        if job.was_ready:
            job.pivot_pause.look()
        if job.ending is Ending.NONE:
            self._ending_since_s = None
        elif self._ending_since_s is None:
            self._ending_since_s = now_s
        copier, waits = job.copier, job.waits
        answers = copier.answers, copier.copied_bytes, job.tracker.written_bytes, waits.answers
        if answers != self._answers or not self._waits_for:
            self._answers, self._answered_s = answers, now_s
        for device in self.far_side():
            silence = self._silences.setdefault(device.description, Silence())
            silence.look(device.pool.shared.pending, now_s)
        if job.options.copy_mode is not self._mode:
            self._mode = job.options.copy_mode
            job.log.info("copy mode %s", job.options.copy_mode)
        if job.last_error is not self._error:
            self._error, self._error_s = job.last_error, now_s
        self._late_since_s = (self._late_since_s or now_s) if self._is_late else None
        if job.makes_points is not self._of_points or not self._is_sending:
            self._of_points = job.makes_points
            self._meter.start_over()
        if self._is_sending:
            self._meter.add(self._sample())

    @property
    def _is_sending(self) -> bool:
        return self._job.copier.is_running or self._job.makes_points

    @property
    def rates(self) -> Rates | None:
        """None while nothing is sent, and before enough is known."""
        is_known = self._is_sending and self._job.makes_points is self._of_points
        return self._meter.rates(self._sample()) if is_known else None

    @property
    def prediction(self) -> Prediction | None:
        """When the job will be READY; None if it was, and if nothing is known."""
        job = self._job
        if job.status is not JobStatus.RUNNING or not job.copier.is_running:
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
        if job.disk.ledger.gate is not None:
            return None  # guests are held, until their requests in progress have ended
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
        return silent_s if silent_s >= LOOK_S and self._waits_for == operation else 0.0

    @property
    def _waits_for(self) -> str:
        """What waits for an answer: "read", "write"; "": nothing. A wait for the target hides a
        wait for the source."""
        copier, waits = self._job.copier, self._job.waits
        if waits.is_at_target:
            return "write"
        if copier.in_flight:
            return "read"
        if self._job.tracker.in_flight_bytes:
            return "write"  # a synchronous one
        return "read" if waits.is_at_source else ""

    def _sample(self) -> Sample:
        job, tracker = self._job, self._job.tracker
        traffic = job.traffic.since_ready if job.traffic is not None else None
        if job.makes_points:  # what is left waits for its point: it does not say who is faster
            return Sample(self._clock(), 0, 0, 0, 0, 0, traffic)
        return Sample(
            time_s=self._clock(),
            offset=job.offset,
            data=job.copier.written_bytes + job.copier.spared_bytes + tracker.written_bytes,
            left=job.tracker.remaining_bytes,
            in_flight=tracker.in_flight_bytes,
            again=tracker.again_bytes,
            traffic=traffic,
        )
