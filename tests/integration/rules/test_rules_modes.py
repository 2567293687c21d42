"""Write-blocking and background mode: what a guest's request is told, and what it pays. Rules of a
mirror job that the other tests leave open; docs/rules.md has all of them by number.

Every mirror here ends with images that are compared byte by byte, by the `identical` fixture.
"""

from __future__ import annotations

from pathlib import Path

import nbd
import pytest
from integration.rules.rulesparts import (
    GRANULE,
    SIZE,
    Logged,
    LoggedFaulty,
    begin,
    both_endings,
    both_modes,
    cancel_by_force,
    end,
    wait_in_sync,
    wait_synced,
)
from support.clients import connected, nbd_errno, requested
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import make_noise
from support.losing import SeldomFlushing
from support.paritysides import Faulty
from support.serverprocess import Server
from support.servers import NbdkitTarget, Nbdmirror
from support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("identical")


# 10, 11, 13, 45: write-blocking mode


@pytest.mark.rule(10)
def test_where_the_source_fails_the_target_is_not_written(
    start: Start, identical: Identical, folder: Path, disk: Path, logged: Logged
) -> None:
    source = start(Faulty(folder, disk))
    server = start(Nbdmirror(folder, f"src={source.uri()}", bare=True))
    server.allowed = ["Input/output error"]
    qmp = server.qmp
    identical(disk, logged.image)
    begin(server, logged, copy_mode="write-blocking")
    qmp.wait_ready()
    wait_synced(qmp, "write-blocking")
    before = disk.read_bytes()
    with connected(server.uri("src")) as guest:
        source.set("write", "EIO")
        assert nbd_errno(guest.pwrite, b"\x31" * 100, 1000) == 5
        source.heal("write")
        wait_in_sync(qmp)
        assert disk.read_bytes() == before == logged.image.read_bytes()
        guest.pwrite(b"\x32" * 100, 1000)
    assert (1000, 100) in [place[:2] for place in logged.requests("Write")]
    end(qmp, "block-job-cancel")


def sends_sectors(server: Nbdmirror, logged: Logged) -> bool:
    """And no whole granules, for a write to the disk's first sector."""
    before = len(logged.requests("Write"))
    with connected(server.uri("src")) as guest:
        guest.pwrite(b"\x40" * 100, 0)
    wait_until(lambda: len(logged.requests("Write")) > before, "a copy")
    return logged.requests("Write")[-1][:2] == (0, 512)


@pytest.mark.rule(11)
def test_a_request_keeps_to_the_mode_that_it_began_in(
    start: Start, identical: Identical, folder: Path, disk: Path, logged: Logged
) -> None:
    """While a write is under way that began in background mode, the job is not actively synced,
    whatever the mode is by now; it is copied in the background."""
    source = start(LoggedFaulty(folder, disk))
    server = start(Nbdmirror(folder, f"src={source.uri()}", bare=True))
    qmp = server.qmp
    identical(disk, logged.image)
    begin(server, logged)
    qmp.wait_ready()
    wait_until(lambda: sends_sectors(server, logged), "parts of granules are copied")
    written = source.log.read_text().count(" Write id")
    source.set("write", "hold")
    guest = requested(server.uri("src"), lambda handle: handle.pwrite(b"\x41" * 100, 70_000))
    wait_until(
        lambda: source.log.read_text().count(" Write id") > written, "the write is under way", 5
    )
    qmp.execute("block-job-change", id="j", type="mirror", copy_mode="write-blocking")
    with connected(server.uri("src")) as other:
        for _ in range(100):
            other.pread(512, 0)
            assert not qmp.job()["actively-synced"]
    assert not guest.has_ended_within(0)
    source.heal("write")
    guest.result(5.0)
    wait_synced(qmp, "write-blocking")
    assert (70_000, 100) not in [place[:2] for place in logged.requests("Write")]
    sectors = 70_000 // 512 * 512, 512
    assert sectors in [place[:2] for place in logged.requests("Write")]
    end(qmp, "block-job-complete")


@pytest.mark.rule(13, 45)
@pytest.mark.guarantee("Write-blocking")
@both_modes
def test_a_guests_flush(
    start: Start, identical: Identical, disk: Path, logged: Logged, copy_mode: str
) -> None:
    """Background: it goes to the source alone. Write-blocking: it has reached the target as well
    when it is answered, and so has a write with FUA."""
    server = start(SeldomFlushing(disk.parent, f"src={disk}", bare=True))
    qmp = server.qmp
    identical(disk, logged.image)
    begin(server, logged, copy_mode=copy_mode)
    qmp.wait_ready()
    wait_synced(qmp, copy_mode)
    before = len(logged.requests("Flush"))
    assert before == 1, "flushed once, for READY"
    with connected(server.uri("src")) as guest:
        for number in range(3):
            guest.pwrite(b"\x51" * 4096, number * GRANULE)
            guest.flush()
            seen = len(logged.requests("Flush")) - before
            assert seen == (number + 1 if copy_mode == "write-blocking" else 0)
        guest.pwrite(b"\x52" * 100, 1000, nbd.CMD_FLAG_FUA)
        durable = (1000, 100, True) in logged.requests("Write")
        assert durable == (copy_mode == "write-blocking")
    seen = len(logged.requests("Flush"))
    end(qmp, "block-job-complete")
    assert len(logged.requests("Flush")) > seen, "flushed at the end"


