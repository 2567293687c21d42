"""A disk that is an NBD export, at the start or since a pivot, whose server goes away and comes
back: what guests' requests make of it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import nbd
import pytest
from support.clients import connected, nbd_errno
from support.fixtures import Start
from support.images import MiB, assert_identical, make_noise
from support.losing import Lossy
from support.processes import nbdmirror
from support.servers import NbdkitTarget, Nbdmirror
from support.waiting import InThread, wait_until

from nbdmirror.errors import DeviceLost
from nbdmirror.nbdclient.device import NbdDevice

BLOCK = 4096
SIZE = 4 * MiB
DATA = b"\x5a" * BLOCK
LOST = r"connection lost|not flushed|lost: |Failed to connect"

PATIENT = """
import nbdmirror.nbdclient.pool
nbdmirror.nbdclient.pool.RECONNECT_TIMEOUT_S = 20.0
"""


class Patient(Nbdmirror):
    """Requests wait for a server that takes long to start on a busy machine."""

    patches = PATIENT


@pytest.fixture(params=[True, False], ids=["multi-conn", "one connection"])
def target(start: Start, folder: Path, request: pytest.FixtureRequest) -> Lossy:
    image = make_noise(folder / "t.img", SIZE)
    return start(Lossy(folder, image, multi_conn=request.param))


@pytest.fixture
def server(start: Start, folder: Path, target: Lossy) -> Nbdmirror:
    server = start(Patient(folder, target.uri(), bare=True))
    server.allowed.append(LOST)
    return server


@pytest.mark.guarantee("An NBD server that is restarted under a guest")
def test_a_request_in_flight_is_done_again(target: Lossy, server: Nbdmirror) -> None:
    with connected(server.uri()) as guest:
        guest.pwrite(DATA, 0)
        guest.flush()
        target.order("kill write 1")
        write = InThread(lambda: guest.pwrite(DATA, BLOCK, nbd.CMD_FLAG_FUA))
        target.wait_killed()
        target.come_back()
        write.result()
        guest.flush()  # nothing was lost: what had been acknowledged was flushed
        assert guest.pread(2 * BLOCK, 0) == 2 * DATA


@pytest.mark.guarantee("An NBD server that is restarted under a guest")
def test_requests_wait_for_the_server(target: Lossy, server: Nbdmirror) -> None:
    with connected(server.uri()) as guest:
        expected = bytes(guest.pread(MiB, 0))
        target.kill()
        read = InThread(lambda: guest.pread(MiB, 0) == expected or pytest.fail("another content"))
        wait_until(lambda: "no answer" not in server.stderr, "the server lives")
        target.come_back()
        read.result()
        assert guest.pread(MiB, 0) == expected


@pytest.mark.guarantee("An NBD server that is restarted under a guest")
def test_a_flush_tells_once_of_writes_that_may_be_lost(target: Lossy, server: Nbdmirror) -> None:
    with connected(server.uri()) as guest:
        guest.pwrite(DATA, 0)
        guest.flush()
        guest.pwrite(DATA, BLOCK)
        target.kill()
        target.come_back()
        guest.pread(BLOCK, 0)
        assert nbd_errno(guest.flush) == errno.EIO
        assert guest.pread(BLOCK, BLOCK) != DATA, "the target has lost it, as it was to do"
        guest.pwrite(DATA, BLOCK)
        guest.flush()
    assert_identical(2 * DATA, target.image.read_bytes()[: 2 * BLOCK])


@pytest.mark.guarantee("An NBD server that is restarted under a guest")
def test_the_flush_that_finds_the_loss_tells_of_it(target: Lossy, server: Nbdmirror) -> None:
    """No other request came in between: it is done again on a server that knows of nothing."""
    with connected(server.uri()) as guest:
        guest.pwrite(DATA, 0)
        target.kill()
        target.come_back()
        assert nbd_errno(guest.flush) == errno.EIO
        guest.flush()
        assert guest.pread(BLOCK, 0) != DATA


def test_a_server_that_dies_in_a_flush(target: Lossy, server: Nbdmirror) -> None:
    with connected(server.uri()) as guest:
        guest.pwrite(DATA, 0)
        target.order("kill flush 1")
        flush = InThread(guest.flush)
        target.wait_killed()
        target.come_back()
        with pytest.raises(nbd.Error, match="EIO"):
            flush.result()


def have_links(guest: nbd.NBD, target: Lossy) -> None:
    """Keep several requests under way until they have connections of their own."""

    def has_links() -> bool:
        reads = [guest.aio_pread(nbd.Buffer(BLOCK), 0) for _ in range(8)]
        while reads:
            guest.poll(-1)
            reads = [read for read in reads if not guest.aio_command_completed(read)]
        return target.connections() > 4

    if target.settings["multi-conn"]:
        wait_until(has_links, "the guest's threads have links")


def test_a_server_that_lost_nothing_costs_no_flush(target: Lossy, server: Nbdmirror) -> None:
    """All connections broke with the server; each is opened again when a thread of the guest's
    first uses it. That is one loss, of before the writes that follow."""
    with connected(server.uri()) as guest:
        guest.pwrite(DATA, 0)
        have_links(guest, target)
        guest.flush()
        target.kill()
        target.come_back()
        for number in range(20):
            guest.pwrite(DATA, number * BLOCK)
            guest.pread(BLOCK, number * BLOCK)
            guest.flush()
    assert_identical(20 * DATA, target.image.read_bytes()[: 20 * BLOCK])


def test_requests_fail_in_the_end(start: Start, folder: Path, target: Lossy) -> None:
    server = start(Nbdmirror(folder, target.uri(), bare=True))
    server.allowed.append(LOST)
    with connected(server.uri()) as guest:
        target.kill()
        assert nbd_errno(guest.pread, BLOCK, 0) == errno.EIO
        assert nbd_errno(guest.pwrite, DATA, 0) == errno.EIO
        target.come_back()
        wait_until(lambda: nbd_errno(guest.pread, BLOCK, 0) == 0, "the disk is back")


def test_after_a_pivot_requests_wait_as_long_as_the_nodes_reconnect_delay(
    start: Start, folder: Path, target: Lossy
) -> None:
    source = make_noise(folder / "s.img", 4 * MiB, seed=3)
    server = start(Nbdmirror(folder, source, bare=True))
    server.allowed.append(LOST)
    address = {"type": "unix", "path": str(target.socket)}
    qmp = server.qmp
    qmp.execute("blockdev-add", driver="nbd", node_name="t", server=address, reconnect_delay=20)
    qmp.start_mirror("t")
    qmp.wait_ready()
    qmp.complete()
    with connected(server.uri()) as guest:
        target.kill()
        write = InThread(lambda: guest.pwrite(DATA, 0))
        read = InThread(lambda: guest.pread(BLOCK, MiB))
        assert not write.has_ended_within(3), "longer than a request waits without it"
        target.come_back()
        write.result()
        read.result()
        guest.flush()
    expected = DATA + source.read_bytes()[BLOCK:]
    assert_identical(expected, target.image)


def respawn(target: Lossy) -> None:
    """Start it, and do not wait: it may be killed again before anybody has looked."""
    target.wait_killed()
    target.order("kill write 1")
    target.socket.unlink(missing_ok=True)
    target.spawn()


@pytest.mark.guarantee("An NBD server that is restarted under a guest")
def test_a_server_that_is_lost_again_and_again(target: Lossy, server: Nbdmirror) -> None:
    """Each time the request is done again."""
    with connected(server.uri()) as guest:
        guest.pwrite(DATA, 0)
        have_links(guest, target)
        guest.flush()
        target.order("kill write 1")
        write = InThread(lambda: guest.pwrite(DATA, BLOCK, nbd.CMD_FLAG_FUA))
        for _ in range(3):
            respawn(target)
        target.wait_killed()
        target.come_back()
        write.result()
    assert_identical(2 * DATA, target.image.read_bytes()[: 2 * BLOCK])


@pytest.fixture
def grown(start: Start, folder: Path) -> NbdkitTarget:
    """A server that looks for its image's size at each connection."""
    return start(NbdkitTarget(folder, "file", str(make_noise(folder / "grown.img", SIZE))))


