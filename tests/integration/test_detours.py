"""A target that is the disk itself by way of another server, which tells nothing of that."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.clients import connected
from support.fixtures import Identical, Start
from support.images import KiB, MiB, make_empty, make_image, make_noise
from support.qmpclient import Refused
from support.servers import NbdkitTarget, Nbdmirror, OnTcp, QemuNbd, strict_blocks
from support.waiting import wait_until

SIZE = 4 * MiB
DRIVE_MIRROR = {"device": "disk0", "sync": "full", "mode": "existing"}
OURS = "is an export of this server itself"
Proxy = Callable[[Path, str], Nbdmirror | NbdkitTarget | QemuNbd | OnTcp]


def by_qemu(folder: Path, uri: str) -> QemuNbd:
    return QemuNbd(folder, uri)


def by_nbdkit(folder: Path, uri: str) -> NbdkitTarget:
    return NbdkitTarget(folder, "nbd", f"uri={uri}")


def by_nbdmirror(folder: Path, uri: str) -> Nbdmirror:
    return Nbdmirror(folder, uri, bare=True)


@pytest.mark.parametrize(
    "proxies",
    [
        (by_qemu,),
        (by_nbdkit,),
        (by_nbdmirror,),
        (by_qemu, by_qemu),
        (by_qemu, by_nbdmirror),
        (by_nbdmirror, by_nbdkit),
    ],
    ids=lambda proxies: " ".join(proxy.__name__ for proxy in proxies),
)
@pytest.mark.parametrize("is_file", [True, False], ids=["file", "nbd"])
def test_a_proxy_of_the_disk_itself(
    start: Start, folder: Path, proxies: tuple[Proxy, ...], is_file: bool
) -> None:
    """Nothing is written through it; without this the mirror would write its own writes for
    ever."""
    image = make_image(folder / "disk.img", SIZE)
    before = image.read_bytes()
    disk = image if is_file else start(QemuNbd(folder, image)).uri()
    server = start(Nbdmirror(folder, disk, bare=True))
    server.allowed = ["leads back to this server"]
    uri = server.uri()
    for layer, proxy in enumerate(proxies, 2):
        behind = proxy(folder, uri)
        behind.layer = layer
        uri = start(behind).uri()
    text = failure(server, uri)
    assert f"{uri}: leads back to this server through another server" in text or OURS in text
    assert image.read_bytes() == before


def test_a_proxy_that_takes_small_requests_only(start: Start, folder: Path) -> None:
    """A longer read would be refused, and nothing would be seen at the disk."""
    image = make_noise(folder / "disk.img", 64 * MiB)
    before = image.read_bytes()
    server = start(Nbdmirror(folder, image, bare=True))
    server.allowed = ["leads back to this server"]
    middle = by_qemu(folder, server.uri())
    middle.layer = 2
    settings = (f"uri={start(middle).uri()}", *strict_blocks("4K", "4K", "4K"))
    proxy = NbdkitTarget(folder, "nbd", *settings, filters=("blocksize-policy",))
    proxy.layer = 3
    assert "leads back to this server" in failure(server, start(proxy).uri())
    assert image.read_bytes() == before


def test_a_proxy_of_an_empty_disk(start: Start, folder: Path) -> None:
    """Of holes a server may tell without a look at the disk."""
    server = start(Nbdmirror(folder, make_empty(folder / "disk.img", SIZE), bare=True))
    server.allowed = ["leads back to this server"]
    proxy = by_qemu(folder, server.uri())
    proxy.layer = 2
    assert "leads back to this server" in failure(server, start(proxy).uri())


def failure(server: Nbdmirror, uri: str) -> str:
    """Why the mirror to `uri` has ended, or has not begun: nbdkit hands on what we say of our
    exports."""
    try:
        server.qmp.execute("drive-mirror", target=uri, **DRIVE_MIRROR)
    except Refused as error:
        return str(error)

    def last() -> dict[str, str]:
        (disk,) = server.qmp.execute("x-nbdmirror-query-status")["disks"]
        return dict(disk.get("last-job") or {})

    wait_until(lambda: bool(last()), "the job has ended")
    assert last()["result"] == "failed"
    return last()["reason"]


def test_a_guest_that_reads_much_is_not_mistaken(
    start: Start, folder: Path, identical: Identical
) -> None:
    """Of a small disk, all of it in each moment, and by odd ranges too."""
    disk = make_image(folder / "disk.img", 64 * KiB)
    server = start(Nbdmirror(folder, disk, bare=True))
    is_over = threading.Event()

    def read() -> None:
        with connected(server.uri()) as guest:
            while not is_over.is_set():
                for offset in range(0, 64 * KiB, 4 * KiB):
                    guest.pread(4 * KiB, offset)
                    guest.pread(offset % 511 + 1, offset + 1)

    guests = [threading.Thread(target=read) for _ in range(2)]
    for guest in guests:
        guest.start()
    try:
        for number in range(20):
            image = make_empty(folder / f"target{number}.img", 64 * KiB)
            with QemuNbd(folder, image) as target:
                server.qmp.execute("drive-mirror", target=target.uri(), **DRIVE_MIRROR)
                server.qmp.wait_ready("disk0")
                server.qmp.execute("block-job-cancel", device="disk0")
                server.qmp.wait_completed("disk0")
            server.qmp.forget()
            identical(disk, image)
    finally:
        is_over.set()
        for guest in guests:
            guest.join()
