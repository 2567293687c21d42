"""With a real server: every job is brought to its end from the command line, and what a command
says of it is so."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fixtures import Identical, Start
from support.images import MiB, make_image
from support.processes import Finished, freeze, nbdmirror, run
from support.servers import Nbdmirror, QemuNbd
from support.waiting import wait_until

from nbdmirror.cli.common import DONE, FAILED, TIMED_OUT

SIZE = 4 * MiB
Cli = Callable[..., Finished]


@pytest.fixture
def server(start: Start, disk: Path, target: QemuNbd) -> Nbdmirror:
    return start(Nbdmirror(disk.parent, f"vda={disk}", bare=True))


def served(cli: Cli) -> str:
    return str(json.loads(cli("status", "--json").stdout)["disks"][0]["source"])


def begin_to_complete(server: Nbdmirror) -> None:
    """Without a command that waits for it."""
    server.qmp.execute("job-complete", id="vda")

    def is_begun() -> bool:
        return bool(server.qmp.disk()["jobs"][0]["ending"] == "complete")

    wait_until(is_begun, "it is being completed")


def job_of(cli: Cli) -> dict[str, Any]:
    (job,) = json.loads(cli("status", "--json").stdout)["disks"][0]["jobs"]
    return dict(job)


@pytest.mark.guarantee("What a command says at its end is so")
def test_a_complete_that_nobody_waits_for_any_more(
    cli: Cli, server: Nbdmirror, disk: Path, target: QemuNbd, identical: Identical
) -> None:
    """The target hangs; complete times out; a cancel comes too late; then the target goes on, and
    so does the pivot. Nobody is told that the source is served."""
    assert cli("mirror", target.uri(), "--wait", "ready").returncode == DONE
    freeze(target.pid)
    try:
        begin_to_complete(server)
        late = cli("complete", "--timeout", "2")  # once more, which changes nothing
        assert (late.returncode, "completing for 0:" in late.stderr) == (TIMED_OUT, True)
        refused = cli("cancel")
        assert (refused.returncode, refused.stdout) == (FAILED, "")
        assert "is already being completed" in refused.stderr
        assert "completing for" in cli("status").stdout
    finally:
        os.kill(target.pid, signal.SIGCONT)
    said = cli("wait", "--concluded")
    assert (said.returncode, served(cli)) == (DONE, target.uri())
    assert said.stdout.endswith(f"disk vda is served from {target.uri()}\n")
    identical(disk, target.image)


@pytest.mark.guarantee("What a command says at its end is so")
def test_a_complete_that_is_taken_back(
    cli: Cli, server: Nbdmirror, disk: Path, target: QemuNbd
) -> None:
    assert cli("mirror", target.uri(), "--wait", "ready").returncode == DONE
    freeze(target.pid)
    try:
        begin_to_complete(server)
        done = cli("cancel", "--force")
        assert (done.returncode, served(cli)) == (DONE, str(disk))
        assert f"disk vda is served from {disk}\n" in done.stdout
    finally:
        os.kill(target.pid, signal.SIGCONT)


def test_a_job_that_failed_before_anybody_asked(cli: Cli, target: QemuNbd) -> None:
    slow = ["--speed", "64K", "--buf-size", "64K"]
    assert cli("mirror", target.uri(), *slow).returncode == DONE
    target.kill()
    wait_until(lambda: "last job" in cli("status").stdout, "it has failed")
    said = cli("wait", "--ready")
    assert said.returncode == FAILED
    assert f"job vda failed: {target.uri()}: connection lost; disk vda is served" in said.stderr


def test_a_resumed_job_whose_target_is_still_away(cli: Cli, target: QemuNbd) -> None:
    slow = ["--speed", "64K", "--buf-size", "64K", "--on-target-error", "stop"]
    assert cli("mirror", target.uri(), *slow).returncode == DONE
    target.kill()
    wait_until(lambda: job_of(cli)["status"] == "paused", "it has stopped")
    assert "connection lost; try again with: nbdmirror resume" in cli("status").stdout
    again = cli("resume")
    assert (again.returncode, "has stopped again" in again.stderr) == (FAILED, True)
    assert cli("cancel", "--force").returncode == DONE


def test_a_job_that_waits_to_be_finalized_and_dismissed(
    cli: Cli, server: Nbdmirror, disk: Path, target: QemuNbd, identical: Identical
) -> None:
    manual = {"auto_finalize": False, "auto_dismiss": False, "mode": "existing", "sync": "full"}
    server.qmp.execute("drive-mirror", device="vda", target=target.uri(), **manual)
    assert cli("wait", "--ready").returncode == DONE
    server.qmp.execute("query-version")  # hears events from now on
    server.qmp.execute("job-complete", id="vda")
    server.qmp.wait_status("pending", "vda")
    waiting = cli("wait", "--concluded", "--timeout", "2")
    assert (waiting.returncode, "nbdmirror finalize" in waiting.stderr) == (TIMED_OUT, True)
    assert served(cli) == str(disk)
    done = cli("finalize")
    assert (done.returncode, served(cli)) == (DONE, target.uri())
    assert f"served from {target.uri()}" in done.stdout
    assert "nbdmirror dismiss" in cli("status").stdout
    assert "nbdmirror dismiss" in cli("cancel").stderr
    assert cli("dismiss").stdout == "job vda is dismissed\n"
    identical(disk, target.image)


def test_copy_mode_and_speed(cli: Cli, disk: Path, target: QemuNbd, identical: Identical) -> None:
    assert cli("mirror", target.uri(), "--speed", "64K", "--buf-size", "64K").returncode == DONE
    assert "limit 64 KiB/s" in cli("status").stdout
    assert cli("copy-mode", "write-blocking").returncode == DONE
    assert cli("set-speed", "0").stdout == "job vda copies without a limit from now on\n"
    assert cli("wait", "--ready").returncode == DONE
    wait_until(lambda: "write-blocking (actively synced)" in cli("status").stdout, "in step")
    assert cli("copy-mode", "background").stdout == "job vda: copy mode background\n"
    assert cli("pause").stdout == "job vda is paused; continue with: nbdmirror resume\n"
    assert job_of(cli)["status"] == "standby"
    assert "standby (paused after READY)" in cli("status").stdout
    assert cli("resume").stdout == "job vda continues: ready\n"
    done = cli("cancel")
    copy = f"{target.uri()} is a consistent copy; disk vda is served from {disk}\n"
    assert done.stdout == f"job vda ended; {copy}"
    identical(disk, target.image)


def test_a_mirror_from_a_bitmap(
    cli: Cli, server: Nbdmirror, disk: Path, target: QemuNbd, identical: Identical
) -> None:
    """Copied once; what changes from then on is recorded, and copied alone."""
    assert "no bitmap monday" in cli("bitmap", "clear", "monday").stderr
    assert cli("bitmap", "add", "monday", "--granularity", "4K").returncode == DONE
    assert "already" in cli("bitmap", "add", "monday").stderr
    assert "--state-dir" in cli("bitmap", "add", "b", "--persistent").stderr
    assert cli("mirror", target.uri(), "--wait", "completed").returncode == DONE
    uri = server.uri("vda")
    run("qemu-io", "-f", "raw", "-c", "write -P 0x22 64k 64k", "-c", "flush", uri)
    assert "monday: 64 KiB dirty, granularity 4 KiB, recording" in cli("bitmap", "list").stdout
    assert "disabled" in cli("bitmap", "disable", "monday").stdout
    assert cli("bitmap", "add", "all", "--disabled").returncode == DONE
    assert "all: 64 KiB dirty" in cli("bitmap", "merge", "all", "monday").stdout
    assert "no bitmap all any more" in cli("bitmap", "remove", "all").stdout
    back = QemuNbd(disk.parent, disk)
    with back:
        copied = ["--sync", "bitmap", "--bitmap", "monday", "--wait", "ready"]
        assert cli("mirror", back.uri(), *copied).returncode == DONE
        assert cli("cancel").returncode == DONE
        identical_now = disk.read_bytes() == target.image.read_bytes()
    assert identical_now
    identical(disk, target.image)


def test_a_server_whose_control_socket_was_removed(
    start: Start, server: Nbdmirror, disk: Path
) -> None:
    """It is not taken for the one that has the place now."""
    server.qmp_path.unlink()
    gone = f"{server.qmp_path}  process {server.pid}\n  no server at {server.qmp_path} "
    listed = nbdmirror("list").stdout
    assert gone in listed
    assert "its control socket was removed (SIGTERM ends it in order)" in listed
    other = Nbdmirror(disk.parent, f"vdb={make_image(disk.parent / 'other.img', MiB)}")
    other.qmp_path = server.qmp_path
    with other:
        listed = nbdmirror("list").stdout
        text = f"the control socket was removed, and process {other.pid} has its place now"
        assert f"{server.qmp_path}  process {server.pid}\n  {text}" in listed
        assert f"{server.qmp_path}  process {other.pid}\n  vdb  1 MiB" in listed


def test_the_servers_of_this_host(server: Nbdmirror, disk: Path) -> None:
    """Among others that run beside this test."""
    done = nbdmirror("list", "--json")
    found = {one["qmp"]: one for one in json.loads(done.stdout)}
    ours = found[str(server.qmp_path)]
    assert (ours["pid"], ours["disks"][0]["source"]) == (server.pid, str(disk))
    assert f"{server.qmp_path}  process {server.pid}\n  vda  4 MiB" in nbdmirror("list").stdout
