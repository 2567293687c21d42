"""Control clients that misbehave: one clear error in the place where the user looks; a running
guest never notices; nothing on the source or the target is touched."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from integration.bad_input.badparts import SIZE
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import MiB, assert_identical, make_noise
from support.late import started
from support.processes import resources
from support.qmpclient import Qmp
from support.serverprocess import Server
from support.servers import Nbdmirror, QemuNbd
from support.waiting import wait_until

GARBAGE_BYTES = 100_000_000


@pytest.fixture
def bystanders(server: Nbdmirror, disk: Path) -> Iterator[None]:
    """A guest and a well-behaved control client, before, meanwhile and after."""
    server.allowed = ["qmp"]  # it may say what it thinks of the client
    with Guest(server.uri(), disk, connections=2) as guest, Qmp(server.qmp_path) as other:
        guest.wait_for_requests(20)
        yield
        guest.wait_for_requests(100)
        assert other.execute("query-status")["running"] is True
    assert_identical(guest.model, disk)
    assert guest.longest_s < 1.0


@contextlib.contextmanager
def raw_client(server: Nbdmirror) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(server.qmp_path))
        client.recv(4096)  # the greeting
        yield client


def lines(client: socket.socket, count: int) -> list[dict[str, object]]:
    received = b""
    while received.count(b"\n") < count:
        part = client.recv(65536)
        assert part, f"closed after {received!r}"
        received += part
    return [json.loads(line) for line in received.splitlines()]


@pytest.mark.alone
@pytest.mark.guarantee("A control client cannot harm others")
@pytest.mark.usefixtures("bystanders")
def test_garbage(server: Nbdmirror) -> None:
    with raw_client(server) as client:
        client.sendall(b"garbage\n")
        assert "error" in lines(client, 1)[0]
        client.sendall(b"\x00\xff\xfe{{{{\n")
        lines(client, 1)
    with raw_client(server) as client:
        client.sendall(os.urandom(100_000))


@pytest.mark.alone
@pytest.mark.usefixtures("bystanders")
def test_half_a_line(server: Nbdmirror) -> None:
    with raw_client(server) as client, raw_client(server) as leaver:
        client.sendall(b'{"execute": "qmp_capab')
        leaver.sendall(b'{"execute": "qmp_capab')
        leaver.close()
        assert server.qmp.execute("query-jobs") == []
        client.sendall(b'ilities"}')
        assert lines(client, 1)[0] == {"return": {}}


@pytest.mark.alone
@pytest.mark.guarantee("A control client cannot harm others")
@pytest.mark.usefixtures("bystanders")
def test_a_hundred_megabytes_without_a_newline(server: Nbdmirror) -> None:
    before = resources(server.pid)[0]
    for start_of_text in (b"x", b'"', b'{"execute": "', b"[" * 100, b" "):
        with raw_client(server) as client, contextlib.suppress(ConnectionError, TimeoutError):
            client.sendall(start_of_text)
            piece = start_of_text[-1:] * (1 << 20)
            for _ in range(GARBAGE_BYTES >> 20):
                client.sendall(piece)
                if resources(server.pid)[0] - before > 256 * MiB:
                    break
        assert resources(server.pid)[0] - before < 64 * MiB


@pytest.mark.alone
@pytest.mark.guarantee("A control client cannot harm others")
@pytest.mark.usefixtures("bystanders")
def test_a_client_that_never_reads(server: Nbdmirror) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(str(server.qmp_path))
        client.settimeout(1)
        with contextlib.suppress(OSError):
            client.sendall(b'{"execute": "qmp_capabilities"}\n')
            for _ in range(20_000):
                client.sendall(b'{"execute": "query-commands"}\n')
        with Qmp(server.qmp_path) as other:
            began_s = time.monotonic()
            for _ in range(20):
                other.execute("query-commands")
            assert time.monotonic() - began_s < 5


def test_a_client_that_never_reads_events_does_not_stop_a_job(
    start: Start, folder: Path, server: Nbdmirror, disk: Path, identical: Identical
) -> None:
    target: Server = start(QemuNbd(folder, make_noise(folder / "target.img", SIZE)))
    with raw_client(server) as deaf, Guest(server.uri(), disk) as guest:
        deaf.sendall(b'{"execute": "qmp_capabilities"}')
        identical(guest, target.uri())
        server.qmp.add_target("t", target)
        for _ in range(60):
            started(lambda: server.qmp.start_mirror("t"))
            server.qmp.wait_ready()
            server.qmp.execute("job-cancel", id="j")
            server.qmp.wait_status("null")
        started(lambda: server.qmp.start_mirror("t"))
        server.qmp.wait_ready()
        server.qmp.complete()
        guest.wait_for_requests(30)


@pytest.mark.alone
@pytest.mark.usefixtures("bystanders")
def test_many_control_clients(server: Nbdmirror) -> None:
    """More than it takes are turned away; when they have gone there is room again."""
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
        for _ in range(60):
            stack.enter_context(raw_client(server))

    def is_answering() -> bool:
        with contextlib.suppress(ConnectionError), Qmp(server.qmp_path) as client:
            return bool(client.execute("query-jobs") == [])
        return False

    wait_until(is_answering, "it answers again")
