"""A mirror with points whose far side is lost, in whole or in parts, and comes back."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from integration.mirror.points.pointsparts import (
    RING_BYTES,
    SIZE,
    FarSide,
    last_point,
    wait_for_points,
    wait_for_rest,
)
from support.fixtures import Identical, Start
from support.guests import Guest
from support.processes import freeze
from support.servers import NbdkitTarget, Nbdmirror
from support.waiting import wait_until

from nbdmirror.devices.base import MemoryDevice
from nbdmirror.points.format import BLOCK_BYTES, RING_START
from nbdmirror.points.ownership import create
from nbdmirror.points.reader import read
from nbdmirror.points.requests import Side, run


@pytest.mark.parametrize("which", ["image", "journal", "both"])
def test_a_far_side_that_comes_back(
    start: Start, identical: Identical, server: Nbdmirror, far: FarSide, disk: Path, which: str
) -> None:
    lost = {
        "image": [far.image_server],
        "journal": [far.journal_server],
        "both": [far.image_server, far.journal_server],
    }[which]
    with Guest(server.uri(), disk) as guest:
        identical(guest, far.image_server.uri())
        far.start_mirror(server, x_nbdmirror_reconnect_delay=60)
        server.qmp.wait_ready()
        guest.wait_for_requests(30)
        for one in lost:
            one.kill()
        server.qmp.wait_for_event("X_NBDMIRROR_TARGET_LOST")
        guest.wait_for_requests(30)
        for one in lost:
            one.start()
        wait_for_points(server, 2)
        server.qmp.complete()
        guest.wait_for_requests(30)
    assert guest.longest_s < 5.0


@pytest.mark.parametrize("which", ["image", "journal", "both"])
def test_what_is_lost_is_named(
    identical: Identical, server: Nbdmirror, far: FarSide, disk: Path, which: str
) -> None:
    """The server that is to be looked after, and why it cannot be reached."""
    image, journal = far.image_server, far.journal_server
    lost = {"image": [image], "journal": [journal], "both": [image, journal]}[which]
    uri = journal.uri()
    far.start_mirror(server, x_nbdmirror_reconnect_delay=600)
    server.qmp.wait_ready()
    assert (job_of(server)["journal"], job_of(server)["journal-connected"]) == (uri, True)
    for one in lost:
        one.kill()
    names = {
        "image": "the target has",
        "journal": f"the journal {uri} has",
        "both": "the target and its journal have",
    }

    def is_seen() -> bool:
        job = job_of(server)
        there = job["target-connected"], job["journal-connected"]
        is_there = tuple(one not in lost for one in (image, journal))
        return there == is_there and "target-lost-reason" in job

    wait_until(is_seen, "it is seen")
    lines = job_of(server)["explanation"]
    (text,) = [line for line in lines if " been lost for " in line]
    assert text.startswith(f"{names[which]} been lost for ")
    assert "last attempt: " in text
    for one in lost:
        one.start()

    def are_back() -> bool:
        job = job_of(server)
        there = job["target-connected"] and job["journal-connected"]
        return there and "target-lost-for-s" not in job

    wait_until(are_back, "they are back")
    server.qmp.complete()
    identical(disk, image.uri())


def test_a_journal_whose_server_is_ended_while_guests_rest_is_lost(
    start: Start, identical: Identical, folder: Path, disk: Path
) -> None:
    """nbdkit closes no connection on SIGTERM, and refuses requests: the source sends one now and
    then."""
    far = FarSide(start, folder, kind="nbdkit", ring=RING_BYTES)
    server = start(Nbdmirror(disk.parent, disk, bare=True))
    far.start_mirror(server, x_nbdmirror_reconnect_delay=60)
    server.qmp.wait_ready()
    wait_for_rest(server)
    far_server = far.journal_server
    assert isinstance(far_server, NbdkitTarget)
    process = far_server.process
    assert process is not None
    process.send_signal(signal.SIGTERM)
    server.qmp.wait_for_event("X_NBDMIRROR_TARGET_LOST")
    wait_until(lambda: process.poll() is not None, "its clients have left, and it ends")
    far_server.process = None
    far_server.socket.unlink(missing_ok=True)
    far_server.start()
    server.qmp.wait_for_event("X_NBDMIRROR_TARGET_BACK")
    server.qmp.complete()
    identical(disk, far.image_server.uri())


@pytest.mark.parametrize("goes_first", ["image", "journal"])
@pytest.mark.parametrize("returns", ["before the other one goes", "beside the other one"])
def test_a_far_side_that_goes_and_comes_in_parts(
    start: Start,
    identical: Identical,
    server: Nbdmirror,
    far: FarSide,
    disk: Path,
    goes_first: str,
    returns: str,
) -> None:
    """A far host that is restarted ends its servers one after the other."""
    first, second = far.image_server, far.journal_server
    if goes_first == "journal":
        first, second = second, first
    with Guest(server.uri(), disk) as guest:
        identical(guest, far.image_server.uri())
        far.start_mirror(server, x_nbdmirror_reconnect_delay=60)
        server.qmp.wait_ready()
        guest.wait_for_requests(30)
        first.kill()
        server.qmp.wait_for_event("X_NBDMIRROR_TARGET_LOST", target=first.uri())
        if returns == "before the other one goes":
            first.start()
            server.qmp.wait_for_event("X_NBDMIRROR_TARGET_BACK")
            second.kill()
        else:
            second.kill()
            first.start()
        server.qmp.wait_for_event("X_NBDMIRROR_TARGET_LOST", target=second.uri())
        guest.wait_for_requests(30)
        second.start()
        wait_for_points(server, 2)
        server.qmp.complete()
        guest.wait_for_requests(30)
    assert guest.longest_s < 5.0


def torn(journal: Path, before: bytes) -> str:
    """In its middle: the footer of an old point is lost, and all later ones are there."""
    content = journal.read_bytes()
    device = MemoryDevice(len(content))
    device.data[:] = content
    _, header, *later = run(read("journal", device.size), {Side.JOURNAL: device}).headers
    assert len(later) > 3
    with journal.open("r+b") as file:
        file.seek(RING_START + header.footer_place)
        file.write(bytes(BLOCK_BYTES))
    last, newest = header.point.sequence - 1, later[-1].point.sequence
    return f"has lost points: it ends with point {last}, and point {newest} was committed"


def older(journal: Path, before: bytes) -> str:
    journal.write_bytes(before)
    return "is an older copy of what was written to it"


def foreign(journal: Path, before: bytes) -> str:
    """As good as the one before, and another disk's."""
    device = MemoryDevice(len(before))
    run(create("journal", len(before), disk_bytes=SIZE, now_ns=0), {Side.JOURNAL: device})
    journal.write_bytes(device.data)
    return "is the journal of another disk"


