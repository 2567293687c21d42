"""Mirrors with points whose server ends and is started again: the points of before stay, and the
next one has what was changed meanwhile."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from integration.mirror.points.pointsparts import (
    RING_BYTES,
    SIZE,
    FarSide,
    last_point,
    left_bytes,
    points_of,
    stop_at_rest,
    wait_for_points,
    wait_for_rest,
    wait_until_points_continue,
)
from integration.state.stateparts import End, ends, restart_until_ready, settle
from support.clients import connected
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import KiB, MiB, assert_identical, make_image
from support.kept import Kept, power_cut
from support.processes import nbdmirror
from support.servers import QemuNbd
from support.waiting import wait_until

SMALL = 64 * KiB
"""What a point may have beside what was changed, in bytes."""


@pytest.fixture
def far(start: Start, folder: Path) -> FarSide:
    return FarSide(start, folder, ring=RING_BYTES)


@pytest.fixture
def server(start: Start, folder: Path) -> Kept:
    server = start(Kept(folder, make_image(folder / "disk.img", SIZE)))
    server.allowed.append(".*")  # nbdkit complains of guests that it ends on
    return server


@pytest.fixture
def disk(folder: Path) -> Path:
    return folder / "disk.img"


def begin(server: Kept, far: FarSide, **options: object) -> None:
    far.start_mirror(server, device="vda", x_nbdmirror_reconnect_delay=60, **options)


def change(server: Kept, number: int, blocks: int = 16) -> None:
    """Blocks here and there that nobody has written before."""
    with connected(server.uri()) as guest:
        for block in range(blocks):
            place = (block * 41 + number * 7) % (SIZE // (4 * KiB)) * 4 * KiB
            guest.pwrite(bytes([number, block]) * 2 * KiB, place)


def ask_for_point(server: Kept, name: str) -> None:
    done = nbdmirror("point", "--qmp", server.qmp_path, "--name", name, "--wait")
    assert done.returncode == 0, done.stderr


@ends
def test_points_continue_and_those_of_before_stay(
    server: Kept, far: FarSide, disk: Path, identical: Identical, end: End
) -> None:
    begin(server, far, x_nbdmirror_keep=3600)
    server.qmp.wait_ready()
    change(server, 1)
    ask_for_point(server, "before")
    number = int(points_of(server)["sequence"])
    change(server, 2)
    end(server)
    restart_until_ready(server)
    points = points_of(server)
    assert points["sequence"] > number and points["points"] > number
    if end is not power_cut:  # then it is known in regions only
        assert points["bytes"] <= 16 * 4 * KiB + SMALL
    change(server, 3)
    assert "has a point 'before' already" in server.qmp.refusal(
        "x-nbdmirror-point", id="j", name="before"
    )
    server.qmp.execute("block-job-cancel", device="j")
    server.qmp.wait_completed()
    far.stop()
    identical(disk, far.image)


@ends
def test_an_older_point_is_recovered_after_a_restart(
    server: Kept, far: FarSide, disk: Path, end: End
) -> None:
    begin(server, far, x_nbdmirror_keep=3600)
    server.qmp.wait_ready()
    change(server, 1)
    ask_for_point(server, "before")
    before = disk.read_bytes()
    change(server, 2)
    end(server)
    restart_until_ready(server)
    number = last_point(server)
    change(server, 3)
    wait_until(lambda: last_point(server) > number, "there is a point more")
    server.kill()
    far.stop()
    assert_identical(before, far.recover("--point", "before"))


@ends
def test_the_disk_moves_to_the_image_after_a_restart(
    server: Kept, far: FarSide, disk: Path, identical: Identical, end: End
) -> None:
    begin(server, far)
    server.qmp.wait_ready()
    change(server, 1)
    end(server)
    restart_until_ready(server)
    with Guest(server.uri(), disk) as guest:
        identical(guest, far.image_server.uri())
        wait_for_points(server, 2)
        server.qmp.complete()
        guest.wait_for_requests(60)
    assert server.qmp.execute("query-block-jobs") == []
    server.stop()
    assert not (server.state / "vda.json").exists()


@ends
def test_the_first_copy_continues(
    server: Kept, far: FarSide, disk: Path, identical: Identical, end: End
) -> None:
    begin(server, far, speed=MiB)
    wait_until(lambda: server.qmp.job()["offset"] >= 2 * MiB, "a part is copied")
    change(server, 1)
    settle(server)
    end(server)
    qmp = server.restart()
    assert "sequence" not in points_of(server)
    qmp.execute("block-job-set-speed", device="j", speed=0)
    wait_until(lambda: qmp.job()["ready"], "the first point is there")
    change(server, 2)
    stop_at_rest(server, far)
    identical(disk, far.image)


@pytest.mark.parametrize("first", ["image", "journal"])
def test_a_far_side_that_comes_up_later_is_waited_for(
    server: Kept, far: FarSide, disk: Path, identical: Identical, first: str
) -> None:
    """A site comes up in any order after a power cut."""
    begin(server, far)
    server.qmp.wait_ready()
    change(server, 1)
    far.image_server.kill()
    far.journal_server.kill()
    power_cut(server)
    server.restart()
    change(server, 2)
    order = [far.image_server, far.journal_server]
    for one in order if first == "image" else reversed(order):
        assert not server.qmp.job()["ready"]
        one.start()
    wait_until(lambda: server.qmp.job()["ready"], "points continue")
    stop_at_rest(server, far)
    identical(disk, far.image)


@ends
def test_the_lag_is_told_while_the_far_side_is_away_after_a_restart(
    server: Kept, far: FarSide, disk: Path, identical: Identical, end: End
) -> None:
    """There is a point, and it becomes older; a promise that is broken is reported."""
    begin(server, far, x_nbdmirror_rpo=2)
    server.qmp.wait_ready()
    change(server, 1)
    ask_for_point(server, "before")
    point = points_of(server)
    far.stop()
    change(server, 2)
    end(server)
    server.start()
    job = server.qmp.job()
    assert job["status"] == "running" and not job["ready"]
    there = job["x-nbdmirror-points"]
    assert there["begun"] and there.get("sequence", 0) <= point["sequence"]
    text = nbdmirror("status", "--qmp", server.qmp_path).stdout
    assert "no copy yet" not in text and ("lag not known yet" in text) is ("time-s" not in there)
    if end is not power_cut:  # then the last seconds may not be kept
        assert (there["sequence"], there["time-s"]) == (point["sequence"], point["time-s"])
        see_the_lag(server, point)
    for one in (far.image_server, far.journal_server):
        one.start()
    wait_until_points_continue(server)
    if end is not power_cut:  # told only after it was told that the promise is broken
        server.qmp.wait_for_event("X_NBDMIRROR_RPO", kept=True)
    change(server, 3)
    wait_until(lambda: left_bytes(server) == 0, "a point has everything")
    server.qmp.execute("block-job-cancel", device="j")
    server.qmp.wait_completed()
    far.stop()
    identical(disk, far.image)


def see_the_lag(server: Kept, point: dict[str, Any]) -> None:
    """It counts from `point`, and the promise is broken, perhaps before anybody hears events."""

    def told() -> dict[str, Any]:
        (job,) = server.qmp.execute("x-nbdmirror-query-status")["disks"][0]["jobs"]
        return job if any("than the 2 s of --rpo" in said for said in job["explanation"]) else {}

    wait_until(told, "the promise is broken")
    least_s = time.time() - point["time-s"]
    shown = told()
    assert shown["lag-s"] >= least_s - 0.001
    text = nbdmirror("status", "--qmp", server.qmp_path).stdout
    assert f"point {point['sequence']}, lag " in text


def test_a_mirror_that_waits_for_its_far_side_can_be_ended(
    server: Kept, far: FarSide, disk: Path, identical: Identical
) -> None:
    """Guests go on, and nothing of it is left."""
    begin(server, far)
    server.qmp.wait_ready()
    server.stop()
    far.stop()
    qmp = server.restart()
    change(server, 1)
    qmp.execute("block-job-cancel", device="j", force=True)
    qmp.wait_for_event("BLOCK_JOB_CANCELLED", device="j")
    change(server, 2)
    server.stop()
    assert not (server.state / "vda.json").exists()
    expected = disk.read_bytes()
    server.restart()
    with connected(server.uri()) as guest:
        identical(bytes(guest.pread(SIZE, 0)), expected)


def test_a_source_that_loses_writes_while_the_far_side_is_away(
    server: Kept, far: FarSide, disk: Path, start: Start, identical: Identical
) -> None:
    """An NBD server that was killed may have lost what was not flushed: all may differ then."""
    server.stop()
    source = start(QemuNbd(disk.parent, disk))
    server.disks = [f"vda={source.uri()}"]
    server.restart()
    begin(server, far)
    server.qmp.wait_ready()
    change(server, 1)
    wait_for_rest(server)
    server.stop()
    far.stop()
    server.restart()
    change(server, 2, blocks=1)
    source.kill()
    with disk.open("r+b") as file:
        file.seek(5 * MiB)
        file.write(b"as it was before")
    source.start()
    with connected(server.uri()) as guest:
        guest.pread(512, 0)
    far.image_server.start()
    far.journal_server.start()
    wait_until(lambda: server.qmp.job()["ready"], "points continue")
    stop_at_rest(server, far)
    identical(disk, far.image)


def test_a_disk_that_others_changed_meanwhile(
    server: Kept, far: FarSide, disk: Path, identical: Identical
) -> None:
    """All of it is in the next point."""
    begin(server, far)
    server.qmp.wait_ready()
    server.stop()
    with disk.open("r+b") as file:
        file.seek(5 * MiB)
        file.write(b"another program")
    restart_until_ready(server)
    stop_at_rest(server, far)
    identical(disk, far.image)


def failure(server: Kept) -> str:
    """Why the job of the last start has ended."""

    def reason() -> str:
        status = server.qmp.execute("x-nbdmirror-query-status")["disks"][0]
        return str(status.get("last-job", {}).get("reason", ""))

    server.restart()
    return str(wait_until(reason, "the job has failed"))


def test_a_journal_that_was_recovered_meanwhile(server: Kept, far: FarSide, folder: Path) -> None:
    """The guest may run at the far side now: nothing is sent there any more."""
    begin(server, far)
    server.qmp.wait_ready()
    change(server, 1)
    wait_for_rest(server)
    server.kill()
    far.stop()
    recovered, journal = far.recover(), far.journal.read_bytes()
    far.image_server.start()
    far.journal_server.start()
    assert " was recovered" in failure(server)
    change(server, 2)
    far.stop()
    assert_identical(recovered, far.image)
    assert_identical(journal, far.journal)


@pytest.mark.parametrize("end", [Kept.stop, Kept.kill], ids=["orderly end", "killed"])
def test_a_journal_that_has_lost_points(server: Kept, far: FarSide, end: End) -> None:
    """A far side of an older moment, from a snapshot, lacks what is not dirty any more."""
    begin(server, far)
    server.qmp.wait_ready()
    far.stop()
    old = [(path, path.read_bytes()) for path in (far.image, far.journal)]
    far.image_server.start()
    far.journal_server.start()
    change(server, 1)
    wait_for_rest(server)
    end(server)
    far.stop()
    for path, content in old:
        path.write_bytes(content)
    far.image_server.start()
    far.journal_server.start()
    assert "has lost points: it ends with point" in failure(server)


def test_another_image(server: Kept, far: FarSide) -> None:
    """With the right journal it would be spoilt for ever."""
    begin(server, far)
    server.qmp.wait_ready()
    change(server, 1)
    wait_for_rest(server)
    server.stop()
    far.stop()
    other = bytes(SIZE)
    far.image.write_bytes(other)
    far.image_server.start()
    far.journal_server.start()
    assert "the image does not hold point" in failure(server)
    far.stop()
    assert_identical(other, far.image)
