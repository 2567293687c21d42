"""Mirrors with points of other disks and at other moments than the usual ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from integration.mirror.points.pointsparts import (
    INTERVAL_S,
    RING_BYTES,
    SIZE,
    FarSide,
    wait_for_points,
)
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import MiB, make_image
from support.servers import Nbdmirror, QemuNbd
from support.waiting import wait_until


def test_a_disk_on_another_server(
    start: Start, identical: Identical, far: FarSide, disk: Path
) -> None:
    source = start(QemuNbd(disk.parent, disk))
    server = start(Nbdmirror(disk.parent, source.uri(), bare=True))
    with Guest(server.uri(), disk, connections=2) as guest:
        identical(guest, far.image_server.uri())
        far.start_mirror(server)
        server.qmp.wait_ready()
        guest.wait_for_requests(60)
        wait_for_points(server, 2)
        server.qmp.complete()
        guest.wait_for_requests(30)


@pytest.mark.parametrize("which", ["image", "journal"])
def test_a_far_side_that_is_lost_in_the_first_copy(
    start: Start, identical: Identical, far: FarSide, disk: Path, which: str
) -> None:
    server = start(Nbdmirror(disk.parent, disk, bare=True))
    with Guest(server.uri(), disk) as guest:
        identical(guest, far.image_server.uri())
        far.start_mirror(server, x_nbdmirror_reconnect_delay=60, speed=MiB)
        guest.wait_for_requests(30)
        lost = far.image_server if which == "image" else far.journal_server
        lost.kill()
        server.qmp.wait_for_event("X_NBDMIRROR_TARGET_LOST")
        lost.start()
        server.qmp.execute("block-job-set-speed", device="j", speed=0)
        server.qmp.wait_ready()
        wait_for_points(server, 2)
        server.qmp.complete()
        guest.wait_for_requests(30)


@pytest.mark.alone
def test_heavy_writers_do_not_keep_the_pivot_away(
    start: Start, identical: Identical, far: FarSide, disk: Path
) -> None:
    server = start(Nbdmirror(disk.parent, disk, bare=True))
    far.start_mirror(server)
    server.qmp.wait_ready()
    with Guest(server.uri(), disk, connections=3, pause_s=0) as guest:
        identical(guest, far.image_server.uri())
        guest.wait_for_requests(300)
        server.qmp.complete()
        guest.wait_for_requests(100)
    assert guest.longest_s < 3.0


def test_a_guest_that_is_faster_than_the_copy_has_points(
    start: Start, identical: Identical, far: FarSide, disk: Path
) -> None:
    """The first copy is never in sync beside such a guest."""
    server = start(Nbdmirror(disk.parent, disk, bare=True))
    with Guest(server.uri(), disk, connections=3, pause_s=0) as guest:
        guest.wait_for_requests(50)
        far.start_mirror(server, speed=2 * MiB)
        server.qmp.wait_ready()
        guest.wait_for_requests(50)
    server.qmp.execute("block-job-set-speed", device="j", speed=0)
    server.qmp.execute("block-job-cancel", device="j")
    server.qmp.wait_completed()
    far.stop()
    identical(guest, far.recover())


def test_a_disk_with_an_odd_end(start: Start, identical: Identical, folder: Path) -> None:
    """Not of whole blocks of a journal; and the image is larger, as it may be."""
    size = SIZE - 2560
    disk = make_image(folder / "odd.img", size)
    far = FarSide(start, folder, ring=RING_BYTES)
    server = start(Nbdmirror(folder, disk, bare=True))
    with Guest(server.uri(), disk) as guest:
        far.start_mirror(server, x_nbdmirror_allow_larger_target=True)
        server.qmp.wait_ready()
        guest.wait_for_requests(60)
        wait_for_points(server, 2)
    server.qmp.execute("block-job-cancel", device="j")
    server.qmp.wait_completed()
    far.stop()
    identical(guest, far.recover()[:size])


def test_two_disks_end_together(start: Start, identical: Identical, folder: Path) -> None:
    disks, sides = [], []
    for name in ("a", "b"):
        (folder / name).mkdir()
        disks.append(make_image(folder / name / "disk", SIZE))
        sides.append(FarSide(start, folder / name, ring=RING_BYTES))
    server = start(Nbdmirror(folder, *disks, bare=True))
    qmp = server.qmp
    with Guest(server.uri("disk0"), disks[0]) as one, Guest(server.uri("disk1"), disks[1]) as other:
        actions = []
        for number, (side, guest) in enumerate(zip(sides, (one, other), strict=True)):
            identical(guest, side.image_server.uri())
            qmp.add_target(f"image{number}", side.image_server)
            qmp.add_target(f"journal{number}", side.journal_server)
            data = {
                "job-id": f"j{number}", "device": f"disk{number}", "target": f"image{number}",
                "sync": "full", "copy-mode": "points", "x-nbdmirror-interval": INTERVAL_S,
                "x-nbdmirror-journal": f"journal{number}",
            }  # fmt: skip
            actions.append({"type": "blockdev-mirror", "data": data})
        qmp.execute("transaction", actions=actions, properties={"completion-mode": "grouped"})
        jobs = partial(qmp.execute, "query-block-jobs")
        wait_until(lambda: [job["ready"] for job in jobs()] == [True, True], "READY")
        for number in range(2):
            qmp.execute("job-complete", id=f"j{number}")
        wait_until(lambda: jobs() == [], "the end")
        assert [e["data"]["id"] for e in qmp.events if e["event"].endswith("PIVOTED")]
        one.wait_for_requests(30)
        other.wait_for_requests(30)
