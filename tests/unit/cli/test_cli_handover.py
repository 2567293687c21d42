"""`nbdmirror handover` with made-up servers: the order of its steps, and what seldom happens in
between. tests/e2e/test_handover.py has real ones."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fakes import URI, Fake, FakeQemu
from support.paritysides import StorageDaemon

from nbdmirror.cli import common
from nbdmirror.cli import handover as cli_handover
from nbdmirror.cli import jobs as cli_jobs
from nbdmirror.cli import main as cli

TO = "tcp:there:4444"
Handover = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setattr(cli_jobs, "POLL_S", 0.01)
    fake = Fake(str(tmp_path / "qmp"))
    fake.server.start()
    yield fake
    fake.server.stop()


@pytest.fixture
def qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeQemu]:
    monkeypatch.setattr(cli_handover, "POLL_S", 0.01)
    qemu = FakeQemu(str(tmp_path / "qemu"))
    qemu.server.start()
    yield qemu
    qemu.server.stop()


@pytest.fixture
def handover(fake: Fake, qemu: FakeQemu, capsys: pytest.CaptureFixture[str]) -> Handover:
    def run(*more: str, qmp: str = fake.path, qemu: str = qemu.path) -> tuple[int, str, str]:
        words = ["handover", URI, "--qmp", qmp, "--qemu", qemu, "--to", TO, *more]
        status = cli.main(words)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err.splitlines()[-1]

    return run


def changes(server: Fake | FakeQemu) -> list[str]:
    """Commands that do something."""
    return [name for name, _ in server.calls if "query" not in name]


def add_ready_job(fake: Fake, **fields: Any) -> None:
    fake.add_job("disk0", offset=400, ready=True, status="ready", **fields)


# Before anything is begun


@pytest.mark.parametrize(
    "words",
    [
        [],
        [URI],
        [URI, "--qemu", "x"],
        [URI, "--to", TO],
        [URI, "--qemu", "x", "--to", "there"],
        [URI, "--qemu", "x", "--to", TO, "--timeout", "soon"],
    ],
)
def test_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["handover", *words])
    assert left.value.code == common.USAGE
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        ({"guest": "postmigrate"}, "cannot be moved in state postmigrate"),
        ({"guest": "inmigrate"}, "cannot be moved in state inmigrate"),
        ({"migration": "device"}, "is being migrated already: device"),
        ({"capabilities": {"events": False}}, "is too old: it lacks pause-before-switchover"),
        ({"size": 512}, "has no disk of 1073741824 bytes"),
    ],
)
def test_a_qemu_that_does_not_fit(
    fake: Fake, qemu: FakeQemu, handover: Handover, attributes: dict[str, Any], text: str
) -> None:
    for name, value in attributes.items():
        setattr(qemu, name, value)
    status, out, line = handover()
    assert (status, out) == (common.FAILED, "")
    assert text in line
    assert changes(fake) + changes(qemu) == []


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"paused": True}, "job disk0 is paused"),
        ({"auto-finalize": False}, "auto-finalize off"),
    ],
)
def test_a_mirror_that_does_not_fit(
    fake: Fake, qemu: FakeQemu, handover: Handover, fields: dict[str, Any], text: str
) -> None:
    add_ready_job(fake, **fields)
    status, _, line = handover()
    assert status == common.FAILED
    assert text in line
    assert changes(fake) + changes(qemu) == []


def test_which_disk(handover: Handover) -> None:
    status, _, line = handover("--device", "b")
    assert status == common.FAILED
    assert line == "nbdmirror: there is no disk b; the server's disks are: disk0"


# The order


@pytest.mark.guarantee("A guest that is handed over has one disk at a time")
@pytest.mark.parametrize("is_ready", [False, True])
def test_the_order(fake: Fake, qemu: FakeQemu, handover: Handover, is_ready: bool) -> None:
    states = []
    complete = fake.do_job_complete

    def completes(arguments: dict[str, Any]) -> Any:
        states.append((qemu.migration, qemu.guest))
        return complete(arguments)

    fake.do_job_complete = completes  # type: ignore[method-assign]
    if is_ready:
        add_ready_job(fake)
    status, out, _ = handover()
    assert status == common.DONE
    assert out.startswith(f"handed over: the guest runs at {TO} on {URI}; it was stopped for 7 ms")
    assert states == [("pre-switchover", "finish-migrate")]
    mirror = [] if is_ready else ["drive-mirror"]
    assert changes(fake) == [*mirror, "job-complete"]
    assert changes(qemu) == ["migrate-set-capabilities", "migrate", "migrate-continue"]


# In between


def is_undone(qemu: FakeQemu) -> bool:
    return (
        "migrate-continue" not in changes(qemu)
        and qemu.migration == "cancelled"
        and not qemu.capabilities["pause-before-switchover"]
        and qemu.capabilities["return-path"]
    )


def test_the_job_is_ended_by_somebody_else(fake: Fake, qemu: FakeQemu, handover: Handover) -> None:
    add_ready_job(fake)
    qemu.plan["steps"] = {"setup": "active"}
    migrate = qemu.do_migrate

    def migrates(arguments: dict[str, Any]) -> Any:
        fake.end("disk0", "BLOCK_JOB_COMPLETED")
        return migrate(arguments)

    qemu.do_migrate = migrates  # type: ignore[method-assign]
    status, _, line = handover()
    assert status == common.FAILED
    assert "ended by another client; the guest continues here; its disk is a.img" in line
    assert is_undone(qemu)


def test_the_job_is_stopped_by_an_error(fake: Fake, qemu: FakeQemu, handover: Handover) -> None:
    add_ready_job(fake)
    qemu.plan["steps"] = {"setup": "active"}
    migrate = qemu.do_migrate

    def migrates(arguments: dict[str, Any]) -> Any:
        fake.jobs["disk0"].update({"paused": True, "status": "standby", "io-status": "nospace"})
        return migrate(arguments)

    qemu.do_migrate = migrates  # type: ignore[method-assign]
    status, _, line = handover()
    assert status == common.FAILED
    assert "job disk0 was paused: nospace" in line
    assert "the mirror disk0 continues" in line
    assert is_undone(qemu)


def test_the_pivot_fails(fake: Fake, qemu: FakeQemu, handover: Handover) -> None:
    add_ready_job(fake)

    def completes(arguments: dict[str, Any]) -> Any:
        fake.end("disk0", "BLOCK_JOB_COMPLETED", error="Input/output error")
        return {}

    fake.do_job_complete = completes  # type: ignore[method-assign]
    status, _, line = handover()
    assert status == common.FAILED
    assert "job disk0 failed: nbd://target/export: Input/output error; disk disk0 is served" in line
    assert "the guest continues here" in line
    assert is_undone(qemu)


def test_somebody_cancels_softly_right_at_the_pivot(
    fake: Fake, qemu: FakeQemu, handover: Handover
) -> None:
    """The job ended well, and nothing was pivoted: the guest must not go on there."""
    add_ready_job(fake)

    def completes(arguments: dict[str, Any]) -> Any:
        fake.end("disk0", "BLOCK_JOB_COMPLETED")
        return {}

    fake.do_job_complete = completes  # type: ignore[method-assign]
    status, _, line = handover()
    assert status == common.FAILED
    assert "no pivot; the guest continues here; its disk is a.img" in line
    assert is_undone(qemu)


def test_another_disk_pivots_at_that_moment(fake: Fake, qemu: FakeQemu, handover: Handover) -> None:
    """It is not this one's pivot."""
    add_ready_job(fake)

    def completes(arguments: dict[str, Any]) -> Any:
        fake.ring.append("X_NBDMIRROR_PIVOTED", {"device": "b", "id": "b", "pause-ms": 1.0})
        fake.end("disk0", "BLOCK_JOB_COMPLETED")
        return {}

    fake.do_job_complete = completes  # type: ignore[method-assign]
    status, _, line = handover()
    assert (status, "no pivot" in line) == (common.FAILED, True)
    assert is_undone(qemu)


