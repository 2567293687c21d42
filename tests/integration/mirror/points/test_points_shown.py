"""What is shown of a mirror with points: how much is sent for what guests change, where on the disk
something is left to do, and what is waited for."""

from __future__ import annotations

import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from integration.mirror.points.pointsparts import (
    RING_BYTES,
    SIZE,
    FarSide,
    wait_for_points,
    wait_for_rest,
)
from support.clients import connected
from support.fixtures import Identical
from support.guests import Guest
from support.images import KiB, MiB
from support.processes import nbdmirror
from support.servers import Nbdmirror
from support.waiting import wait_until

WRITE = 64 * KiB
WRITES = 16


def job_of(server: Nbdmirror) -> dict[str, Any]:
    (disk,) = server.qmp.execute("x-nbdmirror-query-status")["disks"]
    (job,) = disk["jobs"]
    return dict(job)


def map_of(server: Nbdmirror) -> dict[str, list[int]]:
    """Two cells."""
    return dict(server.qmp.execute("x-nbdmirror-query-job-map", id="j", cells=2))


@pytest.fixture
def ready(server: Nbdmirror, far: FarSide) -> Nbdmirror:
    far.start_mirror(server)
    server.qmp.wait_ready()
    wait_for_rest(server)
    return server


def test_what_is_sent_for_what_guests_change(
    ready: Nbdmirror, far: FarSide, identical: Identical
) -> None:
    """Each change goes to the journal and to the image, with little beside it."""
    wait_until(lambda: "copy-bytes-per-s" in job_of(ready), "rates are measured")
    before = job_of(ready)
    with connected(ready.uri()) as guest:
        for number in range(WRITES):
            guest.pwrite(bytes([number + 1]) * WRITE, number * WRITE)
    wait_for_rest(ready)
    job = job_of(ready)
    changed = job["changed-bytes"] - before["changed-bytes"]
    sent = job["sent-bytes"] - before["sent-bytes"]
    assert changed == WRITES * WRITE
    assert 2 * changed <= sent < 2.3 * changed, "points have an index, and superblocks"
    assert job["copy-bytes-per-s"] >= job["dirty-bytes-per-s"] > 0 == job["zero-bytes-per-s"]
    assert "left-s" not in job or job["left-s"] == 0
    shown = nbdmirror("status", "--qmp", ready.qmp_path).stdout
    assert "copying " in shown and " changed (2." in shown
    ready.qmp.complete()
    ended = [e["data"] for e in ready.qmp.events if e["event"] == "BLOCK_JOB_COMPLETED"]
    assert ended[0]["x-nbdmirror-changed-bytes"] == job["changed-bytes"]
    assert ended[0]["x-nbdmirror-sent-bytes"] >= job["sent-bytes"]
    identical(far.image_server.uri(), ready.uri())


def test_a_far_side_that_hangs_is_what_the_job_waits_for(
    ready: Nbdmirror, far: FarSide, identical: Identical
) -> None:
    """What guests change since the cut is dirty, what they changed before is on its way."""
    with connected(ready.uri()) as guest:
        guest.pwrite(os.urandom(SIZE), 0)
    wait_for_rest(ready)
    assert map_of(ready)["zero"] == [0, 0]
    os.kill(far.journal_server.pid, signal.SIGSTOP)
    try:
        with connected(ready.uri()) as guest:
            guest.pwrite(b"a" * WRITE, 0)
            wait_until(lambda: job_of(ready)["in-flight-bytes"], "a point is on its way")
            guest.pwrite(b"b" * MiB, SIZE - MiB)
        wait_until(lambda: job_of(ready)["waits"]["now"] == "target-write", "that is noticed")
        job, found = job_of(ready), map_of(ready)
        assert job["in-flight-bytes"] == WRITE and job["dirty-bytes"] == MiB
        assert (found["in-flight"], found["dirty"]) == ([WRITE, 0], [0, MiB])
        wait_until(lambda: job_of(ready)["waits"]["seconds"]["target-write"] > 2, "it counts")
        wait_until(lambda: job_of(ready).get("target-silent-for-s", 0) > 1, "the silence is told")
    finally:
        os.kill(far.journal_server.pid, signal.SIGCONT)
    wait_for_rest(ready)
    found = map_of(ready)
    assert sum(found["in-flight"] + found["dirty"] + found["unflushed"]) == 0
    with connected(ready.uri()) as guest:
        guest.zero(4 * MiB, 0)
    wait_for_rest(ready)
    assert map_of(ready)["zero"] == [4 * MiB, 0]
    with connected(ready.uri()) as guest:
        guest.pwrite(b"c" * MiB, MiB)
    wait_for_rest(ready)
    assert map_of(ready)["zero"] == [3 * MiB, 0]
    shares = job_of(ready)["waits"]["since-start"]
    assert math.isclose(sum(shares.values()), 1, abs_tol=1e-3)
    ready.qmp.complete()
    identical(far.image_server.uri(), ready.uri())


def test_how_long_an_outage_the_journal_survives(
    server: Nbdmirror, far: FarSide, disk: Path, identical: Identical
) -> None:
    """It is said at the start, while the first copy is under way as well, and an event comes when
    the next point takes much of the journal."""
    server.qmp.execute("query-version")  # hears events from now on
    with Guest(server.uri(), disk) as guest:
        identical(guest, far.image_server.uri())
        argv = ("mirror", far.image_server.uri(), "--journal", far.journal_server.uri())
        begun = nbdmirror(*argv, "--job", "j", "--speed", "64K", "--qmp", server.qmp_path)
        assert begun.returncode == 0
        pattern = (
            r"the journal of job j: it has room for an outage of \d+:\d\d while guests change .*/s"
        )
        assert re.fullmatch(pattern, begun.stderr.rstrip())
        assert "running" in begun.stdout
        nbdmirror("set-speed", "0", "--qmp", server.qmp_path)
        server.qmp.wait_ready()
        os.kill(far.journal_server.pid, signal.SIGSTOP)
        try:
            small = server.qmp.wait_for_event("X_NBDMIRROR_JOURNAL")
        finally:
            os.kill(far.journal_server.pid, signal.SIGCONT)
        assert small["enough"] is False
        assert small["point-bytes"] >= small["left-bytes"] > small["point-bytes"] / 2
        points = job_of(server)["x-nbdmirror-points"]
        assert points["journal-point-bytes"] == small["point-bytes"] < RING_BYTES
        assert points["journal-enough"] is False and points["change-bytes-per-s"] > 0
        wait_for_points(server, 1)
        server.qmp.complete()
    server.wait_to_say("INFO: job j: waiting -> pending")
    assert re.search("job j: the next point takes .* of the .* that the journal", server.stderr)