def settled(start: Start, folder: Path, grown: NbdkitTarget, is_pivoted: bool) -> Nbdmirror:
    """A server of that disk, from the start or since a pivot."""
    disk = make_noise(folder / "old.img", SIZE) if is_pivoted else grown.uri()
    server = start(Patient(folder, disk, bare=True))
    server.allowed.append(LOST)
    if is_pivoted:
        server.qmp.start_mirror(grown.uri())
        server.qmp.wait_ready()
        server.qmp.complete()
    return server


@pytest.mark.guarantee("An NBD server that is restarted under a guest")
@pytest.mark.parametrize("is_pivoted", [False, True], ids=["from the start", "after a pivot"])
def test_a_disk_that_has_grown_meanwhile_keeps_its_size(
    start: Start, folder: Path, grown: NbdkitTarget, is_pivoted: bool
) -> None:
    server = settled(start, folder, grown, is_pivoted)
    image = folder / "grown.img"
    with connected(server.uri()) as guest:
        guest.pwrite(DATA, 0)
        guest.flush()
        os.truncate(image, SIZE + MiB)
        grown.kill()
        grown.come_back()
        guest.pwrite(DATA, BLOCK)
        guest.flush()
        assert guest.pread(2 * BLOCK, 0) == 2 * DATA
        assert guest.get_size() == SIZE
    assert_identical(2 * DATA, image.read_bytes()[: 2 * BLOCK])


