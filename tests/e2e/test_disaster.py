"""A second site: the link to it is cut and healed, the first one is lost for good, the guest starts
from what the second has, and goes home. As docs/disaster-recovery.md has it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from e2e.guest import ALL_FILES, DISK_BYTES, WRITERS, Machine, check_disk, make_disk, nbd_drive
from e2e.hosts import NBD_PORT, Host, Hosts, NbdmirrorAt, QemuNbdAt, two_hosts
from integration.mirror.points.pointsparts import recovered
from support.fixtures import Start
from support.images import make_noise
from support.processes import nbdmirror, run
from support.servers import Nbdmirror
from support.waiting import wait_until

pytestmark = pytest.mark.timeout(180)


hosts = pytest.fixture(two_hosts)


IMPATIENCE = """
from nbdmirror.nbdclient import tcp_watch

tcp_watch.PEER_LOST_S = 3
"""


class Impatient(Nbdmirror):
    """It takes a peer that does not answer for lost after 3 s, and not after 30."""

    def environment(self) -> dict[str, str]:
        place = self.folder / "impatient"
        place.mkdir(exist_ok=True)
        (place / "sitecustomize.py").write_text(IMPATIENCE)
        environment = super().environment()
        return environment | {"PYTHONPATH": f"{place}{os.pathsep}{environment['PYTHONPATH']}"}


class SiteA:
    """A guest that writes, on a disk that nbdmirror serves."""

    def __init__(self, folder: Path, start: Start, site: Host) -> None:
        self.disk = make_disk(folder / "disk-a.img")
        self.server = start(site.place(Impatient(folder, self.disk)))
        drive = nbd_drive(str(self.server.socket), reconnect_delay=60)
        self.guest = start(site.place(Machine(folder, drive)))
        self.guest.say("write")
        self.guest.wait_for_files(5)

    def do(self, *words: str) -> None:
        """A command of nbdmirror's."""
        done = nbdmirror(*words, "--qmp", self.server.qmp_path)
        assert done.returncode == 0, done.stderr

    def wait_synced(self) -> None:
        """Until each write that the guest has had answered is at site B as well."""
        qmp = self.server.qmp
        wait_until(lambda: qmp.job("disk0")["actively-synced"], "the target is actively synced")
        self.guest.wait_for_files(5)

    def resume(self) -> None:
        """Until it does not stop at once: right after a link came back the kernel may still say
        that there is no route, until it has found the neighbour again."""

        def runs() -> bool:
            if self.server.qmp.job("disk0")["status"] == "standby":
                done = nbdmirror("resume", "--qmp", self.server.qmp_path)
                assert done.returncode == 0 or "No route to host" in done.stderr, done.stderr
            return bool(self.server.qmp.job("disk0")["actively-synced"])

        wait_until(runs, "the mirror goes on")

    def burn_down(self) -> str:
        """Returns what the guest had told."""
        self.guest.check()
        self.guest.kill()
        self.server.kill()
        return self.guest.transcript


@pytest.mark.guarantee("A target that fails stays usable")
def test_a_site_that_is_always_usable(folder: Path, hosts: Hosts, start: Start) -> None:
    a, b = hosts
    disk_b = make_noise(folder / "disk-b.img", DISK_BYTES)
    target = start(NbdmirrorAt(folder, disk_b, b))
    target.allowed = ["Connection reset by peer"]  # when site A burns down
    here = SiteA(folder, start, a)
    mirror = ["--copy-mode", "write-blocking", "--on-target-error", "stop", "--wait", "ready"]
    here.do("mirror", target.uri(), *mirror)
    here.wait_synced()

    before = here.guest.transcript
    b.set_link("down")
    here.server.qmp.wait_for_event("BLOCK_JOB_ERROR", action="stop")
    here.guest.wait_for_files(10)
    # What site B has is of the moment when the link was cut, and stays so until `resume`.
    check_disk(disk_b, before, torn_max=WRITERS)

    b.set_link("up")
    here.resume()
    here.wait_synced()

    told = here.burn_down()
    b.set_link("down")
    target.stop()
    check_disk(disk_b, told, torn_max=WRITERS)
    served = start(NbdmirrorAt(folder, disk_b, b, port=NBD_PORT + 1))
    guest = start(b.place(Machine(folder, nbd_drive(f"{b.address}:{served.port}"))))
    guest.say("write")
    guest.wait_for_files(5)

    b.set_link("up")
    old = start(NbdmirrorAt(folder, here.disk, a))
    drive, to = nbd_drive(f"{a.address}:{NBD_PORT}"), f"tcp:{a.address}:4444"
    home = start(a.place(Machine(folder, drive, incoming=to)))
    done = nbdmirror(
        *("handover", old.uri(), "--qmp", served.qmp_path),
        *("--qemu", guest.monitor_path, "--to", to),
    )
    assert done.returncode == 0, done.stderr
    guest.check()
    home.transcript = guest.transcript
    home.verify()
    home.wait_for_files(ALL_FILES)
    check_disk(here.disk, home.shut_down())
    guest.stop()
    served.stop()  # its disk is `old` now, which is to end after it


