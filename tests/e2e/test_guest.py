"""A real Linux writes to its disk, with fsync and discard, while that is mirrored and moved.

It verifies what it reads all the way, and would tell of an I/O error on its console; at the end the
image that should be the truth is compared with what the guest has said to be on its disk.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e.guest import ALL_FILES, WRITERS, Machine, check_disk, make_disk, nbd_drive
from support.fixtures import Start
from support.images import assert_identical, make_noise
from support.servers import Nbdmirror, QemuNbd

pytestmark = pytest.mark.timeout(180)

SPEED = 24 << 20
"""Bytes a second: so that the guest writes while the disk is copied."""


class Stage:
    """A guest that writes to a disk on nbdmirror, and a target for that disk."""

    def __init__(self, folder: Path, start: Start, *, options: str = "defaults") -> None:
        self.source = make_disk(folder / "source.img")
        size = self.source.stat().st_size
        self.target = start(QemuNbd(folder, make_noise(folder / "target.img", size)))
        self.server = start(Nbdmirror(folder, self.source))
        drive = nbd_drive(str(self.server.socket), reconnect_delay=60)
        self.guest = start(Machine(folder, drive, words=f"disk=vda options={options}"))
        self.guest.say("write")
        self.guest.wait_for_files(5)

    def mirror(self, target: str = "", **options: str) -> None:
        """Start it, and see the guest write meanwhile."""
        options = {"sync": "full", **options}
        self.server.qmp.start_mirror(target or self.target.uri(), speed=SPEED, **options)
        self.guest.wait_for_files(5)

    def pivot(self) -> None:
        """Complete; all that the guest has and writes from now on is on the target."""
        self.guest.wait_for_files(5)
        self.server.qmp.complete()
        self.guest.verify()
        before = self.source.read_bytes()
        self.guest.wait_for_files(ALL_FILES)
        everything = self.guest.shut_down()
        check_disk(self.target.image, everything)
        with pytest.raises(AssertionError, match="differ from what the guest wrote"):
            check_disk(self.source, everything, torn_max=WRITERS)
        assert self.source.read_bytes() == before, "written to after the pivot"


@pytest.mark.guarantee("A virtual machine notices nothing")
@pytest.mark.parametrize(
    ("options", "copy_mode"), [("defaults", "background"), ("discard", "write-blocking")]
)
def test_pivot(folder: Path, start: Start, options: str, copy_mode: str) -> None:
    stage = Stage(folder, start, options=options)
    stage.mirror(copy_mode=copy_mode)
    stage.server.qmp.wait_ready()
    stage.pivot()


@pytest.mark.guarantee("Completed means identical")
@pytest.mark.guarantee("A virtual machine notices nothing")
def test_soft_cancel(folder: Path, start: Start) -> None:
    """While the guest writes the copy is a file system as after a power cut, with all that was
    synced; when it is quiet, byte for byte what it has."""
    stage = Stage(folder, start)
    qmp = stage.server.qmp
    stage.mirror()
    qmp.wait_ready()
    stage.guest.wait_for_files(5)
    before = stage.guest.transcript
    qmp.execute("block-job-cancel", device="j")
    qmp.wait_completed()
    stage.guest.wait_for_files(5)
    check_disk(stage.target.image, before, torn_max=WRITERS)

    stage.mirror()
    qmp.wait_ready()
    stage.guest.wait_for_files(ALL_FILES)
    everything = stage.guest.shut_down()
    qmp.execute("block-job-cancel", device="j")
    qmp.wait_completed()
    check_disk(stage.source, everything)
    assert_identical(stage.source, stage.target.image)


@pytest.mark.guarantee("A virtual machine notices nothing")
@pytest.mark.parametrize("is_ready", [False, True])
def test_the_target_is_killed_and_comes_back(folder: Path, start: Start, is_ready: bool) -> None:
    """In the first copy within the reconnect delay, and later with none and the policy `stop`."""
    stage = Stage(folder, start)
    qmp = stage.server.qmp
    server = {"type": "unix", "path": str(stage.target.socket)}
    delay = {} if is_ready else {"reconnect_delay": 60}
    qmp.execute("blockdev-add", driver="nbd", node_name="target", server=server, **delay)
    stage.mirror("target", on_target_error="stop" if is_ready else "report")
    if is_ready:
        qmp.wait_ready()
    stage.target.kill()
    if is_ready:
        qmp.wait_for_event("BLOCK_JOB_ERROR", device="j", action="stop")
    stage.guest.wait_for_files(10)
    stage.target.start()
    if is_ready:
        qmp.execute("block-job-resume", device="j")
    else:
        qmp.wait_ready()
    stage.pivot()


@pytest.mark.guarantee("A server that is killed and started again is a pause")
def test_the_server_is_killed_and_comes_back(folder: Path, start: Start) -> None:
    """With a mirror under way. The guest sees a disk that takes long to answer, once; the source
    is the truth, and the mirror starts anew."""
    stage = Stage(folder, start)
    stage.mirror()
    stage.server.qmp.wait_ready()
    stage.server.kill()
    stage.server.start()
    stage.guest.wait_for_files(5)
    stage.guest.verify()
    stage.mirror()
    stage.server.qmp.wait_ready()
    stage.pivot()


@pytest.mark.guarantee("A virtual machine notices nothing")
def test_the_kernels_own_client(folder: Path, start: Start) -> None:
    """/dev/nbd0 in a guest, over TCP: the kernel's reading of the protocol, with discard."""
    source = make_disk(folder / "source.img")
    target = start(QemuNbd(folder, make_noise(folder / "target.img", source.stat().st_size)))
    server = start(Nbdmirror(folder, source, tcp=True))
    network = ("-netdev", "user,id=network", "-device", "virtio-net-pci,netdev=network")
    words = f"nbd=10.0.2.2,{server.port} options=discard"
    guest = start(Machine(folder, words=words, options=network))
    guest.say("write")
    guest.wait_for_files(5)
    server.qmp.start_mirror(target.uri(), speed=SPEED)
    server.qmp.wait_ready()
    guest.wait_for_files(5)
    server.qmp.complete()
    guest.verify()
    guest.wait_for_files(ALL_FILES)
    check_disk(target.image, guest.shut_down())
