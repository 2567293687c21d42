"""The metrics of jobs."""

from __future__ import annotations

from collections.abc import Callable

from nbdmirror.web.metric_kinds import Metric, is_one_of, key, numbers, one_of
from nbdmirror.web.records import Record, member, number

JOB_STATES = (
    "created", "running", "paused", "ready", "standby", "waiting", "pending", "aborting",
    "concluded",
)  # fmt: skip
OUTLOOKS = ("can-be-kept", "may-be-missed", "cannot-be-kept", "not-known", "passed")
"""Of a deadline."""


def _end(job: Record) -> float | None:
    left_s = number(job.get("left-s"))
    return None if left_s is None or job.get("ready") else job["time-s"] + left_s


def _lag(job: Record) -> float | None:
    """The server's lag is of when the server was asked. Now it may be as much larger as that is
    ago."""
    lag_s, age_s = number(job.get("lag-s")), number(job.get("age-s"))
    return None if lag_s is None else lag_s + (age_s or 0.0)


def _moment(name: str) -> Callable[[Record], float | None]:
    """A moment that is so many seconds from the answer."""

    def of(job: Record) -> float | None:
        left_s = number(job.get(name))
        return None if left_s is None else job["time-s"] + left_s

    return of


def _milliseconds(name: str) -> Callable[[Record], float | None]:
    def of(job: Record) -> float | None:
        milliseconds = number(job.get(name))
        return None if milliseconds is None else milliseconds / 1000

    return of


def _of_points(name: str) -> Callable[[Record], float | None]:
    return lambda job: number(member(job, "x-nbdmirror-points").get(name))