def test_the_two_sockets_are_one_nbdmirrors(fake: Fake, handover: Handover) -> None:
    status, _, line = handover(qemu=fake.path)
    assert status == common.NO_SERVER
    assert f"{fake.path} is the control socket of nbdmirror, not of QEMU" in line
    assert not changes(fake)


def test_the_two_sockets_are_one_qemus(qemu: FakeQemu, handover: Handover) -> None:
    status, _, line = handover(qmp=qemu.path)
    assert status == common.NO_SERVER
    assert f"{qemu.path} is the control socket of QEMU 7.2.0, not of nbdmirror" in line
    assert not changes(qemu)


def test_a_qemu_without_a_guest(fake: Fake, handover: Handover, folder: Path) -> None:
    with StorageDaemon(folder, "driver=null-co,size=4096") as daemon:
        status, _, line = handover(qemu=str(daemon.qmp_path))
    assert (status, "no guest to migrate" in line) == (common.NO_SERVER, True)
    assert not changes(fake)


def test_the_pivot_is_refused(fake: Fake, qemu: FakeQemu, handover: Handover) -> None:
    add_ready_job(fake)
    fake.do_job_complete = None  # type: ignore[assignment]
    status, _, line = handover()
    assert status == common.FAILED
    assert "does not know the command job-complete" in line
    assert "the guest continues here" in line
    assert is_undone(qemu)


