"""Several disks in one command: what is asked of the server, what is told of each job, and what is
refused before anything is asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fakes import Fake
from unit.cli.cliparts import Main, one_line, reached

from nbdmirror.cli import common
from nbdmirror.cli import jobs as cli_jobs
from nbdmirror.errors import CommandError

A, B = "nbd://h/a", "nbd://h/b"
JA, JB = "nbd://h/ja", "nbd://h/jb"
BOTH = [f"vda={A}", f"vdb={B}"]


class Both(Fake):
    """A server with two disks, each with a job of its name. `refuses`: the next transaction."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.disks = ["vda", "vdb"]
        self.lasts: dict[str, dict[str, Any]] = {}
        self.refuses = ""

    def do_transaction(self, arguments: dict[str, Any]) -> Any:
        if self.refuses:
            raise CommandError(self.refuses)
        for action in arguments["actions"]:
            name = action["type"].replace("-", "_")
            getattr(self, f"do_{name}")(action["data"])
        return {}

    def do_x_nbdmirror_query_status(self, arguments: dict[str, Any]) -> Any:
        jobs = {job["device"]: job for job in self.do_query_block_jobs({})}
        if self.last:
            self.lasts[self.last["id"]] = self.last
        return {
            "disks": [
                {"name": name, "size": 1 << 30, "source": f"{name}.img"}
                | {"jobs": [jobs[name]] if name in jobs else []}
                | ({"last-job": self.lasts[name]} if name in self.lasts else {})
                for name in self.disks
            ]
        }

    def pivot(self, job: str, pause_ms: float = 3.25) -> None:
        self.pivots[job] = pause_ms
        data = {"device": job, "id": job, "pause-ms": pause_ms}
        self.ring.append("X_NBDMIRROR_PIVOTED", data)

    def end(self, job: str, event: str, **data: Any) -> None:
        super().end(job, event, **data)
        self.lasts[job] = self.last


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Both]:
    monkeypatch.setattr(cli_jobs, "POLL_S", 0.01)
    with reached(Both(str(tmp_path / "qmp")), monkeypatch) as both:
        yield both


def transaction(both: Both) -> dict[str, Any]:
    (found,) = [arguments for name, arguments in both.calls if name == "transaction"]
    return found


# What is asked


def test_one_transaction_starts_all(both: Both, run: Main) -> None:
    """All options are for each disk; each journal is its disk's."""
    options = "--every 2s --keep 1h --rpo 10s --on-target-error stop --reconnect-delay 60"
    journals = ["--journal", f"vdb={JB}", "--journal", f"vda={JA}"]
    status, out, err = run("mirror", *BOTH, *journals, *options.split())
    assert (status, err) == (common.DONE, "")
    assert out == (
        f"job vda mirrors vda to {A}: running; see: nbdmirror status\n"
        f"job vdb mirrors vdb to {B}: running; see: nbdmirror status\n"
    )
    shared = {
        "mode": "existing",
        "sync": "full",
        "copy-mode": "points",
        "x-nbdmirror-interval": 2.0,
        "x-nbdmirror-keep": 3600.0,
        "x-nbdmirror-rpo": 10.0,
        "on-target-error": "stop",
        "x-nbdmirror-reconnect-delay": 60,
    }
    asked = transaction(both)
    assert asked["properties"] == {"completion-mode": "grouped"}
    assert [action["type"] for action in asked["actions"]] == ["drive-mirror"] * 2
    assert [action["data"] for action in asked["actions"]] == [
        {"device": "vda", "target": A, "x-nbdmirror-journal": JA, **shared},
        {"device": "vdb", "target": B, "x-nbdmirror-journal": JB, **shared},
    ]


@pytest.mark.parametrize(
    "argv",
    [
        [*BOTH, "--journal", JA, "--journal", JB],
        [BOTH[0], "--journal", JA, BOTH[1], "--journal", JB],
        ["--journal", JA, "--journal", JB, *BOTH],
    ],
)
def test_journals_without_names_are_in_the_order_of_the_targets(
    both: Both, run: Main, argv: list[str]
) -> None:
    assert run("mirror", *argv)[0] == common.DONE
    data = [action["data"] for action in transaction(both)["actions"]]
    assert [one["x-nbdmirror-journal"] for one in data] == [JA, JB]


