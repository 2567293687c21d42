"""Which processors a served guest's threads may use: one while that is faster, all at rest."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.fixtures import Start
from support.servers import Nbdmirror
from support.waiting import wait_until

SECONDS_MAX = 120


def places(server: Nbdmirror) -> set[frozenset[int]]:
    """The processors that the server's threads may use, but for threads that have just ended."""
    found = set()
    for thread in os.listdir(f"/proc/{server.pid}/task"):
        try:
            found.add(frozenset(os.sched_getaffinity(int(thread))))
        except ProcessLookupError:
            continue
    return found


@contextmanager
def many_small_reads(server: Nbdmirror, folder: Path) -> Iterator[None]:
    """A guest with 16 requests in flight."""
    fio = subprocess.Popen(
        [
            "fio", "--name=guest", "--ioengine=nbd", f"--uri={server.uri()}", "--rw=randread",
            "--bs=4096", "--iodepth=16", "--time_based", f"--runtime={SECONDS_MAX}",
            "--norandommap", "--output=/dev/null",
        ],
        cwd=folder,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield
        assert fio.poll() is None, "it has read all the time"
    finally:
        fio.terminate()
        fio.wait()


@pytest.mark.alone  # a rate decides
def test_a_busy_guests_threads_are_tried_on_one_processor_and_let_go(
    start: Start, disk: Path
) -> None:
    server = start(Nbdmirror(disk.parent, disk))
    everywhere = frozenset(os.sched_getaffinity(0))
    assert places(server) == {everywhere}
    with many_small_reads(server, disk.parent):
        wait_until(lambda: any(len(one) == 1 for one in places(server)), "it was tried")
    wait_until(lambda: places(server) == {everywhere}, "its guest is gone")


@pytest.mark.alone  # a rate decides
def test_a_server_on_a_processor_of_its_own_stays_there(start: Start, disk: Path) -> None:
    chosen = max(os.sched_getaffinity(0))
    server = Nbdmirror(disk.parent, disk)
    server.inside = ("taskset", "-c", str(chosen))
    start(server)
    with many_small_reads(server, disk.parent):
        wait_until(lambda: requests_of(server) > 20_000, "its guest is busy")
        assert places(server) == {frozenset({chosen})}
    assert places(server) == {frozenset({chosen})}


def requests_of(server: Nbdmirror) -> int:
    """How many reads were timed, times how few of them are."""
    (disk,) = server.qmp.execute("x-nbdmirror-query-status")["disks"]
    return sum(251 * sum(one["buckets"]) for one in disk["requests"])
