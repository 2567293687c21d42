"""A target that takes small requests alone goes away and comes back. What it was before is compared
in such requests, too."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.clients import connected
from support.fixtures import Identical, Start
from support.images import MiB, make_noise
from support.kept import Kept
from support.servers import NbdkitTarget, Nbdmirror, strict_blocks
from support.waiting import wait_until

SIZE = 4 * MiB
BLOCK = 4096


@pytest.fixture
def target(start: Start, folder: Path) -> NbdkitTarget:
    image = make_noise(folder / "target.img", SIZE)
    words = strict_blocks("4K", "4K", "4K")
    return start(NbdkitTarget(folder, "file", str(image), *words, filters=("blocksize-policy",)))


def has_settled(server: Nbdmirror) -> bool:
    """The target is there, and in sync."""
    (job,) = server.qmp.execute("x-nbdmirror-query-status")["disks"][0]["jobs"]
    is_there: bool = job["target-connected"] and "target-lost-for-s" not in job
    return is_there and job["ready"] and not job["dirty-bytes"] and not job["in-flight-bytes"]


@pytest.mark.guarantee("A target that was lost and came back")
def test_it_comes_back(
    start: Start, folder: Path, identical: Identical, target: NbdkitTarget
) -> None:
    disk = make_noise(folder / "disk.img", SIZE, 7)
    server = start(Nbdmirror(folder, disk, bare=True))
    server.allowed.append("connection lost|is lost|Failed to connect")
    server.qmp.start_mirror(target.uri(), x_nbdmirror_reconnect_delay=60)
    server.qmp.wait_ready()
    target.kill()
    with connected(server.uri()) as guest:
        guest.pwrite(b"x" * BLOCK, MiB)
    target.come_back()
    wait_until(lambda: has_settled(server), "the mirror goes on")
    server.qmp.complete()
    identical(disk, folder / "target.img")


@pytest.mark.guarantee("A target that was lost and came back")
def test_a_server_that_was_killed_goes_on(
    start: Start, folder: Path, identical: Identical, target: NbdkitTarget
) -> None:
    disk = make_noise(folder / "disk.img", SIZE, 7)
    server = start(Kept(folder, disk))
    server.qmp.start_mirror(target.uri(), device="vda")
    server.qmp.wait_ready()
    server.kill()
    server.start()
    wait_until(lambda: has_settled(server), "the mirror goes on")
    server.qmp.complete()
    identical(disk, folder / "target.img")
