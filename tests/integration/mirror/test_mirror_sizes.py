"""A mirror of disks of any size, with holes, granularities and buffers of any kind.

Every test names what must be identical at its end; the `identical` fixture compares it, byte by
byte, after the test, and fails a test that names nothing.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from integration.mirror.mirrorparts import READY, SIZE, TARGETS, nbdkit_memory
from support.clients import connected
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import KiB, MiB, allocated_bytes, make_empty, make_image, make_noise, make_qcow2
from support.serverprocess import Server
from support.servers import NbdkitTarget, Nbdmirror, QemuNbd

pytestmark = pytest.mark.usefixtures("identical")


@pytest.mark.rule(26)
@pytest.mark.guarantee("Any size, to the last byte")
@pytest.mark.parametrize("size", [0, 1, 512, 65535, MiB + 1, 1025 * KiB])
@pytest.mark.parametrize("kind", ["memory", "file", "plain"])
def test_odd_sizes(start: Start, identical: Identical, folder: Path, kind: str, size: int) -> None:
    disk = make_noise(folder / "disk.img", size, 4)
    target = start(TARGETS[kind](folder, size))
    server = start(Nbdmirror(folder, disk, bare=True))
    qmp = server.qmp
    expected = bytearray(disk.read_bytes())
    identical(expected, target.uri())
    qmp.start_mirror(target.uri())
    told = qmp.wait_ready()
    assert (told["len"], told["offset"]) == (size, size)
    with connected(server.uri()) as guest:
        for letter in (b"!", b"?"):  # the last byte, before the pivot and after it
            if size:
                expected[-1:] = letter
                guest.pwrite(letter, size - 1)
            guest.flush()
            if letter == b"!":
                qmp.complete()


@pytest.mark.parametrize("kind", ["qcow2", "qemu-nbd", "qsd"])
def test_sizes_of_whole_sectors(
    start: Start, identical: Identical, folder: Path, kind: str
) -> None:
    size = 1025 * KiB
    disk = make_image(folder / "disk.img", size, 4)
    target = start(TARGETS[kind](folder, size))
    server = start(Nbdmirror(folder, disk, bare=True))
    with Guest(server.uri(), disk) as guest:
        identical(guest, target.uri())
        server.qmp.start_mirror(target.uri())
        server.qmp.wait_ready()
        guest.wait_for_requests(50)
        server.qmp.complete()
        guest.wait_for_requests(50)


@pytest.mark.rule(28)
def test_an_empty_disk_is_ready_before_the_answer(
    start: Start, identical: Identical, folder: Path
) -> None:
    target = start(nbdkit_memory(folder, 0))
    server = start(Nbdmirror(folder, make_empty(folder / "disk.img", 0), bare=True))
    qmp = server.qmp
    identical(server.uri(), target.uri())
    qmp.add_target("tgt", target)
    qmp.forget()
    qmp.start_mirror("tgt")
    assert qmp.steps("j") == ["created", "running", *READY, "return"]
    assert qmp.complete()["len"] == 0


@pytest.mark.rule(30)
@pytest.mark.guarantee("Old data does not shine through")
@pytest.mark.parametrize("kind", ["qemu-nbd", "file", "plain", "nbdmirror"])
@pytest.mark.parametrize("unmap", [True, False])
def test_old_data_does_not_shine_through_holes(
    start: Start, identical: Identical, folder: Path, kind: str, unmap: bool
) -> None:
    disk = make_empty(folder / "disk.img", SIZE)
    with disk.open("r+b") as file:
        for offset in (0, 3 * MiB + 7, SIZE - 700):
            file.seek(offset)
            file.write(b"data" * 175)
    target = start(TARGETS[kind](folder, SIZE))
    server = start(Nbdmirror(folder, disk, bare=True))
    identical(disk.read_bytes(), target.uri())
    server.qmp.start_mirror(target.uri(), unmap=unmap)
    server.qmp.wait_ready()
    server.qmp.complete()
    used = allocated_bytes(folder / "target.img")
    if not unmap:
        assert used >= SIZE, "without unmap the target keeps its space"
    elif kind != "plain":
        assert used < MiB, "holes are punched into the old data"


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_the_target_stays_sparse(
    start: Start, identical: Identical, folder: Path, kind: str
) -> None:
    """Holes in the source, and zeroes that are written out in it: neither is stored."""
    size = 64 * MiB
    disk = make_empty(folder / "disk.img", size)
    with disk.open("r+b") as file:
        file.seek(10 * MiB)
        file.write(b"d" * MiB)
        file.seek(20 * MiB)
        file.write(bytes(8 * MiB))
    image = folder / "target"
    make = make_empty if kind == "raw" else make_qcow2
    target = start(QemuNbd(folder, make(image, size), kind))
    server = start(Nbdmirror(folder, disk, bare=True))
    identical(disk, target.uri())
    server.qmp.start_mirror(target.uri())
    server.qmp.wait_ready()
    server.qmp.complete()
    assert allocated_bytes(image) < 2 * MiB


@pytest.mark.parametrize(
    ("granularity", "pause_s", "requests"),
    [(512, 0.001, 30), (4 * KiB, 0.001, 30), (MiB, 0.03, 30), (64 * MiB, 0.3, 10)],
)
def test_any_granularity(
    identical: Identical,
    server: Nbdmirror,
    target: Server,
    disk: Path,
    granularity: int,
    pause_s: float,
    requests: int,
) -> None:
    """The guest pauses so long that there are moments without dirt, however much a write makes
    dirty."""
    with Guest(server.uri(), disk, connections=2, pause_s=pause_s) as guest:
        identical(guest, target.uri())
        server.qmp.start_mirror(target.uri(), granularity=granularity)
        server.qmp.wait_ready()
        guest.wait_for_requests(requests)
        server.qmp.complete()
        guest.wait_for_requests(requests)


def test_a_small_buffer(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    with Guest(server.uri(), disk) as guest:
        identical(guest, target.uri())
        server.qmp.start_mirror(target.uri(), buf_size=1)
        server.qmp.wait_ready()
        server.qmp.complete()
        guest.wait_for_requests(60)


@pytest.mark.rule(29)
def test_sync_none_copies_only_what_is_written(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    expected = bytearray((disk.parent / "target.img").read_bytes())
    identical(expected, target.uri())
    qmp = server.qmp
    qmp.add_target("tgt", target)
    qmp.forget()
    qmp.start_mirror("tgt", sync="none", granularity=4096)
    qmp.wait_ready()
    assert qmp.steps("j") == ["created", "running", "return", *READY]
    assert qmp.job()["len"] == 0
    data = b"new!" * 1024
    with connected(server.uri()) as guest:
        guest.pwrite(data, 5 * 4096)
    expected[5 * 4096 : 6 * 4096] = data
    qmp.execute("block-job-cancel", device="j")
    qmp.wait_completed()


def test_write_blocking_to_a_target_of_large_blocks(
    start: Start, folder: Path, identical: Identical
) -> None:
    """Guests write at odd places, and the target refuses all but whole blocks of 4 KiB."""
    disk = make_image(folder / "disk.img", SIZE)
    image = make_noise(folder / "target.img", SIZE)
    policy = ("blocksize-minimum=4096", "blocksize-error-policy=error")
    target = start(
        NbdkitTarget(folder, "file", f"file={image}", *policy, filters=("blocksize-policy",))
    )
    server = start(Nbdmirror(folder, disk, bare=True))
    with Guest(server.uri(), disk, connections=2) as guest:
        identical(guest, server.uri())
        server.qmp.start_mirror(target.uri(), copy_mode="write-blocking")
        server.qmp.wait_ready()
        guest.wait_for_requests(100)
        server.qmp.complete()
        guest.wait_for_requests(100)
    assert not [e for e in server.qmp.events if e["event"] == "BLOCK_JOB_ERROR"]


@pytest.mark.alone  # a target beside other tests may never answer quickly
@pytest.mark.parametrize("kind", ["qemu-nbd", "qsd"])
def test_the_targets_memory_is_used_again(
    start: Start, identical: Identical, folder: Path, kind: str
) -> None:
    """glibc's malloc would map the buffer of each request anew, 256 pages for each MiB, had not one
    request been larger than all others (in_flight.OPENING_BYTES). Until then it takes some 10,000,
    whatever the size."""
    size = 192 * MiB
    disk = make_noise(folder / "disk.img", size)
    target = start(TARGETS[kind](folder, size))
    server = start(Nbdmirror(folder, disk, bare=True))
    identical(disk, target.uri())
    before = page_faults(target)
    server.qmp.start_mirror(target.uri())
    server.qmp.wait_ready()
    assert page_faults(target) - before < size // 4096 / 2
    server.qmp.complete()


def page_faults(server: Server) -> int:
    """That took memory, and no disk: minflt of proc_pid_stat(5)."""
    return int(Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[7])
