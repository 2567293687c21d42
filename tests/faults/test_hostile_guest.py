"""Guests that do what no client does, over raw sockets. nbdkit deals with them; what is shown here
is that jobs and other guests do not notice, and that nothing stays behind."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.fixtures import Start
from support.guests import Guest
from support.hostile import (
    ACK,
    EXPORT_NAME,
    FLUSH,
    GO,
    MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    READ,
    REQUEST_MAGIC,
    SIMPLE_MAGIC,
    STATUS,
    STRUCTURED,
    TRIM,
    WRITE,
    ZERO,
)
from support.images import KiB, MiB, assert_identical, make_image, make_noise
from support.seeds import SEED, print_seed
from support.servers import Nbdmirror, QemuNbd
from support.waiting import wait_until

SIZE = 2 * MiB
HALF_OPEN = 1000


@pytest.fixture
def disk(folder: Path) -> Path:
    print_seed()
    return make_image(folder / "disk.img", SIZE, SEED)


@pytest.fixture
def server(start: Start, folder: Path, disk: Path) -> Iterator[Nbdmirror]:
    """With a guest that behaves, and a mirror that is completed in the end. It serves another disk
    too: a disk that is alone may go with its guest, before nbdkit 1.34 (docs/security.md)."""
    other = make_image(folder / "other.img", 1 << 20, SEED + 2)
    image = make_noise(folder / "target.img", SIZE, SEED + 1)
    target = start(QemuNbd(folder, image))
    server = start(Nbdmirror(folder, disk, other))
    server.allowed = [r"nbdkit: "]  # it says what it thinks of them
    server.qmp.start_mirror(target.uri())
    server.qmp.wait_ready()
    with Guest(server.uri(), disk, seed=SEED, connections=2) as guest:
        guest.wait_for_requests(20)
        yield server
        guest.wait_for_requests(100)
        assert guest.longest_s < 5.0
        server.qmp.complete()
        guest.wait_for_requests(50)
    assert_identical(guest.model, image)
    assert "Traceback" not in server.stderr


@contextlib.contextmanager
def raw(server: Nbdmirror) -> Iterator[socket.socket]:
    """A connection up to the server's greeting."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(server.socket))
        assert receive(client, 18)[:16] == struct.pack(">QQ", MAGIC, OPTION_MAGIC)
        yield client


