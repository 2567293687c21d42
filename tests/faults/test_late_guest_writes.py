"""A served disk on an NBD server of which one connection is lost, or several, while the server
lives: what is in flight on the others is done once, there. Were it cut and done again, the server
could carry the first one out late, over what the guest has written since."""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import nbd
import pytest
from support.clients import connected, requested
from support.fixtures import Identical, Start
from support.images import MiB, make_image, make_noise
from support.late import Holding
from support.processes import freeze
from support.proxy import Proxy
from support.servers import Nbdmirror, QemuNbd
from support.waiting import InThread, wait_until

SIZE = 4 * MiB
BLOCK = 4096
LENGTH = 2 * BLOCK
REQUEST = bytes(8) + struct.pack(">I", LENGTH)
"""Offset and length of the one that is in flight, as NBD sends them."""

OLD, NEW = b"1" * LENGTH, b"2" * LENGTH
ZEROES = bytes(LENGTH)
LOST = r"connection broken|connection lost|lost: |not flushed|Failed to connect"
AT_ONCE = 8

Request = Callable[[nbd.NBD], object]
CHANGES: dict[str, tuple[Request, bytes]] = {
    "write": (lambda guest: guest.pwrite(OLD, 0), OLD),
    "write with FUA": (lambda guest: guest.pwrite(OLD, 0, nbd.CMD_FLAG_FUA), OLD),
    "zeroes": (lambda guest: guest.zero(LENGTH, 0), ZEROES),
    "trim": (lambda guest: guest.trim(LENGTH, 0), ZEROES),
}

CUTTING = """
from nbdmirror.nbdclient.pool import ConnectionPool

connect_again = ConnectionPool._connect_again

def cut_and_connect(pool):
    for one in (*pool._all, *pool._old):
        one.kill()
    connect_again(pool)

ConnectionPool._connect_again = cut_and_connect
"""
"""A broken variant: of several connections that seem lost, it breaks those that are not."""


class Cutting(Nbdmirror):
    patches = CUTTING


@pytest.fixture
def image(folder: Path) -> Path:
    return make_noise(folder / "target.img", SIZE)


@pytest.fixture
def proxies() -> Iterator[list[Proxy]]:
    opened: list[Proxy] = []
    yield opened
    for proxy in opened:
        proxy.close()


@pytest.fixture
def proxied(proxies: list[Proxy]) -> Callable[[Path], Proxy]:
    def make(socket: Path) -> Proxy:
        proxies.append(Proxy(socket))
        return proxies[-1]

    return make


def read_at_once(guest: nbd.NBD) -> None:
    """Several reads that are under way at the same time, each of another thread of the server."""
    reads = [guest.aio_pread(nbd.Buffer(BLOCK), MiB) for _ in range(AT_ONCE)]
    while reads:
        guest.poll(-1)
        reads = [read for read in reads if not guest.aio_command_completed(read)]


def have_connections(uri: str, proxy: Proxy) -> None:
    with connected(uri) as busy:

        def has_some() -> bool:
            read_at_once(busy)
            return proxy.connections_at_work > 5

        wait_until(has_some, "the guest's threads have connections")


def served(
    start: Start, folder: Path, proxy: Proxy, kind: type[Nbdmirror], *, pivoted: bool
) -> Nbdmirror:
    """A guest's disk on the server behind `proxy`; `pivoted`: since a mirror to there ended."""
    if not pivoted:
        server = start(kind(folder, proxy.uri))
    else:
        server = start(kind(folder, make_image(folder / "disk.img", SIZE)))
        server.qmp.start_mirror(proxy.uri, device="disk0")
        server.qmp.wait_ready()
        server.qmp.complete()
    server.allowed.append(LOST)
    have_connections(server.uri(), proxy)
    proxy.spare(REQUEST)  # not before: what was sent so far may look the same
    return server


def lose_the_others(server: Nbdmirror, proxy: Proxy) -> InThread:
    """All connections but the one with the request in flight; a guest reads until the server has
    another one. A read behind that request ends when the request does."""
    proxy.reset()
    reads = requested(server.uri(), read_at_once)
    wait_until(lambda: "connected again" in server.stderr, "there is another connection")
    return reads


