"""A disk that is an NBD export, at the start or since a pivot, whose server goes away and comes
back: what guests' requests make of it."""

from __future__ import annotations

import errno
from pathlib import Path

import nbd
import pytest
from support.clients import connected, nbd_errno
from support.fixtures import Start
from support.images import MiB, assert_identical, make_noise
from support.losing import Lossy
from support.servers import Nbdmirror
from support.waiting import InThread, wait_until

BLOCK = 4096
DATA = b"\x5a" * BLOCK
LOST = r"connection lost|not flushed|lost: |Failed to connect"


@pytest.fixture(params=[True, False], ids=["multi-conn", "one connection"])
def target(start: Start, folder: Path, request: pytest.FixtureRequest) -> Lossy:
    image = make_noise(folder / "t.img", 4 * MiB)
    return start(Lossy(folder, image, multi_conn=request.param))


@pytest.fixture
def server(start: Start, folder: Path, target: Lossy) -> Nbdmirror:
    server = start(Nbdmirror(folder, target.uri(), bare=True))
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


def test_requests_fail_in_the_end(target: Lossy, server: Nbdmirror) -> None:
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
