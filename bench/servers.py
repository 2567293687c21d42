"""What is measured, and the targets it mirrors to. `Guestable` servers are driven alike: nbdmirror
and qemu-storage-daemon speak the same QMP, so one measurement fits both."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from bench.processes import Process, Qmp, wait_for_socket

DISK = "disk0"


class GuestServer(Process):
    """Serves `disks` as exports disk0, disk1, ..."""

    can_mirror = True
    mirror_options: ClassVar[dict[str, Any]] = {}
    """What each mirror of this subject has, beside what a measurement asks for."""

    def __init__(
        self,
        folder: Path,
        disks: Sequence[Path],
        *,
        is_direct: bool = False,
        options: Sequence[str] = (),
    ) -> None:
        """`options`: words of its command line."""
        super().__init__(folder)
        self.disks = disks
        self.is_direct = is_direct
        self.options = options
        self.qmp_path = self.socket.with_suffix(".qmp")
        self._qmp: Qmp | None = None

    def uri(self, number: int = 0) -> str:
        return f"nbd+unix:///disk{number}?socket={self.socket}"

    @property
    def qmp(self) -> Qmp:
        if self._qmp is None:
            self._qmp = Qmp(self.qmp_path)
        return self._qmp

    def stop(self) -> None:
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None
        super().stop()
        self.qmp_path.unlink(missing_ok=True)

    # Mirrors. The node and the job of disk N are called targetN and jobN.

    def add_target(self, target: Target, number: int = 0) -> None:
        node = {"driver": "nbd", "node-name": f"target{number}", "server": target.server()}
        node |= {"export": target.export(number)}
        # Without "unmap", here and at qemu-nbd, QEMU 10.0 fills the target's holes.
        self.qmp.execute("blockdev-add", {**node, "discard": "unmap"})

    def start_mirror(self, number: int = 0, **options: Any) -> str:
        """Returns the job's id. `_` in an option's name stands for `-`."""
        job = f"job{number}"
        arguments = {
            "job-id": job,
            "device": f"disk{number}",
            "target": f"target{number}",
            "sync": "full",
        }
        options = self.mirror_options | options
        named = {name.replace("_", "-"): value for name, value in options.items()}
        self.qmp.execute("blockdev-mirror", {**arguments, **named})
        return job

    def job(self, job: str) -> dict[str, Any]:
        """As query-block-jobs has it; {} if there is none."""
        jobs = self.qmp.execute("query-block-jobs")
        return next((found for found in jobs if found["device"] == job), {})

    def copied_bytes(self, job: str) -> int:
        """The job's `offset`."""
        return int(self.job(job).get("offset", 0))


def nbdmirror_environment() -> dict[str, str]:
    """For this checkout, or the one that NBDMIRROR_BENCH_TREE names."""
    tree = os.environ.get("NBDMIRROR_BENCH_TREE", str(Path(__file__).resolve().parent.parent))
    return {**os.environ, "PYTHONPATH": tree, "PYTHONSAFEPATH": "1"}


class Nbdmirror(GuestServer):
    """This checkout, or the one that NBDMIRROR_BENCH_TREE names; NBDMIRROR_BENCH_OPTIONS are more
    options for `serve`. Both are for comparing a change with what was there before."""

    name = "nbdmirror"

    def argv(self) -> list[str | Path]:
        serve: list[str | Path] = [sys.executable, "-m", "nbdmirror", "serve"]
        disks = [f"disk{number}={disk}" for number, disk in enumerate(self.disks)]
        options = [*self.options, *os.environ.get("NBDMIRROR_BENCH_OPTIONS", "").split()]
        options += ["--cache", "none"] if self.is_direct else []
        return [*serve, *disks, "--socket", self.socket, "--qmp", self.qmp_path, *options]

    def environment(self) -> dict[str, str]:
        return nbdmirror_environment()

    def wait_until_it_serves(self) -> None:
        super().wait_until_it_serves()
        wait_for_socket(str(self.qmp_path), self)