@pytest.mark.parametrize("is_late", [False, True])
def test_the_pivot_takes_too_long(
    fake: Fake,
    qemu: FakeQemu,
    handover: Handover,
    monkeypatch: pytest.MonkeyPatch,
    is_late: bool,
) -> None:
    """It is given up. If it has taken place nevertheless, right then, the guest goes on there."""
    monkeypatch.setattr(cli_handover, "PIVOT_S_MAX", 0.1)
    add_ready_job(fake)
    fake.plan["stuck"] = True

    def cancels(arguments: dict[str, Any]) -> Any:
        assert arguments == {"id": "disk0"}
        if is_late:
            fake.pivot("disk0")
        fake.end("disk0", "BLOCK_JOB_COMPLETED" if is_late else "BLOCK_JOB_CANCELLED")
        return {}

    fake.do_job_cancel = cancels  # type: ignore[method-assign]
    status, _, line = handover()
    if is_late:
        assert status == common.DONE
    else:
        assert status == common.FAILED
        assert "job disk0 was cancelled" in line
        assert is_undone(qemu)


def test_the_pivot_cannot_be_given_up(
    fake: Fake, qemu: FakeQemu, handover: Handover, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows what happened: the guest stays stopped, and so loses nothing."""
    monkeypatch.setattr(cli_handover, "PIVOT_S_MAX", 0.1)
    monkeypatch.setattr(cli_handover, "CANCEL_S_MAX", 0.1)
    add_ready_job(fake)
    fake.plan["stuck"] = True
    fake.do_job_cancel = fake.do_job_pause  # type: ignore[method-assign]
    status, _, line = handover()
    assert status == common.NO_SERVER
    assert "the server did not report whether the disk was pivoted" in line
    assert (qemu.guest, qemu.migration) == ("finish-migrate", "pre-switchover")


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
"""Ctrl-C, timeout(1), and an ssh connection that is lost."""


@pytest.mark.guarantee("A guest that is handed over has one disk at a time")
@pytest.mark.parametrize("number", SIGNALS)
def test_an_interrupt_before_the_pivot_undoes_all(
    fake: Fake, qemu: FakeQemu, handover: Handover, number: signal.Signals
) -> None:
    """Else QEMU would stop the guest for a pivot that never comes."""
    add_ready_job(fake)
    qemu.plan["steps"] = {"setup": "active"}
    query = qemu.do_query_migrate

    def queried(arguments: dict[str, Any]) -> Any:
        if qemu.migration == "active":
            os.kill(os.getpid(), number)
        return query(arguments)

    qemu.do_query_migrate = queried  # type: ignore[method-assign]
    status, _, line = handover()
    assert status == common.INTERRUPTED
    assert "interrupted; the guest continues here; its disk is a.img" in line
    assert is_undone(qemu)


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interrupt_at_the_pivot_waits_for_the_outcome(
    fake: Fake, handover: Handover, number: signal.Signals
) -> None:
    add_ready_job(fake)
    complete = fake.do_job_complete

    def completes(arguments: dict[str, Any]) -> Any:
        os.kill(os.getpid(), number)
        return complete(arguments)

    fake.do_job_complete = completes  # type: ignore[method-assign]
    status, out, _ = handover()
    assert status == common.DONE
    assert out.startswith("handed over: ")


# After the pivot


def test_the_migration_fails(qemu: FakeQemu, handover: Handover) -> None:
    qemu.plan["end"] = "failed"
    status, _, line = handover()
    assert status == common.FAILED
    assert "the migration failed after the pivot: Connection reset by peer" in line
    assert f"the guest: it continues here; the disk is {URI} now" in line


def test_the_migration_does_not_end(
    qemu: FakeQemu, handover: Handover, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_handover, "FINISH_S_MAX", 0.1)
    monkeypatch.setattr(cli_handover, "CANCEL_S_MAX", 0.1)
    qemu.plan["end"] = "device"
    status, _, line = handover()
    assert status == common.TIMED_OUT
    assert "the guest: it is finish-migrate here" in line
    assert "migrate_cancel" not in changes(qemu)


def test_somebody_else_lets_the_guest_go_on(qemu: FakeQemu, handover: Handover) -> None:
    qemu.plan["steps"] = {"setup": "active", "active": "completed"}
    status, _, line = handover()
    assert status == common.FAILED
    assert "another client continued the guest at the other side before the pivot" in line
    assert qemu.guest == "postmigrate"
