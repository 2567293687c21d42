"""A mirror after another: on to a third place, back to the first, of a node on a node, once more
after a cancel, and of several disks at once.

Every test names what must be identical at its end; the `identical` fixture compares it, byte by
byte, after the test, and fails a test that names nothing.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from integration.mirror.mirrorparts import SIZE, SLOW, qemu_nbd_raw
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import KiB, MiB, make_image, make_noise
from support.late import started
from support.serverprocess import Server
from support.servers import Nbdmirror, QemuNbd
from support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("identical")


@pytest.mark.parametrize("way", ["blockdev-add", "drive-mirror"])
@pytest.mark.parametrize("connections", [1, 4])
def test_two_rounds_and_back(
    start: Start, identical: Identical, disk: Path, way: str, connections: int
) -> None:
    """A -> B -> C -> the image that B is on again; one guest all the while."""
    folder = disk.parent
    images = [make_noise(folder / name, SIZE, n) for n, name in enumerate(("b.img", "c.img"), 5)]
    targets = [start(QemuNbd(folder, image)) for image in images]
    server = start(Nbdmirror(folder, disk, bare=True))
    qmp = server.qmp
    with Guest(server.uri(), disk, connections=connections) as guest:
        identical(guest, targets[0].uri())
        for number, behind in enumerate((targets[0], targets[1], targets[0])):
            name = f"t{number}"
            if way == "blockdev-add":
                qmp.add_target(name, behind)
            qmp.start_mirror(name if way == "blockdev-add" else behind.uri(), job_id=f"j{number}")
            qmp.wait_ready(f"j{number}")
            guest.wait_for_requests(60)
            qmp.complete(f"j{number}")
            guest.wait_for_requests(60)
    identical(guest, server.uri())


def test_back_to_the_first_node(start: Start, identical: Identical, disk: Path) -> None:
    """The disk is on NBD from the start; A -> B, then B -> A, by the nodes' names."""
    folder = disk.parent
    first = start(QemuNbd(folder, disk))
    second = start(qemu_nbd_raw(folder, SIZE))
    server = start(Nbdmirror(folder, first.uri(), bare=True))
    qmp = server.qmp
    with Guest(server.uri(), disk, connections=2) as guest:
        identical(guest, first.uri())
        qmp.add_target("second", second)
        qmp.start_mirror("second")
        qmp.wait_ready()
        qmp.complete()
        qmp.wait_status("null")
        guest.wait_for_requests(60)
        assert "in use" in qmp.refusal("blockdev-del", node_name="second")
        qmp.add_target("first", first)
        qmp.start_mirror("first")
        qmp.wait_ready()
        guest.wait_for_requests(60)
        qmp.complete()
        qmp.wait_status("null")
        qmp.execute("blockdev-del", node_name="second")
        guest.wait_for_requests(60)


def test_no_way_back_to_a_file(
    server: Nbdmirror, identical: Identical, target: Server, disk: Path
) -> None:
    """A target is an NBD export (QEMU could mirror to the file); it says so, and nothing happens to
    the file."""
    qmp = server.qmp
    qmp.add_target("tgt", target)
    qmp.start_mirror("tgt")
    qmp.wait_ready()
    qmp.complete()
    before = disk.read_bytes()
    refusal = qmp.refusal("blockdev-mirror", job_id="j", device="tgt", target="disk0", sync="full")
    assert refusal == "Node 'disk0' is a file; a mirror's target is an NBD export"
    qmp.execute("blockdev-del", node_name="disk0")
    with Guest(server.uri(), target.uri()) as guest:
        guest.wait_for_requests(50)
        identical(guest, target.uri())
    assert disk.read_bytes() == before


def test_a_raw_node_stays_while_the_node_below_it_is_used(
    server: Nbdmirror, identical: Identical, target: Server, disk: Path
) -> None:
    """The lower one goes with it, so that neither can be taken away."""
    qmp = server.qmp

    def keeps_both() -> None:
        assert qmp.refusal("blockdev-del", node_name="upper") == "Node upper is in use"
        nodes = {info["node-name"] for info in qmp.execute("query-named-block-nodes")}
        assert nodes >= {"upper", "lower"}

    address = {"type": "unix", "path": str(target.socket)}
    lower = {"driver": "nbd", "node-name": "lower", "server": address}
    qmp.execute("blockdev-add", driver="raw", node_name="upper", file=lower)
    qmp.start_mirror("lower")
    keeps_both()
    qmp.wait_ready()
    qmp.complete()
    keeps_both()
    identical(disk, target.uri())