def test_several_disks_need_no_points(both: Both, run: Main) -> None:
    assert run("mirror", *BOTH, "--copy-mode", "write-blocking")[0] == common.DONE
    data = [action["data"] for action in transaction(both)["actions"]]
    assert [one["copy-mode"] for one in data] == ["write-blocking"] * 2
    assert not any("x-nbdmirror-journal" in one for one in data)


def test_one_named_disk_is_no_group(both: Both, run: Main) -> None:
    assert run("mirror", f"vdb={B}", "--journal", f"vdb={JB}")[0] == common.DONE
    (asked,) = [arguments for name, arguments in both.calls if name == "drive-mirror"]
    assert (asked["device"], asked["target"], asked["x-nbdmirror-journal"]) == ("vdb", B, JB)


def test_several_jobs_are_completed_in_one_step(both: Both, run: Main) -> None:
    both.plan["stuck"] = True
    for job in ("vda", "vdb"):
        both.add_job(job, offset=400, ready=True, status="ready")
    both.plan = {}
    status, out, _ = run("complete", "--device", "vda", "--job", "vdb")
    assert status == common.USAGE
    status, out, _ = run("complete", "--device", "vda", "--device", "vdb", "--device", "vda")
    assert status == common.DONE
    assert sorted(out.splitlines()) == [
        f"job {job} completed; the pivot held the guest for 3.2 ms; disk {job} is served from"
        f" {job}.img"
        for job in ("vda", "vdb")
    ]
    assert transaction(both) == {
        "actions": [{"type": "job-complete", "data": {"id": job}} for job in ("vda", "vdb")]
    }


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_several_jobs_are_cancelled_in_one_step(both: Both, run: Main, force: list[str]) -> None:
    both.plan["stuck"] = True
    for job in ("vda", "vdb"):
        both.add_job(job, offset=400, ready=not force, status="ready" if not force else "running")
    status, out, _ = run("cancel", "--job", "vda", "--job", "vdb", *force)
    assert (status, len(out.splitlines())) == (common.DONE, 2)
    more = {"force": True} if force else {}
    assert transaction(both) == {
        "actions": [
            {"type": "block-job-cancel", "data": {"device": job, **more}} for job in ("vda", "vdb")
        ]
    }


# What is told


def test_each_job_is_waited_for(both: Both, run: Main) -> None:
    status, out, err = run("mirror", *BOTH, "--wait", "ready")
    assert status == common.DONE
    ready = "job {} is ready: the target follows the source"
    assert sorted(out.splitlines()) == [ready.format(job) for job in ("vda", "vdb")]
    assert "vda: running" in err and "vdb: running" in err
    status, out, _ = run("wait", "--ready", "--device", "vdb", "--device", "vda", "--json")
    assert status == common.DONE
    assert sum("result" in json.loads(line) for line in out.splitlines()) == 2


def test_all_complete_when_all_are_ready(both: Both, run: Main) -> None:
    status, out, _ = run("mirror", *BOTH, "--wait", "completed")
    assert (status, len(out.splitlines())) == (common.DONE, 2)
    assert not both.jobs
    assert [name for name, _ in both.calls].count("job-complete") == 2


def test_each_end_is_told(both: Both, run: Main) -> None:
    """One has failed, and the other one was cancelled for that: two lines, and status 1."""

    def fails(arguments: dict[str, Any]) -> Any:
        for job in ("vda", "vdb"):
            both.add_job(job)
        both.end("vdb", "BLOCK_JOB_COMPLETED", error="No space left on device")
        both.end("vda", "BLOCK_JOB_CANCELLED")
        both.lasts["vda"]["reason"] = "job vdb of its group did not complete"
        return {}

    both.do_transaction = fails  # type: ignore[method-assign]
    for argv in ([], ["--wait", "ready"]):
        status, out, err = run("mirror", *BOTH, *argv)
        assert (status, out) == (common.FAILED, "")
        found = [line for line in err.splitlines() if line.startswith("nbdmirror: ")]
        assert len(found) == 2
        assert "nbdmirror: job vdb failed: nbd://target/export: No space left on device" in err
        assert "nbdmirror: job vda was cancelled (job vdb of its group did not complete)" in err


