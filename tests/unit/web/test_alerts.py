"""The alert rules that come with the documentation: silent for what is ordinary, one alert for each
trouble. promtool runs them over metrics of a day, one sample a minute."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.processes import ROOT
from support.promtool import checked, promtool

from nbdmirror.web.metrics import METRICS

RULES = ROOT / "docs" / "monitoring" / "alerts.yml"
DASHBOARD = RULES.with_name("dashboard.json")
SERVER = 'server="/run/a.qmp"'
DISK = f'{SERVER}, disk="vda"'
JOB = f'{DISK}, job_id="vda"'

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def tool() -> None:
    if promtool() is None:
        pytest.skip("there is no promtool on this system")


READY = {
    "nbdmirror_build_info": {'version="0.1.0"': "1x480"},
    "nbdmirror_server_up": {SERVER: "1x480"},
    "nbdmirror_state_dir_ok": {SERVER: "1x480"},
    "nbdmirror_disk_protected": {DISK: "1x480"},
    "nbdmirror_disk_connected": {DISK: "1x480"},
    "nbdmirror_disk_file_ok": {DISK: "1x480"},
    "nbdmirror_job_state": {
        f'{JOB}, state="running"': "0x480",
        f'{JOB}, state="ready"': "1x480",
    },
    "nbdmirror_job_lag_seconds": {JOB: "0.2x480"},
    "nbdmirror_job_target_connected": {JOB: "1x480"},
    "nbdmirror_job_io_ok": {JOB: "1x480"},
    "nbdmirror_job_converging": {JOB: "1x480"},
    "nbdmirror_job_dirty_bytes": {JOB: "0+1000000x480"},
}
"""A mirror that follows a busy guest for eight hours."""


def changed(**series: str) -> dict[str, dict[str, str]]:
    """READY, where the metrics that are named (without their prefix) have other values."""
    found = {name: dict(values) for name, values in READY.items()}
    for name, values in series.items():
        metric = f"nbdmirror_{name}"
        found[metric] = dict.fromkeys(found.get(metric, {DISK: ""}), values)
    return found


def job_state(running: str, ready: str) -> dict[str, dict[str, str]]:
    states = {f'{JOB}, state="running"': running, f'{JOB}, state="ready"': ready}
    return {"nbdmirror_job_state": states}


ENDED = "1x59 _x420"
"""Of a job: there for an hour, then gone."""


def given_up(end_s: int) -> dict[str, dict[str, str]]:
    """A mirror that has ended in the middle of its copy. Its deadline was at 3600."""
    found = changed(
        disk_protected="0x480",
        disk_last_job_end_timestamp_seconds=f"_x60 {end_s}x419",
        **dict.fromkeys(("job_target_connected", "job_io_ok", "job_converging"), ENDED),
    )
    del found["nbdmirror_job_lag_seconds"]
    return (
        found
        | job_state(ENDED, "0x59 _x420")
        | {
            "nbdmirror_job_deadline_timestamp_seconds": {JOB: "3600x59 _x420"},
            "nbdmirror_disk_last_job_result": {f'{DISK}, result="cancelled"': "_x60 1x419"},
        }
    )


ORDINARY = {
    "a mirror that follows": READY,
    "a first copy of four hours": changed(
        disk_protected="0x240 1x240", job_lag_seconds="_x240 0.1x240"
    )
    | job_state("1x240 0x240", "0x240 1x240"),
    "a target that is back after three minutes": changed(
        job_target_connected="1x60 0x2 1x400",
        disk_protected="1x60 0x2 1x400",
        job_lag_seconds="0.2x60 50 20 0.1x400",
    ),
    "a server that is started again": changed(server_up="1x60 0 1x400"),
    "a pivot": changed(
        job_lag_seconds=ENDED,
        job_target_connected=ENDED,
        job_io_ok=ENDED,
        job_converging=ENDED,
        disk_protected="1x60 0x420",
    )
    | job_state("0x59 _x420", "1x59 _x420")
    | {"nbdmirror_disk_last_job_result": {f'{DISK}, result="failed"': "_x60 0x420"}},
    "a disk that nobody mirrors": {
        name: series for name, series in READY.items() if "_job_" not in name
    }
    | {"nbdmirror_disk_protected": {DISK: "0x480"}},
    "a guest that writes faster for ten minutes": changed(job_converging="1x60 0x10 1x400"),
    "points that are late for half a minute": changed(job_lag_seconds="0.2x60 11 0.2x420")
    | {
        "nbdmirror_job_rpo_seconds": {JOB: "10x480"},
        "nbdmirror_job_points_kept": {JOB: "1x480"},
    },
    "a large point": READY | {"nbdmirror_job_journal_enough": {JOB: "1x60 0 1x420"}},
    "a deadline that is kept": READY
    | {
        "nbdmirror_job_deadline_outlook": {
            f'{JOB}, outlook="can-be-kept"': "1x480",
            f'{JOB}, outlook="cannot-be-kept"': "0x480",
            f'{JOB}, outlook="passed"': "0x480",
        }
    },
    "a mirror that was begun again after it had failed": READY
    | {"nbdmirror_disk_last_job_result": {f'{DISK}, result="failed"': "1x480"}},
    "a mirror that its user has given up long before its deadline": given_up(end_s=1800),
    "a server that was ended in order": {
        name: dict.fromkeys(series, "1x59 _x420") if name != "nbdmirror_build_info" else series
        for name, series in changed(job_lag_seconds="0x59 _x420").items()
    }
    | job_state("0x59 _x420", "1x59 _x420"),
}

TROUBLE = {
    "NbdmirrorWebDown": {"nbdmirror_build_info": {'version="0.1.0"': "1x60 _x420"}},
    "NbdmirrorServerDown": changed(server_up="1x60 0x420"),
    "NbdmirrorLag": changed(job_lag_seconds="0.2x60 90x420"),
    "NbdmirrorRpo": changed(job_lag_seconds="0.2x60 90x420")
    | {"nbdmirror_job_rpo_seconds": {JOB: "10x480"}},
    "NbdmirrorPointsNotKept": READY | {"nbdmirror_job_points_kept": {JOB: "1x60 0x420"}},
    "NbdmirrorJournal": READY | {"nbdmirror_job_journal_enough": {JOB: "1x60 0x420"}},
    "NbdmirrorDeadline": READY
    | {
        "nbdmirror_job_deadline_outlook": {
            f'{JOB}, outlook="can-be-kept"': "1x60 0x420",
            f'{JOB}, outlook="cannot-be-kept"': "0x60 1x60 0x360",
            f'{JOB}, outlook="passed"': "0x120 1x360",
        }
    },
    "NbdmirrorTargetLost": changed(job_target_connected="1x60 0x420", disk_protected="1x420 0x60"),
    "NbdmirrorStopped": changed(job_io_ok="1x60 0x420"),
    "NbdmirrorFailed": changed(disk_protected="0x480")
    | {"nbdmirror_job_state": {}}
    | {"nbdmirror_disk_last_job_result": {f'{DISK}, result="failed"': "_x60 1x420"}},
    "NbdmirrorGivenUp": given_up(end_s=3601),
    "NbdmirrorNotConverging": changed(job_converging="1x60 0x420"),
    "NbdmirrorUnprotected": changed(disk_protected="0x480", job_lag_seconds="_x480")
    | job_state("1x480", "0x480"),
    "NbdmirrorStateDirFailing": changed(state_dir_ok="1x60 0x420"),
    "NbdmirrorDiskFileChanged": changed(disk_file_ok="1x60 0x420"),
    "NbdmirrorDiskServerLost": changed(disk_connected="1x60 0x420"),
}


ALSO = {
    "NbdmirrorTargetLost": changed(disk_protected="1x420 0x60")
    | {"nbdmirror_job_journal_connected": {JOB: "1x60 0x420"}},
}
"""The same by other metrics."""


def alerts() -> list[str]:
    return re.findall(r"^ +- alert: (\w+)$", RULES.read_text(), re.M)


def told(series: dict[str, dict[str, str]], expected: str, place: Path) -> str:
    """What promtool complains of if `expected`, and no other alert, fires in these eight hours."""
    firing = 'ALERTS{alertstate="firing"}'
    tests: list[dict[str, Any]] = [
        {
            "interval": "1m",
            "input_series": [
                {"series": f"{name}{{{labels}}}", "values": values}
                for name, by_labels in series.items()
                for labels, values in by_labels.items()
            ],
            "promql_expr_test": [
                {
                    "expr": f"count by (alertname) (count_over_time({firing}[8h:1m]))",
                    "eval_time": "8h",
                    "exp_samples": [
                        {"labels": f'{{alertname="{name}"}}', "value": 1}
                        for name in [expected]
                        if name
                    ],
                }
            ],
        }
    ]
    content = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}
    (place / "test.yml").write_text(json.dumps(content))  # which is YAML as well
    return checked("test", "rules", str(place / "test.yml"))


def test_the_rules_are_rules() -> None:
    assert checked("check", "rules", str(RULES)) == ""


@pytest.mark.parametrize("name", ORDINARY)
def test_what_is_ordinary_raises_none(name: str, tmp_path: Path) -> None:
    assert told(ORDINARY[name], "", tmp_path) == ""


@pytest.mark.parametrize("alert", alerts())
def test_each_trouble_raises_its_own(alert: str, tmp_path: Path) -> None:
    assert told(TROUBLE[alert], alert, tmp_path) == ""


@pytest.mark.parametrize("alert", ALSO)
def test_another_trouble_raises_the_same(alert: str, tmp_path: Path) -> None:
    assert told(ALSO[alert], alert, tmp_path) == ""


def test_an_alert_too_many_or_too_few_would_be_seen(tmp_path: Path) -> None:
    assert "NbdmirrorLag" in told(TROUBLE["NbdmirrorLag"], "", tmp_path)
    assert "NbdmirrorLag" in told(READY, "NbdmirrorLag", tmp_path)


def expressions() -> list[str]:
    """The dashboard's, with its variables filled in."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel["targets"]]
    return [re.sub(r"\$\w+", ".*", expression) for expression in found]


def test_the_dashboards_expressions_are_right(tmp_path: Path) -> None:
    rules = [{"record": f"r{n}", "expr": text} for n, text in enumerate(expressions())]
    assert len(rules) > 10
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "a", "rules": rules}]}))
    assert checked("check", "rules", str(tmp_path / "rules.yml")) == ""


@pytest.mark.parametrize("path", [RULES, DASHBOARD], ids=lambda path: path.name)
def test_they_are_about_metrics_that_there_are(path: Path) -> None:
    there = {metric.name for level in METRICS.values() for metric in level}
    found = re.findall(r"\bnbdmirror_\w+", path.read_text())
    used = {re.sub("(?<=_seconds)_(bucket|count|sum)$", "", name) for name in found}
    assert used and used <= there
