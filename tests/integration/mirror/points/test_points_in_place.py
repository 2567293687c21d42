"""A point that does not fit into the journal, where that may cost all points: the image is copied
in place, and points begin anew."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from integration.mirror.points.pointsparts import (
    SIZE,
    FarSide,
    last_point,
    points_of,
    stop_at_rest,
    wait_for_points,
    wait_for_rest,
)
from integration.state.stateparts import End, ends
from support.clients import connected
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import MiB, make_image
from support.kept import Kept
from support.processes import nbdmirror
from support.servers import Nbdmirror
from support.waiting import wait_until

from nbdmirror.points.format import RING_BYTES_MIN

IN_PLACE = {"x_nbdmirror_on_journal_full": "in-place", "x_nbdmirror_reconnect_delay": 60}


@pytest.fixture
def far(start: Start, folder: Path) -> FarSide:
    return FarSide(start, folder, ring=RING_BYTES_MIN)


@pytest.fixture
def server(start: Start, folder: Path) -> Kept:
    server = start(Kept(folder, make_image(folder / "disk.img", SIZE)))
    server.allowed.append(".*")  # nbdkit complains of guests that it ends on
    return server


def change_too_much(server: Nbdmirror, fill: bytes = b"x") -> None:
    """In one request, so in one point."""
    with connected(server.uri()) as guest:
        guest.pwrite(fill * 8 * MiB, MiB)


def lag_of(server: Kept) -> float:
    return float(str(server.job_status()["lag-s"]))


def begin_in_place(server: Kept, far: FarSide) -> None:
    """And go no further: the speed is limited, which limits what is copied in place alone."""
    far.start_mirror(server, device="vda", **IN_PLACE)
    server.qmp.wait_ready()
    server.qmp.execute("block-job-set-speed", device="j", speed=1)
    change_too_much(server)
    server.qmp.wait_for_event("X_NBDMIRROR_IN_PLACE")


@pytest.mark.parametrize("keep_s", [0, 3600])
def test_points_begin_anew(
    server: Kept, far: FarSide, folder: Path, identical: Identical, keep_s: int
) -> None:
    """Also if the journal keeps points, which the image must hold first."""
    far.start_mirror(server, device="vda", x_nbdmirror_keep=keep_s, **IN_PLACE)
    server.qmp.wait_ready()
    before = last_point(server)
    with connected(server.uri()) as guest:
        guest.pwrite(b"a" * 4096, 0)
    if keep_s:
        wait_until(lambda: last_point(server) > before, "there is a point more")
    else:
        wait_for_rest(server)
    change_too_much(server)
    told = server.qmp.wait_for_event("X_NBDMIRROR_IN_PLACE")
    assert told["bytes"] >= 8 * MiB and told["since-s"] > 0
    after = server.qmp.wait_for_event("X_NBDMIRROR_POINT")
    assert after["bytes"] < 8 * MiB, "most of it was copied in place"
    assert "in-place-since-s" not in points_of(server)
    with Guest(server.uri(), folder / "disk.img") as guest:
        identical(guest, far.image_server.uri())
        wait_for_points(server, 2)
        server.qmp.complete()
        guest.wait_for_requests(60)


def test_while_it_is_copied_in_place_nothing_can_be_recovered(
    server: Kept, far: FarSide, identical: Identical, folder: Path
) -> None:
    """And that is said, wherever it is asked."""
    begin_in_place(server, far)
    wait_until(lambda: "in-place-since-s" in points_of(server), "it is shown")
    assert "did not fit into the journal" in nbdmirror("status", "--qmp", server.qmp_path).stdout
    listed = nbdmirror("points", far.journal_server.uri())
    assert "no point: the image is being copied in place since" in listed.stdout + listed.stderr
    lag_s = lag_of(server)
    refused = server.qmp.refusal("x-nbdmirror-point", id="j")
    assert "makes no points now" in refused
    assert lag_of(server) > lag_s, "it grows"
    server.qmp.execute("block-job-set-speed", device="j", speed=0)
    wait_until(lambda: "sequence" in points_of(server), "there are points again")
    stop_at_rest(server, far)
    identical(folder / "disk.img", far.image)


@ends
def test_the_server_ends_meanwhile(
    server: Kept, far: FarSide, identical: Identical, folder: Path, end: End
) -> None:
    begin_in_place(server, far)
    end(server)
    qmp = server.restart()
    qmp.execute("block-job-set-speed", device="j", speed=0)
    wait_until(lambda: qmp.job()["ready"], "there are points again")
    stop_at_rest(server, far)
    identical(folder / "disk.img", far.image)


def test_the_far_side_is_lost_meanwhile(
    server: Kept, far: FarSide, identical: Identical, folder: Path
) -> None:
    begin_in_place(server, far)
    for one in (far.image_server, far.journal_server):
        one.kill()
    server.qmp.wait_for_event("X_NBDMIRROR_TARGET_LOST")
    for one in (far.image_server, far.journal_server):
        one.start()
    server.qmp.execute("block-job-set-speed", device="j", speed=0)
    wait_until(lambda: "sequence" in points_of(server), "there are points again")
    stop_at_rest(server, far)
    identical(folder / "disk.img", far.image)


def test_a_journal_that_stands_still_is_no_full_one(
    server: Kept, far: FarSide, identical: Identical, folder: Path
) -> None:
    """Points are given up only for a point that can never fit."""
    far.start_mirror(server, device="vda", **IN_PLACE)
    server.qmp.wait_ready()
    os.kill(far.journal_server.pid, signal.SIGSTOP)
    with connected(server.uri()) as guest:
        for number in range(4):
            guest.pwrite(bytes([number]) * 64 * 1024, number * MiB)
    os.kill(far.journal_server.pid, signal.SIGCONT)
    wait_for_rest(server)
    told = [event["event"] for event in server.qmp.events]
    assert "X_NBDMIRROR_IN_PLACE" not in told
    server.stop()
    far.stop()
    identical(folder / "disk.img", far.image)
