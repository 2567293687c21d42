"""The metrics, one table, in the names and units of Prometheus: docs/monitoring.md lists them, and
a test compares the two.

A server that does not answer has `nbdmirror_server_up` 0 and nothing else: old numbers are not
given for new ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from nbdmirror import __version__
from nbdmirror.web.job_metrics import JOB_METRICS
from nbdmirror.web.metric_kinds import Metric, Times, key, one_of
from nbdmirror.web.records import Record, Report, is_well, member, number, records

RESULTS = ("completed", "cancelled", "failed")
FOLLOWING = ("ready", "waiting", "pending")
"""States of a mirror whose target follows the source."""


def _state_dir_ok(server: Record) -> float | None:
    if not any(disk.get("lasting") for disk in records(server, "disks")):
        return None
    return float("state-error" not in server)


def _protected(disk: Record) -> float:
    return float(any(map(_follows, records(disk, "jobs"))))


def _follows(job: Record) -> bool:
    return is_well(job) and job.get("status") in FOLLOWING


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
            key("started-at-s"),
        ),
        Metric(
            "nbdmirror_server_answer_timestamp_seconds",
            "When the server answered last, in seconds since 1970.",
            key("time-s"),
        ),
        Metric(
            "nbdmirror_state_dir_ok",
            "Whether the state directory can be written (1) or not (0).",
            _state_dir_ok,
        ),
    ),
    "disk": (
        Metric("nbdmirror_disk_size_bytes", "The size of the disk.", key("size")),
        Metric(
            "nbdmirror_disk_read_only",
            "Whether the server refuses writes of guests (1).",
            key("read-only"),
        ),
        Metric(
            "nbdmirror_disk_connected",
            "Whether the NBD server of the disk is there (1) or lost (0). A file is always there.",
            key("connected"),
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
            lambda disk: one_of("result", RESULTS)(member(disk, "last-job")),
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
    "job": JOB_METRICS,
}
"""Level -> what there is of this process, of each server, of each one that answers, of each disk,
of each job."""


def rendered(reports: Iterable[Report], accept: str, now_s: float) -> tuple[bytes, str]:
    """The metrics in the format that the client accepts, and that format's content type. `now_s`:
    by the clock of Report.asked_s."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Reports(reports, now_s))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _Reports(Collector):
    def __init__(self, reports: Iterable[Report], now_s: float) -> None:
        self._reports = list(reports)
        self._now_s = now_s

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
            time = {"time-s": report.time_s, **report.age(self._now_s)}
            if level == "any server":
                yield (report.socket,), report.as_json
            elif level == "server" and not report.error:
                yield (report.socket,), report.status | time
            for disk in report.disks:
                if level == "disk":
                    yield (report.socket, str(disk.get("name", ""))), disk
                for labels, job in report.jobs(disk) if level == "job" else ():
                    yield labels, job | time
