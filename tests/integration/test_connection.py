"""SharedConnection: whose reply is whose while driving changes hands. What uses it tests the rest:
test_device_contract, integration/test_nbd_source, and the tests with lost servers."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import threading
import time
from functools import partial
from pathlib import Path

import nbd
import pytest
from support.fixtures import Start
from support.images import MiB, make_noise
from support.late import Holding
from support.processes import freeze
from support.servers import OnTcp, QemuNbd
from support.waiting import WAIT_S_MAX, InThread, wait_until

from nbdmirror.errors import DeviceError, DeviceLost
from nbdmirror.event_loop import Loop
from nbdmirror.nbdclient.exclusive_connection import ExclusiveConnection
from nbdmirror.nbdclient.exclusive_unix import ExclusiveUnixConnection
from nbdmirror.nbdclient.handshake import connect
from nbdmirror.nbdclient.shared_connection import SharedConnection


def test_a_leader_that_is_late_leaves_the_loops_replies_to_the_loop(
    start: Start, folder: Path
) -> None:
    """A guest's thread had just seen that something can be read when the loop took over, and what
    it then reads is the answer to a request of the loop's."""
    image = make_noise(folder / "disk.img", MiB)
    connection = SharedConnection.open(start(QemuNbd(folder, image)).uri(), 5.0)
    loop = Loop(time.monotonic)
    connection.attach(loop)
    told: list[BaseException | None] = []
    buffer = memoryview(bytearray(512))
    connection.start(connection.handle.aio_pread, buffer, 0, done=told.append)
    while connection.is_busy:
        connection._drive()
    loop.run_once(1.0)
    assert told == [None]
    assert buffer == image.read_bytes()[:512]
    connection.close()


def write_on(connection: SharedConnection) -> None:
    """Until that fails: over TCP the first write may find nothing wrong yet."""
    while True:
        connection.write(bytes(512), 0)


class LatePoll:
    """A connection's poll, whose user is held before he waits."""

    def __init__(self, poll: select.poll) -> None:
        self.modify = poll.modify
        self.is_about = threading.Event()
        self.may_go_on = threading.Event()
        self._poll = poll

    def poll(self) -> list[tuple[int, int]]:
        self.is_about.set()
        assert self.may_go_on.wait(WAIT_S_MAX)
        return self._poll.poll()


@pytest.mark.parametrize("tcp", [False, True])
def test_a_driver_whose_connection_another_thread_finds_broken(
    start: Start, folder: Path, tcp: bool
) -> None:
    """The driver's request has failed with that; libnbd's descriptor is another connection's then,
    and nothing ever comes there."""
    image = make_noise(folder / "disk.img", MiB)
    server = start(OnTcp(folder, image) if tcp else QemuNbd(folder, image))
    connection = SharedConnection.open(server.uri(), 5.0)
    poll = LatePoll(connection._poll)
    connection._poll = poll  # type: ignore[assignment]
    freeze(server.pid)
    first = InThread(lambda: connection.read(memoryview(bytearray(512)), 0))
    assert poll.is_about.wait(WAIT_S_MAX)
    server.kill()
    with pytest.raises(DeviceLost):
        InThread(lambda: write_on(connection)).result(5.0)
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            for end in socket.socketpair():
                stack.enter_context(end)
        poll.may_go_on.set()
        with pytest.raises(DeviceLost):
            first.result(5.0)
    connection.close()


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_driver_that_finds_nothing_to_read_holds_back_no_request(
    start: Start, folder: Path, times: int
) -> None:
    """Two saw the same reply, and the other has read it: libnbd alone would send nothing more."""
    image = make_noise(folder / "disk.img", MiB)
    connection = SharedConnection.open(start(QemuNbd(folder, image)).uri(), 5.0)
    for _ in range(times):
        connection._notify(select.POLLIN)
    buffer = memoryview(bytearray(512))
    request = InThread(lambda: connection.read(buffer, 0))
    request.result(5.0)
    assert buffer == image.read_bytes()[:512]
    connection.close()


def test_a_driver_that_finds_nothing_to_read_in_the_midst_of_a_request(
    start: Start, folder: Path
) -> None:
    """Half of a write is sent, and the server reads no more of it."""
    server = start(QemuNbd(folder, make_noise(folder / "disk.img", 32 * MiB)))
    connection = SharedConnection.open(server.uri(), 5.0)
    data = os.urandom(16 * MiB)
    freeze(server.pid)
    request = InThread(lambda: connection.write(data, MiB))
    wait_until(lambda: bool(connection._handle_state.direction() & 2), "its socket is full")
    connection._notify(select.POLLIN)
    connection._notify(select.POLLIN)
    os.kill(server.pid, signal.SIGCONT)
    request.result(5.0)
    buffer = memoryview(bytearray(len(data)))
    connection.read(buffer, MiB)
    assert buffer == data
    connection.close()


@pytest.mark.parametrize("count", [1, 4])
def test_the_loop_takes_over_and_leaves_again_and_again(
    start: Start, folder: Path, count: int
) -> None:
    """At any moment of the guests' requests: each is answered, with its own data."""
    image = make_noise(folder / "disk.img", MiB)
    content = image.read_bytes()
    connection = SharedConnection.open(start(QemuNbd(folder, image)).uri(), 5.0)
    answers = [0] * count
    is_over = threading.Event()

    def read(block: int) -> None:
        buffer = memoryview(bytearray(4096))
        while not is_over.is_set():
            connection.read(buffer, block * 4096)
            assert buffer == content[block * 4096 :][:4096]
            answers[block] += 1

    guests = [InThread(partial(read, block)) for block in range(count)]
    loop = Loop(time.monotonic)
    for _ in range(1000):
        connection.attach(loop)
        for _ in range(3):
            loop.run_once(0.001)
        connection.detach()
    is_over.set()
    for guest in guests:
        guest.result(5.0)
    assert all(answers)
    connection.close()


