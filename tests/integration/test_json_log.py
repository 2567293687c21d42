"""A log of JSON: each line is an object, whoever wrote it and wherever it goes, and each change of
a job's state has its job, its disk, its reason and its time."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import nbd
import pytest
from support.clients import connected
from support.fixtures import Start
from support.images import MiB, assert_identical, make_image, make_noise
from support.processes import patched
from support.servers import NbdkitTarget, Nbdmirror, QemuNbd
from support.waiting import WAIT_S_MAX, wait_until

JSON = ("--log-format", "json")

Line = dict[str, Any]


def parsed(text: str) -> list[Line]:
    """The lines, each of which is an object with what all of them have."""
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        assert line.keys() >= {"time", "level", "program", "message"}
        age = datetime.now(UTC) - datetime.fromisoformat(line["time"])
        assert timedelta(0) <= age < timedelta(minutes=10)
    return lines


def changes(lines: list[Line]) -> list[tuple[str, str, str]]:
    """What is said of states: from, to, and why."""
    found = [line for line in lines if "state" in line]
    assert all((line["job"], line["device"]) == ("j", "disk0") for line in found)
    return [(line["before"], line["state"], line["reason"]) for line in found]


def test_each_change_of_a_state_is_a_line(start: Start, folder: Path) -> None:
    disk = make_noise(folder / "disk.img", 4 * MiB)
    target = start(QemuNbd(folder, make_image(folder / "target.img", 4 * MiB)))
    server = start(Nbdmirror(folder, disk, options=JSON))
    server.qmp.start_mirror(target.uri())
    server.qmp.wait_ready()
    server.qmp.execute("job-pause", id="j")
    server.qmp.wait_for_event("JOB_STATUS_CHANGE", id="j", status="standby")
    server.qmp.execute("job-resume", id="j")
    server.qmp.complete()
    server.stop()
    lines = parsed(server.stderr)
    assert changes(lines) == [
        ("undefined", "created", "requested"),
        ("created", "running", "started"),
        ("running", "ready", "source and target are in sync"),
        ("ready", "standby", "paused by a user"),
        ("standby", "ready", "resumed"),
        ("ready", "waiting", "has done its work"),
        ("waiting", "pending", "all jobs of its group have done their work"),
        ("pending", "concluded", "completed"),
        ("concluded", "null", "dismissed"),
    ]
    assert [line["message"] for line in lines if line.get("state") == "standby"] == [
        "job j: ready -> standby"
    ]
    (end,) = [line for line in lines if "result" in line]
    assert (end["result"], end["pivoted"], end["job"]) == ("completed", True, "j")
    assert {line["program"] for line in lines} == {"nbdmirror"}
    assert any(line.get("device") == "disk0" and "served from" in line["message"] for line in lines)
    assert_identical(disk, target.image)


@pytest.mark.parametrize("policy", ["stop", "report"])
def test_what_goes_wrong_is_the_reason(start: Start, folder: Path, policy: str) -> None:
    disk, trouble = make_noise(folder / "disk.img", MiB), folder / "trouble"
    image = make_image(folder / "target.img", MiB)
    error = ("error=ENOSPC", "error-pwrite-rate=100%", f"error-pwrite-file={trouble}")
    target = start(NbdkitTarget(folder, "file", str(image), *error, filters=("error",)))
    server = start(Nbdmirror(folder, disk, options=JSON))
    server.allowed = ["write error", "failed"]
    trouble.touch()
    server.qmp.start_mirror(target.uri(), on_target_error=policy)
    if policy == "stop":
        server.qmp.wait_status("paused")
    else:
        server.qmp.wait_for_event("BLOCK_JOB_COMPLETED")
    trouble.unlink()
    if policy == "stop":
        server.qmp.execute("job-resume", id="j")
        server.qmp.wait_ready()
        server.qmp.complete()
        assert_identical(disk, image)
    server.stop()
    lines = parsed(server.stderr)
    (said,) = [line for line in lines if line.get("operation") == "write"]
    assert (said["action"], said["level"], said["device"]) == (policy, "warning", "disk0")
    assert "No space left" in said["reason"]
    reasons = {state: reason for _, state, reason in changes(lines)}
    assert reasons["paused" if policy == "stop" else "aborting"] == said["reason"]
    (result,) = [line for line in lines if "result" in line]
    assert result["result"] == ("completed" if policy == "stop" else "failed")
    assert result.get("reason", said["reason"]) == said["reason"]


def test_a_target_that_is_lost_and_back(start: Start, folder: Path) -> None:
    disk = make_noise(folder / "disk.img", 4 * MiB)
    target = start(QemuNbd(folder, make_image(folder / "target.img", 4 * MiB)))
    server = start(Nbdmirror(folder, disk, options=JSON))
    server.allowed = ["lost", "connected again", "connect", "broken"]
    server.qmp.start_mirror(target.uri(), x_nbdmirror_reconnect_delay=60)
    server.qmp.wait_ready()
    target.kill()
    server.qmp.wait_for_event("X_NBDMIRROR_TARGET_LOST")
    target.start()
    server.qmp.wait_for_event("X_NBDMIRROR_TARGET_BACK")
    server.qmp.complete()
    server.stop()
    assert_identical(disk, target.image)
    told = [line for line in parsed(server.stderr) if line.get("job") == "j"]
    for words in ("is lost: reconnecting for 60 s", "is back after"):
        (line,) = [line for line in told if words in line["message"]]
        assert line["device"] == "disk0"


def fail(uri: str, times: int) -> None:
    with connected(uri) as guest:
        for _ in range(times):
            with pytest.raises(nbd.Error):
                guest.pread(512, 0)


def failing(folder: Path, start: Start) -> NbdkitTarget:
    image = make_image(folder / "source.img", MiB)
    error = ("error=EIO", "error-pread-rate=100%")
    return start(NbdkitTarget(folder, "file", str(image), *error, filters=("error",)))


def test_lines_of_nbdkit(start: Start, folder: Path) -> None:
    """Also after the first ones of a lasting cause, which are counted."""
    server = start(Nbdmirror(folder, failing(folder, start).uri(), options=JSON))
    server.allowed = ["pread", "request failed"]
    fail(server.uri(), 30)
    server.stop()
    lines = parsed(server.stderr)
    theirs = [line for line in lines if line["program"] == "nbdkit"]
    assert 1 <= len(theirs) < 30
    for line in theirs:
        assert line["level"] == "error"
        assert re.search(r"pread: error: .*Input/output error", line["message"])
    counted = [re.search(r"\((\d+) more within", line["message"]) for line in lines]
    assert len(theirs) + sum(int(found.group(1)) for found in counted if found) == 30


def test_in_the_background_each_line_goes_to_syslog_as_an_object(
    start: Start, folder: Path
) -> None:
    place = f"from nbdmirror import logs\nlogs.SYSLOG_SOCKET = {str(folder / 'log')!r}\n"
    pidfile = folder / "pid"
    options = (*JSON, "--daemonize", "--pidfile", str(pidfile))
    server = Nbdmirror(folder, failing(folder, start).uri(), options=options)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(folder / "log"))
        syslog.settimeout(WAIT_S_MAX)
        environment = patched(server.environment(), folder, place)
        subprocess.run(server.argv(), env=environment, check=True, timeout=WAIT_S_MAX)
        pid = int(pidfile.read_text())
        try:
            fail(server.uri(), 1)
            said: list[str] = []
            while not any("pread" in line for line in said):
                line = syslog.recv(1 << 16).decode()
                found = re.fullmatch(rf"<(\d+)>nbdmirror\[{pid}\]: (.*?)\0?", line, re.DOTALL)
                assert found, line
                said.append(found.group(2))
        finally:
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not os.path.exists(server.qmp_path), "it ends")
    assert {line["program"] for line in parsed("\n".join(said))} == {"nbdmirror", "nbdkit"}


def ended(server: Nbdmirror, argv: list[str]) -> subprocess.CompletedProcess[str]:
    environ = server.environment()
    return subprocess.run(
        argv, check=False, env=environ, capture_output=True, text=True, timeout=WAIT_S_MAX
    )


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("wrong", ["a missing disk", "a wrong parameter"])
def test_a_server_that_does_not_start_says_so_in_an_object(
    folder: Path, bare: bool, wrong: str
) -> None:
    disk = folder / "none" if wrong == "a missing disk" else make_image(folder / "a.img", MiB)
    server = Nbdmirror(folder, disk, bare=bare)
    options = ["log-format=json"] if bare else list(JSON)
    if wrong == "a wrong parameter":
        options.append("connections=x" if bare else "--mirror-to=x")
    argv = server.argv()
    place = argv.index("python") + 2 if bare else len(argv)  # first: what comes later may be wrong
    run = ended(server, [*argv[:place], *options, *argv[place:]])
    assert run.returncode == 1
    (line,) = parsed(run.stderr)
    assert line["level"] == "error"
    assert line["message"]


def test_a_format_that_does_not_exist(folder: Path) -> None:
    disk = make_image(folder / "a.img", MiB)
    for bare, option, status in ((True, ["log-format=xml"], 1), (False, ["--log-format=xml"], 2)):
        server = Nbdmirror(folder, disk, bare=bare)
        run = ended(server, [*server.argv(), *option])
        assert run.returncode == status
        assert re.fullmatch("nbdmirror: .*log-format.*xml.*plain.*json.*\n", run.stderr)