def test_a_server_that_comes_back_without_multi_conn_has_one_connection(
    grown: NbdkitTarget, folder: Path
) -> None:
    """A flush on one connection would not cover what was written on others."""
    device = NbdDevice.open(grown.uri())
    try:
        device.pool.links.ask()
        wait_until(lambda: device.pool.links.open, "there are two connections")
        grown.kill()
        grown.options.append("--filter=multi-conn")
        grown.parameters = (*grown.parameters, "multi-conn-mode=disable")
        grown.come_back()
        found = bytearray(BLOCK)
        for number in range(100):
            device.pwrite(DATA, number * BLOCK)
            device.pool.links.ask()
        device.flush()
        device.pread(memoryview(found), 0)
        assert found == DATA
        assert device.pool.links.connections_max == 1
        assert not device.pool.links.open
    finally:
        device.close()
    assert_identical(100 * DATA, (folder / "grown.img").read_bytes()[: 100 * BLOCK])


def test_a_disk_that_has_shrunk_meanwhile_is_not_written_to(
    start: Start, folder: Path, grown: NbdkitTarget
) -> None:
    server = start(Nbdmirror(folder, grown.uri(), bare=True))
    server.allowed.append(LOST)
    with connected(server.uri()) as guest:
        os.truncate(folder / "grown.img", SIZE - MiB)
        grown.kill()
        grown.come_back()
        with pytest.raises(nbd.Error, match="EIO"):
            guest.pwrite(DATA, 0)
    text = f"came back changed (size was {SIZE}, is {SIZE - MiB})"
    wait_until(lambda: text in server.stderr, "the log says why")
    assert (folder / "grown.img").read_bytes()[:BLOCK] != DATA


@pytest.mark.parametrize(
    ("size", "why"), [(0, "Failed to connect"), (SIZE - MiB, "came back changed")]
)
def test_status_says_why_the_disks_server_is_lost_still(
    start: Start, folder: Path, grown: NbdkitTarget, size: int, why: str
) -> None:
    """It may be there, with a disk that is refused: then waiting does not mend that."""
    server = start(Nbdmirror(folder, grown.uri(), bare=True))
    server.allowed.append(LOST)
    with connected(server.uri()) as guest:
        grown.kill()
        if size:
            os.truncate(folder / "grown.img", size)
            grown.come_back()
        with pytest.raises(nbd.Error, match="EIO"):
            guest.pread(BLOCK, 0)
        wait_until(lambda: why in str(server.qmp.disk().get("lost-reason")), "the query says why")
        shown = nbdmirror("status", "--qmp", server.qmp_path).stdout
        assert "its NBD server is lost (last attempt: " in shown and why in shown
        os.truncate(folder / "grown.img", SIZE)
        if size:
            grown.kill()
        grown.come_back()
        wait_until(lambda: nbd_errno(guest.pread, BLOCK, 0) == 0, "the disk is back")
        assert server.qmp.disk()["connected"] and "lost-reason" not in server.qmp.disk()


def test_a_disk_that_was_closed_is_not_connected_to_again(
    grown: NbdkitTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a helper reads it while the process ends."""
    device = NbdDevice.open(grown.uri())
    device.close()
    monkeypatch.setattr("nbdmirror.nbdclient.pool.start_thread", pytest.fail)
    with pytest.raises(DeviceLost):
        device.pread(memoryview(bytearray(BLOCK)), 0)


def test_a_request_that_ends_its_server_each_time_fails(target: Lossy, server: Nbdmirror) -> None:
    with connected(server.uri()) as guest:
        target.order("kill write 1")
        write = InThread(lambda: guest.pwrite(DATA, 0))
        times = 0
        while not write.has_ended_within(0.05):
            if target.process is not None and target.process.poll() is not None:
                respawn(target)
                times += 1
        with pytest.raises(nbd.Error, match="EIO"):
            write.result()
        assert 2 < times < 10
        target.kill()
        target.order_path.unlink(missing_ok=True)
        target.come_back()