@pytest.mark.guarantee("A point is the disk of one moment")
@pytest.mark.parametrize("change", [torn, older, foreign])
def test_a_journal_that_comes_back_and_is_not_what_it_was(
    server: Nbdmirror, far: FarSide, disk: Path, change: Callable[[Path, bytes], str]
) -> None:
    """No further point is announced, which nobody could have. Guests do not notice."""
    with Guest(server.uri(), disk) as guest:
        far.start_mirror(server, x_nbdmirror_reconnect_delay=60, x_nbdmirror_keep=3600)
        server.qmp.wait_ready()
        wait_for_points(server, 3)
        before = far.journal.read_bytes()
        wait_for_points(server, 4)
        far.journal_server.kill()
        server.qmp.wait_for_event("X_NBDMIRROR_TARGET_LOST")
        text, number = change(far.journal, before), last_point(server)
        changed = far.journal.read_bytes()
        far.journal_server.start()
        wait_until(lambda: not server.qmp.execute("query-jobs"), "the job has ended")
        guest.wait_for_requests(30)
    status = server.qmp.execute("x-nbdmirror-query-status")
    assert text in status["disks"][0]["last-job"]["reason"]
    told = [e["data"] for e in server.qmp.events if e["event"] == "X_NBDMIRROR_POINT"]
    assert told[-1]["sequence"] == number
    assert far.journal.read_bytes() == changed
    assert guest.longest_s < 5.0


@pytest.mark.parametrize("which", ["image", "journal"])
def test_a_far_side_that_hangs_is_told(
    identical: Identical, server: Nbdmirror, far: FarSide, disk: Path, which: str
) -> None:
    """The copier has stopped long before: its silence says nothing."""
    hung = far.image_server if which == "image" else far.journal_server
    with Guest(server.uri(), disk) as guest:
        identical(guest, far.image_server.uri())
        far.start_mirror(server)
        server.qmp.wait_ready()
        wait_for_points(server, 1)
        freeze(hung.pid)
        try:
            wait_until(lambda: job_of(server).get("target-silent-for-s"), "that it hangs is seen")
        finally:
            os.kill(hung.pid, signal.SIGCONT)
        wait_until(lambda: "target-silent-for-s" not in job_of(server), "that it answers is seen")
        server.qmp.complete()
    assert guest.longest_s < 5.0


def job_of(server: Nbdmirror) -> dict[str, Any]:
    (job,) = server.qmp.execute("x-nbdmirror-query-status")["disks"][0]["jobs"]
    return dict(job)
