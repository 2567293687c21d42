"""The metrics: as Prometheus wants them, whatever a server says."""

from __future__ import annotations

import re
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse
from support.in_parts import given_in_parts
from support.madeservers import JOB, POINTS, PROMISES, any_status, disk, status
from support.promtool import checked

from nbdmirror.mirror.deadline import Kept
from nbdmirror.mirror.job_states import JobStatus
from nbdmirror.web.job_metrics import JOB_STATES, OUTLOOKS
from nbdmirror.web.metrics import METRICS, rendered
from nbdmirror.web.records import Report, plain

OPEN_METRICS = "application/openmetrics-text;version=1.0.0"
LAST = {"id": "vda", "target": "nbd://b", "result": "failed", "ended-at-s": 1.7e9, "reason": "?"}


def text_of(*reports: Report, accept: str = "", now_s: float = 0.0) -> str:
    return rendered(reports, accept, now_s)[0].decode()


def values(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """By the name and the values of the labels, sorted by the labels' names."""
    found = [sample for family in parse(text) for sample in family.samples]
    named = {
        (one.name, tuple(v for _, v in sorted(one.labels.items()))): one.value for one in found
    }
    assert len(named) == len(found), "a series is there twice"
    return named


ALL = (
    Report("/run/a.qmp", 1.7e9, status(disk("vda", JOB, last_job=LAST), disk("vdb"))),
    Report("/run/b.qmp", 1.7e9, status(state_error="No space left on device")),
    Report("/run/c.qmp", 1.7e9, error="no answer within 5 s"),
)


@pytest.mark.parametrize("reports", [ALL, ()], ids=["servers", "none"])
def test_promtool_is_content(reports: tuple[Report, ...]) -> None:
    assert checked("check", "metrics", text=text_of(*reports)) == ""


def test_promtool_complains_of_what_is_wrong() -> None:
    text = "# HELP nbdmirror_things Things.\n# TYPE nbdmirror_things counter\nnbdmirror_things 1\n"
    assert "counter metrics should have" in checked("check", "metrics", text=text)


def test_the_other_format_has_the_same() -> None:
    families = parse_open(text_of(*ALL, accept=OPEN_METRICS))  # type: ignore[no-untyped-call]
    opened = {family.name for family in families}
    assert opened == {family.name for family in parse(text_of(*ALL))}


def test_every_metric_has_a_value() -> None:
    """Of a job that copies, and of one that follows."""
    copying = JOB | PROMISES | {"device": "other", "ready": False, "status": "running"}
    made = status(disk("vda", copying), disk("vdb", JOB | POINTS | {"device": "vdb"}))
    text = text_of(*ALL, Report("/run/d.qmp", 1.7e9, made))
    there = {re.sub("(?<=_seconds)_(bucket|count|sum)$", "", name) for name, _ in values(text)}
    metrics = {metric.name for level in METRICS.values() for metric in level}
    assert there == metrics


def test_what_they_say() -> None:
    found = values(text_of(*ALL))
    assert found["nbdmirror_server_up", ("/run/a.qmp",)] == 1
    assert found["nbdmirror_server_up", ("/run/c.qmp",)] == 0
    assert found["nbdmirror_disk_protected", ("vda", "/run/a.qmp")] == 1
    assert found["nbdmirror_disk_protected", ("vdb", "/run/a.qmp")] == 0
    job = ("vda", "vda", "/run/a.qmp")
    assert found["nbdmirror_job_lag_seconds", job] == 0.25
    assert found["nbdmirror_job_dirtied_bytes_total", job] == 10 << 20
    assert found["nbdmirror_job_converging", job] == 1
    assert found["nbdmirror_job_waiting_seconds_total", ("target-write", *job)] == 200
    assert found["nbdmirror_job_state", (*job, "ready")] == 1
    write = ("vda", "write", "/run/a.qmp")
    name = "nbdmirror_disk_request_seconds"
    assert found[f"{name}_sum", write] == 0.5 and found[f"{name}_count", write] == 6
    ends = {end: found[f"{name}_bucket", ("vda", "write", end, "/run/a.qmp")]
            for end in ("1e-06", "2e-06", "4e-06", "8.38861", "+Inf")}  # fmt: skip
    assert ends == {"1e-06": 1, "2e-06": 3, "4e-06": 6, "8.38861": 6, "+Inf": 6}
    assert found["nbdmirror_disk_request_own_seconds_sum", write] == 0.25
    assert found["nbdmirror_disk_held_seconds_count", ("cut", "vda", "/run/a.qmp")] == 1
    assert sum(v for (name, _), v in found.items() if name == "nbdmirror_job_state") == 1
    assert found["nbdmirror_disk_last_job_result", ("vda", "failed", "/run/a.qmp")] == 1
    assert ("nbdmirror_job_end_timestamp_seconds", job) not in found


def test_a_lag_is_one_of_now() -> None:
    """The target may not have got anything since the server was asked: the lag is as much larger
    now, and is never told too small."""
    asked = Report("a", 1.7e9, status(disk("vda", JOB)), asked_s=100.0)
    lag = ("nbdmirror_job_lag_seconds", ("vda", "vda", "a"))
    assert values(text_of(asked, now_s=100.0))[lag] == 0.25
    assert values(text_of(asked, now_s=106.5))[lag] == 6.75


def test_what_they_say_of_promises_and_points() -> None:
    made = status(disk("vda", JOB | PROMISES), disk("vdb", JOB | POINTS | {"device": "vdb"}))
    found = values(text_of(Report("a", 1.7e9, made)))
    vda, vdb = ("vda", "vda", "a"), ("vdb", "vdb", "a")
    assert found["nbdmirror_job_end_latest_timestamp_seconds", vda] == 1.7e9 + 2.5
    assert found["nbdmirror_job_pause_limit_seconds", vda] == 0.02
    assert found["nbdmirror_job_deadline_timestamp_seconds", vda] == 1.7e9 + 600
    assert found["nbdmirror_job_deadline_outlook", ("vda", "vda", "can-be-kept", "a")] == 1
    assert found["nbdmirror_job_deadline_outlook", ("vda", "vda", "passed", "a")] == 0
    assert found["nbdmirror_job_points_kept", vdb] == 1
    assert found["nbdmirror_job_journal_lasts_seconds", vdb] == 900.9
    assert found["nbdmirror_job_journal_enough", vdb] == 1
    assert found["nbdmirror_job_point_timestamp_seconds", vdb] == 1.7e9 - 1
    assert ("nbdmirror_job_rpo_seconds", vda) not in found


@pytest.mark.parametrize(
    "trouble",
    [
        {"status": "running"},
        {"status": "standby"},
        {"status": "concluded"},
        {"io-status": "nospace"},
        {"target-connected": False},
        {"target-connected": True, "journal-connected": False},
    ],
)
def test_a_disk_is_protected_only_while_its_target_follows(trouble: dict[str, Any]) -> None:
    found = values(text_of(Report("a", 0, status(disk("vda", JOB | trouble)))))
    assert found["nbdmirror_disk_protected", ("vda", "a")] == 0


def test_a_server_without_a_state_directory_has_none_to_report_of() -> None:
    found = values(text_of(Report("a", 0, status(disk("vda", lasting=False)))))
    assert ("nbdmirror_state_dir_ok", ("a",)) not in found
    broken = status(disk("vda"), state_error="No space left on device")
    found = values(text_of(Report("a", 0, broken)))
    assert found["nbdmirror_state_dir_ok", ("a",)] == 0


def test_a_server_that_does_not_answer_has_no_old_numbers() -> None:
    found = values(text_of(Report("a", 1.0, error="Connection refused")))
    assert {name for name, _ in found} == {"nbdmirror_build_info", "nbdmirror_server_up"}


def test_all_states_are_known() -> None:
    """`null` and `undefined` are of jobs that are there no more, or not yet."""
    assert set(JOB_STATES) == set(map(str, JobStatus)) - {"null", "undefined"}
    assert set(OUTLOOKS) == set(map(str, Kept))


@pytest.mark.parametrize(
    "name", ['a"b', "a\\b", "a\nb", "ä€\U0001f600", "\udcff", "", "x" * 5000, "{}", "\x00\x7f"]
)
def test_names_are_labels(name: str) -> None:
    """One of another server's choosing is no way to write lines here."""
    report = Report(plain(name), 1.0, plain(status(disk(name, JOB | {"device": name}))))
    text = text_of(report)
    assert checked("check", "metrics", text=text) == ""
    assert ("nbdmirror_disk_size_bytes", (plain(name), plain(name))) in values(text)


def test_disks_and_jobs_of_one_name_are_one_series() -> None:
    found = values(text_of(Report("a", 1.0, status(disk("vda", JOB, JOB), disk("vda", JOB)))))
    assert found["nbdmirror_job_lag_seconds", ("vda", "vda", "a")] == 0.25


@given_in_parts(100, any_status())
def test_any_answer_can_be_shown(said: dict[str, Any]) -> None:
    """Servers differ in age, and another program may speak QMP."""
    report = Report("a", 1.0, plain(said))
    values(text_of(report))
    list(parse_open(text_of(report, accept=OPEN_METRICS)))  # type: ignore[no-untyped-call]
