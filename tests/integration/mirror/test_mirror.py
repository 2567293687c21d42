"""The mirror job from end to end, over real QMP and real NBD, with targets that no one here wrote.

Every test names what must be identical at its end; the `identical` fixture compares it, byte by
byte, after the test, and fails a test that names nothing. `Guest` writes all the while and verifies
what it reads.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from integration.mirror.mirrorparts import SIZE, SLOW, TARGETS, qemu_nbd_raw
from support.clients import connected
from support.fixtures import Identical, Start
from support.guests import Guest
from support.processes import nbdmirror
from support.serverprocess import Server
from support.servers import Nbdmirror
from support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("identical")


@pytest.mark.guarantee("Completed means identical")
@pytest.mark.guarantee("No request is lost, fails or is answered twice")
@pytest.mark.parametrize("threads", ["1", ""])
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.alone
def test_a_guest_is_moved_to_any_target(
    start: Start, identical: Identical, disk: Path, kind: str, threads: str
) -> None:
    """Three connections: open before the mirror, and used over the pivot and after it."""
    target = start(TARGETS[kind](disk.parent, SIZE))
    nbdkit = ("-t", threads) if threads else ()
    server = start(Nbdmirror(disk.parent, disk, bare=True, nbdkit=nbdkit))
    qmp = server.qmp
    with Guest(server.uri(), disk, connections=3) as guest:
        identical(guest, target.uri())
        guest.wait_for_requests(30)
        qmp.start_mirror(target.uri(), **SLOW)
        guest.wait_for_requests(30)
        qmp.execute("block-job-set-speed", device="j", speed=0)
        qmp.wait_ready()
        guest.wait_for_requests(60)
        qmp.complete()
        before = disk.read_bytes()
        guest.wait_for_requests(150)
    assert before == disk.read_bytes(), "the source was written after the pivot"
    assert guest.longest_s < 1.0, "the pivot is a pause that nobody notices"


def test_a_client_that_connects_after_the_pivot(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    server.qmp.start_mirror(target.uri())
    server.qmp.wait_ready()
    server.qmp.complete()
    with Guest(server.uri(), disk, connections=2) as guest:
        identical(guest, target.uri())
        guest.wait_for_requests(50)
    identical(guest, server.uri())


def test_an_idle_guest_pivots_too(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    with connected(server.uri()) as guest:
        server.qmp.start_mirror(target.uri())
        server.qmp.wait_ready()
        server.qmp.complete()
        identical(disk.read_bytes(), target.uri())
        assert guest.pread(512, 0) == disk.read_bytes()[:512]


@pytest.mark.alone
@pytest.mark.rule(15)
@pytest.mark.guarantee("The pause is bounded")
def test_heavy_writers_do_not_keep_the_pivot_away(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    """They dirty faster than any target can follow. (READY might never come then, as in QEMU: it is
    there before they begin. The ending must come all the same.)"""
    server.qmp.start_mirror(target.uri())
    server.qmp.wait_ready()
    with Guest(server.uri(), disk, connections=4, pause_s=0, length_max=300_000) as guest:
        identical(guest, target.uri())
        guest.wait_for_requests(300)
        server.qmp.complete()
        guest.wait_for_requests(100)
    assert guest.longest_s < 3.0


def test_with_the_command_line(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    control = ("--qmp", server.qmp_path)
    with Guest(server.uri(), disk) as guest:
        identical(guest, target.uri())
        assert nbdmirror("mirror", target.uri(), "--wait", "ready", *control).returncode == 0
        assert '"ready": true' in nbdmirror("status", "--json", *control).stdout
        guest.wait_for_requests(30)
        done = nbdmirror("complete", *control)
        assert done.returncode == 0, done.stderr
        guest.wait_for_requests(30)


def test_mirror_to_starts_by_itself(start: Start, identical: Identical, disk: Path) -> None:
    target = start(qemu_nbd_raw(disk.parent, SIZE))
    server = start(Nbdmirror(disk.parent, disk, options=("--mirror-to", target.uri())))
    with Guest(server.uri(), disk) as guest:
        identical(guest, target.uri())
        wait_until(
            lambda: [j for j in server.qmp.execute("query-block-jobs") if j["ready"]], "READY"
        )
        guest.wait_for_requests(30)
        server.qmp.complete("disk0")
        guest.wait_for_requests(30)
