"""A running job changes to points, and back to another copy mode, under a guest's writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from integration.mirror.points.pointsparts import (
    SIZE,
    FarSide,
    points_of,
    wait_for_points,
    wait_for_rest,
)
from integration.state.stateparts import End, ends
from support.clients import connected
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import MiB, make_image
from support.kept import Kept
from support.processes import ROOT, nbdmirror
from support.servers import NbdkitTarget, QemuNbd
from support.waiting import WAIT_S_MAX, wait_until

BEHIND = {"x_nbdmirror_reconnect_delay": 60}


@pytest.fixture
def server(start: Start, folder: Path) -> Kept:
    server = start(Kept(folder, make_image(folder / "disk.img", SIZE)))
    server.allowed.append(".*")  # nbdkit complains of guests that it ends on
    return server


def change(server: Kept, mode: str, *options: str) -> str:
    done = nbdmirror("copy-mode", mode, *options, "--qmp", str(server.qmp_path))
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(server: Kept, mode: str, *options: str) -> str:
    done = nbdmirror("copy-mode", mode, *options, "--qmp", str(server.qmp_path))
    assert done.returncode and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def begin(server: Kept, far: FarSide, **options: int) -> None:
    server.qmp.start_mirror(far.image_server.uri(), device="vda", **BEHIND, **options)
    server.qmp.wait_ready()


def has_points(server: Kept) -> bool:
    return "x-nbdmirror-points" in server.qmp.job()


def test_there_and_back_under_a_guest(
    server: Kept, far: FarSide, folder: Path, identical: Identical
) -> None:
    begin(server, far)
    uri = far.journal_server.uri()
    guest = Guest(server.uri(), folder / "disk.img", connections=2)
    with guest:
        guest.wait_for_requests(20)
        told = change(server, "points", "--journal", uri, "--every", "100ms", "--keep", "1m")
        assert "copy mode points; there is no point before the event X_NBDMIRROR_POINT" in told
        server.qmp.wait_for_event("X_NBDMIRROR_POINT")
        wait_for_points(server, 3)
        assert points_of(server)["interval-s"] == 0.1
        listed = nbdmirror("points", str(far.journal)).stdout
        assert "no point" not in listed and "points" in listed
        guest.wait_for_requests(20)
        change(server, "write-blocking")
        wait_until(lambda: not has_points(server), "the job makes no points")
        assert "is being copied in place" in nbdmirror("points", str(far.journal)).stdout
        wait_until(lambda: server.qmp.job()["actively-synced"], "the target is actively synced")
        guest.wait_for_requests(20)
    server.qmp.complete()
    server.stop()
    far.stop()
    identical(guest, far.image)


@ends
def test_a_server_that_starts_again_knows_the_mode(
    server: Kept, far: FarSide, folder: Path, identical: Identical, end: End
) -> None:
    begin(server, far)
    change(server, "points", "--journal", far.journal_server.uri(), "--every", "100ms")
    server.qmp.wait_for_event("X_NBDMIRROR_POINT")
    end(server)
    server.restart()
    wait_until(lambda: server.qmp.job()["ready"], "the mirror continues")
    guest = Guest(server.uri(), folder / "disk.img")
    with guest:
        guest.wait_for_requests(10)
        wait_for_points(server, 2)
    wait_for_rest(server)
    change(server, "background")
    wait_until(lambda: not has_points(server), "the job makes no points")
    end(server)
    server.restart()
    wait_until(lambda: server.qmp.job()["ready"], "the mirror continues")
    assert not has_points(server)
    server.qmp.complete()
    server.stop()
    far.stop()
    identical(guest, far.image)


@ends
def test_what_is_in_no_point_is_not_forgotten(
    server: Kept, far: FarSide, folder: Path, identical: Identical, end: End
) -> None:
    """What was dirty as a part of no point is dirty as a part of the mirror, before the points
    leave the state directory."""
    begin(server, far, buf_size=1 << 16)  # what a limit of speed lets pass at first
    change(server, "points", "--journal", far.journal_server.uri(), "--every", "1h")
    server.qmp.wait_for_event("X_NBDMIRROR_POINT")
    with connected(server.uri()) as client:
        client.pwrite(b"n" * 4 * MiB, MiB)
        client.flush()
    # Saves all bits: those of the points have what was written, those of the mirror have not.
    bitmap = {"node": "vda", "name": "b", "persistent": True}
    server.qmp.execute("block-dirty-bitmap-add", **bitmap)
    server.qmp.execute("block-job-set-speed", device="j", speed=1)
    change(server, "background")
    wait_until(lambda: not has_points(server), "the job makes no points")
    end(server)
    server.restart()
    server.qmp.execute("block-job-set-speed", device="j", speed=0)
    wait_until(lambda: server.qmp.job()["ready"], "the mirror continues")
    server.qmp.complete()
    server.stop()
    far.stop()
    identical(folder / "disk.img", far.image)


@ends
@pytest.mark.parametrize("mode", ["background", "write-blocking"])
def test_a_change_that_was_answered_goes_on_after_a_restart(
    server: Kept, far: FarSide, folder: Path, identical: Identical, end: End, mode: str
) -> None:
    begin(server, far)
    change(server, "points", "--journal", far.journal_server.uri(), "--every", "100ms")
    server.qmp.wait_for_event("X_NBDMIRROR_POINT")
    for one in (far.image_server, far.journal_server):
        os.kill(one.pid, signal.SIGSTOP)
    with connected(server.uri()) as client:
        client.pwrite(b"n" * MiB, MiB)
    change(server, mode)
    assert has_points(server)
    end(server)
    for one in (far.image_server, far.journal_server):
        os.kill(one.pid, signal.SIGCONT)
    server.restart()
    wait_until(lambda: not has_points(server), "the job makes no points")
    wait_until(lambda: server.qmp.job()["ready"], "the mirror continues")
    assert server.job_status()["copy-mode"] == mode
    guest = Guest(server.uri(), folder / "disk.img")
    with guest:
        guest.wait_for_requests(20)
    server.qmp.complete()
    server.stop()
    far.stop()
    identical(guest, far.image)


def test_of_two_changes_at_once_one_is_refused(
    server: Kept, far: FarSide, start: Start, folder: Path, identical: Identical
) -> None:
    begin(server, far)
    (folder / "second").mkdir()
    other = make_image(folder / "second" / "journal", 4 * MiB)
    os.truncate(other, 0)
    os.truncate(other, 4 * MiB)
    second = start(QemuNbd(folder / "second", other))
    os.kill(second.pid, signal.SIGSTOP)
    argv = ("copy-mode", "points", "--journal", second.uri(), "--qmp", str(server.qmp_path))
    slow = subprocess.Popen(
        [sys.executable, "-m", "nbdmirror", *argv],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    change(server, "points", "--journal", far.journal_server.uri())
    os.kill(second.pid, signal.SIGCONT)
    _, said = slow.communicate(timeout=WAIT_S_MAX)
    assert slow.returncode and "makes points already" in said
    assert not any(other.read_bytes())
    server.qmp.wait_for_event("X_NBDMIRROR_POINT")
    wait_for_rest(server)
    server.stop()
    far.stop()
    identical(folder / "disk.img", far.image)


def test_what_is_refused_changes_nothing(
    server: Kept, far: FarSide, start: Start, folder: Path, identical: Identical
) -> None:
    begin(server, far)
    other = start(NbdkitTarget(folder, "memory", "1M"))
    fixed = start(NbdkitTarget(folder, "memory", "8M", options=("-r",)))
    cases = {
        ("points",): "points: needs --journal",
        ("background", "--keep", "1m"): "--keep: needs the copy mode points",
        ("points", "--journal", other.uri()): "is too small",
        ("points", "--journal", fixed.uri()): "is read-only",
        ("points", "--journal", far.image_server.uri()): "Journal",
        ("points", "--journal", "nbd+unix:///?socket=/nothing"): "--journal: ",
        ("points", "--journal", far.journal_server.uri(), "--every", "10ms"): "expects 0.1 to",
    }
    for argv, message in cases.items():
        assert message in refused(server, *argv)
        assert server.qmp.job()["status"] == "ready" and not has_points(server)
    block = {"id": "j", "type": "mirror", "copy-mode": "points"}
    named = {key.replace("-", "_"): value for key, value in block.items()}
    change_it = "block-job-change"
    assert "needs 'x-nbdmirror-journal'" in server.qmp.refusal(change_it, **named)
    with_node = {**named, "x_nbdmirror_journal": "nowhere"}
    assert "nowhere" in server.qmp.refusal(change_it, **with_node)
    change(server, "points", "--journal", far.journal_server.uri())
    again = refused(server, "points", "--journal", far.journal_server.uri())
    assert "makes points already: --journal cannot be changed" in again
    paused = {**named, "x_nbdmirror_max_pause": 5}
    assert "accepts no 'x-nbdmirror-max-pause'" in server.qmp.refusal(change_it, **paused)
    server.qmp.wait_for_event("X_NBDMIRROR_POINT")
    wait_for_rest(server)
    server.stop()
    far.stop()
    identical(folder / "disk.img", far.image)


def test_a_job_with_promises_makes_no_points(
    server: Kept, far: FarSide, folder: Path, identical: Identical
) -> None:
    server.qmp.start_mirror(far.image_server.uri(), device="vda", x_nbdmirror_max_pause=1000)
    server.qmp.wait_ready()
    line = refused(server, "points", "--journal", far.journal_server.uri())
    assert "Copy mode 'points' accepts no --max-pause" in line
    server.qmp.complete()
    server.stop()
    far.stop()
    identical(folder / "disk.img", far.image)
