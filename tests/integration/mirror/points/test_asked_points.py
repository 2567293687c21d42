"""Points that a user asks for, and names: `nbdmirror point`, and what comes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from integration.mirror.points.pointsparts import (
    FarSide,
    last_point,
    left_bytes,
    wait_for_rest,
)
from support.clients import connected
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import KiB, MiB, assert_identical
from support.processes import nbdmirror, nbdmirror_environment, patched
from support.servers import Nbdmirror
from support.waiting import WAIT_S_MAX, wait_until


def names(far: FarSide) -> list[str]:
    listed = nbdmirror("points", far.journal_server.uri())
    assert listed.returncode == 0, listed.stderr
    return [word for word in ("one", "before upgrade", "später") if word in listed.stdout]


def test_a_named_point_is_what_the_disk_was(
    server: Nbdmirror, far: FarSide, disk: Path, identical: Identical
) -> None:
    """Listed, served and recovered by its name, as long as the journal has it."""
    control = ("--qmp", str(server.qmp_path))
    with Guest(server.uri(), disk) as guest:
        far.start_mirror(server)
        server.qmp.wait_ready()
        guest.wait_for_requests(40)
    content = bytes(guest.model)
    done = nbdmirror("point", "--name", "before upgrade", "--wait", *control)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"job j: the far side has point {last_point(server)} (before upgrade)\n"
    points = [e["data"] for e in server.qmp.events if e["event"] == "X_NBDMIRROR_POINT"]
    assert [p["sequence"] for p in points if "name" in p] == [last_point(server)]
    (job,) = server.qmp.execute("query-block-jobs")
    assert job["x-nbdmirror-points"]["name"] == "before upgrade"
    assert names(far) == ["before upgrade"]
    server.kill()
    far.stop()
    identical(disk, far.recover("--point", "before upgrade"))
    assert_identical(content, far.image.read_bytes())


def test_a_name_is_free_again_when_its_point_has_gone(
    server: Nbdmirror, far: FarSide, disk: Path, identical: Identical
) -> None:
    control = ("--qmp", str(server.qmp_path))
    far.start_mirror(server, x_nbdmirror_interval=86400)
    server.qmp.wait_ready()
    first = last_point(server)
    for _ in range(2):  # with nothing changed
        for name in ("one", "später"):
            done = nbdmirror("point", "--name", name, "--wait", *control)
            assert done.returncode == 0, done.stderr
            wait_for_rest(server)
    assert last_point(server) == first + 4
    again = nbdmirror("point", "--name", "später", *control)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == "nbdmirror: The journal of job 'j' has a point 'später' already\n"
    with connected(server.uri()) as guest:
        guest.pwrite(b"x" * 64 * KiB, MiB)
    taken = nbdmirror("point", *control)
    number = first + 5
    assert taken.stdout == f"job j: point {number} is taken, and on its way to the far side\n"
    wait_until(lambda: last_point(server) == number, "the point")
    assert left_bytes(server) == 0
    server.kill()
    far.stop()
    refused = nbdmirror(
        "recover", "--image", str(far.image), "--journal", str(far.journal), "--point", "one"
    )
    assert refused.returncode == 1 and "has no point 'one'" in refused.stderr
    identical(disk, far.recover())


def test_what_is_refused(server: Nbdmirror, far: FarSide, disk: Path, identical: Identical) -> None:
    """With one line, and neither image nor journal is touched."""
    control = ("--qmp", str(server.qmp_path))

    def refused(text: str, *argv: str, status: int = 1) -> None:
        before = far.image.read_bytes(), far.journal.read_bytes()
        done = nbdmirror("point", *argv, *control)
        assert (done.returncode, done.stdout) == (status, "")
        assert text in done.stderr and done.stderr.count("\n") == 1, done.stderr
        is_same = (far.image.read_bytes(), far.journal.read_bytes()) == before
        assert is_same, "the image or the journal has changed"

    refused("there is no job (start one with")
    refused("there is no job k", "--job", "k")
    server.qmp.start_mirror(far.image_server.uri())
    server.qmp.wait_ready()
    refused("Job 'j' makes no points: its copy mode is 'background'")
    server.qmp.execute("job-cancel", id="j")
    server.qmp.wait_for_event("BLOCK_JOB_CANCELLED")
    far.start_mirror(server, speed=1)
    assert "makes no points yet: the image is" in server.qmp.refusal("x-nbdmirror-point", id="j")
    server.qmp.execute("block-job-set-speed", device="j", speed=0)
    server.qmp.wait_ready()
    done = nbdmirror("point", "--name", "one", "--wait", *control)
    assert done.returncode == 0, done.stderr
    wait_for_rest(server)
    for name, text in {
        "": "--name: is empty",
        "a\tb": "--name: 'a\\tb' has control characters",
    }.items():
        refused(text, "--name", name, status=2)
    for name, text in {
        "17": "'17' is a number: a point's name must not look like one",
        "2026-11-28": "'2026-11-28' is a time: a point's name must not look like one",
        "2026-11-28 18:09:37+0100": "is a time",
        " one": "spaces at an end",
        "zero\u200bwidth": "cannot be printed",
        "ü" * 128: "has at most 255 bytes, and this one has 256",
        "one": "has a point 'one' already",
    }.items():
        refused(text, "--name", name)
    assert server.qmp.refusal("x-nbdmirror-point", id="k") == "Job not found"
    assert "must not be empty" in server.qmp.refusal("x-nbdmirror-point", id="j", name="")
    server.qmp.execute("job-pause", id="j")
    server.qmp.wait_status("standby")
    refused("job j is paused")
    server.qmp.execute("job-resume", id="j")
    server.qmp.wait_status("ready")
    server.qmp.execute("block-job-cancel", device="j")
    server.qmp.wait_completed()
    far.stop()
    identical(disk, far.recover())


@pytest.mark.parametrize("end", ["the job", "the far side", "pause"])
def test_a_point_that_is_waited_for_and_does_not_come(
    server: Nbdmirror, far: FarSide, disk: Path, identical: Identical, end: str
) -> None:
    far.start_mirror(server, x_nbdmirror_reconnect_delay=60)
    server.qmp.wait_ready()
    wait_for_rest(server)
    before = disk.read_bytes()
    os.kill(far.journal_server.pid, signal.SIGSTOP)
    is_stopped = True
    argv = [sys.executable, "-m", "nbdmirror", "point", "--name", "one", "--wait"]
    with (
        connected(server.uri()) as guest,
        subprocess.Popen(
            [*argv, "--qmp", str(server.qmp_path)],
            env=nbdmirror_environment(),
            stderr=subprocess.PIPE,
            text=True,
        ) as command,
    ):
        wait_until(lambda: server.qmp.job()["busy"], "the point is on its way")
        guest.pwrite(b"y" * MiB, 0)
        if end == "the far side":
            far.journal_server.kill()
            is_stopped = False
        else:
            verb = "job-cancel" if end == "the job" else "job-pause"
            server.qmp.execute(verb, id="j")
        if end == "pause":
            os.kill(far.journal_server.pid, signal.SIGCONT)
            is_stopped = False
        _, said = command.communicate(timeout=WAIT_S_MAX)
        assert command.returncode == 1
        assert said.startswith("nbdmirror: Job 'j' has not made the point: "), said
        assert said.count("\n") == 1
    if is_stopped:
        os.kill(far.journal_server.pid, signal.SIGCONT)
    server.stop()
    far.stop()
    identical(before, far.recover())


class Impatient(Nbdmirror):
    """Looks for a moment for a short time only."""

    def environment(self) -> dict[str, str]:
        code = "import nbdmirror.mirror.points_view as p\np.REQUEST_S_MAX = 0.3\n"
        return patched(super().environment(), self.folder, code)


def test_a_frozen_guest_is_not_held_for_ever(
    start: Start, far: FarSide, disk: Path, identical: Identical
) -> None:
    """The point in progress does not end, so no moment is found for the one that is asked for."""
    server = start(Impatient(disk.parent, disk, bare=True))
    far.start_mirror(server)
    server.qmp.wait_ready()
    wait_for_rest(server)
    before = disk.read_bytes()
    os.kill(far.journal_server.pid, signal.SIGSTOP)
    try:
        first = nbdmirror("point", "--qmp", str(server.qmp_path))
        assert first.returncode == 0, first.stderr
        with connected(server.uri()) as guest:
            guest.pwrite(b"z" * MiB, 0)
        late = nbdmirror("point", "--name", "one", "--qmp", str(server.qmp_path))
    finally:
        os.kill(far.journal_server.pid, signal.SIGCONT)
    assert late.returncode == 1
    text = "Job 'j' has not made the point: no moment was found for it within 0.3 s"
    assert late.stderr == f"nbdmirror: {text}\n"
    wait_for_rest(server)
    after = disk.read_bytes()
    assert after != before
    server.stop()
    far.stop()
    identical(after, far.recover())
