"""Lab: where images are and how long a measurement takes. One folder, gone at the end."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.processes import BenchError
from bench.servers import GuestServer, NbdkitFile, Nbdmirror, Qsd, QsdFine

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

SUBJECTS: dict[str, type[GuestServer]] = {
    "nbdmirror": Nbdmirror,
    "qsd": Qsd,
    "qsd-4k": QsdFine,
    "nbdkit": NbdkitFile,
}
"""Those that serve guests. nbdcopy, which only copies, is a subject of its own in measures.copy."""

SPARE_BYTES = 3 * GiB
"""Left free in memory, for the servers and for whoever else is on this machine."""


class Lab:
    """`disk_bytes` is the usual disk's size, `seconds` the usual load's length."""

    def __init__(self, *, is_quick: bool) -> None:
        self.is_quick = is_quick
        self.disk_bytes = 256 * MiB if is_quick else GiB
        self.seconds = 1.5 if is_quick else 3.0
        self._images: dict[tuple[str, int], Path] = {}
        self._noise = os.urandom(4 * MiB)

    def __enter__(self) -> Self:
        memory = Path("/dev/shm")
        is_there = memory.is_dir() and _room(memory) > 2 * self.disk_bytes + SPARE_BYTES
        self.folder = Path(tempfile.mkdtemp(prefix="nbm-bench-", dir=memory if is_there else None))
        self.is_in_memory = is_there
        self.disk_folder = Path(tempfile.mkdtemp(prefix="nbm-bench-", dir=_disk_place()))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.disk_folder, ignore_errors=True)

    def image(self, name: str, size: int | None = None) -> Path:
        """A raw file without holes or zeroes; made once, and kept. What measurements write to it
        stays, and is of no interest."""
        size = self.disk_bytes if size is None else size
        if (name, size) not in self._images:
            self.need(size)
            path = self.folder / f"{name}-{size}.img"
            self._fill(path, size)
            self._images[name, size] = path
        return self._images[name, size]

    def image_on_disk(self) -> Path:
        """The same on a real file system, and written back, for direct I/O."""
        size = self.disk_bytes
        if ("disk", size) not in self._images:
            path = self.disk_folder / "direct.img"
            self._fill(path, size)
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._images["disk", size] = path
        return self._images["disk", size]

    def sparse(self, name: str, size: int, pieces: Sequence[int] = ()) -> Path:
        """A raw file that is one hole, but for 1 MiB of data at each of `pieces`."""
        path = self.folder / f"{name}-sparse.img"
        with path.open("wb") as file:
            file.truncate(size)
            for offset in pieces:
                os.pwrite(file.fileno(), self._noise[:MiB], offset)
        return path

    def touch(self, length: int) -> None:
        """Use so much free memory, for a server that is about to take it: what has been free for
        some seconds a virtual machine's host may have taken back, and whoever comes first waits."""
        self.need(length)
        if self.is_in_memory:
            path = self.folder / "touched"
            try:
                self._fill(path, length)
            finally:
                path.unlink()

    def clear(self) -> None:
        """Delete all images: a larger one needs the room, or needed it."""
        for path in self._images.values():
            path.unlink(missing_ok=True)
        self._images.clear()

    def need(self, length: int) -> None:
        """Raise BenchError if there is no room for so much more."""
        if _room(self.folder) < length + SPARE_BYTES:
            raise BenchError(f"no room for {length >> 20} MiB more in {self.folder}")

    def _fill(self, path: Path, size: int) -> None:
        with path.open("wb") as file:
            for offset in range(0, size, len(self._noise)):
                file.write(self._noise[: min(len(self._noise), size - offset)])


def _room(folder: Path) -> int:
    """Free bytes there; for a file system in memory, free memory is a bound as well."""
    status = os.statvfs(folder)
    room = status.f_bavail * status.f_frsize
    if Path("/dev/shm") in (folder, *folder.parents):
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * KiB
        room = min(room, available)
    return room


def _disk_place() -> str | None:
    """A folder whose file system has direct I/O: /var/tmp rather than /tmp, which may be tmpfs."""
    return "/var/tmp" if os.access("/var/tmp", os.W_OK) else None