def test_a_site_with_copies(folder: Path, hosts: Hosts, start: Start) -> None:
    """In background mode: one copy is whole while the other is being made."""
    a, b = hosts
    size = DISK_BYTES
    one = start(QemuNbdAt(folder, make_noise(folder / "one.img", size), b))
    two = start(QemuNbdAt(folder, make_noise(folder / "two.img", size), b, port=NBD_PORT + 1))
    here = SiteA(folder, start, a)

    here.do("mirror", one.uri(), "--wait", "ready")
    here.guest.wait_for_files(5)
    before = here.guest.transcript
    here.do("cancel")
    here.guest.wait_for_files(5)

    here.do("mirror", two.uri(), "--speed", "256K")  # minutes, however slow the guest is here
    here.guest.wait_for_files(10)
    here.burn_down()
    with pytest.raises(AssertionError):
        check_disk(two.image, before, torn_max=WRITERS)
    check_disk(one.image, before, torn_max=WRITERS)
    guest = start(b.place(Machine(folder, nbd_drive(f"{b.address}:{NBD_PORT}"))))
    guest.say("write")
    guest.wait_for_files(ALL_FILES)
    check_disk(one.image, guest.shut_down())


def test_a_site_with_points(folder: Path, hosts: Hosts, start: Start) -> None:
    """A rehearsal while the guest goes on; and then the guest starts on what site B has."""
    a, b = hosts
    journal_b = folder / "journal-b.img"
    journal_b.touch()
    os.truncate(journal_b, 1 << 30)
    disk_b = make_noise(folder / "disk-b.img", DISK_BYTES)
    image = start(QemuNbdAt(folder, disk_b, b))
    journal = start(QemuNbdAt(folder, journal_b, b, port=NBD_PORT + 1))
    here = SiteA(folder, start, a)
    points = ["--journal", journal.uri(), "--every", "200ms", "--keep", "10m"]
    here.do("mirror", image.uri(), *points, "--wait", "ready")
    here.guest.wait_for_files(5)

    here.do("point", "--name", "rehearsal", "--wait")
    options = ("--journal", journal.uri(), "--read-only", "--point", "rehearsal")
    view = start(b.place(Nbdmirror(folder, image.uri(), options=options)))
    layer = folder / "layer.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", view.uri(), "-F", "raw", layer)
    drive = f"driver=qcow2,node-name=disk,file.driver=file,file.filename={layer}"
    other = start(Machine(folder, drive))
    other.say("write")
    other.wait_for_files(5)
    here.guest.wait_for_files(5)
    other.shut_down()
    other.stop()
    view.stop()

    here.guest.check()
    before = here.guest.transcript
    here.do("point", "--wait")
    here.guest.wait_for_files(5)
    b.set_link("down")
    here.guest.wait_for_files(5)
    here.burn_down()
    image.stop()
    journal.stop()
    check_disk(recovered(disk_b, journal_b), before, torn_max=WRITERS)
    server = NbdmirrorAt(folder, disk_b, b, port=NBD_PORT + 2)
    server.options += ("--journal", str(journal_b))
    served = start(server)
    guest = start(b.place(Machine(folder, nbd_drive(f"{b.address}:{NBD_PORT + 2}"))))
    guest.say("write")
    guest.wait_for_files(ALL_FILES)
    told = guest.shut_down()
    wait_until(lambda: "the journal is not needed any more" in served.stderr, "all is in the image")
    served.stop()
    check_disk(disk_b, told)