@pytest.mark.guarantee("One lost connection of several costs the others nothing")
@pytest.mark.parametrize("pivoted", [False, True], ids=["from the start", "after a pivot"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_in_flight_beside_a_lost_connection_is_done_once(
    start: Start,
    folder: Path,
    image: Path,
    proxied: Callable[[Path], Proxy],
    identical: Identical,
    change: str,
    pivoted: bool,
) -> None:
    target = start(Holding(folder, image))
    proxy = proxied(target.socket)
    server = served(start, folder, proxy, Nbdmirror, pivoted=pivoted)
    expected = bytearray(image.read_bytes())
    target.hold.touch()
    request, content = CHANGES[change]
    old = requested(server.uri(), request)
    wait_until(target.is_holding, "it is at the server")
    reads = lose_the_others(server, proxy)
    with connected(server.uri()) as other:
        other.pwrite(NEW, MiB)  # the disk is there meanwhile
    target.hold.unlink()
    old.result()
    reads.result()
    assert image.read_bytes()[:LENGTH] == content
    with connected(server.uri()) as guest:
        guest.pwrite(NEW, 0)
        flush_at_last(guest)
        expected[:LENGTH] = expected[MiB : MiB + LENGTH] = NEW
        assert guest.pread(LENGTH, 0) == NEW
    server.stop()
    target.stop()  # it ends when it has carried out all
    identical(bytes(expected), image)


@pytest.mark.guarantee("One lost connection of several costs the others nothing")
def test_a_mirror_reads_from_the_disk_meanwhile(
    start: Start,
    folder: Path,
    image: Path,
    proxied: Callable[[Path], Proxy],
    identical: Identical,
) -> None:
    """The request in flight is on the connection that the mirror reads from."""
    source = start(Holding(folder, image))
    proxy = proxied(source.socket)
    target = start(QemuNbd(folder, make_noise(folder / "copy.img", SIZE, seed=5)))
    server = start(Nbdmirror(folder, proxy.uri, bare=True))
    server.allowed.append(LOST)
    qmp = server.qmp
    qmp.start_mirror(target.uri(), device="disk0")
    qmp.wait_ready()
    proxy.spare(REQUEST)
    source.hold.touch()
    old = requested(server.uri(), CHANGES["write"][0])
    wait_until(source.is_holding, "it is at the server")
    have_connections(server.uri(), proxy)
    lose_the_others(server, proxy).result()
    with connected(server.uri()) as other:
        other.pwrite(NEW, MiB)
    source.hold.unlink()
    old.result()
    with connected(server.uri()) as guest:
        guest.pwrite(NEW, 0)
        flush_at_last(guest)
    qmp.complete()
    server.stop()
    source.stop()
    assert image.read_bytes()[:LENGTH] == NEW
    identical(image, target.image)


def flush_at_last(guest: nbd.NBD) -> None:
    """The first ones may tell of writes that could have been lost."""

    def is_flushed() -> bool:
        try:
            guest.flush()
        except nbd.Error:
            return False
        return True

    wait_until(is_flushed, "a flush succeeds")


@pytest.mark.guarantee("One lost connection of several costs the others nothing")
def test_the_test_is_able_to_fail(
    start: Start, folder: Path, image: Path, proxied: Callable[[Path], Proxy]
) -> None:
    """A server that breaks the other connections: the old write comes late."""
    target = start(Holding(folder, image))
    proxy = proxied(target.socket)
    server = served(start, folder, proxy, Cutting, pivoted=False)
    target.hold.touch()
    target.last.touch()
    old = requested(server.uri(), CHANGES["write"][0])
    wait_until(target.is_holding, "it is at the server")
    reads = lose_the_others(server, proxy)
    wait_until(lambda: len(target.held.read_bytes()) == 2, "it is there twice")
    target.hold.unlink()
    old.result()
    reads.result()
    with connected(server.uri()) as guest:
        guest.pwrite(NEW, 0)
    target.last.unlink()
    wait_until(lambda: image.read_bytes()[:LENGTH] == OLD, "the old write is carried out last")


@pytest.mark.guarantee("One lost connection of several costs the others nothing")
@pytest.mark.parametrize("pivoted", [False, True], ids=["from the start", "after a pivot"])
def test_a_server_that_is_stopped_meanwhile_and_goes_on(
    start: Start,
    folder: Path,
    image: Path,
    proxied: Callable[[Path], Proxy],
    identical: Identical,
    pivoted: bool,
) -> None:
    """Nobody is greeted for as long; requests on lost connections may fail. What is in flight on
    the one that is left is waited for, and is done once."""
    target = start(QemuNbd(folder, image, shared=16))
    proxy = proxied(target.socket)
    server = served(start, folder, proxy, Nbdmirror, pivoted=pivoted)
    expected = bytearray(image.read_bytes())
    freeze(target.pid)
    try:
        old = requested(server.uri(), CHANGES["write"][0])
        wait_until(lambda: proxy.has_spared, "it is under way to the server")
        proxy.reset()
        reads = requested(server.uri(), read_at_once)
        assert not old.has_ended_within(3.0), "longer than requests wait for a lost server"
    finally:
        os.kill(target.pid, signal.SIGCONT)
    old.result()
    assert reads.has_ended_within(10.0)
    with connected(server.uri()) as guest:
        wait_until(lambda: is_written(guest, NEW), "the disk is back")
        flush_at_last(guest)
    expected[:LENGTH] = NEW
    server.stop()
    target.stop()
    identical(bytes(expected), image)


def is_written(guest: nbd.NBD, content: bytes) -> bool:
    try:
        guest.pwrite(content, 0)
    except nbd.Error:
        return False
    return True


@pytest.mark.parametrize("change", CHANGES)
def test_a_server_that_was_killed_leaves_nothing(
    start: Start,
    folder: Path,
    image: Path,
    proxied: Callable[[Path], Proxy],
    identical: Identical,
    change: str,
) -> None:
    """All connections are lost with what was in flight, which is done again, and once."""
    target = start(Holding(folder, image))
    proxy = proxied(target.socket)
    server = served(start, folder, proxy, Nbdmirror, pivoted=False)
    expected = bytearray(image.read_bytes())
    target.hold.touch()
    old = requested(server.uri(), CHANGES[change][0])
    wait_until(target.is_holding, "it is at the server")
    target.kill()
    target.hold.unlink()
    target.socket.unlink(missing_ok=True)
    target.start()
    old.result()
    assert image.read_bytes()[:LENGTH] == CHANGES[change][1]
    with connected(server.uri()) as guest:
        guest.pwrite(NEW, 0)
        flush_at_last(guest)
    expected[:LENGTH] = NEW
    server.stop()
    target.stop()
    identical(bytes(expected), image)
