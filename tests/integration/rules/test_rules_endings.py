"""Endings, pauses and back-offs of a mirror. Rules of a mirror job that the other tests leave open;
docs/rules.md has all of them by number.

Every mirror here ends with images that are compared byte by byte, by the `identical` fixture.
"""

from __future__ import annotations

import os
import socket
import time
from functools import partial
from pathlib import Path

import nbd
import pytest
from integration.rules.rulesparts import (
    GRANULE,
    SIZE,
    Logged,
    Options,
    begin,
    both_endings,
    both_modes,
    cancel_by_force,
    end,
    guests,
    requests,
    status_of,
)
from support.clients import connected, requested
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import MiB, make_empty, make_noise
from support.paritysides import Faulty
from support.servers import Nbdmirror, QemuNbd
from support.waiting import wait_until

from nbdmirror.mirror.in_flight import GROWTH, PROBE_BYTES

pytestmark = pytest.mark.usefixtures("identical")


# 19, 22, 30, 34, 37, 42: endings and pauses


@pytest.mark.rule(19)
@pytest.mark.alone
def test_force_cancel_with_every_request_in_flight(
    start: Start, identical: Identical, folder: Path, faulty: Faulty
) -> None:
    """Each slot has a request that hangs, and guests' writes hang as well. Afterwards the disk goes
    to another target."""
    disk = make_noise(folder / "large.img", 16 * MiB)
    held = start(Faulty(folder, make_noise(folder / "held.img", 16 * MiB)))
    other = start(QemuNbd(folder, make_noise(folder / "other.img", 16 * MiB)))
    server = start(Nbdmirror(folder, f"src={disk}", bare=True))
    qmp = server.qmp
    begin(server, held, copy_mode="write-blocking", speed=1)
    wait_until(lambda: qmp.job()["offset"], "the first answer, before which nothing else goes", 5)
    held.set("write", "hold")
    qmp.execute("block-job-set-speed", device="j", speed=0)
    # One large write, or small ones if the first answer was not quick.
    least = (1 + GROWTH) * PROBE_BYTES
    wait_until(lambda: status_of(qmp)["in-flight-bytes"] >= least, "all slots are taken", 5)
    guests = [
        requested(server.uri("src"), partial(nbd.NBD.pwrite, buf=b"\x61" * 100, offset=n * MiB))
        for n in (0, 1, 12)
    ]
    assert cancel_by_force(qmp) < 1.0
    for guest in guests:
        guest.result(5.0)
    identical(server.uri("src"), disk)
    identical(disk, other.image)
    qmp.start_mirror(other.uri(), device="src")
    qmp.wait_ready()
    qmp.complete()
    held.heal("write")


@pytest.mark.rule(22)
@both_modes
@pytest.mark.parametrize("is_ready", [False, True], ids=["first copy", "ready"])
def test_a_paused_job_leaves_its_target_alone(
    identical: Identical,
    server: Nbdmirror,
    disk: Path,
    logged: Logged,
    is_ready: bool,
    copy_mode: str,
) -> None:
    qmp = server.qmp
    with Guest(server.uri("src"), disk, connections=2) as guest:
        identical(guest, logged.image)
        slow: Options = {} if is_ready else {"speed": MiB, "buf_size": GRANULE}
        begin(server, logged, copy_mode=copy_mode, **slow)
        if is_ready:
            qmp.wait_ready()
        else:
            wait_until(lambda: qmp.job()["offset"] > 0, "it copies")
        qmp.execute("block-job-pause", device="j")
        qmp.wait_status("standby" if is_ready else "paused")
        before, offset = requests(logged), qmp.job()["offset"]
        guest.wait_for_requests(100)
        assert requests(logged) == before
        job = qmp.job()
        assert (job["offset"], job["busy"]) == (offset, False)
        assert job["len"] > offset, "what the guest writes is dirty"
        qmp.execute("block-job-set-speed", device="j", speed=0)
        qmp.execute("block-job-resume", device="j")
        if not is_ready:
            qmp.wait_ready()
        else:
            qmp.wait_status("ready")
        qmp.complete()


def test_a_pause_does_not_wait_for_a_flush_that_takes_long(
    identical: Identical, server: Nbdmirror, disk: Path, faulty: Faulty
) -> None:
    """It changes nothing. What is asked for while it is under way is done after the resume."""
    qmp = server.qmp
    faulty.set("flush", "hold")
    begin(server, faulty)
    wait_until(lambda: not status_of(qmp)["dirty-bytes"], "all is copied, and to be flushed")
    qmp.execute("block-job-pause", device="j")
    qmp.wait_status("paused")
    faulty.heal("flush")
    qmp.execute("block-job-resume", device="j")
    qmp.wait_ready()
    end(qmp, "block-job-cancel")
    identical(disk, faulty.image)


