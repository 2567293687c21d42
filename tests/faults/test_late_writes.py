"""A server may carry out a request late, long after nobody waits for the answer any more: over
newer data, if that came on another connection. So no other connection of ours writes there before
each request on the old one was answered, or the server has ended it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from support.clients import connected, requested
from support.fixtures import Identical, Start
from support.images import KiB, MiB, make_image, make_noise
from support.late import Holding, refused, started
from support.processes import freeze
from support.qmpclient import Qmp
from support.servers import Nbdmirror, QemuNbd
from support.waiting import wait_until

from nbdmirror.nbdclient.demand import REQUESTS

CANCEL = "block-job-cancel"
SIZE = 4 * MiB
FORCE_S_MAX = 3.0
"""Of a forced cancel; it takes 0.3 s."""
LINKED = 2 * REQUESTS
OLD, NEW = b"1" * 4096, b"2" * 4096

IMPATIENT = """
from nbdmirror.mirror import target_watch
from nbdmirror.nbdclient import pool

target_watch.HUNG_S = 0.5
pool.LIFE_S = 0.5
"""
"""A server that takes a silent target for lost within a second."""

CARELESS = """
from nbdmirror.nbdclient.pool import ConnectionPool

ConnectionPool.unanswered = 0
"""
"""A broken variant: it writes on a new connection whatever is in flight on the old one."""


class Impatient(Nbdmirror):
    patches = IMPATIENT


class Careless(Nbdmirror):
    patches = IMPATIENT + CARELESS


@pytest.fixture
def disk(folder: Path) -> Path:
    return make_image(folder / "disk.img", SIZE)


@pytest.fixture
def image(folder: Path) -> Path:
    return make_noise(folder / "target.img", SIZE)


def cancel(qmp: Qmp) -> None:
    began_s = time.monotonic()
    qmp.execute(CANCEL, device="j", force=True)
    qmp.wait_for_event("BLOCK_JOB_CANCELLED")
    assert time.monotonic() - began_s < FORCE_S_MAX


def status_sum(qmp: Qmp, key: str) -> int:
    jobs = qmp.execute("x-nbdmirror-query-status")["disks"][0]["jobs"]
    return sum(job[key] for job in jobs)


def leave_a_write(server: Nbdmirror, target: Holding, node: str, copy_mode: str) -> None:
    """OLD is in flight at the target when the job is cancelled by force; then the guest writes NEW
    and flushes."""
    qmp = server.qmp
    qmp.start_mirror(node, copy_mode=copy_mode, granularity=64 * KiB)
    qmp.wait_ready()
    if copy_mode == "write-blocking":
        wait_until(lambda: qmp.job()["actively-synced"], "actively synced")
        with connected(server.uri()) as busy:
            for number in range(LINKED):  # after so many it has a connection to the target
                busy.pwrite(bytes(512), MiB + number * 512)
    target.hold.touch()
    guest = requested(server.uri(), lambda guest: guest.pwrite(OLD, 0))
    wait_until(target.is_holding, "it is at the target")
    cancel(qmp)
    guest.result(10.0)
    with connected(server.uri()) as other:
        other.pwrite(NEW, 0)
        other.flush()


@pytest.mark.rule(19)
@pytest.mark.guarantee("What is in flight at a cancel does not come late")
@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
@pytest.mark.parametrize(
    ("multi_conn", "tcp"),
    [(True, False), (False, False), (True, True)],
    ids=["multi-conn", "one connection", "tcp"],
)
def test_a_new_mirror_waits_for_what_a_cancelled_one_has_in_flight(
    start: Start,
    folder: Path,
    identical: Identical,
    disk: Path,
    image: Path,
    copy_mode: str,
    multi_conn: bool,
    tcp: bool,
) -> None:
    """Whatever way it is asked for; what the old one wrote late is overwritten."""
    target = start(Holding(folder, image, multi_conn=multi_conn, tcp=tcp))
    server = start(Nbdmirror(folder, disk, bare=True))
    qmp = server.qmp
    if tcp:
        address = {"type": "inet", "host": "127.0.0.1", "port": str(target.port)}
        qmp.execute("blockdev-add", driver="nbd", node_name="tgt", server=address)
    else:
        qmp.add_target("tgt", target)
    leave_a_write(server, target, "tgt", copy_mode)
    text = refused(lambda: qmp.start_mirror("tgt"))
    assert target.uri().split("/?")[0] in text and "1 are left" in text
    refused(lambda: qmp.start_mirror(target.uri()))
    qmp.execute("blockdev-del", node_name="tgt")
    refused(lambda: qmp.start_mirror(target.uri(), job_id="j"))
    target.hold.unlink()
    started(lambda: qmp.start_mirror(target.uri()))
    qmp.wait_ready()
    qmp.complete()
    identical(disk, image)
    assert image.read_bytes()[: len(NEW)] == NEW


@pytest.mark.guarantee("What is in flight at a cancel does not come late")
def test_the_test_is_able_to_fail(start: Start, folder: Path, disk: Path, image: Path) -> None:
    """A server that does not wait: the job ends well, and the old data comes late."""
    target = start(Holding(folder, image, multi_conn=True))
    server = start(Careless(folder, disk, bare=True))
    leave_a_write(server, target, target.uri(), "background")
    server.qmp.start_mirror(target.uri())
    target.last.touch()
    target.hold.unlink()
    server.qmp.wait_ready()
    server.qmp.complete()
    target.last.unlink()
    wait_until(lambda: image.read_bytes()[: len(OLD)] == OLD, "the old write is carried out last")


@pytest.mark.guarantee("What is in flight at a cancel does not come late")
@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
@pytest.mark.parametrize("shared", [1, 16])
def test_a_stopped_server_that_goes_on(
    start: Start,
    folder: Path,
    identical: Identical,
    disk: Path,
    image: Path,
    shared: int,
    copy_mode: str,
) -> None:
    """A qemu-nbd, also one that takes one client at a time. The refusal does not wait for it, and
    another disk's mirror to another server goes on beside."""
    target = start(QemuNbd(folder, image, shared=shared))
    other_disk = make_image(folder / "other.img", SIZE)
    other = start(QemuNbd(folder, make_noise(folder / "other-target.img", SIZE)))
    server = start(Nbdmirror(folder, f"src={disk}", f"second={other_disk}"))
    qmp = server.qmp
    qmp.start_mirror(target.uri(), device="src", copy_mode=copy_mode)
    qmp.wait_ready()
    # A copy counts as written when it is sent; a synchronous write is in flight until it has ended.
    key = "written-bytes" if copy_mode == "background" else "in-flight-bytes"
    before = status_sum(qmp, key)
    freeze(target.pid)
    try:
        guest = requested(server.uri("src"), lambda guest: guest.pwrite(OLD, 0))
        wait_until(lambda: status_sum(qmp, key) > before, "it is at the target")
        cancel(qmp)
        guest.result(10.0)
        refused(lambda: qmp.start_mirror(target.uri(), device="src"))
        refused(lambda: qmp.start_mirror(target.uri(), device="second"))
        qmp.start_mirror(other.uri(), device="second", job_id="k")
        qmp.wait_ready("k")
        qmp.complete("k")
    finally:
        os.kill(target.pid, signal.SIGCONT)
    with connected(server.uri("src")) as guest_again:
        guest_again.pwrite(NEW, 0)
        guest_again.flush()
    started(lambda: qmp.start_mirror(target.uri(), device="src"))
    qmp.wait_ready()
    qmp.complete()
    identical(disk, image)
    identical(other_disk, other.image)


