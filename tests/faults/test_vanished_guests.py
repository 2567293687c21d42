"""Guests that vanish without a word, their network cut: what they held is free again, and who is
merely slow stays. And guests that take none of their answers: the server ends without them."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest
from e2e.hosts import Hosts, NbdmirrorAt, two_hosts
from support.clients import connected
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import KiB, MiB, assert_identical, make_image, make_noise
from support.kept import Kept
from support.processes import patched, resources
from support.servers import Nbdmirror, QemuNbd
from support.waiting import WAIT_S_MAX, wait_until

GUESTS = 4  # of each kind

VISITORS = """
import sys, nbd, threading, time
uri, count = sys.argv[1], int(sys.argv[2])
kept = []
for number in range(count):
    idle, deaf, busy = nbd.NBD(), nbd.NBD(), nbd.NBD()
    for handle in (idle, deaf, busy):
        handle.connect_uri(uri)
        handle.pread(4096, 0)
    kept += [idle, [deaf.aio_pread(nbd.Buffer(1 << 20), 0) for _ in range(12)], deaf]
    def work(handle=busy):
        while True:
            handle.pread(1 << 18, 0)
    threading.Thread(target=work, daemon=True).start()
print("connected", flush=True)
sys.stdin.read()
"""
"""Those that say nothing, those that do not take what they asked for, and those at work."""


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    yield from two_hosts()


def test_what_they_held_is_free_again(hosts: Hosts, start: Start, folder: Path) -> None:
    here, there = hosts
    disk = make_image(folder / "disk.img", 2 * MiB)
    before = disk.read_bytes()
    server = NbdmirrorAt(folder, disk, here)
    # One thread a guest: before nbdkit 1.34 the server would go with them (docs/security.md).
    server.options += ("--keepalive", "2", "--threads", "1")
    server.allowed.append("read request|write data")
    start(server)
    _, threads, descriptors = resources(server.pid)
    visitors = subprocess.Popen(
        [*there.inside, sys.executable, "-c", VISITORS, server.uri(), str(GUESTS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert visitors.stdout
        assert visitors.stdout.readline() == b"connected\n"
        # The look whether the server is ready may have had a thread still when these were counted.
        wanted = threads - 1 + 3 * GUESTS
        wait_until(lambda: resources(server.pid)[1] >= wanted, "a thread for each")
        there.set_link("down")
        visitors.kill()  # nobody is told

        def is_free() -> bool:
            _, now_threads, now_descriptors = resources(server.pid)
            return now_threads <= threads and now_descriptors <= descriptors

        wait_until(is_free, "threads and descriptors are as they were")
    finally:
        visitors.kill()
        visitors.communicate()
    there.set_link("up")
    wait_until(server.is_ready, "others are served")
    assert_identical(before, disk)


def silent_ms(sock: socket.socket) -> int:
    """How long ago it last received data (tcp_info's tcpi_last_data_recv)."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 56)
    return int(struct.unpack_from("I", info, 52)[0])


def test_a_guest_that_takes_nothing_for_a_while_stays(start: Start, folder: Path) -> None:
    """A virtual machine that was stopped, say: its host answers for it."""
    disk = make_image(folder / "disk.img", 16 * MiB)
    server = start(Nbdmirror(folder, disk, tcp=True, options=("--keepalive", "1")))
    handle = nbd.NBD()
    handle.connect_uri(server.uri())
    buffers = [nbd.Buffer(MiB) for _ in range(16)]
    for number, buffer in enumerate(buffers):
        handle.aio_pread(buffer, number * MiB)
    with socket.socket(fileno=handle.aio_get_fd()) as own:
        try:
            wait_until(lambda: silent_ms(own) > 3000, "three times the limit have gone")
        finally:
            own.detach()
    while handle.aio_in_flight():
        handle.poll(-1)
    assert b"".join(bytes(buffer.to_bytearray()) for buffer in buffers) == disk.read_bytes()


def test_the_server_ends_without_guests_that_take_no_answers(
    folder: Path, start: Start, identical: Identical
) -> None:
    """In order: what other guests wrote is on the disk, and the mirror goes on afterwards."""
    target = start(QemuNbd(folder, make_noise(folder / "target.img", 4 * MiB)))
    disk = make_image(folder / "disk.img", 4 * MiB)

    class Impatient(Kept):
        def environment(self) -> dict[str, str]:
            soon = "import nbdmirror.nbdkit_host.hangup as h\nh.TAKES_NOTHING_S = 0.3\n"
            return patched(super().environment(), folder, soon)

    server = Impatient(folder, disk).start()
    try:
        with connected(server.uri()) as deaf:
            for _ in range(16):
                deaf.aio_pread(nbd.Buffer(512 * KiB), 0)
            server.qmp.start_mirror(target.uri(), device="vda")
            server.qmp.wait_ready()
            with Guest(server.uri(), disk) as guest:
                guest.wait_for_requests(50)
            server.stop()
        assert "some guests read no replies" in server.stderr
        assert_identical(guest.model, disk)
    except BaseException:
        server.abandon()
        raise
    start(server)
    wait_until(lambda: server.qmp.job()["ready"], "the mirror went on", WAIT_S_MAX)
    with Guest(server.uri(), guest.model, seed=2) as again:
        again.wait_for_requests(50)
        server.qmp.complete()
    identical(again, target.uri())
