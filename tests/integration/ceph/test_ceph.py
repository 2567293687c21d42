"""RBD images of a real Ceph, of one node, behind qemu-nbd: a target under a guest's load, a pivot
onto it and home again, an OSD that dies, and a pool that is full. A Ceph that cannot do a request
keeps it until it can, and says nothing: it is neither dead nor does it fail."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cephnode import Ceph, RbdNbd, missing
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import MiB, assert_identical, make_image, make_noise
from support.knownservers import RBD, Target
from support.late import started
from support.processes import ROOT
from support.qmpclient import Qmp
from support.recipes import ran, script_of
from support.servers import Nbdmirror, QemuNbd
from support.targettrial import try_target
from support.waiting import wait_until

if lacking := missing():
    pytest.skip(f"no Ceph to try, for want of: {lacking}", allow_module_level=True)

# The first test makes the Ceph; an OSD that comes back takes five to ten seconds.
pytestmark = [pytest.mark.timeout(120), pytest.mark.xdist_group("ceph")]  # of one node

SIZE = 8 * MiB
RECIPE_SIZE = 1 << 30
"""What docs/ceph.md gives its disk."""
REQUESTS = 40
FORCE_S_MAX = 3.0
"""Of a forced cancel, with a target that does not answer; it takes 0.3 s."""
ERROR = "BLOCK_JOB_ERROR"

MakeImage = Callable[..., RbdNbd]

names = (f"disk{number}" for number in itertools.count(1))


@pytest.fixture
def rbd(ceph: Ceph, folder: Path, start: Start) -> MakeImage:
    """rbd(): qemu-nbd of a new image that is full of noise; `settings` are Ceph's client's."""

    def make(**settings: str) -> RbdNbd:
        name = next(names)
        ceph.add_image(name, make_noise(folder / name, SIZE))
        return start(RbdNbd(folder, ceph, name, **settings))

    return make


@pytest.fixture
def server(folder: Path, start: Start) -> Nbdmirror:
    return start(Nbdmirror(folder, make_image(folder / "disk.img", SIZE)))


@pytest.fixture
def guest(server: Nbdmirror, folder: Path, identical: Identical) -> Iterator[Guest]:
    """It writes all through the test, and each of its requests succeeds."""
    with Guest(server.uri(), folder / "disk.img", connections=2) as guest:
        identical(guest, server.uri())
        yield guest


def pivot(server: Nbdmirror, guest: Guest, target: str, **options: Any) -> None:
    server.qmp.start_mirror(target, **options)
    finish(server, guest)


def finish(server: Nbdmirror, guest: Guest) -> None:
    server.qmp.wait_ready()
    guest.wait_for_requests(REQUESTS)
    server.qmp.complete()
    guest.wait_for_requests(REQUESTS)


@pytest.fixture
def bring_home(
    server: Nbdmirror, guest: Guest, folder: Path, start: Start, identical: Identical
) -> Callable[[], None]:
    """bring_home(): from the image to a file, which holds what the guest wrote in the end."""

    def call() -> None:
        home = make_noise(folder / "home.img", SIZE, seed=7)
        pivot(server, guest, start(QemuNbd(folder, home)).uri())
        identical(guest, home)

    return call


def test_its_row(ceph: Ceph, folder: Path, start: Start) -> None:
    """In objects of a granule's size, so that it can be seen which of them are there."""

    def make(folder: Path, noise: Path) -> RbdNbd:
        ceph.add_image("row", noise, "--object-size=64K")
        return RbdNbd(folder, ceph, "row")

    try_target(Target(RBD, make, file=""), folder, start)


def test_the_recipe(ceph: Ceph, folder: Path) -> None:
    """Commands of docs/ceph.md, as they stand there but for the places of files."""
    script = script_of(ROOT / "docs" / "ceph.md")
    for place, ours in {"/etc/ceph": ceph.folder, "/run/nbdmirror": folder, "/srv": folder}.items():
        script = script.replace(place, str(ours))
    disk = make_image(folder / "disk.img", SIZE)
    os.truncate(disk, RECIPE_SIZE)
    with ran(script, folder, CEPH_CONF=str(ceph.configuration)) as text:
        served = re.findall(r"^disk0 .*  (\S+)$", text, flags=re.MULTILINE)
        assert served == [f"nbd+unix:///?socket={folder}/guest1.sock"]
        assert_identical(disk, f"nbd+unix:///?socket={folder}/disk.sock")


