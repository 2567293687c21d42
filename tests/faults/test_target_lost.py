"""A target is killed, with all that it had not flushed, and comes back: the job goes on, the guest
notices nothing, and in the end source and target are identical."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.clients import connected
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import assert_identical, make_noise
from support.losing import (
    GRANULE,
    SELDOM_FLUSHES,
    SIZE,
    Lossy,
    SeldomFlushing,
    end,
    start_mirror,
    wait_caught_up,
)
from support.seeds import SEED
from support.servers import Nbdmirror
from support.waiting import wait_until

COMPLETE = "block-job-complete"
ENDINGS = [COMPLETE, "block-job-cancel"]
MOMENTS = {
    "first copy": "kill write 5",
    "flush for READY": "kill flush 1",
    "READY": "kill write 5",
    "completing, flush ahead": "kill flush 1",
    "completing, guest held": "hold flush 1",
}

EARLY = ("first copy", "flush for READY")

FORGETFUL = """
from nbdmirror.disk.tracker import Tracker

def target_came_back(self):
    with self._lock:
        for claim in (*self._copies, *self._writes):
            self.dirty.mark(claim.offset, claim.length)

Tracker.target_came_back = target_came_back
"""
"""A broken variant of rule 39: `unflushed` is not merged into `dirty`."""


class Mutant(SeldomFlushing):
    """nbdmirror with FORGETFUL in it."""

    patches = SELDOM_FLUSHES + FORGETFUL


@pytest.fixture
def image(folder: Path) -> Path:
    """The target's, of noise: what is not copied is seen."""
    return make_noise(folder / "target.img", SIZE, SEED + 1)


@pytest.mark.parametrize("verb", ENDINGS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_target_that_is_lost_and_comes_back(
    start: Start, identical: Identical, disk: Path, image: Path, moment: str, verb: str
) -> None:
    """It kills itself at that request; two guest connections write all the while."""
    is_early, is_ending = moment in EARLY, moment.startswith("completing")
    multi_conn = verb == COMPLETE
    target = start(Lossy(disk.parent, image, multi_conn=multi_conn, extents=not multi_conn))
    server = start(SeldomFlushing(disk.parent, f"src={disk}", bare=True))
    with Guest(server.uri("src"), disk, seed=SEED, connections=2) as guest:
        if is_early:
            target.order(MOMENTS[moment])
        qmp = start_mirror(server, target.uri())
        if not is_early:
            qmp.wait_ready()
            guest.wait_for_requests(20)
            target.order(MOMENTS[moment])
        before = target.mark()
        if is_ending:
            qmp.execute(verb, device="j")
        if MOMENTS[moment] == "hold flush 1":
            # What is written during the flush ahead needs another flush, behind the gate.
            wait_until(lambda: ("flush", 0, 0) in target.requests(before), "the flush ahead")
            guest.wait_for_requests(50)
            target.order("kill flush 1")
        target.wait_killed()
        guest.wait_for_requests(50)
        target.come_back()
        if is_early:
            qmp.wait_ready()
        guest.wait_for_requests(20)
        if is_ending:
            qmp.wait_completed()
        elif verb == COMPLETE:
            end(qmp, verb)
        guest.wait_for_requests(20)
    if verb == COMPLETE:
        identical(guest, image)  # the guest wrote on, to the target, and flushed
    elif is_ending:
        identical(guest, disk)  # the copy is of an earlier moment than this
    else:
        end(qmp, verb)
        identical(disk, image)
    assert not [event for event in qmp.events if event["event"] == "BLOCK_JOB_ERROR"]


@pytest.mark.parametrize("verb", ENDINGS)
def test_a_soft_cancel_or_complete_of_a_disk_at_rest(
    start: Start, identical: Identical, disk: Path, image: Path, verb: str
) -> None:
    """Lost at the ending's flush: then both images can be compared, whatever the ending."""
    target = start(Lossy(disk.parent, image))
    server = start(SeldomFlushing(disk.parent, f"src={disk}", bare=True))
    qmp = start_mirror(server, target.uri())
    qmp.wait_ready()
    write_some(server)
    wait_caught_up(qmp)
    target.order("kill flush 1")
    qmp.execute(verb, device="j")
    target.wait_killed()
    target.come_back()
    qmp.wait_completed()
    identical(disk, image)


def test_write_blocking(start: Start, identical: Identical, disk: Path, image: Path) -> None:
    """The guest's own writes find the target lost; it is not told."""
    target = start(Lossy(disk.parent, image))
    server = start(SeldomFlushing(disk.parent, f"src={disk}", bare=True))
    with Guest(server.uri("src"), disk, seed=SEED, connections=2) as guest:
        qmp = start_mirror(server, target.uri(), copy_mode="write-blocking")
        qmp.wait_ready()
        guest.wait_for_requests(20)
        target.order("kill write 3")
        target.wait_killed()
        guest.wait_for_requests(50)
        target.come_back()
        wait_until(lambda: qmp.job()["actively-synced"], "actively synced again")
        end(qmp, COMPLETE)
    identical(guest, image)
    assert not [event for event in qmp.events if event["event"] == "BLOCK_JOB_ERROR"]


def write_some(server: Nbdmirror) -> list[int]:
    """A write in the middle of each of a few granules; returns the granules' offsets."""
    places = [n * GRANULE for n in (3, 4, 70, 127)]
    with connected(server.uri("src")) as guest:
        for place in places:
            guest.pwrite(b"\x77" * 4096, place + 8192)
    return places


def lose_unflushed_writes(start: Start, server: Nbdmirror, target: Lossy) -> None:
    """READY, which flushed all but what a guest wrote since; the target has that, and loses it."""
    qmp = start_mirror(server, target.uri())
    qmp.wait_ready()
    before = target.mark()
    places = write_some(server)
    wait_until(lambda: target.changed_bytes(before) >= len(places) * GRANULE, "copied")
    wait_caught_up(qmp)
    assert "flush" not in [kind for kind, _, _ in target.requests(before)]
    target.kill()


def test_only_what_was_not_flushed_is_sent_again(
    start: Start, identical: Identical, disk: Path, image: Path
) -> None:
    target = start(Lossy(disk.parent, image))
    server = start(SeldomFlushing(disk.parent, f"src={disk}", bare=True))
    lose_unflushed_writes(start, server, target)
    qmp, lost_at = server.qmp, target.mark()
    offset = qmp.job()["offset"]
    target.come_back()
    end(qmp, ENDINGS[1])
    identical(disk, image)
    # The granules 3 and 4 are one run.
    again = [(3 * GRANULE, 2 * GRANULE), (70 * GRANULE, GRANULE), (127 * GRANULE, GRANULE)]
    assert sorted(target.changed(lost_at)) == again
    assert target.changed_bytes(lost_at) == 4 * GRANULE
    completed = [e["data"] for e in qmp.events if e["event"] == "BLOCK_JOB_COMPLETED"]
    assert completed[0]["offset"] == completed[0]["len"] == offset + 4 * GRANULE


def test_the_test_is_able_to_fail(start: Start, disk: Path, image: Path) -> None:
    """The same with a server that forgets what was not flushed: a job that ends well, and images
    that differ."""
    target = start(Lossy(disk.parent, image))
    server = start(Mutant(disk.parent, f"src={disk}", bare=True))
    lose_unflushed_writes(start, server, target)
    lost_at = target.mark()
    target.come_back()
    end(server.qmp, ENDINGS[1])
    assert not target.changed(lost_at)
    with pytest.raises(AssertionError, match=rf"bytes differ, the first at {3 * GRANULE + 8192}"):
        assert_identical(disk, image)
