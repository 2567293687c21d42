"""File systems and formats that make snapshots, by the commands of docs/disaster-recovery.md: each
snapshot that was acknowledged is the disk of the point's moment, also after a power cut there."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from integration.mirror.snapshots.snapshotsparts import Exec, start_mirror
from integration.mirror.snapshots.storageparts import (
    SIZE,
    block,
    documented,
    replaced,
    try_storage,
)
from support.clients import connected
from support.fixtures import Start
from support.images import KiB, MiB, assert_identical, make_image, make_noise
from support.mounts import formatted, mounted
from support.processes import nbdmirror, run
from support.serverprocess import Server
from support.servers import NbdkitTarget, Nbdmirror, QemuNbd

Serve = Callable[[Path, Path], Server]

SERVERS: dict[str, tuple[str, Serve]] = {
    "qemu-nbd": ("raw", QemuNbd),
    "nbdkit file": ("raw", lambda folder, image: NbdkitTarget(folder, "file", f"file={image}")),
    "qemu-nbd, qcow2": ("qcow2", lambda folder, image: QemuNbd(folder, image, "qcow2")),
}
"""The format of the image, and who serves it."""


def raw(fmt: str, image: Path, folder: Path) -> Path:
    """The content of an image that nobody uses."""
    if fmt == "raw":
        return image
    run("qemu-img", "check", "-f", fmt, image)
    made = folder / f"{image.name}.raw"
    run("qemu-img", "convert", "-f", fmt, "-O", "raw", image, made)
    return made


class Reflinks:
    """Copies of a file that share its blocks, on a file system that is mounted at `place`."""

    row = "a raw or qcow2 file on XFS or btrfs"

    def __init__(self, start: Start, folder: Path, place: Path, kind: str = "qemu-nbd") -> None:
        self.folder, self.place = folder, place
        self.fmt, serve = SERVERS[kind]
        (place / "snapshots").mkdir()
        self.make_home()
        noise = make_noise(folder / "noise", SIZE)
        run("qemu-img", "convert", "-f", "raw", "-O", self.fmt, noise, self.home / "vda.img")
        self.server = start(serve(folder, self.home / "vda.img"))
        self.command = self.documented()

    @property
    def home(self) -> Path:
        return self.place

    def make_home(self) -> None:
        pass

    def documented(self) -> str:
        places = {"/srv/vda.img": self.home / "vda.img", "/srv/snapshots": self.snapshots}
        return documented(self.row, {theirs: str(ours) for theirs, ours in places.items()})

    @property
    def snapshots(self) -> Path:
        return self.place / "snapshots"

    def file(self, time: str) -> Path:
        return self.snapshots / f"vda-{time}"

    def snapshot(self, time: str) -> bytes:
        return raw(self.fmt, self.file(time), self.folder).read_bytes()

    def recover(self, time: str) -> str:
        """As the page says it of a file."""
        again = self.place / "again.img"
        run("cp", "--reflink=always", self.file(time), again)
        return str(raw(self.fmt, again, self.folder))


class Subvolumes(Reflinks):
    """A btrfs subvolume that holds the file, and its snapshots."""

    row = "a file in a btrfs subvolume"

    @property
    def home(self) -> Path:
        return self.place / "vda"

    def make_home(self) -> None:
        run("btrfs", "subvolume", "create", self.home)

    def documented(self) -> str:
        places = {"/srv/vda ": f"{self.home} ", "/srv/snapshots": str(self.snapshots)}
        return documented(self.row, places)

    def file(self, time: str) -> Path:
        return super().file(time) / "vda.img"


class DocumentedDaemon(Server):
    """qemu-storage-daemon as the page starts it, on a socket."""

    name = "qsd"

    def __init__(self, folder: Path, image: Path, control: Path) -> None:
        super().__init__(folder)
        self.places = {
            "/srv/vda.qcow2": str(image),
            "/run/vda.qmp": str(control),
            "--daemonize --pidfile /run/vda.pid ": "",
            "addr.type=inet,addr.host=SITE-B,addr.port=10809": (
                f"addr.type=unix,addr.path={self.socket}"
            ),
        }

    def argv(self) -> list[str]:
        return shlex.split(replaced(block("sh"), self.places).replace("\\\n", ""))

    def uri(self, export: str = "vda") -> str:
        return super().uri(export)


class InternalSnapshots:
    """Those of a qcow2 file that qemu-storage-daemon serves."""

    def __init__(self, start: Start, folder: Path, place: Path) -> None:
        self._start, self.folder, self.place = start, folder, place
        script, control = folder / "qcow2-snapshot", folder / "vda.qmp"
        script.write_text(block("python"))
        script.chmod(0o755)
        noise = make_noise(folder / "noise", SIZE)
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", noise, self.image)
        self.server: Server = start(DocumentedDaemon(folder, self.image, control))
        places = {"qcow2-snapshot": str(script), "/run/vda.qmp": str(control)}
        self.command = documented("a qcow2 file that qemu-storage-daemon serves", places)

    @property
    def image(self) -> Path:
        return self.place / "vda.qcow2"

    def snapshot(self, time: str) -> bytes:
        made = self.folder / "snapshot.raw"
        run("qemu-img", "check", "-r", "leaks", "-f", "qcow2", self.image)
        run("qemu-img", "convert", "-l", f"snapshot.name={time}", "-O", "raw", self.image, made)
        return made.read_bytes()

    def recover(self, time: str) -> str:
        run("qemu-img", "snapshot", "-a", time, self.image)
        self._start(self.server)
        return self.server.uri()


@pytest.fixture
def far(folder: Path) -> Iterator[Callable[[str], Path]]:
    """far(kind): where such a file system is mounted."""
    with ExitStack() as stack:

        def make(kind: str) -> Path:
            device = formatted(kind, folder / "device")
            return stack.enter_context(mounted(kind, "loop", device))

        yield make


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.parametrize("file_system", ["xfs", "btrfs"])
def test_reflinks(
    start: Start, folder: Path, far: Callable[[str], Path], file_system: str, kind: str
) -> None:
    try_storage(start, folder, Reflinks(start, folder, far(file_system), kind))


def test_subvolumes(start: Start, folder: Path, far: Callable[[str], Path]) -> None:
    try_storage(start, folder, Subvolumes(start, folder, far("btrfs")))


def test_internal_snapshots(start: Start, folder: Path) -> None:
    try_storage(start, folder, InternalSnapshots(start, folder, folder))


@pytest.mark.parametrize(
    ("file_system", "make"),
    [
        ("xfs", Reflinks),
        ("btrfs", Reflinks),
        ("btrfs", Subvolumes),
        ("xfs", InternalSnapshots),
    ],
)
def test_a_power_cut_at_the_far_side(
    start: Start, folder: Path, file_system: str, make: type[Reflinks | InternalSnapshots]
) -> None:
    """What is on the device when a snapshot is acknowledged has that snapshot."""
    disk = make_image(folder / "disk.img", SIZE)
    device, cut = formatted(file_system, folder / "device"), folder / "cut"
    server = start(Nbdmirror(folder, disk))
    with mounted(file_system, "loop", device) as place:
        storage = make(start, folder, place)
        start_mirror(server, storage.server.uri(), x_nbdmirror_interval=86400)
        with Exec(server, storage.command) as command:
            command.wait_for(1)
            with connected(server.uri()) as guest:
                guest.pwrite(b"p" * 64 * KiB, MiB)
            control = ("--qmp", str(server.qmp_path))
            done = nbdmirror("point", "--wait", *control)
            assert done.returncode == 0, done.stderr
            run("cp", "--sparse=always", device, cut)
            command.wait_for(2)
            server.qmp.execute("block-job-cancel", device="j")
            assert command.wait() == 0, command.err
        storage.server.stop()
    with mounted(file_system, "loop", cut, may_skip=False) as storage.place:
        assert_identical(disk.read_bytes(), storage.snapshot(command.times[2]))
