"""How the last job of a disk ended is known after a restart, and of one that goes on it is not
said that it has ended."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from integration.state.stateparts import End, begin, ends
from support.fixtures import Identical
from support.kept import Kept
from support.servers import QemuNbd
from support.waiting import wait_until

SLOW = {"speed": 64 << 10, "buf_size": 64 << 10}


@pytest.mark.guarantee("How a job ended is known afterwards")
@ends
def test_how_the_last_job_ended(server: Kept, target: QemuNbd, end: End) -> None:
    server.qmp.execute("block-dirty-bitmap-add", node="vda", name="b", persistent=True)
    begin(server, target, **SLOW)
    target.kill()
    told = wait_until(lambda: server.qmp.disk().get("last-job"), "it has failed")
    assert (told["result"], told["reason"]) == ("failed", f"{target.uri()}: connection lost")
    wait_until((server.state / "vda.last").exists, "that is kept")
    end(server)
    server.restart()
    assert server.qmp.disk()["last-job"] == told
    assert not server.qmp.disk()["jobs"]


def test_a_mirror_that_goes_on_has_not_ended(
    server: Kept, target: QemuNbd, disk: Path, identical: Identical
) -> None:
    begin(server, target, **SLOW)
    server.stop()
    assert "continues when the server starts again" in server.stderr
    assert "is unusable" not in server.stderr
    server.restart()
    assert "last-job" not in server.qmp.disk()
    server.qmp.execute("block-job-set-speed", device="j", speed=0)
    server.qmp.wait_ready()
    server.qmp.complete()
    assert server.qmp.disk()["last-job"]["pivoted"]
    identical(disk, target.image)


@pytest.mark.guarantee("How a job ended is known afterwards")
@ends
def test_a_mirror_that_the_next_start_cannot_continue(
    server: Kept, target: QemuNbd, disk: Path, end: End
) -> None:
    """The disk has grown meanwhile. The log is not where somebody looks who waits for that job."""
    server.allowed += ["everything counts as dirty", "its mirror is not resumed"]
    begin(server, target, **SLOW)
    end(server)
    os.truncate(disk, 2 * disk.stat().st_size)
    for _ in range(2):  # the first start that cannot, and each later one
        server.restart()
        assert not server.qmp.disk()["jobs"]
        last = server.qmp.disk()["last-job"]
        assert (last["id"], last["result"]) == ("j", "failed")
        assert last["reason"] == (
            "could not continue after the server's start: "
            f"the target has {disk.stat().st_size // 2} bytes, the disk {disk.stat().st_size}"
        )
        wait_until((server.state / "vda.last").exists, "that is kept")
        server.stop()


def test_a_file_that_is_damaged_is_forgotten(server: Kept, target: QemuNbd) -> None:
    """Nothing depends on it, so the server starts."""
    server.stop()
    (server.state / "vda.last").write_text("nbdmirror last 1 2 3\n{}")
    server.restart()
    assert "last-job" not in server.qmp.disk()
    assert "the result of its last job is not known" in server.stderr
