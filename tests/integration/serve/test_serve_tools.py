"""The NBD server, as tools see it that no one here wrote: nbdinfo, nbdcopy, qemu-img, qemu-io, fio;
and sources of several kinds."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import nbd
import pytest
from integration.serve.serveparts import SIZES
from support.clients import connected
from support.fixtures import Start
from support.guests import Guest
from support.images import (
    KiB,
    MiB,
    assert_identical,
    make_empty,
    make_image,
    make_noise,
    make_qcow2,
)
from support.mounts import ON_DISK, loop_device
from support.processes import run
from support.servers import NbdkitTarget, Nbdmirror, QemuNbd, strict_blocks


def test_nbdinfo_tells_what_the_disk_can_do(start: Start, disk: Path) -> None:
    server = start(Nbdmirror(disk.parent, disk))
    told = json.loads(run("nbdinfo", "--json", server.uri()).stdout)
    export = told["exports"][0]
    assert told["structured"] is True
    assert export["export-size"] == 4 * MiB
    assert export["block_size_minimum"] == 1
    assert export["block_size_preferred"] >= 512
    # Newer ones have a ninth, of 64-bit requests, which nbdkit has not.
    can = [name for name in export if re.fullmatch("can_(?!block_status_payload).*", name)]
    assert len(can) == 8
    for name in can:
        assert export[name] is True, name
    assert export["is_read_only"] is False
    assert export["contexts"] == ["base:allocation"]


def test_nbdinfo_lists_every_disk_and_the_first_is_the_default(start: Start, folder: Path) -> None:
    images = [make_image(folder / f"{n}.img", size, n) for n, size in enumerate((5000, 0, 700))]
    server = start(Nbdmirror(folder, f"sys={images[0]}", images[1], f"data.2={images[2]}"))
    told = json.loads(run("nbdinfo", "--list", "--json", server.uri()).stdout)
    sizes = {export["export-name"]: export["export-size"] for export in told["exports"]}
    assert sizes == {"sys": 5000, "disk1": 0, "data.2": 700}
    for export, image in zip(("", "disk1", "data.2"), images, strict=True):
        assert_identical(image, server.uri(export))


def test_nbdinfo_map_shows_the_holes(start: Start, folder: Path) -> None:
    image = make_empty(folder / "disk.img", MiB)
    with image.open("r+b") as file:
        file.seek(256 * KiB)
        file.write(b"d" * 128 * KiB)
    server = start(Nbdmirror(folder, image))
    told = json.loads(run("nbdinfo", "--map", "--json", server.uri()).stdout)
    found = [(extent["offset"], extent["length"], extent["type"]) for extent in told]
    tail = (384 * KiB, 640 * KiB, 3)
    assert found == [(0, 256 * KiB, 3), (256 * KiB, 128 * KiB, 0), tail]
    told = run("qemu-img", "map", "--output=json", "-f", "raw", server.uri()).stdout
    assert [extent["data"] for extent in json.loads(told)] == [False, True, False]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bare", [True, False], ids=["bare", "cli"])
def test_nbdcopy_both_ways_at_any_size(start: Start, folder: Path, size: int, bare: bool) -> None:
    image = make_image(folder / "disk.img", size)
    fresh = make_noise(folder / "new.img", size)
    server = start(Nbdmirror(folder, image, f"new={fresh}", bare=bare))
    out = folder / "out.img"
    out.touch()
    run("nbdcopy", server.uri(), out)
    assert_identical(image, out)
    if size:  # nbdcopy 1.14 fails on an empty destination, whoever serves it
        run("nbdcopy", image, server.uri("new"))
    assert_identical(image, server.uri("new"))
    assert_identical(image, fresh)


def test_qemu_img_compares_and_converts(start: Start, disk: Path) -> None:
    folder = disk.parent
    back = make_noise(folder / "back.img", 4 * MiB)
    server = start(Nbdmirror(folder, disk, f"back={back}"))
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", disk, server.uri())
    qcow2 = folder / "copy.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", server.uri(), qcow2)
    run("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", qcow2, server.uri("back"))
    assert_identical(disk, back)


def test_qemu_io_patterns(start: Start, folder: Path) -> None:
    image = make_noise(folder / "disk.img", MiB)
    server = start(Nbdmirror(folder, image))
    steps = (
        "write -P 0xa5 1000 70000",
        "write -f -P 0x11 512 512",
        "write -z 8k 8k",
        "write -z -u 16k 4k",
        "discard 32k 4k",
        "flush",
        "read -P 0x11 512 512",
        "read -P 0 8k 12k",
        "read -P 0xa5 1024 7168",
        "read -P 0xa5 36k 34000",
    )
    words = [word for step in steps for word in ("-c", step)]
    said = run("qemu-io", "-f", "raw", *words, server.uri()).stdout
    assert "verification failed" not in said


@pytest.mark.parametrize("threads", ["1", None])
def test_fio_writes_and_verifies(start: Start, folder: Path, threads: str | None) -> None:
    image = make_empty(folder / "disk.img", 16 * MiB)
    options = ("--threads", threads) if threads else ()
    server = start(Nbdmirror(folder, image, options=options))
    said = run(
        "fio", "--name=verify", "--ioengine=nbd", f"--uri={server.uri()}", "--rw=randwrite",
        "--bsrange=512-64k", "--bs_unaligned=1", "--size=16M", "--iodepth=16", "--verify=crc32c",
        "--verify_fatal=1", "--randseed=7", "--verify_state_save=0", "--output-format=json",
    ).stdout  # fmt: skip
    job = json.loads(said[said.index("{") :])["jobs"][0]
    assert job["error"] == 0 and job["read"]["io_bytes"] >= 8 * MiB


# Sources


@pytest.mark.parametrize("connections", [1, 3])
def test_a_qcow2_behind_qemu_nbd(start: Start, folder: Path, connections: int) -> None:
    image = make_qcow2(folder / "disk.qcow2", 8 * MiB)
    behind = start(QemuNbd(folder, image, "qcow2"))
    server = start(Nbdmirror(folder, behind.uri()))
    with Guest(server.uri(), bytes(8 * MiB), connections=connections, pause_s=0) as guest:
        guest.wait_for_requests(600)
    assert_identical(guest.model, server.uri())
    assert_identical(guest.model, behind.uri())


@pytest.mark.parametrize("unit", [512, 4096])
def test_unaligned_requests_on_a_source_of_large_blocks(
    start: Start, folder: Path, unit: int
) -> None:
    strict = strict_blocks(f"{unit}", "4096", "32M")
    behind = start(NbdkitTarget(folder, "memory", "4M", *strict, filters=("blocksize-policy",)))
    server = start(Nbdmirror(folder, behind.uri()))
    with connected(server.uri()) as handle:
        assert handle.get_block_size(nbd.SIZE_MINIMUM) == 1
    with Guest(server.uri(), bytes(4 * MiB), connections=3, pause_s=0) as guest:
        guest.wait_for_requests(600)
    assert_identical(guest.model, server.uri())
    assert_identical(guest.model, behind.uri())


def test_a_read_only_nbd_source(start: Start, disk: Path) -> None:
    behind = start(QemuNbd(disk.parent, disk, read_only=True))
    server = start(Nbdmirror(disk.parent, behind.uri(), options=("--read-only",)))
    server.allowed = ["on readonly export|write protected|read.?only"]
    assert_identical(disk, server.uri())
    with connected(server.uri()) as guest:
        assert guest.is_read_only()


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_a_block_device(folder: Path, cache: str) -> None:
    with tempfile.NamedTemporaryFile(dir=ON_DISK, suffix=".img") as file:
        image = make_image(Path(file.name), 4 * MiB)
        with loop_device(image) as device:
            with (
                Nbdmirror(folder, device, options=("--cache", cache)) as server,
                Guest(server.uri(), image, connections=2, pause_s=0) as guest,
            ):
                guest.wait_for_requests(300)
            assert_identical(guest.stop().model, Path(device))


def test_direct_io_takes_unaligned_requests(folder: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=ON_DISK, suffix=".img") as file:
        image = make_image(Path(file.name), 2 * MiB + 512)
        with (
            Nbdmirror(folder, image, options=("--cache", "none")) as server,
            Guest(server.uri(), image, connections=2, pause_s=0) as guest,
        ):
            guest.wait_for_requests(300)
        assert_identical(guest.stop().model, image)
