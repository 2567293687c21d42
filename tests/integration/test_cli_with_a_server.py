"""The command line with a real server: exit statuses, jobs that fail, a server that dies in the
middle of a command, on a terminal and in a pipe."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fixtures import Identical, Start
from support.images import KiB, MiB
from support.processes import Finished, nbdmirror_environment
from support.servers import NbdkitTarget, Nbdmirror, QemuNbd
from support.waiting import wait_until

from nbdmirror.cli.common import DONE, FAILED, NO_SERVER, TIMED_OUT, USAGE

SIZE = 4 * MiB
Cli = Callable[..., Finished]


@pytest.fixture
def server(start: Start, disk: Path, target: QemuNbd) -> Nbdmirror:
    return start(Nbdmirror(disk.parent, disk, bare=True))


def last_line(done: Finished) -> str:
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("wait", ["ready", "completed"])
def test_a_job_that_fails(
    cli: Cli, server: Nbdmirror, start: Start, folder: Path, wait: str
) -> None:
    parameters = (str(SIZE), "error-pwrite=EIO", "error-pwrite-rate=100%")
    broken = start(NbdkitTarget(folder, "memory", *parameters, filters=("error",)))
    done = cli("mirror", broken.uri(), "--wait", wait)
    assert done.returncode == FAILED
    failed = (
        f"nbdmirror: job disk0 failed: {broken.uri()}: Input/output error; disk disk0 is served"
    )
    assert last_line(done).startswith(failed)
    arguments = ["mirror", broken.uri(), "--wait", wait, "--on-target-error", "stop"]
    stopped = Running([*arguments, "--qmp", str(server.qmp_path)], is_terminal=False)
    wait_until(lambda: b"continue with: nbdmirror resume" in stopped.heard, "what to do is told")
    assert "I/O error (failed)" in cli("status").stdout
    assert cli("wait", "--ready", "--timeout", "0.1").returncode == TIMED_OUT
    assert cli("cancel", "--force").returncode == DONE
    status, heard = stopped.end()
    assert (status, "Traceback" in heard) == (FAILED, False)


def test_lines_for_scripts(cli: Cli, server: Nbdmirror, target: QemuNbd) -> None:
    done = cli("mirror", target.uri(), "--wait", "completed", "--json")
    assert (done.returncode, done.stderr) == (DONE, "")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {len(line) for line in lines} == {1}
    states = [line["job"]["status"] for line in lines if "job" in line]
    assert states[0] in ("created", "running", "ready") and "result" not in states
    events = [line["event"]["event"] for line in lines if "event" in line]
    assert {"BLOCK_JOB_READY", "X_NBDMIRROR_PIVOTED", "BLOCK_JOB_COMPLETED"} <= set(events)
    assert lines[-1]["result"].startswith("job disk0 completed")
    again = cli("wait", "--concluded", "--json")
    assert (again.returncode, list(json.loads(again.stdout))) == (DONE, ["result"])


def test_a_paused_job(
    cli: Cli, server: Nbdmirror, identical: Identical, target: QemuNbd, disk: Path
) -> None:
    assert cli("mirror", target.uri(), "--wait", "ready").returncode == DONE
    assert cli("pause").returncode == DONE
    refused = cli("cancel")
    assert (refused.returncode, "cancel --force" in last_line(refused)) == (FAILED, True)
    again = cli("mirror", target.uri())
    assert (again.returncode, "nbdmirror status" in last_line(again)) == (FAILED, True)
    completing = Running(["complete", "--qmp", str(server.qmp_path)], is_terminal=False)
    wait_until(lambda: b"after: nbdmirror resume" in completing.heard, "what to do is told")
    assert cli("resume").returncode == DONE
    assert completing.end()[0] == DONE
    assert "disk.img" not in cli("status").stdout
    identical(disk, target.image)


@pytest.mark.parametrize("arguments", [["set-speed", "9000P"], ["mirror"], ["wait"]])
def test_what_is_no_command(cli: Cli, arguments: list[str]) -> None:
    done = cli(*arguments)
    assert (done.returncode, len(done.stderr.splitlines())) == (USAGE, 1)


class Running:
    """A command under way, in a pipe or on a terminal of 80 columns; `heard` is what it said."""

    def __init__(self, arguments: list[str], *, is_terminal: bool) -> None:
        near, far = pty.openpty() if is_terminal else os.pipe()
        self.heard = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nbdmirror", *arguments],
            env={**nbdmirror_environment(), "COLUMNS": "80", "TERM": "xterm"},
            stdin=subprocess.DEVNULL,
            stdout=far,
            stderr=far,
        )
        os.close(far)
        self._reader = threading.Thread(target=self._read, args=(near,), daemon=True)
        self._reader.start()

    def end(self) -> tuple[int, str]:
        status = self.process.wait(30)
        self._reader.join(10)
        return status, self.heard.decode()

    def _read(self, near: int) -> None:
        try:
            while data := os.read(near, 1 << 16):
                self.heard += data
        except OSError:
            pass  # a terminal's other end was closed
        finally:
            os.close(near)


@pytest.mark.parametrize("is_terminal", [False, True], ids=["pipe", "terminal"])
@pytest.mark.parametrize(
    "command",
    [
        "mirror TARGET --speed 64K --wait ready",
        "mirror TARGET --speed 64K --wait completed",
        "wait --ready",
        "wait --concluded",
        "complete",
        "status --watch",
    ],
)
def test_a_server_that_dies_in_the_middle(
    server: Nbdmirror, target: QemuNbd, command: str, is_terminal: bool
) -> None:
    words = [target.uri() if word == "TARGET" else word for word in command.split()]
    if words[0] != "mirror":
        is_to_complete = words[0] == "complete"
        slow: dict[str, Any] = {"speed": 64 * KiB, "buf_size": 64 * KiB}
        server.qmp.start_mirror(target.uri(), **({} if is_to_complete else slow))
        if is_to_complete:
            server.qmp.wait_ready()
            server.qmp.execute("job-pause", id="j")
            server.qmp.wait_status("standby")
    running = Running([*words, "--qmp", str(server.qmp_path)], is_terminal=is_terminal)
    wait_until(lambda: b"left" in running.heard, "it shows the job")
    os.kill(server.pid, signal.SIGKILL)
    if (command, is_terminal) == ("status --watch", True):  # continues until interrupted
        wait_until(lambda: b"trying again" in running.heard, "it shows that the server is gone")
        running.process.send_signal(signal.SIGINT)
        assert running.end()[0] == DONE
        server.kill()
        return
    status, heard = running.end()
    server.kill()
    assert status == NO_SERVER
    assert "Traceback" not in heard
    assert "lost the connection to the server" in heard.splitlines()[-1]
