"""Sizes that qemu-storage-daemon rounds, and whole clusters on the first touch, which it cannot
show."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from integration.sync.syncparts import SIZE, soft_cancel, wait_in_sync
from support.clients import connected
from support.fixtures import Identical, Start
from support.images import KiB, MiB, make_image, make_noise, make_qcow2
from support.processes import run
from support.servers import Nbdmirror, QemuNbd

# Sizes that the peer rounds


@pytest.mark.rule(12)
@pytest.mark.guarantee("Any size, to the last byte")
@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
@pytest.mark.parametrize("size", [1, 511, 513, MiB + 1, 1025 * KiB + 1])
def test_one_odd_byte_over(
    start: Start, identical: Identical, folder: Path, size: int, copy_mode: str
) -> None:
    """QEMU would round up to sectors and grow the target; here sizes are bytes. (The target is
    nbdmirror itself, since qemu-nbd rounds too.)"""
    disk = make_image(folder / "disk.img", size)
    target = start(Nbdmirror(folder, make_noise(folder / "target.img", size), bare=True))
    target.allowed = ["Connection reset by peer"]  # its client ends first, perhaps half-connected
    server = start(Nbdmirror(folder, f"src={disk}", bare=True))
    qmp = server.qmp
    qmp.start_mirror(target.uri(), device="src", copy_mode=copy_mode)
    assert qmp.wait_ready()["len"] == size
    with connected(server.uri("src")) as guest:
        guest.pwrite(b"\x66", size - 1)
        if size > 1000:
            guest.zero(600, size - 600)
            guest.pwrite(b"\x67" * 3, size - 3)
        before = qmp.complete()
        assert before["offset"] == before["len"]
        identical(disk.read_bytes(), folder / "target.img")
        assert bytes(guest.pread(1, size - 1)) == (b"\x67" if size > 1000 else b"\x66")
    assert (folder / "target.img").stat().st_size == size


# Whole clusters on the first touch (rule 24)

CLUSTER = 64 * KiB


@pytest.fixture
def overlay(folder: Path) -> tuple[Path, Path]:
    """A base of noise, and an overlay with parts of clusters written."""
    base = make_noise(folder / "base.img", SIZE, 5)
    overlay = make_qcow2(folder / "overlay.qcow2", SIZE, "-b", str(base), "-F", "raw")
    for offset, length in ((1000, 600), (200_000, 100), (400_000, 70_000), (SIZE - 512, 512)):
        pattern = f"write -P {offset % 250 + 1} {offset} {length}"
        run("qemu-io", "-f", "qcow2", "-c", pattern, overlay)
    return base, overlay


def backed_target(folder: Path, base: Path) -> tuple[Path, Path]:
    """A qcow2 file that believes in another backing file: of the same size, full of other data."""
    wrong = make_noise(folder / "wrong.img", SIZE, 77)
    target = make_qcow2(folder / "target.qcow2", SIZE, "-b", str(base), "-F", "raw")
    run("qemu-img", "rebase", "-u", "-b", wrong, "-F", "raw", target)
    return target, wrong


def rebased(folder: Path, target: Path, base: Path) -> bytes:
    run("qemu-img", "rebase", "-u", "-b", base, "-F", "raw", target)
    flat = folder / "flat.img"
    run("qemu-img", "convert", "-O", "raw", target, flat)
    return flat.read_bytes()


SMALL: dict[str, Any] = {"granularity": 512, "x_nbdmirror_target_cluster_size": CLUSTER}


@pytest.mark.rule(24)
@pytest.mark.guarantee("Whole clusters on first touch")
@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
@pytest.mark.parametrize("buf_size", [0, 512])
@pytest.mark.parametrize("sync", ["top", "none"])
def test_the_first_touch_carries_a_whole_cluster(
    folder: Path, overlay: tuple[Path, Path], sync: str, copy_mode: str, buf_size: int
) -> None:
    """Rebased to the right backing file, the target is the source: nothing of the wrong one was
    pulled in. With sync=none, what was written before is laid under it afterwards."""
    base, source_image = overlay
    image, _ = backed_target(folder, base)
    source = QemuNbd(folder, source_image, "qcow2", options=("-A",))
    target = QemuNbd(folder, image, "qcow2")
    if sync == "none":  # then the target's right backing is what the source was
        run("qemu-img", "convert", "-O", "raw", source_image, folder / "was.img")
        base = folder / "was.img"
    with source, target, Nbdmirror(folder, f"src={source.uri()}", bare=True) as server:
        qmp = server.qmp
        options = {"copy_mode": copy_mode, "buf_size": buf_size, **SMALL}
        qmp.start_mirror(target.uri(), device="src", sync=sync, **options)
        qmp.wait_ready()
        with connected(server.uri("src")) as guest:
            noise = random.Random(3)
            for _ in range(30):
                length = noise.choice((1, 100, 512, 5000, 65536, 70_000))
                offset = noise.randrange(SIZE - length)
                if noise.random() < 0.8:
                    guest.pwrite(noise.randbytes(length), offset)
                else:
                    guest.zero(length, offset)
            if sync == "top":
                wait_in_sync(qmp)
            soft_cancel(qmp)
            held = bytes(guest.pread(SIZE, 0))
    assert rebased(folder, image, base) == held


@pytest.mark.rule(25)
def test_top_copies_what_the_top_layer_has(folder: Path, overlay: tuple[Path, Path]) -> None:
    """And no more: the target's other clusters stay unallocated."""
    base, source_image = overlay
    image, _ = backed_target(folder, base)
    source = QemuNbd(folder, source_image, "qcow2", options=("-A",))
    target = QemuNbd(folder, image, "qcow2")
    with source, target, Nbdmirror(folder, f"src={source.uri()}", bare=True) as server:
        server.qmp.start_mirror(target.uri(), device="src", sync="top", **SMALL)
        server.qmp.wait_ready()
        server.qmp.complete()
    clusters = {0, 200_000 // CLUSTER, *range(400_000 // CLUSTER, 470_000 // CLUSTER + 1), 15}
    mapped = run("qemu-img", "map", "-f", "qcow2", image).stdout.splitlines()[1:]
    own = [line.split() for line in mapped if "target.qcow2" in line]
    found = {
        (int(start, 16) + at) // CLUSTER
        for start, length, *_ in own
        for at in range(0, int(length, 16), CLUSTER)
    }
    assert found == clusters
    run("qemu-img", "convert", "-O", "raw", source_image, folder / "was.img")
    assert rebased(folder, image, base) == (folder / "was.img").read_bytes()