def link_to(target: Holding) -> ExclusiveConnection:
    """As a mirror's target has them."""
    link = ExclusiveConnection if target.port else ExclusiveUnixConnection
    return link(connect(target.uri(), 5.0, for_data_alone=True), target.uri())


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_a_link_that_is_given_up_ends_when_its_request_is_carried_out(
    start: Start, folder: Path, tcp: bool
) -> None:
    """Its thread goes on at once, and the server does not notice: it carries the request out when
    it likes, and then nothing of it is to come any more."""
    target = start(Holding(folder, make_noise(folder / "disk.img", MiB), tcp=tcp))
    link = link_to(target)
    link.write(bytes(512), 4096)
    target.hold.touch()
    data = b"\x33" * 4096
    request = InThread(lambda: link.write(data, 0))
    wait_until(lambda: link.is_busy, "it is in flight")
    wait_until(target.is_holding, "it is at the server")
    link.give_up()
    with pytest.raises(DeviceLost):
        request.result(5.0)
    assert not link.end(), "it may be carried out yet"
    assert target.image.read_bytes()[: len(data)] != data
    target.hold.unlink()
    wait_until(link.end, "it was carried out")
    assert target.image.read_bytes()[: len(data)] == data
    with pytest.raises(DeviceLost):
        link.write(data, 0)


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_a_link_whose_server_is_killed_ends(start: Start, folder: Path, tcp: bool) -> None:
    target = start(Holding(folder, make_noise(folder / "disk.img", MiB), tcp=tcp))
    link = link_to(target)
    target.hold.touch()
    request = InThread(lambda: link.write(b"\x33" * 4096, 0))
    wait_until(target.is_holding, "it is at the server")
    link.give_up()
    with pytest.raises(DeviceLost):
        request.result(5.0)
    assert not link.end()
    target.kill()
    wait_until(link.end, "the server has ended")


@pytest.mark.parametrize("length", [512, 4096, 64 * 1024])
@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_a_link_survives_a_refused_write(
    start: Start, folder: Path, tcp: bool, length: int
) -> None:
    target = start(Holding(folder, make_noise(folder / "disk.img", MiB), tcp=tcp))
    link = link_to(target)
    data = os.urandom(length)
    with pytest.raises(DeviceError, match="out of bounds"):
        link.write(data, MiB)
    link.write(memoryview(data), 4096)
    assert not link.is_lost
    assert target.image.read_bytes()[4096:][:length] == data
    link.close()


def test_a_link_at_rest_that_is_given_up_ends_at_once(start: Start, folder: Path) -> None:
    target = start(Holding(folder, make_noise(folder / "disk.img", MiB)))
    link = link_to(target)
    link.write(bytes(512), 0)
    link.give_up()
    assert link.end()


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_a_link_whose_socket_breaks_while_libnbd_waits_is_lost(
    start: Start, folder: Path, tcp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libnbd's poll then fails with ENOTCONN, and the handle says that it is ready as before."""
    link = link_to(start(Holding(folder, make_noise(folder / "disk.img", MiB), tcp=tcp)))

    def fail(*_: object, **__: object) -> None:
        raise nbd.Error("nbd_poll", errno.ENOTCONN)

    monkeypatch.setattr(link._handle, "pread" if tcp else "poll", fail)
    with pytest.raises(DeviceLost):
        link.read(memoryview(bytearray(512)), 0)
    assert link.is_lost
    link.kill()
    wait_until(link.end, "its socket has ended")


@pytest.mark.rule(19)
def test_a_connection_that_is_given_up_ends_when_all_is_answered(
    start: Start, folder: Path
) -> None:
    """Those who wait hear of a loss at once: the loop's requests, and a guest's, whose buffer is
    the guest's again while the server has yet to read it."""
    target = start(Holding(folder, make_noise(folder / "disk.img", MiB)))
    connection = SharedConnection.open(target.uri(), 5.0)
    loop = Loop(time.monotonic)
    loop.start()
    loop.run(lambda: connection.attach(loop)).result(5.0)
    target.hold.touch()
    told: list[BaseException | None] = []
    data, content = bytearray(b"\x33" * 4096), b"\x33" * 4096
    loop.run(
        lambda: connection.start(connection.handle.aio_pwrite, bytes(512), 0, done=told.append)
    ).result(5.0)
    wait_until(target.is_holding, "it is at the server")
    freeze(target.pid)
    request = InThread(lambda: connection.write(data, 8192))
    wait_until(lambda: connection.unanswered == 2, "in flight")
    over = threading.Event()
    loop.run(lambda: connection.give_up(over.set)).result(5.0)
    with pytest.raises(DeviceLost):
        request.result(5.0)
    data[:] = bytes(len(data))
    wait_until(lambda: told, "the loop's request has failed")
    assert isinstance(told[0], DeviceLost)
    with pytest.raises(DeviceLost):
        connection.write(b"\x55" * 512, 16384)
    assert connection.unanswered == 2
    assert not over.is_set()
    os.kill(target.pid, signal.SIGCONT)
    wait_until(lambda: connection.unanswered == 1, "one was answered")
    assert not over.is_set()
    target.hold.unlink()
    assert over.wait(5.0)
    assert len(told) == 1
    image = target.image.read_bytes()
    assert image[:512] == bytes(512)
    assert image[8192 : 8192 + len(content)] == content
    assert image[16384 : 16384 + 512] != b"\x55" * 512
    loop.stop(5.0)
