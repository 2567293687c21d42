"""The metrics, one table, in the names and units of Prometheus: docs/monitoring.md lists them, and
a test compares the two.

A server that does not answer has `nbdmirror_server_up` 0 and nothing else: old numbers are not
given for new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from nbdmirror import __version__
from nbdmirror.web.metric_kinds import Metric, Times
from nbdmirror.web.records import Record, Report, is_well, member, number, records

JOB_STATES = (
    "created", "running", "paused", "ready", "standby", "waiting", "pending", "aborting",
    "concluded",
)  # fmt: skip
RESULTS = ("completed", "cancelled", "failed")
FOLLOWING = ("ready", "waiting", "pending")
"""States of a mirror whose target follows the source."""


def _key(key: str) -> Callable[[Record], float | None]:
    return lambda record: number(record.get(key))


def _is(key: str, *values: object) -> Callable[[Record], float | None]:
    """1 if the key has one of the values; None where there is no such key."""
    return lambda record: float(record[key] in values) if key in record else None


def _numbers(found: Record) -> dict[str, float] | None:
    numbers = {str(key): number(value) for key, value in found.items()}
    return {key: value for key, value in numbers.items() if value is not None and value >= 0}


def _one_of(key: str, values: tuple[str, ...]) -> Callable[[Record], dict[str, float] | None]:
    """A series for each value, of which one is 1."""

    def of(record: Record) -> dict[str, float] | None:
        if key not in record:
            return None
        return {value: float(record[key] == value) for value in values}

    return of


def _state_dir_ok(server: Record) -> float | None:
    if not any(disk.get("lasting") for disk in records(server, "disks")):
        return None
    return float("state-error" not in server)


def _protected(disk: Record) -> float:
    return float(any(map(_follows, records(disk, "jobs"))))


def _follows(job: Record) -> bool:
    return is_well(job) and job.get("status") in FOLLOWING


def _end(job: Record) -> float | None:
    left_s = number(job.get("left-s"))
    return None if left_s is None or job.get("ready") else job["time-s"] + left_s


METRICS: dict[str, tuple[Metric | Times, ...]] = {
    "host": (
        Metric(
            "nbdmirror_build_info",
            "The version of this program.",
            lambda _: {__version__: 1.0},
            "version",
        ),
    ),
    "any server": (
        Metric(
            "nbdmirror_server_up",
            "Whether the server answers (1) or not (0).",
            lambda server: float(not server.get("error")),
        ),
    ),
    "server": (
        Metric(
            "nbdmirror_server_info",
            "The version of the server.",
            lambda server: {str(server.get("package", "")): 1.0},
            "version",
        ),
        Metric(
            "nbdmirror_server_start_time_seconds",
            "When the server started, in seconds since 1970.",
            _key("started-at-s"),
        ),
        Metric(
            "nbdmirror_server_answer_timestamp_seconds",
            "When the server answered last, in seconds since 1970.",
            _key("time-s"),
        ),
        Metric(
            "nbdmirror_state_dir_ok",
            "Whether the state directory can be written (1) or not (0).",
            _state_dir_ok,
        ),
    ),
    "disk": (
        Metric("nbdmirror_disk_size_bytes", "The size of the disk.", _key("size")),
        Metric(
            "nbdmirror_disk_read_only",
            "Whether the server refuses writes of guests (1).",
            _key("read-only"),
        ),
        Metric(
            "nbdmirror_disk_connected",
            "Whether the NBD server of the disk is there (1) or lost (0). A file is always there.",
            _key("connected"),
        ),
        Metric(
            "nbdmirror_disk_file_ok",
            "Whether the file of the disk is as it was opened (1), or was truncated, deleted, moved"
            " or replaced (0).",
            lambda disk: float("problem" not in disk),
        ),
        Metric(
            "nbdmirror_disk_protected",
            "Whether the target of a mirror follows the disk (1).",
            _protected,
        ),
        Metric(
            "nbdmirror_disk_last_job_end_timestamp_seconds",
            "When the last job of the disk ended, in seconds since 1970.",
            lambda disk: number(member(disk, "last-job").get("ended-at-s")),
        ),
        Metric(
            "nbdmirror_disk_last_job_result",
            "How the last job of the disk ended: 1 for that result, 0 for the others.",
            lambda disk: _one_of("result", RESULTS)(member(disk, "last-job")),
            "result",
        ),
        Times(
            "nbdmirror_disk_request_seconds",
            "How long requests of guests took. Of reads and writes one in 251 is timed.",
            "requests",
            "kind",
        ),
        Times(
            "nbdmirror_disk_request_own_seconds",
            "The same requests without what a mirror had them wait.",
            "requests",
            "kind",
            prefix="own-",
        ),
        Times(
            "nbdmirror_disk_held_seconds",
            "How long a mirror had a request of a guest wait; each wait counts.",
            "held",
            "cause",
        ),
    ),
    "job": (
        Metric(
            "nbdmirror_job_state",
            "The state of the job: 1 for that state, 0 for the others.",
            _one_of("status", JOB_STATES),
            "state",
        ),
        Metric(
            "nbdmirror_job_lag_seconds",
            "The age, at most, of the oldest answered write that is not on the target's storage;"
            " from READY on.",
            _key("lag-s"),
        ),
        Metric(
            "nbdmirror_job_length_bytes",
            "The bytes that the job has copied, and those that are left.",
            _key("len"),
        ),
        Metric("nbdmirror_job_offset_bytes", "The bytes that the job has copied.", _key("offset")),
        Metric(
            "nbdmirror_job_dirty_bytes",
            "The bytes that differ, or may differ, and are not being copied yet.",
            _key("dirty-bytes"),
        ),
        Metric(
            "nbdmirror_job_inflight_bytes",
            "The bytes that are being copied.",
            _key("in-flight-bytes"),
        ),
        Metric(
            "nbdmirror_job_unflushed_bytes",
            "The bytes that the target has received, or is receiving, since its last flush.",
            _key("unflushed-bytes"),
        ),
        Metric(
            "nbdmirror_job_copied_bytes_total",
            "The bytes that were copied, zeroes included.",
            _key("copied-bytes"),
        ),
        Metric(
            "nbdmirror_job_written_bytes_total",
            "The data that was sent to the target, without zeroes.",
            _key("written-bytes"),
        ),
        Metric(
            "nbdmirror_job_sent_bytes_total",
            "The data that was sent to the target since the job was ready.",
            _key("sent-bytes"),
        ),
        Metric(
            "nbdmirror_job_dirtied_bytes_total",
            "The bytes that guests have written since the job was ready.",
            _key("changed-bytes"),
        ),
        Metric(
            "nbdmirror_job_again_bytes_total",
            "The bytes that became dirty because a lost server may have lost them.",
            _key("again-bytes"),
        ),
        Metric(
            "nbdmirror_job_copy_rate_bytes",
            "The data copied per second, over the last five seconds.",
            _key("copy-bytes-per-s"),
        ),
        Metric(
            "nbdmirror_job_dirty_rate_bytes",
            "The bytes that guests make dirty per second, over the last five seconds.",
            _key("dirty-bytes-per-s"),
        ),
        Metric(
            "nbdmirror_job_speed_limit_bytes",
            "The bytes that the job may copy per second; 0: no limit.",
            _key("speed"),
        ),
        Metric(
            "nbdmirror_job_end_timestamp_seconds",
            "When the copy ends at the present rates, in seconds since 1970; only before READY.",
            _end,
        ),
        Metric(
            "nbdmirror_job_converging",
            "Whether the copy keeps up with the guest (1), or falls behind (0).",
            _is("falling-behind", False),
        ),
        Metric(
            "nbdmirror_job_actively_synced",
            "Whether each write of a guest is on the target when it is answered (1).",
            _key("actively-synced"),
        ),
        Metric(
            "nbdmirror_job_target_connected",
            "Whether the target is there (1) or lost (0).",
            _key("target-connected"),
        ),
        Metric(
            "nbdmirror_job_io_ok",
            "Whether the job runs (1), or was stopped by an error (0).",
            _is("io-status", "ok"),
        ),
        Metric(
            "nbdmirror_job_waiting_seconds_total",
            "The time of the job by what it was spent on; the rate is the share.",
            lambda job: _numbers(member(member(job, "waits"), "seconds")),
            "cause",
        ),
        Metric(
            "nbdmirror_job_quiesce_timeouts_total",
            "How often guests were held in vain at the end of the job.",
            _key("quiesce-timeouts"),
        ),
    ),
}
"""Level -> what there is of this process, of each server, of each one that answers, of each disk,
of each job."""


def rendered(reports: Iterable[Report], accept: str) -> tuple[bytes, str]:
    """The metrics in the format that the client accepts, and that format's content type."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Reports(reports))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _Reports(Collector):
    def __init__(self, reports: Iterable[Report]) -> None:
        self._reports = list(reports)

    def describe(self) -> list[Family]:
        return []

    def collect(self) -> Iterator[Family]:
        for level, metrics in METRICS.items():
            found = dict(self._records(level))  # a name that is there twice is one series
            for metric in metrics:
                family = metric.family(level)
                for labels, record in found.items():
                    metric.add(family, labels, record)
                yield family

    def _records(self, level: str) -> Iterator[tuple[tuple[str, ...], Record]]:
        """What there is of a level, each with the values of its labels."""
        if level == "host":
            yield (), {}
        for report in self._reports:
            time = {"time-s": report.time_s}
            if level == "any server":
                yield (report.socket,), report.as_json
            elif level == "server" and not report.error:
                yield (report.socket,), report.status | time
            for disk in report.disks:
                if level == "disk":
                    yield (report.socket, str(disk.get("name", ""))), disk
                for key, job in report.jobs(disk) if level == "job" else ():
                    yield key, job | time
