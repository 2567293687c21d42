"""Mirrors whose points are snapshots, and whose server ends and is started again: the numbers and
the lag go on, and the first point has what no acknowledged one has."""

from __future__ import annotations

from pathlib import Path

import pytest
from integration.mirror.points.pointsparts import SIZE, points_of
from integration.mirror.snapshots.snapshotsparts import SnapshotFarSide
from integration.state.stateparts import End, ends
from support.clients import connected
from support.fixtures import Start
from support.images import KiB, MiB, assert_identical, make_image
from support.kept import Kept, power_cut
from support.waiting import wait_until

SMALL = 64 * KiB
"""What a point may have beside what was changed, in bytes."""


@pytest.fixture
def far(start: Start, folder: Path) -> SnapshotFarSide:
    return SnapshotFarSide(start, folder)


@pytest.fixture
def server(start: Start, folder: Path, disk: Path) -> Kept:
    server = start(Kept(folder, disk))
    server.allowed.append(".*")  # nbdkit complains of guests that it ends on
    return server


@pytest.fixture
def disk(folder: Path) -> Path:
    return make_image(folder / "disk.img", SIZE)


def begin(server: Kept, far: SnapshotFarSide) -> None:
    far.start_mirror(server, device="vda", x_nbdmirror_reconnect_delay=60)


def change(server: Kept, number: int) -> None:
    with connected(server.uri()) as guest:
        guest.pwrite(bytes([number]) * SMALL, number * MiB)


def wait_for_point(server: Kept) -> int:
    """The number of the point that waits."""
    wait_until(lambda: "awaited" in points_of(server), "a point waits")
    return int(points_of(server)["awaited"]["sequence"])


def ack(server: Kept, number: int) -> None:
    server.qmp.execute("x-nbdmirror-point-ack", id="j", sequence=number)


@ends
def test_the_numbers_go_on_and_nothing_is_missing(
    server: Kept, far: SnapshotFarSide, disk: Path, end: End
) -> None:
    """The server ends while a point waits, which was changed meanwhile, and again before the point
    after that is acknowledged."""
    begin(server, far)
    ack(server, wait_for_point(server))
    server.qmp.wait_ready()
    change(server, 1)
    number = wait_for_point(server)
    assert number == 2
    change(server, 2)
    for round_ in (1, 2):
        end(server)
        server.restart()
        assert wait_for_point(server) == number + round_, "no number comes twice"
        assert server.qmp.job()["status"] == "running", "nothing was acknowledged yet"
        assert server.job_status()["lag-s"], "it is that of the last acknowledged point"
        refused = server.qmp.refusal("x-nbdmirror-point-ack", id="j", sequence=number)
        assert "of point 2 is awaited" in refused
        if end is not power_cut:  # then it is known in regions only
            changed = points_of(server)["awaited"]["bytes"]
            assert 2 * SMALL <= changed <= 3 * SMALL
        assert_identical(disk.read_bytes(), far.image.read_bytes())
    ack(server, number + 2)
    server.qmp.wait_ready()
    change(server, 3)
    assert wait_for_point(server) == number + 3
    assert_identical(disk.read_bytes(), far.image.read_bytes())


@ends
def test_a_first_point_that_nobody_has_acknowledged(
    server: Kept, far: SnapshotFarSide, disk: Path, end: End
) -> None:
    begin(server, far)
    assert wait_for_point(server) == 1
    change(server, 1)
    end(server)
    server.restart()
    assert wait_for_point(server) == 2
    assert_identical(disk.read_bytes(), far.image.read_bytes())
    ack(server, 2)
    server.qmp.wait_ready()


def test_the_last_acknowledgement_may_be_repeated_after_a_restart(
    server: Kept, far: SnapshotFarSide, disk: Path
) -> None:
    """By a client that has lost the answer to a server that was killed."""
    begin(server, far)
    ack(server, wait_for_point(server))
    server.qmp.wait_ready()
    wait_until(lambda: points_written_down(server) == 1, "the acknowledgement is written down")
    server.kill()
    server.restart()
    assert wait_for_point(server) == 2
    said = server.qmp.execute("x-nbdmirror-point-ack", id="j", sequence=1)
    assert said == {"repeated": True}
    assert_identical(disk.read_bytes(), far.image.read_bytes())


def points_written_down(server: Kept) -> object:
    mirror = server.definition()["mirror"]
    assert isinstance(mirror, dict)
    return mirror["points"]["acknowledged"]