def receive(client: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length and (part := client.recv(length - len(data))):
        data += part
    return data


def option(number: int, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack(">QII", OPTION_MAGIC, number, len(data) if length is None else length) + data


def request(
    kind: int, offset: int, length: int, flags: int = 0, magic: int = REQUEST_MAGIC
) -> bytes:
    return struct.pack(">IHHQQI", magic, flags, kind, 7, offset, length)


def negotiate(client: socket.socket) -> None:
    """The old way: a name, and off it goes."""
    client.sendall(struct.pack(">I", 3) + option(EXPORT_NAME))
    receive(client, 10)


def until_closed(client: socket.socket) -> int:
    """How many bytes come before the other end closes."""
    count = 0
    with contextlib.suppress(ConnectionError):
        while data := client.recv(1 << 16):
            count += len(data)
    return count


# The handshake

HANDSHAKES: dict[str, bytes] = {
    "garbage": bytes(range(256)) * 16,
    "http": b"GET / HTTP/1.0\r\n\r\n" * 10,
    "unknown flags": struct.pack(">I", 0xFFFFFFFF),
    "a wrong magic": struct.pack(">I", 3) + struct.pack(">QII", 1, GO, 0),
    "4 GiB of an option": struct.pack(">I", 3) + option(GO, length=0xFFFFFFFF) + bytes(1 << 20),
    "a name without an end": struct.pack(">I", 3) + option(GO, struct.pack(">I", 0xFFFFFFF0)),
    "an unknown export": struct.pack(">I", 3) + option(EXPORT_NAME, b"nope" * 100),
    "half an option": struct.pack(">I", 3) + option(GO)[:9],
}


@pytest.mark.parametrize("case", HANDSHAKES)
def test_a_handshake_that_goes_wrong(server: Nbdmirror, case: str) -> None:
    with raw(server) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(HANDSHAKES[case])
            client.shutdown(socket.SHUT_WR)
        until_closed(client)


def test_a_thousand_options(server: Nbdmirror) -> None:
    """Each is answered; at some number nbdkit has had enough."""
    with raw(server) as client:
        client.sendall(struct.pack(">I", 3))
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                client.sendall(option(STRUCTURED))
                magic, _, _, length = struct.unpack(">QIII", receive(client, 20).ljust(20, b"\0"))
                assert magic in (OPTION_REPLY_MAGIC, 0)
                receive(client, length)
        assert ACK  # at least the first


# Requests


@pytest.mark.parametrize(
    "bad",
    [
        request(READ, SIZE, 512),
        request(READ, SIZE - 1, 2),
        request(READ, (1 << 64) - 512, 1024),
        request(READ, 0, 0),
        request(TRIM, SIZE - 512, 1024),
        request(ZERO, 0, 0xFFFFFFFF),
        request(STATUS, 0, 512),
        request(FLUSH, 512, 512),
        request(99, 0, 512),
        request(READ, 0, 512, flags=0xFFFF),
    ],
    ids=["at the end", "over the end", "over 2**64", "of nothing", "trim", "zero", "status",
         "flush", "unknown", "flags"],
)  # fmt: skip
def test_a_request_that_is_refused(server: Nbdmirror, bad: bytes) -> None:
    """With an error; the connection goes on."""
    with raw(server) as client:
        negotiate(client)
        client.sendall(bad)
        magic, error, handle = struct.unpack(">IIQ", receive(client, 16))
        assert magic == SIMPLE_MAGIC and handle == 7 and error
        client.sendall(request(READ, 0, 512))
        assert struct.unpack(">IIQ", receive(client, 16)) == (SIMPLE_MAGIC, 0, 7)
        assert len(receive(client, 512)) == 512


REQUESTS: dict[str, bytes] = {
    "a wrong magic": request(READ, 0, 512, magic=1) + os.urandom(4096),
    "half a request": request(READ, 0, 512)[:20],
    "half a payload": request(WRITE, 0, 65536) + b"x" * 1000,
    "a payload of 4 GiB": request(WRITE, 0, 0xFFFFFFFF) + bytes(1 << 20),
    "a read of 4 GiB": request(READ, 0, 0xFFFFFFFF),
    "garbage": os.urandom(10_000),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_a_request_that_goes_wrong(server: Nbdmirror, disk: Path, case: str) -> None:
    """Nothing of it is done."""
    with raw(server) as client:
        negotiate(client)
        with contextlib.suppress(ConnectionError):
            client.sendall(REQUESTS[case])
            client.shutdown(socket.SHUT_WR)
        until_closed(client)


def test_a_guest_that_does_not_read(server: Nbdmirror) -> None:
    """A hundred replies of 64 KiB for nobody."""
    with raw(server) as client:
        negotiate(client)
        client.settimeout(1)
        with contextlib.suppress(TimeoutError, ConnectionError):
            for _ in range(100):
                client.sendall(request(READ, 0, 64 * KiB))


READER = """
import sys, nbd
handle, size, depth = nbd.NBD(), 65536, 16
handle.connect_uri(sys.argv[1])
buffers = [nbd.Buffer(size) for _ in range(depth)]
cookies = [handle.aio_pread(buffer, number * size) for number, buffer in enumerate(buffers)]
print("reading", flush=True)
while True:
    for number, buffer in enumerate(buffers):
        while not handle.aio_command_completed(cookies[number]):
            handle.poll(-1)
        cookies[number] = handle.aio_pread(buffer, number * size)
"""


@pytest.mark.guarantee("A guest that is killed, or sends garbage, harms no other")
def test_a_guest_that_is_killed_while_it_reads(server: Nbdmirror) -> None:
    """With many replies on their way. nbdkit before 1.34 did not survive 28 of 30 such, where a
    connection has several threads."""
    for _ in range(15):
        command = [sys.executable, "-c", READER, server.uri()]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as guest:
            assert guest.stdout is not None and guest.stdout.readline() == b"reading\n"
            server.qmp.execute("query-jobs")  # some time for it to read
            guest.kill()
        assert server.qmp.job()["status"] == "ready"
    assert server.process is not None and server.process.poll() is None


# Many


def half_greeted(client: socket.socket) -> None:
    pass


def in_the_handshake(client: socket.socket) -> None:
    client.sendall(struct.pack(">I", 3) + option(GO)[:12])


@pytest.mark.guarantee("A guest that is killed, or sends garbage, harms no other")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", [half_greeted, in_the_handshake])
def test_a_thousand_half_open_connections(
    server: Nbdmirror, how: Callable[[socket.socket], None]
) -> None:
    """Others go on meanwhile; when they have gone nothing is left of them."""
    files, tasks = count(server, "fd"), count(server, "task")
    with contextlib.ExitStack() as stack:
        for _ in range(HALF_OPEN):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(20)
            client.connect(str(server.socket))
            how(client)
        wait_until(lambda: count(server, "fd") >= files + HALF_OPEN, "they are all accepted", 60)
        assert server.qmp.job()["status"] == "ready"
        with raw(server) as late:
            negotiate(late)
            late.sendall(request(READ, 0, 512))
            assert len(receive(late, 16 + 512)) == 16 + 512
    wait_until(lambda: count(server, "fd") <= files + 2, "descriptors are closed", 60)
    wait_until(lambda: count(server, "task") <= tasks + 2, "threads have ended", 60)


def count(server: Nbdmirror, what: str) -> int:
    return len(os.listdir(f"/proc/{server.pid}/{what}"))


def test_it_ends_with_half_open_connections(start: Start, disk: Path) -> None:
    server = start(Nbdmirror(disk.parent, disk))
    server.allowed = [r"nbdkit: "]
    with contextlib.ExitStack() as stack:
        for number in range(100):
            client = stack.enter_context(raw(server))
            (half_greeted if number % 2 else in_the_handshake)(client)
        assert server.process is not None
        server.process.terminate()
        assert server.process.wait(30) == 0