JOB_METRICS: tuple[Metric, ...] = (
    Metric(
        "nbdmirror_job_state",
        "The state of the job: 1 for that state, 0 for the others.",
        one_of("status", JOB_STATES),
        "state",
    ),
    Metric(
        "nbdmirror_job_lag_seconds",
        "The age, at most, of the oldest answered write that is not on the target's storage at the"
        " moment of the scrape; from READY on.",
        _lag,
    ),
    Metric(
        "nbdmirror_job_length_bytes",
        "The bytes that the job has copied, and those that are left.",
        key("len"),
    ),
    Metric("nbdmirror_job_offset_bytes", "The bytes that the job has copied.", key("offset")),
    Metric(
        "nbdmirror_job_dirty_bytes",
        "The bytes that differ, or may differ, and are not being copied yet.",
        key("dirty-bytes"),
    ),
    Metric(
        "nbdmirror_job_inflight_bytes",
        "The bytes that are being copied.",
        key("in-flight-bytes"),
    ),
    Metric(
        "nbdmirror_job_unflushed_bytes",
        "The bytes that the target has received, or is receiving, since its last flush.",
        key("unflushed-bytes"),
    ),
    Metric(
        "nbdmirror_job_copied_bytes_total",
        "The bytes that were copied, zeroes included.",
        key("copied-bytes"),
    ),
    Metric(
        "nbdmirror_job_written_bytes_total",
        "The data that was sent to the target, without zeroes.",
        key("written-bytes"),
    ),
    Metric(
        "nbdmirror_job_sent_bytes_total",
        "The data that was sent to the target since the job was ready.",
        key("sent-bytes"),
    ),
    Metric(
        "nbdmirror_job_dirtied_bytes_total",
        "The bytes that guests have written since the job was ready.",
        key("changed-bytes"),
    ),
    Metric(
        "nbdmirror_job_again_bytes_total",
        "The bytes that became dirty because a lost server may have lost them.",
        key("again-bytes"),
    ),
    Metric(
        "nbdmirror_job_copy_rate_bytes",
        "The data copied per second, over the last five seconds.",
        key("copy-bytes-per-s"),
    ),
    Metric(
        "nbdmirror_job_dirty_rate_bytes",
        "The bytes that guests make dirty per second, over the last five seconds.",
        key("dirty-bytes-per-s"),
    ),
    Metric(
        "nbdmirror_job_speed_limit_bytes",
        "The bytes that the job may copy per second; 0: no limit.",
        key("speed"),
    ),
    Metric(
        "nbdmirror_job_end_timestamp_seconds",
        "When the copy ends at the present rates, in seconds since 1970; only before READY.",
        _end,
    ),
    Metric(
        "nbdmirror_job_converging",
        "Whether the copy keeps up with the guest (1), or falls behind (0).",
        is_one_of("falling-behind", False),
    ),
    Metric(
        "nbdmirror_job_actively_synced",
        "Whether each write of a guest is on the target when it is answered (1).",
        key("actively-synced"),
    ),
    Metric(
        "nbdmirror_job_target_connected",
        "Whether the target is there (1) or lost (0).",
        key("target-connected"),
    ),
    Metric(
        "nbdmirror_job_journal_connected",
        "Whether the journal is there (1) or lost (0).",
        key("journal-connected"),
    ),
    Metric(
        "nbdmirror_job_io_ok",
        "Whether the job runs (1), or was stopped by an error (0).",
        is_one_of("io-status", "ok"),
    ),
    Metric(
        "nbdmirror_job_waiting_seconds_total",
        "The time of the job by what it was spent on; the rate is the share.",
        lambda job: numbers(member(member(job, "waits"), "seconds")),
        "cause",
    ),
    Metric(
        "nbdmirror_job_quiesce_timeouts_total",
        "How often guests were held in vain at the end of the job.",
        key("quiesce-timeouts"),
    ),
    Metric(
        "nbdmirror_job_end_earliest_timestamp_seconds",
        "When the copy ends at the earliest, as predicted, in seconds since 1970.",
        _moment("left-s-min"),
    ),
    Metric(
        "nbdmirror_job_end_latest_timestamp_seconds",
        "When the copy ends at the latest, as predicted, in seconds since 1970.",
        _moment("left-s-max"),
    ),
    Metric(
        "nbdmirror_job_deadline_timestamp_seconds",
        "Until when the job is to have ended, in seconds since 1970.",
        lambda job: key("at-s")(member(job, "x-nbdmirror-deadline")),
    ),
    Metric(
        "nbdmirror_job_deadline_outlook",
        "Whether the deadline is kept: 1 for what is so, 0 for the others.",
        lambda job: one_of("outlook", OUTLOOKS)(member(job, "x-nbdmirror-deadline")),
        "outlook",
    ),
    Metric(
        "nbdmirror_job_pause_predicted_seconds",
        "How long a pivot would hold guests' writes now; from READY on.",
        _milliseconds("pause-predicted-ms"),
    ),
    Metric(
        "nbdmirror_job_pause_limit_seconds",
        "How long a pivot may hold guests' writes, where the user has said that.",
        _milliseconds("max-pause-ms"),
    ),
    Metric(
        "nbdmirror_job_throttle_bytes",
        "The bytes that guests may change per second, while they are throttled.",
        key("throttle-bytes-per-s"),
    ),
    Metric(
        "nbdmirror_job_rpo_seconds",
        "The lag that was promised, with copy mode points.",
        _of_points("rpo-s"),
    ),
    Metric(
        "nbdmirror_job_point_sequence",
        "The number of the last point.",
        _of_points("sequence"),
    ),
    Metric(
        "nbdmirror_job_point_timestamp_seconds",
        "The moment of the last point, in seconds since 1970.",
        _of_points("time-s"),
    ),
    Metric(
        "nbdmirror_job_points",
        "How many points can be recovered.",
        _of_points("points"),
    ),
    Metric(
        "nbdmirror_job_points_reach_seconds",
        "How far back the points reach.",
        _of_points("reaches-s"),
    ),
    Metric(
        "nbdmirror_job_points_kept",
        "Whether the points reach back as far as was asked for (1) or not (0).",
        _of_points("kept"),
    ),
    Metric(
        "nbdmirror_job_late_cuts_total",
        "Moments of points that were given up, since requests of guests took too long.",
        _of_points("late-cuts"),
    ),
    Metric(
        "nbdmirror_job_journal_size_bytes",
        "The room of the journal.",
        _of_points("journal-bytes"),
    ),
    Metric(
        "nbdmirror_job_journal_used_bytes",
        "What points take of the journal.",
        _of_points("journal-used-bytes"),
    ),
    Metric(
        "nbdmirror_job_journal_lasts_seconds",
        "How long an outage of the far side may last until the next point does not fit into the"
        " journal.",
        _of_points("journal-lasts-s"),
    ),
    Metric(
        "nbdmirror_job_journal_enough",
        "Whether points take less than half of the journal (1) or not (0).",
        _of_points("journal-enough"),
    ),
    Metric(
        "nbdmirror_job_applier_silent_seconds",
        "For how long `nbdmirror apply`, which makes the image a point now, has given no sign of"
        " life.",
        _of_points("applier-silent-s"),
    ),
    Metric(
        "nbdmirror_job_in_place_timestamp_seconds",
        "Since when there is no point, since the image is copied in place; seconds since 1970.",
        _of_points("in-place-since-s"),
    ),
)