@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
def test_there_and_home_again(
    copy_mode: str,
    rbd: MakeImage,
    server: Nbdmirror,
    guest: Guest,
    bring_home: Callable[[], None],
) -> None:
    pivot(server, guest, rbd().uri(), copy_mode=copy_mode)
    bring_home()


def test_an_osd_that_dies_and_comes_back(
    ceph: Ceph,
    rbd: MakeImage,
    server: Nbdmirror,
    guest: Guest,
    bring_home: Callable[[], None],
) -> None:
    """In the first copy, after READY, and when it is the guest's disk. The mirror is not told of an
    error, nor is the guest, which waits in the last case only."""
    qmp = server.qmp
    qmp.start_mirror(rbd().uri(), speed=MiB)
    ceph.kill_osd()
    guest.wait_for_requests(REQUESTS)
    ceph.start_osd()
    qmp.execute("block-job-set-speed", device="j", speed=0)
    qmp.wait_ready()
    ceph.kill_osd()
    guest.wait_for_requests(REQUESTS)
    ceph.start_osd()
    qmp.complete()
    guest.wait_for_requests(REQUESTS)
    ceph.kill_osd()
    ceph.start_osd()
    guest.wait_for_requests(REQUESTS)
    bring_home()
    assert ERROR not in [event["event"] for event in qmp.events]


def test_a_full_pool_is_waited_for(
    ceph: Ceph, rbd: MakeImage, server: Nbdmirror, guest: Guest, identical: Identical
) -> None:
    """Ceph keeps writes that find no room until there is some: the job waits, and the guest does
    not."""
    target = rbd()
    server.qmp.start_mirror(target.uri(), on_target_error="report")
    server.qmp.wait_ready()
    ceph.fill()
    guest.wait_for_requests(REQUESTS)
    server.qmp.execute("block-job-complete", device="j")
    guest.wait_for_requests(REQUESTS)
    ceph.make_room()
    server.qmp.wait_completed()
    guest.wait_for_requests(REQUESTS)
    identical(guest, target.uri())


def test_a_forced_cancel_while_the_pool_is_full(
    ceph: Ceph, rbd: MakeImage, server: Nbdmirror, guest: Guest, identical: Identical
) -> None:
    """It does not wait for room; what it leaves under way does no harm to the next mirror."""
    target = rbd()
    server.qmp.start_mirror(target.uri())
    server.qmp.wait_ready()
    ceph.fill()
    guest.wait_for_requests(REQUESTS)
    began_s = time.monotonic()
    server.qmp.execute("block-job-cancel", device="j", force=True)
    server.qmp.wait_for_event("BLOCK_JOB_CANCELLED")
    assert time.monotonic() - began_s < FORCE_S_MAX
    ceph.make_room()
    started(lambda: server.qmp.start_mirror(target.uri()))  # when what was left under way has ended
    finish(server, guest)
    identical(guest, target.uri())


def test_a_full_pool_with_a_time_limit(
    ceph: Ceph,
    rbd: MakeImage,
    server: Nbdmirror,
    guest: Guest,
    bring_home: Callable[[], None],
) -> None:
    """With `rados_osd_op_timeout` a request that waits becomes an error, which a flush reports. It
    stops the job. Once there is room, and the job is resumed, what the image lacks is copied."""
    qmp = server.qmp
    target = rbd(rados_osd_op_timeout="3")
    qmp.start_mirror(target.uri(), on_target_error="stop")
    qmp.wait_ready()
    ceph.fill()
    guest.wait_for_requests(REQUESTS)
    qmp.execute("block-job-complete", device="j")
    told = qmp.wait_for_event(ERROR)
    assert (told["action"], told["operation"]) == ("stop", "write")
    qmp.wait_status("standby")
    guest.wait_for_requests(REQUESTS)
    ceph.make_room()
    wait_until(lambda: is_over(qmp), "the job, resumed whenever it stops, has completed")
    qmp.wait_completed()
    guest.wait_for_requests(REQUESTS)
    bring_home()
    target.kill()  # after time-outs it may take ten seconds to end in order


def is_over(qmp: Qmp) -> bool:
    """A job that stands by is resumed: each write that ran out of time makes one flush fail, also a
    flush that comes later."""
    jobs = qmp.execute("query-jobs")
    if any(job["status"] == "standby" for job in jobs):
        qmp.execute("block-job-resume", device="j")
    return not jobs