def test_a_refusal_is_one_line(both: Both, run: Main) -> None:
    both.refuses = "Journal nbd://h/jb: is not empty"
    status, out, err = run("mirror", *BOTH, "--journal", JA, "--journal", JB)
    assert (status, out) == (common.FAILED, "")
    assert one_line(err) == "nbdmirror: Journal nbd://h/jb: is not empty\n"


def test_one_of_several_jobs_does_not_exist(both: Both, run: Main) -> None:
    both.plan["stuck"] = True
    both.add_job("vda", offset=400, ready=True, status="ready")
    for verb in ("complete", "cancel"):
        status, out, err = run(verb, "--device", "vda", "--device", "vdb")
        assert (status, out) == (common.FAILED, "")
        assert "disk vdb has no job" in one_line(err)
    assert "transaction" not in [name for name, _ in both.calls]
    status, out, err = run("wait", "--ready", "--device", "vda", "--device", "vdb")
    assert (status, "job vda is ready" in out) == (common.FAILED, True)
    assert "disk vdb has no job" in err


def test_time_runs_out_for_several(both: Both, run: Main) -> None:
    both.plan["stuck"] = True
    status, _, err = run("mirror", *BOTH, "--wait", "ready", "--timeout", "1")
    assert status == common.TIMED_OUT
    last = err.splitlines()[-1]
    assert "job vda: running" in last and "job vdb: running" in last
    dispatch = both.dispatch

    async def slow(name: str, arguments: dict[str, Any]) -> Any:
        if name == "transaction":
            await asyncio.sleep(5)
        return await dispatch(name, arguments)

    both.jobs.clear()
    both.server._dispatch = slow
    status, _, err = run("mirror", *BOTH, "--wait", "ready", "--timeout", "1")
    assert status == common.TIMED_OUT
    assert one_line(err).count("may still start") == 2


# What is refused before anything is asked


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([A, B], f"TARGET_URI: {A}: there are 2 targets: name the disk of each: NAME=TARGET_URI"),
        ([BOTH[0], B], f"TARGET_URI: {B}: there are 2 targets"),
        ([BOTH[0], f"vda={B}"], "TARGET_URI: disk vda is given two targets"),
        ([BOTH[0], f"vdb={A}"], f"TARGET_URI: {A}: is the same export as TARGET_URI {A}"),
        ([*BOTH, "--journal", JA, "--journal", JA], f"--journal: {JA}: is the same export as"),
        ([*BOTH, "--journal", JA, "--journal", B], f"--journal: {B}: is the same export as TARGET"),
        ([*BOTH, "--job", "j"], "--job: names one job, and there are 2"),
        ([BOTH[0], "--device", "vda"], "--device: the disk is named with its target"),
        ([*BOTH, "--journal", JA], "a journal of its own: 2 disks and 1 journal are given"),
        ([A, "--journal", JA, "--journal", JB], "1 disk and 2 journals are given"),
        ([*BOTH, "--journal", JA, "--journal", f"vdb={JB}"], f"--journal: {JA}: others are named"),
        (
            [*BOTH, "--journal", f"vda={JA}", "--journal", f"vdc={JB}"],
            "disk vdc is given no target",
        ),
        ([*BOTH, "--journal", f"vda={JA}", "--journal", f"vda={JB}"], "is given two journals"),
        ([*BOTH, "--snapshots", "--journal", JA, "--journal", JB], "give one of both"),
        ([*BOTH, "more"], "TARGET_URI: more: there are 3 targets"),
        ([*BOTH, "--wrong", "x"], "unrecognized arguments: --wrong x"),
        ([*BOTH, ""], "TARGET_URI: is empty"),
        ([*BOTH, "--json"], "--json: needs --wait"),
        (["vda="], "TARGET_URI: disk vda is given no target"),
        ([BOTH[0], "--journal", "vda="], "--journal: disk vda is given no journal"),
    ],
)
def test_what_means_nothing(both: Both, run: Main, argv: list[str], text: str) -> None:
    status, out, err = run("mirror", *argv)
    assert (status in (common.USAGE, common.FAILED), out) == (True, "")
    assert text in one_line(err)
    assert not both.calls