class Qsd(GuestServer):
    """qemu-storage-daemon as its documentation would have it for speed: the file node itself is
    exported, io_uring through the page cache, Linux AIO past it."""

    name = "qemu-storage-daemon"

    def argv(self) -> list[str | Path]:
        how = "aio=native,cache.direct=on" if self.is_direct else "aio=io_uring"
        listen = f"addr.type=unix,addr.path={self.socket},max-connections=32"
        control = f"socket,path={self.qmp_path},server=on,wait=off,id=qmp"
        # The monitor first: it is there when the NBD socket answers. It takes one client at a time.
        argv: list[str | Path] = [self.name, "--chardev", control, "--monitor", "chardev=qmp"]
        argv += ["--nbd-server", listen]
        for number, disk in enumerate(self.disks):
            node = f"disk{number}"
            argv += ["--blockdev", f"driver=file,filename={disk},node-name={node},{how}"]
            export = f"type=nbd,id={node}x,node-name={node},name={node},writable=on"
            argv += ["--export", export]
        return argv


class QsdFine(Qsd):
    """Its mirrors send pieces of 4 KiB, at 16 times the memory for the bitmap."""

    mirror_options: ClassVar = {"granularity": 4096}


class NbdkitFile(GuestServer):
    """nbdkit's file plugin, in C: what our host does without us."""

    name = "nbdkit-file"
    can_mirror = False

    def argv(self) -> list[str | Path]:
        return ["nbdkit", "-f", "-U", self.socket, "file", self.disks[0]]


class Target(Process):
    """What is mirrored to."""

    port = 0

    def export(self, number: int) -> str:
        """The name of the export for this disk."""
        return ""

    def address(self) -> str | tuple[str, int]:
        return ("127.0.0.1", self.port) if self.port else str(self.socket)

    def uri(self) -> str:
        if self.port:
            return f"nbd://127.0.0.1:{self.port}"
        return f"nbd+unix://?socket={self.socket}"

    def server(self) -> dict[str, str]:
        """As blockdev-add has it."""
        if self.port:
            return {"type": "inet", "host": "127.0.0.1", "port": str(self.port)}
        return {"type": "unix", "path": str(self.socket)}


class QemuNbd(Target):
    """qemu-nbd of a raw file."""

    name = "qemu-nbd"

    def __init__(self, folder: Path, image: Path, *, is_tcp: bool = False) -> None:
        super().__init__(folder)
        self._image = image
        self.port = free_port() if is_tcp else 0

    def argv(self) -> list[str | Path]:
        tcp: list[str | Path] = ["-b", "127.0.0.1", "-p", str(self.port)]
        listen = tcp if self.port else ["-k", self.socket]
        return ["qemu-nbd", "-f", "raw", "--discard=unmap", "-t", "-e", "16", *listen, self._image]


class NbdkitFileTarget(Target):
    """nbdkit's file plugin, in C."""

    name = "nbdkit-file"

    def __init__(self, folder: Path, image: Path) -> None:
        super().__init__(folder)
        self._image = image

    def argv(self) -> list[str | Path]:
        return ["nbdkit", "-f", "-U", self.socket, "file", self._image]


class NbdkitFolder(Target):
    """nbdkit's file plugin with an export for each file of a folder."""

    name = "nbdkit-folder"

    def __init__(self, folder: Path, images: Path) -> None:
        super().__init__(folder)
        self._images = images

    def export(self, number: int) -> str:
        return f"target{number}"

    def argv(self) -> list[str | Path]:
        return ["nbdkit", "-f", "-U", self.socket, "file", f"dir={self._images}"]


class NbdkitMemory(Target):
    """nbdkit's memory plugin; `filters` are words before it, `parameters` behind it."""

    name = "nbdkit-memory"

    def __init__(
        self,
        folder: Path,
        size: int,
        *,
        filters: Sequence[str] = (),
        parameters: Sequence[str] = (),
        is_tcp: bool = False,
    ) -> None:
        super().__init__(folder)
        self._size = size
        self._filters = filters
        self._parameters = parameters
        self.port = free_port() if is_tcp else 0

    def argv(self) -> list[str | Path]:
        tcp: list[str | Path] = ["-i", "127.0.0.1", "-p", str(self.port)]
        listen = tcp if self.port else ["-U", self.socket]
        plugin = ["memory", str(self._size)]
        return ["nbdkit", "-f", *listen, *self._filters, *plugin, *self._parameters]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
