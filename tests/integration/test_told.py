"""What the server knows and an operator needs is in its status, in events and in its log: how a job
ended though nobody was there, a target that is lost, an ending that is asked for, the copy mode."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from support.clients import connected
from support.fixtures import Identical, Start
from support.images import MiB, make_noise
from support.processes import freeze, nbdmirror, run
from support.qmpclient import Qmp
from support.servers import Nbdmirror, QemuNbd
from support.waiting import wait_until

SIZE = 4 * MiB
SLOW = {"speed": 64 << 10, "buf_size": 64 << 10}


@pytest.fixture
def server(start: Start, disk: Path, target: QemuNbd) -> Nbdmirror:
    return start(Nbdmirror(disk.parent, f"vda={disk}", bare=True))


@pytest.fixture
def qmp(server: Nbdmirror) -> Qmp:
    return server.qmp


def job_of(qmp: Qmp) -> dict[str, Any]:
    (found,) = qmp.disk()["jobs"]
    return dict(found)


def begin(qmp: Qmp, target: QemuNbd, **options: Any) -> None:
    arguments = {"device": "vda", "target": target.uri(), "mode": "existing", "sync": "full"}
    qmp.execute("drive-mirror", **arguments, **options)


def ended(qmp: Qmp) -> dict[str, Any]:
    """How the last job ended, when it has."""
    return dict(wait_until(lambda: qmp.disk().get("last-job"), "the job has ended"))


# How the last job of a disk ended


@pytest.mark.guarantee("How a job ended is known afterwards")
def test_a_job_that_completed(
    qmp: Qmp, server: Nbdmirror, disk: Path, target: QemuNbd, identical: Identical
) -> None:
    assert "last-job" not in qmp.disk()
    begin(qmp, target)
    qmp.wait_ready("vda")
    qmp.execute("job-complete", id="vda")
    told = ended(qmp)
    assert told.pop("ended-at-s") > 1.7e9
    pause_ms = told.pop("pause-ms")
    said = {"id": "vda", "target": target.uri(), "result": "completed", "pivoted": True}
    assert told == said | {"sync": "full"}
    assert qmp.disk()["source"] == target.uri()
    line = f"disk vda is served from {target.uri()}, before from {disk}; writes held {pause_ms:.1f}"
    wait_until(lambda: line in server.stderr, "the log has it")
    identical(disk, target.image)


@pytest.mark.parametrize("is_ready", [True, False])
def test_a_job_that_was_cancelled(
    qmp: Qmp, server: Nbdmirror, disk: Path, target: QemuNbd, is_ready: bool
) -> None:
    begin(qmp, target, **({} if is_ready else SLOW))
    if is_ready:
        qmp.wait_ready("vda")
        qmp.execute("block-job-cancel", device="vda")
    else:
        qmp.execute("job-cancel", id="vda")
    told = ended(qmp)
    assert (told["result"], told["pivoted"]) == ("completed" if is_ready else "cancelled", False)
    assert told.get("reason") == (None if is_ready else "cancelled by force")
    line = "is a consistent copy" if is_ready else "cancelled by force; "
    wait_until(lambda: line in server.stderr, "the log has it")
    assert f"disk vda is served from {disk} as before" in server.stderr


@pytest.mark.parametrize("ending", ["cancel", "complete"])
def test_a_target_that_is_no_copy(
    server: Nbdmirror, qmp: Qmp, disk: Path, target: QemuNbd, ending: str
) -> None:
    """With sync none, of which no command says that it is one."""
    before = target.image.read_bytes()
    words = "has what sync none copies, and elsewhere its old content"
    begun = nbdmirror("mirror", target.uri(), "--sync", "none", "--qmp", server.qmp_path)
    assert f"; at its end the target {words}; see: " in begun.stdout
    qmp.wait_ready("vda")
    with connected(server.uri("vda")) as guest:
        guest.pwrite(b"new" + bytes(MiB - 3), MiB)
    done = nbdmirror(ending, "--qmp", server.qmp_path)
    assert words in done.stdout and "is a consistent copy" not in done.stdout
    assert ended(qmp)["sync"] == "none"
    assert words in nbdmirror("status", "--qmp", server.qmp_path).stdout
    wait_until(lambda: f"{target.uri()} {words}" in server.stderr, "the log has it")
    assert target.image.read_bytes() == before[:MiB] + b"new" + bytes(MiB - 3) + before[2 * MiB :]


@pytest.mark.guarantee("How a job ended is known afterwards")
def test_a_job_that_failed_while_nobody_looked(
    qmp: Qmp, server: Nbdmirror, target: QemuNbd
) -> None:
    begin(qmp, target, **SLOW)
    target.kill()
    told = ended(qmp)
    assert (told["result"], told["pivoted"]) == ("failed", False)
    assert told["reason"] == f"{target.uri()}: connection lost"
    wait_until(lambda: f"failed: {told['reason']}; " in server.stderr, "the log has it")


def test_a_job_that_never_fitted(qmp: Qmp, server: Nbdmirror, start: Start, folder: Path) -> None:
    server.allowed = ["the source has"]
    small = start(QemuNbd(folder, make_noise(folder / "small.img", SIZE // 2)))
    begin(qmp, small)
    assert ended(qmp)["reason"] == "Source and target image have different sizes"


def test_the_server_that_ends_is_why(
    qmp: Qmp, server: Nbdmirror, disk: Path, target: QemuNbd
) -> None:
    begin(qmp, target, **SLOW)
    server.stop()
    assert "job vda: cancelled: the server ended; " in server.stderr


# What is under way


def test_a_target_that_is_lost_and_comes_back(
    qmp: Qmp, server: Nbdmirror, disk: Path, target: QemuNbd, identical: Identical
) -> None:
    begin(qmp, target, **SLOW, x_nbdmirror_reconnect_delay=60)
    wait_until(lambda: "copy-bytes-per-s" in job_of(qmp), "a rate is known")
    target.kill()
    lost = qmp.wait_for_event("X_NBDMIRROR_TARGET_LOST")
    assert lost == {"device": "vda", "id": "vda", "target": target.uri(), "wait-s": 60.0}
    job = job_of(qmp)
    assert (job["status"], job["target-connected"]) == ("running", False)
    assert 0 <= job["target-lost-for-s"] < 60
    assert 0 < job["target-wait-left-s"] <= 60
    assert "copy-bytes-per-s" not in job
    qmp.execute("block-job-set-speed", device="vda", speed=0)
    target.come_back()
    assert qmp.wait_for_event("X_NBDMIRROR_TARGET_BACK")["lost-for-s"] > 0
    qmp.wait_ready("vda")
    job = job_of(qmp)
    assert job["target-connected"]
    assert not {"target-lost-for-s", "target-wait-left-s"} & set(job)
    for line in (
        f"target {target.uri()} is lost: reconnecting for 60 s",
        f"{target.uri()} is back after",
    ):
        assert line in server.stderr
    qmp.execute("block-job-cancel", device="vda")
    ended(qmp)
    identical(disk, target.image)


@pytest.mark.parametrize("ending", ["complete", "cancel"])
def test_an_ending_that_waits_for_a_target_that_hangs(
    qmp: Qmp, disk: Path, target: QemuNbd, ending: str, identical: Identical
) -> None:
    begin(qmp, target)
    qmp.wait_ready("vda")
    assert job_of(qmp)["ending"] == "none"
    freeze(target.pid)
    try:
        qmp.execute(f"block-job-{ending}", device="vda")
        job = wait_until(
            lambda: (job := job_of(qmp)).get("target-silent-for-s") and job, "that it hangs is seen"
        )
        assert (job["ending"], job["status"]) == (ending, "ready")
        assert job["ending-for-s"] >= 0
        assert "source-silent-for-s" not in job
    finally:
        os.kill(target.pid, signal.SIGCONT)
    assert ended(qmp)["pivoted"] is (ending == "complete")
    identical(disk, target.image)


def test_an_error_that_stopped_the_job(qmp: Qmp, target: QemuNbd) -> None:
    begin(qmp, target, **SLOW, on_target_error="stop")
    target.kill()
    qmp.wait_for_event("BLOCK_JOB_ERROR")
    qmp.wait_status("paused", "vda")
    reason = f"{target.uri()}: connection lost"
    job = job_of(qmp)
    error = job["last-error"]
    assert error.pop("ago-s") >= 0
    assert error == {"operation": "write", "action": "stop", "reason": reason}
    assert not job["target-connected"]


def test_the_copy_mode(qmp: Qmp, disk: Path, target: QemuNbd, identical: Identical) -> None:
    begin(qmp, target)
    qmp.wait_ready("vda")
    assert (job_of(qmp)["copy-mode"], job_of(qmp)["actively-synced"]) == ("background", False)
    qmp.execute("block-job-change", id="vda", type="mirror", copy_mode="write-blocking")
    wait_until(lambda: job_of(qmp)["actively-synced"], "writes reach both sides")
    assert job_of(qmp)["copy-mode"] == "write-blocking"
    qmp.execute("block-job-cancel", device="vda")
    ended(qmp)
    identical(disk, target.image)


def test_how_far_the_target_is_behind(
    qmp: Qmp, server: Nbdmirror, disk: Path, target: QemuNbd, identical: Identical
) -> None:
    begin(qmp, target, **SLOW)
    assert "lag-s" not in job_of(qmp), "before READY the target is nothing yet"
    qmp.execute("block-job-set-speed", device="vda", speed=0)
    qmp.wait_ready("vda")
    wait_until(lambda: job_of(qmp)["lag-s"] == 0, "nobody writes")
    qmp.execute("job-pause", id="vda")
    qmp.wait_status("standby", "vda")
    run("qemu-io", "-f", "raw", "-c", "write -P 0x33 0 64k", server.uri("vda"))
    wait_until(lambda: job_of(qmp)["lag-s"] > 0.5, "the write gets older")
    qmp.execute("job-resume", id="vda")
    wait_until(lambda: job_of(qmp)["lag-s"] == 0, "it is copied")
    qmp.execute("block-job-cancel", device="vda")
    ended(qmp)
    identical(disk, target.image)


def test_bitmaps(qmp: Qmp) -> None:
    qmp.execute("block-dirty-bitmap-add", node="vda", name="monday", granularity=65536)
    (bitmap,) = qmp.disk()["bitmaps"]
    assert (bitmap["name"], bitmap["count"], bitmap["granularity"]) == ("monday", 0, 65536)


def test_a_file_that_is_gone(qmp: Qmp, disk: Path, server: Nbdmirror) -> None:
    assert "problem" not in qmp.disk()
    disk.rename(disk.with_name("moved"))
    assert wait_until(lambda: qmp.disk().get("problem"), "it is noticed")
    server.allowed = ["disk vda: "]


# The log


def test_the_server_itself(qmp: Qmp, server: Nbdmirror) -> None:
    status = qmp.execute("x-nbdmirror-query-status")
    assert status["pid"] == server.pid
    assert status["package"].startswith("nbdmirror ")
    assert status["started-at-s"] > 1.7e9


def test_the_log_says_which_signal_ended_it(server: Nbdmirror) -> None:
    os.kill(server.pid, signal.SIGHUP)
    wait_until(lambda: "SIGHUP: the server is ending" in server.stderr, "it says why")


def test_the_log_says_what_is_served_and_when(server: Nbdmirror, disk: Path) -> None:
    time = r"nbdmirror: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO: "
    assert re.search(f"^{time}disk vda: served from {disk}, {SIZE} bytes", server.stderr, re.M)
    assert f"control socket: {server.qmp_path}" in server.stderr


def test_why_a_target_is_lost_still(
    qmp: Qmp, server: Nbdmirror, disk: Path, target: QemuNbd
) -> None:
    """It has come back as another one, and waiting does not mend that."""
    begin(qmp, target, **SLOW, x_nbdmirror_reconnect_delay=60)
    target.kill()
    with target.image.open("r+b") as file:
        file.truncate(target.image.stat().st_size + MiB)
    target.come_back()
    wait_until(
        lambda: "came back changed" in str(job_of(qmp).get("target-lost-reason")), "why is told"
    )
    shown = nbdmirror("status", "--qmp", server.qmp_path).stdout
    assert "the target has been lost" in shown and "came back changed" in shown
    qmp.execute("block-job-cancel", device="vda", force=True)
    qmp.wait_for_event("BLOCK_JOB_CANCELLED")