def test_a_server_that_was_killed_carries_nothing_out(
    start: Start, folder: Path, identical: Identical, disk: Path, image: Path
) -> None:
    """Its end is the end of what it was asked; the same place is a target again at once."""
    target = start(Holding(folder, image, multi_conn=True))
    server = start(Nbdmirror(folder, disk, bare=True))
    leave_a_write(server, target, target.uri(), "background")
    refused(lambda: server.qmp.start_mirror(target.uri()))
    target.kill()
    target.hold.unlink()
    target.socket.unlink(missing_ok=True)
    target.start()
    started(lambda: server.qmp.start_mirror(target.uri()))
    server.qmp.wait_ready()
    server.qmp.complete()
    identical(disk, image)


@pytest.mark.parametrize("ending", ["quit", "SIGTERM"])
def test_a_server_with_something_left_ends_soon(
    start: Start, folder: Path, disk: Path, image: Path, ending: str
) -> None:
    target = start(Holding(folder, image, multi_conn=True))
    server = start(Nbdmirror(folder, disk, bare=True))
    leave_a_write(server, target, target.uri(), "write-blocking")
    assert server.process is not None
    if ending == "quit":
        server.qmp.execute("quit")
    else:
        os.kill(server.pid, signal.SIGTERM)
    server.process.wait(10)
    target.hold.unlink()


def take_for_lost(start: Start, server: Nbdmirror, target: QemuNbd, copy_mode: str) -> Qmp:
    """The target's server is stopped with OLD in flight, which the job, that may reconnect, takes
    for lost; meanwhile the guest writes NEW."""
    qmp = server.qmp
    unix = {"type": "unix", "path": str(target.socket)}
    qmp.execute("blockdev-add", driver="nbd", node_name="tgt", server=unix, reconnect_delay=60)
    qmp.start_mirror("tgt", copy_mode=copy_mode)
    qmp.wait_ready()
    freeze(target.pid)
    guest = requested(server.uri(), lambda guest: guest.pwrite(OLD, 0))
    qmp.wait_for_event("X_NBDMIRROR_TARGET_LOST")
    guest.result(10.0)
    with connected(server.uri()) as other:
        other.pwrite(NEW, 0)
        other.flush()
    return qmp


@pytest.mark.guarantee("What is in flight at a cancel does not come late")
@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
@pytest.mark.parametrize("shared", [1, 16])
def test_a_target_that_was_taken_for_lost_and_goes_on(
    start: Start,
    folder: Path,
    identical: Identical,
    disk: Path,
    image: Path,
    shared: int,
    copy_mode: str,
) -> None:
    """The job writes on a new connection when the old one's requests were answered."""
    target = start(QemuNbd(folder, image, shared=shared))
    server = start(Impatient(folder, disk, bare=True))
    try:
        qmp = take_for_lost(start, server, target, copy_mode)
    finally:
        os.kill(target.pid, signal.SIGCONT)
    qmp.wait_for_event("X_NBDMIRROR_TARGET_BACK")
    qmp.complete()
    identical(disk, image)
    assert image.read_bytes()[: len(NEW)] == NEW
