"""A libvirt domain on nbdmirror. Its disk is the XML in docs/libvirt.md, and libvirt sees a disk
that is well whatever becomes of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from e2e.guest import ALL_FILES, WROTE, check_disk, make_disk
from e2e.libvirtd import Domain, Libvirtd, let_qemu_in
from support.fixtures import Start
from support.images import make_noise
from support.processes import ROOT
from support.servers import Nbdmirror, QemuNbd
from support.waiting import wait_until

pytestmark = pytest.mark.timeout(240)

SOCKET = "/run/nbdmirror/disk0.sock"


def disk_xml(socket: Path, export: str) -> str:
    """The disk as the documentation has it, on that socket."""
    text = (ROOT / "docs" / "libvirt.md").read_text()
    block = re.search(r"^```xml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert block and SOCKET in block[1]
    return block[1].replace(SOCKET, str(socket)).replace("name='disk0'", f"name='{export}'")


def written(libvirtd: Libvirtd) -> int:
    """How many writes libvirt knows of."""
    found = re.search(r"^vda wr_req (\d+)$", libvirtd.virsh("domblkstat", "guest", "vda"), re.M)
    assert found
    return int(found[1])


def assert_well(libvirtd: Libvirtd, domain: Domain) -> None:
    """The domain runs and writes, and libvirt sees no errors on its one disk."""
    before = written(libvirtd)
    domain.wait_for_files(5)
    # What the guest had told may be heard late: those files may be older than `before`.
    wait_until(lambda: written(libvirtd) > before, "libvirt knows of more writes")
    assert libvirtd.virsh("domstate", "guest").strip() == "running"
    assert libvirtd.virsh("domblkerror", "guest").strip() == "No errors found"
    assert "vda" in libvirtd.virsh("domblklist", "guest")


def goes_on(libvirtd: Libvirtd, domain: Domain, told: int) -> bool:
    """Whether it has written some files since its transcript had `told` characters; if it is
    stopped it is resumed, which it may be again until QEMU has connected."""
    if "paused" in libvirtd.virsh("domstate", "guest"):
        libvirtd.virsh("resume", "guest")
    domain.check()
    return len(WROTE.findall(domain.transcript[told:])) >= 3


def test_a_domain(folder: Path, start: Start) -> None:
    source = make_disk(folder / "source.img")
    size = source.stat().st_size
    target = start(QemuNbd(folder, make_noise(folder / "target.img", size)))
    other = start(QemuNbd(folder, make_noise(folder / "other.img", size)))
    let_qemu_in(other.socket)
    server = start(Nbdmirror(folder, source))
    let_qemu_in(server.socket)
    libvirtd = start(Libvirtd(folder))
    domain = start(Domain(folder, libvirtd, disk_xml(server.socket, "disk0")))
    domain.say("write")
    assert_well(libvirtd, domain)

    # Mirror and pivot: libvirt sees nothing of it.
    disks = libvirtd.virsh("domblklist", "guest", "--details")
    server.qmp.start_mirror(target.uri())
    server.qmp.wait_ready()
    assert_well(libvirtd, domain)
    server.qmp.complete()
    assert_well(libvirtd, domain)
    domain.verify()
    assert libvirtd.virsh("domblklist", "guest", "--details") == disks
    before = source.read_bytes()

    # The server dies: the domain stops, or waits where libvirt knows how to, and goes on with one
    # that serves the new place.
    server.kill()
    if "<reconnect" not in libvirtd.virsh("dumpxml", "guest"):
        wait_until(lambda: "paused" in libvirtd.virsh("domstate", "guest"), "it is stopped")
    domain.check()
    server.disks = [target.uri()]
    server.start()
    let_qemu_in(server.socket)
    told = len(domain.transcript)
    wait_until(lambda: goes_on(libvirtd, domain, told), "it goes on")
    domain.verify()

    # libvirt's own way, from there to another server.
    (folder / "new-disk.xml").write_text(disk_xml(other.socket, ""))
    copy = "blockcopy guest vda --wait --pivot --reuse-external --transient-job --xml"
    assert "Successfully pivoted" in libvirtd.virsh(*copy.split(), folder / "new-disk.xml")
    domain.verify()
    server.stop()
    domain.wait_for_files(ALL_FILES)
    check_disk(other.image, domain.shut_down())
    assert source.read_bytes() == before, "written to after the pivot"