@pytest.mark.rule(45)
def test_a_flush_that_fails_on_the_target_is_hidden_from_the_guest(
    identical: Identical, server: Nbdmirror, disk: Path, faulty: Faulty
) -> None:
    qmp = server.qmp
    identical(disk, faulty.image)
    begin(server, faulty, copy_mode="write-blocking", on_target_error="stop")
    qmp.wait_ready()
    wait_synced(qmp, "write-blocking")
    faulty.set("flush", "EIO")
    with connected(server.uri("src")) as guest:
        guest.pwrite(b"\x54" * 4096, 4096)
        guest.flush()
    told = qmp.wait_for_event("BLOCK_JOB_ERROR")
    assert (told["operation"], told["action"]) == ("write", "stop")
    qmp.wait_status("standby")
    faulty.heal("flush")
    qmp.execute("block-job-resume", device="j")
    end(qmp, "block-job-complete")


# 41: the guest never pays


@pytest.mark.rule(41)
@pytest.mark.guarantee("It does not pay for the target")
@pytest.mark.parametrize("trouble", ["slow", "fails", "hangs", "lost"])
@pytest.mark.alone
def test_in_background_mode_the_guest_does_not_notice_the_targets_trouble(
    identical: Identical,
    server: Nbdmirror,
    folder: Path,
    disk: Path,
    faulty: Faulty,
    start: Start,
    trouble: str,
) -> None:
    """Also through several errors, attempts and reconnects; no request takes as long as one of
    the target's."""
    qmp = server.qmp
    target: Server = faulty
    if trouble == "slow":
        slow = ("delay-write=2", "delay-zero=2")
        other = make_noise(folder / "slow.img", SIZE)
        target = start(NbdkitTarget(folder, "file", f"file={other}", *slow, filters=("delay",)))
    with Guest(server.uri("src"), disk, connections=2) as guest:
        identical(guest, disk)
        if trouble == "fails":
            faulty.set("write", "EIO")
        elif trouble == "hangs":
            faulty.set("write", "hold")
        node = {"reconnect_delay": 20} if trouble == "lost" else {}
        begin(server, target, node=node, on_target_error="ignore")
        if trouble == "lost":
            qmp.wait_ready()
            faulty.kill()
        elif trouble == "fails":
            for _ in range(3):
                qmp.wait_for_event("BLOCK_JOB_ERROR", 5)
        guest.wait_for_requests(300)
        assert cancel_by_force(qmp) < 1.0
        guest.wait_for_requests(50)
    assert guest.longest_s < 1.0
    faulty.heal("write")
    target.kill()  # it would work off its delays first


@both_endings
def test_what_only_guests_wrote_to_the_target_is_flushed_at_the_end(
    identical: Identical, server: Nbdmirror, disk: Path, logged: Logged, ending: str
) -> None:
    """The copier has written nothing then: all that the target got is synchronous writes."""
    qmp = server.qmp
    expected = bytearray(logged.image.read_bytes())
    expected[GRANULE : 2 * GRANULE] = b"\x53" * GRANULE
    identical(expected, logged.image)
    begin(server, logged, sync="none", copy_mode="write-blocking")
    qmp.wait_ready()
    wait_synced(qmp, "write-blocking")
    with connected(server.uri("src")) as guest:
        guest.pwrite(b"\x53" * GRANULE, GRANULE)
    assert [place[:2] for place in logged.requests("Write")] == [(GRANULE, GRANULE)]
    end(qmp, ending)
    assert logged.requests("Flush"), "completed means flushed"


@pytest.mark.alone
@pytest.mark.guarantee("The pause is bounded")
def test_no_write_waits_longer_than_one_attempt(
    identical: Identical, server: Nbdmirror, disk: Path, faulty: Faulty
) -> None:
    """Without that rule one time in three failed: 2.003 s and 2.029 s were seen."""
    qmp = server.qmp
    begin(server, faulty)
    qmp.wait_ready()
    faulty.set("write", "hold")
    with Guest(server.uri("src"), disk, pause_s=0.002, length_max=4096) as guest:
        identical(guest, disk)
        guest.wait_for_requests(5)
        qmp.execute("block-job-cancel", device="j")
        for _ in range(6):
            qmp.wait_for_event("X_NBDMIRROR_QUIESCE_TIMEOUT", 10, device="j")
        faulty.heal("write")
        qmp.wait_completed()
    assert guest.longest_s < 1.5
