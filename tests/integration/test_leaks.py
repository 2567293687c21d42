"""Clients of every kind and mirrors leave memory, threads and descriptors as they were.

Guests of a file: test_guests_come_and_go.py."""

from __future__ import annotations

from pathlib import Path

import nbd
import pytest
from support.clients import connected
from support.fixtures import Start
from support.images import KiB, MiB, make_empty, make_image
from support.processes import resources, settled
from support.qmpclient import Qmp
from support.servers import Nbdmirror, QemuNbd

CONNECTS = 1000
WARM_UP = 100
GROWTH_BYTES_MAX = 1536 * KiB


def visit(uri: str, number: int) -> None:
    """One connection with a request of each kind; every third is cut without a good-bye."""
    handle = nbd.NBD()
    handle.connect_uri(uri)
    handle.pwrite(b"x" * 4096, number % 64 * 4096)
    handle.pread(4096, 0)
    handle.flush()
    if number % 3:
        handle.shutdown()


def test_guests_of_a_remote_disk_leave_nothing_behind(start: Start, folder: Path) -> None:
    """Each of their threads has had its turn on the connections to the source."""
    behind = start(QemuNbd(folder, make_image(folder / "d", MiB)))
    server = start(Nbdmirror(folder, behind.uri(), bare=True))
    for number in range(WARM_UP):
        visit(server.uri(), number)
    _, threads_before, descriptors_before = resources(server.pid)
    before = settled(server.pid, threads_before, descriptors_before)
    for number in range(300):
        visit(server.uri(), number)
    grown = settled(server.pid, threads_before, descriptors_before) - before
    assert grown < GROWTH_BYTES_MAX / 2


def test_control_clients_leave_nothing_behind(start: Start, folder: Path) -> None:
    server = start(Nbdmirror(folder, make_image(folder / "d", MiB), bare=True))
    _, threads_before, descriptors_before = resources(server.pid)
    for number in range(WARM_UP + CONNECTS):
        if number == WARM_UP:
            before = settled(server.pid, threads_before, descriptors_before)
        with Qmp(server.qmp_path) as client:
            client.execute("query-block")
    grown = settled(server.pid, threads_before, descriptors_before) - before
    assert grown < GROWTH_BYTES_MAX


@pytest.mark.guarantee("A thousand guests or mirrors leave nothing behind")
def test_mirrors_leave_nothing_behind(start: Start, folder: Path) -> None:
    """Cancelled ones, failed ones, and pivots to and fro."""
    targets = [start(QemuNbd(folder, make_empty(folder / name, MiB))) for name in ("a", "b")]
    short = start(QemuNbd(folder, make_empty(folder / "short", MiB // 2)))
    server = start(Nbdmirror(folder, make_image(folder / "d", MiB), bare=True))
    server.allowed = ["the source has"]
    qmp = server.qmp

    def round_() -> None:
        for target in targets:
            for uri, event in (
                (target.uri(), "BLOCK_JOB_CANCELLED"),
                (short.uri(), "BLOCK_JOB_COMPLETED"),
                (target.uri(), "BLOCK_JOB_COMPLETED"),
            ):
                qmp.start_mirror(uri)
                if uri == target.uri():
                    qmp.wait_ready()
                    verb = "job-cancel" if "CANCEL" in event else "job-complete"
                    qmp.execute(verb, id="j")
                qmp.wait_for_event(event)
                qmp.wait_status("null")
        qmp.forget()

    with connected(server.uri()) as guest:
        for _ in range(15):
            round_()
            guest.pwrite(b"x", 0)
        before, threads_before, descriptors_before = resources(server.pid)
        for _ in range(25):
            round_()
            guest.pwrite(b"x", 0)
        # Python's collector closes some sockets in its own time, so their number is a saw-tooth.
        # Fifty leaked pivots alone would be 400 of them, and 50 MiB of copy buffers.
        grown = settled(server.pid, threads_before, max(descriptors_before, 200)) - before
        assert grown < 8 * MiB
        qmp.execute("blockdev-del", node_name="disk0")  # the file that it was served from first
        assert len(qmp.execute("query-named-block-nodes")) == 1