def test_a_raw_node_outlives_the_drive_mirror_whose_node_it_is_on(
    server: Nbdmirror, identical: Identical, target: Server, disk: Path
) -> None:
    qmp = server.qmp

    def descriptors() -> int:
        return len(list(Path(f"/proc/{server.pid}/fd").iterdir()))

    before = descriptors()
    qmp.execute(
        "drive-mirror", device="disk0", target=target.uri(), sync="full", mode="existing",
        job_id="j", node_name="lower",
    )  # fmt: skip
    qmp.execute("blockdev-add", driver="raw", node_name="upper", file="lower")
    qmp.execute("block-job-cancel", device="j", force=True)
    qmp.wait_for_event("BLOCK_JOB_CANCELLED", device="j")
    for _ in range(2):
        started(lambda: qmp.start_mirror("upper"))  # the target may have a request left
        qmp.wait_ready()
        qmp.execute("block-job-cancel", device="j")
        qmp.wait_completed()
    identical(disk, target.uri())
    qmp.execute("blockdev-del", node_name="upper")
    wait_until(lambda: descriptors() <= before, "its connections are closed")


def test_a_cancelled_mirror_can_be_done_again(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    qmp = server.qmp
    qmp.add_target("tgt", target)
    with Guest(server.uri(), disk) as guest:
        identical(guest, target.uri())
        for force in (True, True, False):
            started(lambda: qmp.start_mirror("tgt"))  # the target may have requests left
            qmp.wait_ready()
            guest.wait_for_requests(20)
            qmp.execute("block-job-cancel", device="j", force=force)
            qmp.wait_status("null")
        qmp.start_mirror("tgt")
        qmp.wait_ready()
        qmp.complete()
        guest.wait_for_requests(50)


def test_several_disks_at_once(start: Start, identical: Identical, folder: Path) -> None:
    sizes = (4 * MiB, 3 * MiB + 512, 1025 * KiB)
    disks = [make_image(folder / f"d{n}.img", size, n) for n, size in enumerate(sizes)]
    targets = [
        start(QemuNbd(folder, make_noise(folder / f"t{n}.img", size)))
        for n, size in enumerate(sizes)
    ]
    server = start(Nbdmirror(folder, *disks, bare=True))
    qmp = server.qmp
    guests = [Guest(server.uri(f"disk{n}"), disk, seed=n).start() for n, disk in enumerate(disks)]
    for guest, target in zip(guests, targets, strict=True):
        identical(guest, target.uri())
    for n, target in enumerate(targets):
        qmp.start_mirror(target.uri(), device=f"disk{n}", job_id=f"j{n}", **SLOW)
    assert [job["device"] for job in qmp.execute("query-block-jobs")] == ["j2", "j1", "j0"]
    for n in range(3):
        qmp.execute("block-job-set-speed", device=f"j{n}", speed=0)
    wait_until(lambda: all(job["ready"] for job in qmp.execute("query-block-jobs")), "all READY")
    for n in range(3):
        qmp.execute("block-job-complete", device=f"j{n}")
    wait_until(lambda: not qmp.execute("query-block-jobs"), "all are done")
    for guest in guests:
        guest.wait_for_requests(30)
    for guest in guests:
        guest.stop()


def test_an_export_that_another_disk_is_mirrored_to_is_no_target(
    start: Start, folder: Path, identical: Identical
) -> None:
    """Neither while that goes on nor after its pivot, by whatever name."""
    disks = [make_image(folder / f"disk{n}.img", SIZE, n) for n in range(2)]
    target = start(QemuNbd(folder, make_noise(folder / "target.img", SIZE)))
    server = start(Nbdmirror(folder, *disks, bare=True))
    qmp = server.qmp
    identical(disks[0], server.uri("disk0"))
    qmp.add_target("t", target)
    qmp.add_target("again", target)
    second = {"device": "disk1", "sync": "full"}
    qmp.start_mirror("t")
    qmp.wait_ready()
    for _ in range(2):
        text = qmp.refusal("drive-mirror", target=target.uri(), mode="existing", **second)
        assert "is in use" in text
        assert "is the same export" in qmp.refusal("blockdev-mirror", target="again", **second)
        if qmp.execute("query-jobs"):
            qmp.complete()
