"""The command line against a server with made-up jobs: usage, mirroring, and verbs on jobs."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from support.fakes import URI, Fake
from unit.cli.cliparts import WAIT_S_MAX, Main, one_line

from nbdmirror import unix_sockets as sockets
from nbdmirror.cli import common, values
from nbdmirror.cli import session as cli_session
from nbdmirror.cli.control import _has_moved

COMPLETED = (
    f"job {{}} completed; the pivot held the guest for 3.2 ms; disk disk0 is served from {URI}\n"
)

# Usage, and nobody there


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["no-such"],
        ["wait"],
        ["wait", "--ready", "--concluded"],
        ["wait", "--ready", "--timeout", "x"],
        ["mirror"],
        ["mirror", URI, "--sync", "x"],
        ["mirror", URI, "--granularity", "64Q"],
        ["set-speed"],
        ["complete", "--job", "a", "--device", "b"],
        ["serve"],
        ["serve", "a", "--socket", "s", "--port", "1"],
        ["serve", "a", "--port", "70000"],
        ["serve", "x="],
    ],
)
def test_usage_errors(run: Main, argv: list[str]) -> None:
    status, out, err = run(*argv)
    assert (status, out) == (common.USAGE, "")
    one_line(err)


def test_nobody_there(run: Main, tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path / "no" / "dir", tmp_path):
        status, _, err = run("status", "--qmp", str(path))
        assert status == common.NO_SERVER
        assert str(path) in one_line(err)
        assert "--qmp" in err


def test_a_server_that_is_not_qmp(run: Main, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(cli_session, "CONNECT_S_MAX", 0.2)
    with sockets.bind_unix_socket(str(tmp_path / "s")):
        status, _, err = run("status", "--qmp", str(tmp_path / "s"))
        assert (status, "does not answer" in one_line(err)) == (common.TIMED_OUT, True)


def test_default_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/x")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert common.default_qmp_paths() == ["/x/nbdmirror.qmp", "/run/nbdmirror.qmp"]
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert common.default_qmp_paths() == ["/run/nbdmirror.qmp"]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(common.CliError, match="--qmp"):
        common.default_qmp_paths()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("65536", 65536),
        ("64k", 65536),
        ("1.5G", 3 << 29),
        ("2TiB", 2 << 40),
        ("1.5K", 1536),
        ("0.001953125k", 2),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert values.parse_size(text) == size


def test_a_size_that_no_server_takes(run: Main) -> None:
    status, _, err = run("set-speed", "8388608T")
    assert (status, "8 EiB" in one_line(err)) == (common.USAGE, True)
    assert values.parse_size("8388607T") < 2**63


# Mirroring


def test_mirror_sends_what_was_asked_for(fake: Fake, run: Main) -> None:
    assert run("mirror", URI)[0] == common.DONE
    assert fake.calls[-2] == (
        "drive-mirror",
        {"device": "disk0", "target": URI, "mode": "existing", "sync": "full"},
    )
    options = "--device d --sync top --copy-mode write-blocking --granularity 64K --buf-size 1M"
    options += " --speed 0 --on-source-error stop --on-target-error enospc --bitmap b --job j"
    options += " --target-cluster-size 2M --no-unmap --target-is-zero --allow-larger-target"
    options += " --max-pause 300 --may throttle,write-blocking"
    options += " --deadline 2h --on-deadline complete"
    assert run("mirror", URI, *options.split())[0] == common.DONE
    assert fake.calls[-2][1] == {
        "device": "d",
        "target": URI,
        "mode": "existing",
        "sync": "top",
        "job-id": "j",
        "copy-mode": "write-blocking",
        "granularity": 65536,
        "buf-size": 1 << 20,
        "speed": 0,
        "on-source-error": "stop",
        "on-target-error": "enospc",
        "bitmap": "b",
        "unmap": False,
        "target-is-zero": True,
        "x-nbdmirror-target-cluster-size": 2 << 20,
        "x-nbdmirror-allow-larger-target": True,
        "x-nbdmirror-max-pause": 300,
        "x-nbdmirror-may": ["throttle", "write-blocking"],
        "x-nbdmirror-deadline": 7200.0,
        "x-nbdmirror-on-deadline": "complete",
    }


@pytest.mark.parametrize("disks", [[], ["a", "b"]])
def test_mirror_wants_one_disk(fake: Fake, run: Main, disks: list[str]) -> None:
    fake.disks = disks
    status, _, err = run("mirror", URI)
    assert status == common.FAILED
    assert ("a, b" if disks else "no disks") in one_line(err)


def test_mirror_and_wait(fake: Fake, run: Main) -> None:
    status, out, err = run("mirror", URI, "--wait", "ready")
    assert (status, out) == (common.DONE, "job disk0 is ready: the target follows the source\n")
    assert re.search(r"^disk0: running, 25\.0%, 300 B left", err, re.MULTILINE)
    assert fake.jobs["disk0"]["ready"]


def test_mirror_and_complete(fake: Fake, run: Main) -> None:
    status, out, _ = run("mirror", URI, "--wait", "completed")
    assert status == common.DONE
    assert out == COMPLETED.format("disk0")
    assert not fake.jobs


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (
            {"fail": True},
            f"failed: {URI}: No space left on device; disk disk0 is served from a.img",
        ),
        ({"refuse": True}, "smaller than the source"),
        ({"vanish": True}, "its result is not known"),
    ],
)
def test_mirror_fails(fake: Fake, run: Main, plan: dict[str, Any], text: str) -> None:
    fake.plan = plan
    status, out, err = run("mirror", URI, "--wait", "completed")
    assert (status, out) == (common.FAILED, "")
    assert text in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("nbdmirror: ")


@pytest.mark.parametrize("options", [[], ["--wait", "ready"]])
def test_mirror_to_a_target_of_another_size(fake: Fake, run: Main, options: list[str]) -> None:
    """Told with both sizes, and even if nobody asked to wait: the job fails at once."""

    def fails(arguments: dict[str, Any]) -> Any:
        fake.add_job("disk0")
        sizes = {"size": 1000, "target-size": 2000}
        fake.ring.append("X_NBDMIRROR_SIZES_DIFFER", {"device": "disk0", "id": "disk0", **sizes})
        fake.end("disk0", "BLOCK_JOB_COMPLETED", error="Source and target image differ")
        return {}

    fake.do_drive_mirror = fails  # type: ignore[method-assign]
    status, out, err = run("mirror", URI, *options)
    assert (status, out) == (common.FAILED, "")
    for part in ("1000 bytes", "target 2000", "--allow-larger-target"):
        assert part in one_line(err)


def test_mirror_is_cancelled_by_somebody_else(fake: Fake, run: Main) -> None:
    fake.plan["stuck"] = True
    fake.add_job("j")

    def cancel() -> None:
        assert fake.queried.wait(WAIT_S_MAX)
        fake.end("j", "BLOCK_JOB_CANCELLED")

    thread = threading.Thread(target=cancel)
    thread.start()
    status, _, err = run("wait", "--concluded")
    thread.join(WAIT_S_MAX)
    assert status == common.FAILED
    # The end may be seen by `wait` before it begins to watch; then there is no job to wait for.
    assert "cancelled" in err or "no job" in err or "not seen" in err


# Verbs on jobs


def test_wait_ready_and_concluded(fake: Fake, run: Main) -> None:
    fake.add_job("j")
    assert run("wait", "--ready")[:2] == (
        common.DONE,
        "job j is ready: the target follows the source\n",
    )
    fake.jobs["j"]["status"] = "completing"
    status, out, _ = run("wait", "--concluded", "--job", "j")
    assert (status, out[:15]) == (common.DONE, "job j completed")


def test_wait_for_a_concluded_job_that_is_kept(fake: Fake, run: Main) -> None:
    fake.plan["stuck"] = True
    fake.add_job("j", status="concluded", error="Input/output error")
    status, _, err = run("wait", "--concluded")
    assert (status, "Input/output error" in err) == (common.FAILED, True)


@pytest.mark.parametrize("until", ["--ready", "--concluded"])
@pytest.mark.parametrize("which", [[], ["--job", "j"], ["--device", "disk0"]])
@pytest.mark.parametrize("error", [None, "No space left on device"])
def test_wait_for_a_job_that_ends_as_it_begins(
    fake: Fake, run: Main, until: str, which: list[str], error: str | None
) -> None:
    """The job is gone at the first look, and its end was heard: success and failure differ."""

    def answer(arguments: dict[str, Any]) -> Any:
        if "j" in fake.jobs:
            fake.pivot("j")
            fake.end("j", "BLOCK_JOB_COMPLETED", **({"error": error} if error else {}))
        return []

    fake.add_job("j")
    fake.do_query_block_jobs = answer  # type: ignore[method-assign]
    status, out, err = run("wait", until, *which)
    if error:
        assert (status, out) == (common.FAILED, "")
        assert error in one_line(err)
    else:
        assert (status, out[:15], err) == (common.DONE, "job j completed", "")


@pytest.mark.parametrize("which", [[], ["--job", "j"], ["--device", "disk0"]])
def test_wait_for_a_job_of_which_nothing_is_known(fake: Fake, run: Main, which: list[str]) -> None:
    status, out, err = run("wait", "--concluded", *which)
    assert (status, out) == (common.FAILED, "")
    assert "no job" in one_line(err)


def test_time_runs_out(fake: Fake, run: Main) -> None:
    fake.plan["stuck"] = True
    fake.add_job("j")
    status, _, err = run("wait", "--ready", "--timeout", "1")
    assert status == common.TIMED_OUT
    assert err.splitlines()[-1] == (
        "nbdmirror: timed out after 1 s; job j: running, 0.0%, 400 B left"
    )


def test_complete(fake: Fake, run: Main) -> None:
    fake.add_job("j", offset=400, ready=True, status="ready")
    status, out, _ = run("complete", "--timeout", "20")
    assert (status, out) == (common.DONE, COMPLETED.format("j"))


def test_complete_of_a_paused_job_says_what_it_waits_for(fake: Fake, run: Main) -> None:
    """It is remembered, and waited for; here until somebody has resumed it."""
    fake.plan["stuck"] = True
    fake.add_job("j", offset=400, ready=True, status="standby", paused=True)

    def complete(arguments: dict[str, Any]) -> Any:
        fake.jobs["j"]["ending"] = "complete"
        return {}

    fake.do_job_complete = complete  # type: ignore[method-assign]
    status, out, err = run("complete", "--timeout", "1")
    assert (status, out) == (common.TIMED_OUT, "")
    assert err.count("will complete after: nbdmirror resume\n") == 1


def test_complete_before_ready_is_refused_with_advice(fake: Fake, run: Main) -> None:
    fake.plan["stuck"] = True
    fake.add_job("j")
    status, _, err = run("complete")
    assert (status, "wait --ready" in one_line(err)) == (common.FAILED, True)


@pytest.mark.parametrize(
    ("ready", "options", "text"),
    [
        (True, [], "consistent copy"),
        (True, ["--force"], "may not be consistent"),
        (False, [], "may not be consistent"),
    ],
)
def test_cancel(fake: Fake, run: Main, ready: bool, options: list[str], text: str) -> None:
    fake.plan["stuck"] = True
    fake.add_job("j", ready=ready)
    status, out, _ = run("cancel", *options)
    assert (status, text in out) == (common.DONE, True)


def test_choosing_a_job(fake: Fake, run: Main) -> None:
    fake.plan["stuck"] = True
    assert "no job" in one_line(run("pause")[2])
    fake.add_job("j")
    assert run("pause")[:2] == (common.DONE, "job j is paused; continue with: nbdmirror resume\n")
    assert run("resume", "--job", "j")[0] == common.DONE
    assert run("set-speed", "10M", "--device", "disk0")[0] == common.DONE
    assert ("block-job-set-speed", {"device": "j", "speed": 10 << 20}) in fake.calls
    fake.add_job("k")
    status, _, err = run("resume")
    assert (status, "several jobs (j, k)" in one_line(err)) == (common.FAILED, True)
    assert "no job x" in one_line(run("resume", "--job", "x")[2])
    assert "no disk x" in one_line(run("resume", "--device", "x")[2])


@pytest.mark.parametrize("lost", ["target-connected", "journal-connected"])
def test_a_job_whose_far_side_is_lost_does_not_continue(lost: str) -> None:
    """Though nothing is left to copy."""
    job = {"paused": False, "len": 100, "offset": 100}
    assert _has_moved(job, job)
    assert not _has_moved(job | {lost: False}, job)


def test_a_wait_for_a_snapshot_says_who_makes_it(fake: Fake, run: Main) -> None:
    """Else the job stands at 100 % for ever."""
    fake.plan["stuck"] = True
    fake.add_job("j", offset=400, **{"x-nbdmirror-points": {"awaited": {"sequence": 1}}})
    status, _, err = run("wait", "--ready", "--timeout", "1")
    assert status == common.TIMED_OUT
    assert "j: point 1 waits for its snapshot; snapshots are made by: nbdmirror points" in err
    fake.add_job("j", status="ready", ready=True, **{"x-nbdmirror-points": {"sequence": 1}})
    status, out, _ = run("wait", "--ready")
    assert (status, out) == (common.DONE, "job j is ready: the far side has a point\n")
