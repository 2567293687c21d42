"""A server has so many places for clients. A disk on it takes as many as its guests need, leaves
some, and gives back what is idle; a server that is full is no error and costs no time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.clients import connected, connections
from support.fixtures import Start
from support.images import KiB, MiB, make_image
from support.processes import run
from support.qmpclient import Qmp
from support.serverprocess import Server
from support.servers import NbdkitTarget, Nbdmirror, QemuNbd
from support.waiting import WAIT_S_MAX, InThread, wait_until

from nbdmirror.nbdclient import exclusive_set as linkset
from nbdmirror.nbdclient.device import NbdDevice

SIZE = 4 * MiB
THREADS = 8
BLOCK = 4 * KiB


def qemu(folder: Path, shared: int) -> Server:
    return QemuNbd(folder, make_image(folder / "image.img", SIZE), shared=shared)


def nbdkit(folder: Path, limit: int) -> Server:
    options = (f"limit={limit}",) if limit else ()
    filters = ("limit",) if limit else ()
    return NbdkitTarget(
        folder, "file", str(make_image(folder / "i", SIZE)), *options, filters=filters
    )


@contextmanager
def busy(device: NbdDevice) -> Iterator[None]:
    """THREADS guests' threads read until the end; none of their requests fails."""
    is_over = threading.Event()

    def read() -> None:
        buffer = memoryview(bytearray(BLOCK))
        while not is_over.is_set():
            device.pread(buffer, 0)

    threads = [InThread(read) for _ in range(THREADS)]
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.result()


@contextmanager
def opened(uri: str) -> Iterator[NbdDevice]:
    device = NbdDevice.open(uri)
    try:
        yield device
    finally:
        device.close()
        linkset.wait_for_handshakes()


def test_an_idle_guest_takes_one_place(start: Start, folder: Path) -> None:
    server = start(nbdkit(folder, 0))
    with opened(server.uri()) as device:
        device.pread(memoryview(bytearray(BLOCK)), 0)
        assert not device.pool.links.open
        assert connections(server.socket) == 1


@pytest.mark.parametrize("number", [1, 2])
def test_a_guest_with_little_to_do_takes_one_place(start: Start, folder: Path, number: int) -> None:
    """So many requests come at once, a hundred times, each of which takes 5 ms: the server shows a
    new client its disk, and lets others wait meanwhile."""
    slow = NbdkitTarget(folder, "memory", str(SIZE), "rdelay=5ms", filters=("delay",))
    server = start(slow)

    def read(device: NbdDevice) -> None:
        device.pread(memoryview(bytearray(BLOCK)), 0)

    with opened(server.uri()) as device:
        for _ in range(100):
            for request in [InThread(lambda: read(device)) for _ in range(number)]:
                request.result()
        assert not [one for one in threading.enumerate() if one.name == "nbdmirror-links"]
        assert connections(server.socket) == 1


def test_a_busy_one_has_a_connection_a_thread_and_gives_them_back(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linkset, "IDLE_S", 0.1)
    server = start(nbdkit(folder, 0))
    with opened(server.uri()) as device:
        with busy(device):
            wait_until(lambda: len(device.pool.links.open) == THREADS, "a link for each thread")
        wait_until(lambda: connections(server.socket) == 1, "the idle ones are closed")
        with busy(device):
            wait_until(lambda: len(device.pool.links.open) > 1, "and opened again")


@pytest.mark.parametrize("is_orderly", [True, False])
def test_no_thread_is_left(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch, is_orderly: bool
) -> None:
    """A process that ends does not wait for what has nothing to do."""
    monkeypatch.setattr(linkset, "IDLE_S", 1000.0)
    server = start(nbdkit(folder, 0))
    device = NbdDevice.open(server.uri())
    with busy(device):
        wait_until(lambda: device.pool.links.open, "a link")
    (thread,) = (one for one in threading.enumerate() if one.name == "nbdmirror-links")
    if is_orderly:
        device.close()
    else:
        device.pool.abandon()
    thread.join(WAIT_S_MAX)
    assert not thread.is_alive()
    device.close()


@pytest.mark.parametrize("places", [2, 3, 8])
@pytest.mark.parametrize("kind", [qemu, nbdkit], ids=["hangs", "refuses"])
def test_another_client_gets_in(start: Start, folder: Path, kind: object, places: int) -> None:
    """qemu-nbd lets it wait without a word, nbdkit's limit filter refuses it. Guests are at work,
    and none of their requests fails."""
    assert callable(kind)
    server = start(kind(folder, places))
    with opened(server.uri()) as device, busy(device):
        wait_until(lambda: not device.pool.links.may_grow, "it is known that the server is full")
        wait_until(lambda: connections(server.socket) < places, "a place is free")
        with connected(server.uri()) as other:
            assert other.get_size() == SIZE


@pytest.mark.parametrize("number", [1, 3])
def test_the_number_can_be_said(start: Start, folder: Path, number: int) -> None:
    server = start(nbdkit(folder, 0))
    with opened(server.uri()) as device:
        device.pool.limit(number)
        with busy(device):
            wait_until(lambda: not device.pool.links.may_grow, "all are open")
            assert 1 + len(device.pool.links.open) <= number


def test_the_number_of_the_command_line(start: Start, folder: Path) -> None:
    """It counts for disks, and for targets that become disks."""
    target = start(QemuNbd(folder, make_image(folder / "target.img", SIZE), shared=3))
    disk = make_image(folder / "disk.img", SIZE, seed=3)
    server = Nbdmirror(folder, f"vda={disk}", options=("--connections", "2"))
    start(server)
    qmp: Qmp = server.qmp
    qmp.add_target("t", target)
    qmp.start_mirror("t", device="vda")
    qmp.wait_ready()
    qmp.complete()
    fio = ("--ioengine=nbd", f"--uri={server.uri()}", "--rw=randread", "--iodepth=16")
    run("fio", "--name=guest", *fio, "--size=4M", "--io_size=64M")
    with connected(target.uri()) as other:
        assert other.get_size() == SIZE
    assert connections(target.socket) <= 3


@pytest.mark.parametrize("said", ["0", "-1", "65", "many", "1.5", "²"])
def test_a_number_that_makes_no_sense(folder: Path, said: str) -> None:
    disk = make_image(folder / "disk.img", SIZE)
    server = Nbdmirror(folder, str(disk), options=(f"--connections={said}",))
    done = run(*server.argv(), check=False)
    assert done.returncode == 2
    assert f"--connections: {said!r} is not a whole number from 1 to 64" in done.stderr
    bare = Nbdmirror(folder, disk, bare=True, options=(f"connections={said}",))
    done = run(*bare.argv(), check=False)
    assert done.returncode == 1
    assert f"connections={said}: expected a number from 1 to 64" in done.stderr