@pytest.mark.rule(30)
@pytest.mark.parametrize("ending", ["complete", pytest.param("cancel", marks=pytest.mark.alone)])
def test_zeroes_over_old_data_are_limited_paused_and_cancelled(
    start: Start, identical: Identical, folder: Path, logged: Logged, ending: str
) -> None:
    """Marking all is no separate step before the job: zeroes are copied as data is."""
    disk = make_empty(folder / "empty.img", SIZE)
    server = start(Nbdmirror(folder, f"src={disk}", bare=True))
    qmp = server.qmp
    begin(server, logged, unmap=False, speed=MiB, buf_size=GRANULE)
    wait_until(lambda: qmp.job()["offset"] > 0, "it copies")
    assert qmp.job()["status"] == "running"
    qmp.execute("block-job-pause", device="j")
    qmp.wait_status("paused")
    before = logged.image.read_bytes()
    assert before.strip(b"\0"), "not all is zeroed yet"
    if ending == "cancel":
        assert cancel_by_force(qmp) < 1.0
        identical(before, logged.image)
        identical(disk, bytes(SIZE))
        return
    qmp.execute("block-job-set-speed", device="j", speed=0)
    qmp.execute("block-job-resume", device="j")
    qmp.wait_ready()
    assert not logged.requests("Write")
    identical(disk, logged.image)
    qmp.complete()


@pytest.mark.rule(34)
@pytest.mark.parametrize("is_large", [False, True], ids=["small writes", "large writes"])
@pytest.mark.alone
def test_control_answers_while_there_is_always_dirt(
    identical: Identical, server: Nbdmirror, disk: Path, logged: Logged, is_large: bool
) -> None:
    """No speed limit, and guests that dirty all the while: commands are answered, and obeyed."""
    qmp = server.qmp
    begin(server, logged)
    length = 500_000 if is_large else 4096
    with Guest(server.uri("src"), disk, connections=3, pause_s=0, length_max=length) as guest:
        identical(guest, logged.image)
        guest.wait_for_requests(100)
        for _ in range(50):
            began_s = time.monotonic()
            qmp.job()
            assert time.monotonic() - began_s < 1.0
        qmp.execute("block-job-pause", device="j")
        wait_until(lambda: qmp.job()["status"] in ("paused", "standby"), "it is paused", 5)
        qmp.execute("block-job-resume", device="j")
        guest.wait_for_requests(50)
    wait_until(lambda: qmp.job()["ready"], "READY", 10)
    qmp.complete()


@pytest.mark.rule(37)
@both_modes
@both_endings
def test_a_guest_that_vanishes_leaves_an_orderly_ending(
    start: Start, identical: Identical, disk: Path, logged: Logged, ending: str, copy_mode: str
) -> None:
    """Its connection breaks with writes under way: those are done or not, on both sides alike. One
    thread: nbdkit before 1.34 may abort when a reply cannot be sent while another one is under way
    (docs/guarantees.md)."""
    server = Nbdmirror(disk.parent, f"src={disk}", bare=True, nbdkit=("-t", "1"))
    server.allowed = [".*"]  # nbdkit tells of the broken connection
    start(server)
    qmp = server.qmp
    begin(server, logged, copy_mode=copy_mode)
    qmp.wait_ready()
    before = guests(server)
    handle = nbd.NBD()
    handle.connect_uri(server.uri("src"))
    for number in range(16):
        handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([number] * 5000)), number * 100_000)
    with socket.socket(fileno=os.dup(handle.aio_get_fd())) as connection:
        connection.shutdown(socket.SHUT_RDWR)
    del handle
    wait_until(lambda: guests(server) <= before, "the server has seen it go", 5)
    end(qmp, ending)
    identical(disk, logged.image)
    with connected(server.uri("src")) as other:
        assert bytes(other.pread(SIZE, 0)) == disk.read_bytes()


@pytest.mark.rule(42)
@pytest.mark.guarantee("The pause is bounded")
@both_endings
@pytest.mark.alone
def test_an_ending_that_takes_too_long_gives_the_guest_its_disk_back(
    identical: Identical, server: Nbdmirror, disk: Path, faulty: Faulty, ending: str
) -> None:
    """The last copy hangs behind the gate: an event, another attempt, and guests get on between
    attempts. When the target goes on, the ending comes by itself."""
    qmp = server.qmp
    begin(server, faulty)
    qmp.wait_ready()
    faulty.set("write", "hold")
    with Guest(server.uri("src"), disk, pause_s=0.002, length_max=4096) as guest:
        identical(guest, faulty.image if ending == "block-job-complete" else disk)
        guest.wait_for_requests(5)
        qmp.execute(ending, device="j")
        for _ in range(2):
            told = qmp.wait_for_event("X_NBDMIRROR_QUIESCE_TIMEOUT", 10, device="j")
            assert told["type"] == "mirror"
        assert qmp.job()["ready"]
        guest.wait_for_requests(1)
        faulty.heal("write")
        qmp.wait_completed()
        guest.wait_for_requests(5)
    assert guest.longest_s < 1.5
    if ending == "block-job-cancel":
        with connected(faulty.uri()) as copy:
            assert copy.get_size() == SIZE


@pytest.mark.rule(42)
@pytest.mark.parametrize("operation", ["write", "flush"])
def test_errors_that_are_ignored_are_tried_again_with_a_back_off(
    identical: Identical, server: Nbdmirror, disk: Path, faulty: Faulty, operation: str
) -> None:
    """0.1, 0.2, 0.4 s: four errors take 0.7 s at least, and nothing is skipped."""
    qmp = server.qmp
    identical(disk, faulty.image)
    faulty.set(operation, "EIO")
    began_s = time.monotonic()
    begin(server, faulty, on_target_error="ignore")
    for _ in range(4):
        assert qmp.wait_for_event("BLOCK_JOB_ERROR", 5)["action"] == "ignore"
    assert time.monotonic() - began_s > 0.6
    assert not qmp.job()["ready"]
    faulty.heal(operation)
    qmp.wait_ready()
    qmp.complete()
