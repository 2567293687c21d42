"""ShmDirectory: memory that outlives the process: files in /dev/shm, mapped.

What is stored there is still there after `kill -9`, and that costs nothing: no system call, no
disk. It is gone after a reboot. A folder is named after its disk's epoch, so that the next server
of that disk can take away what a killed one has left, also where nothing else tells of it; it is
locked while its process lives. Everything is allocated when it is made: a page that could not be
had later would end the process (SIGBUS).

From any thread; a bitmap as DirtyBitmap has it.
"""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from nbdmirror.disk.bitmap import DirtyBitmap, bytes_of

PLACE = Path("/dev/shm")


class ShmDirectory:
    """A folder of our own, mode 0700, with files of memory in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._numbers = itertools.count()
        self._fd = -1

    @classmethod
    def create(cls, disk_id: str) -> ShmDirectory:
        """A new one for an epoch of a disk, with a name that nobody can guess. Raises OSError."""
        memory = cls(Path(tempfile.mkdtemp(prefix=_prefix(disk_id), dir=PLACE)))
        memory.lock()
        return memory

    @classmethod
    def find(cls, path: str) -> ShmDirectory | None:
        """One that an earlier process of ours has left; None if it is not there, or not ours. In
        /dev/shm anybody may put anything."""
        folder = Path(path)
        try:
            status = folder.lstat()
        except OSError:
            return None
        is_ours = status.st_uid == os.geteuid() or os.geteuid() == 0
        is_private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077
        return cls(folder) if folder.parent == PLACE and is_ours and is_private else None

    def lock(self) -> bool:
        """Hold the lock until the process ends. False if another process does. Raises OSError."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self._fd = fd
        return True

    def map(self, name: str, length: int) -> mmap.mmap:
        """`length` bytes of zeroes under a new name. Raises OSError."""
        path = self.path / name
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, length)
            return mmap.mmap(fd, length)
        except BaseException:
            self.remove(name)
            raise
        finally:
            os.close(fd)

    def bitmap(self, purpose: str, size: int, granularity: int) -> ShmBitmap:
        """A clean bitmap, one of perhaps several for `purpose`. Raises OSError."""
        name = f"{purpose}.{next(self._numbers)}"
        pages = self.map(name, bytes_of(size, granularity))
        return ShmBitmap(self, name, size, granularity, pages)

    def bits_of(self, purpose: str) -> list[bytes]:
        """What the bitmaps for `purpose` held, as DirtyBitmap.to_bytes has it."""
        names = [name for name in self._names() if name.rpartition(".")[0] == purpose]
        return [content for name in names if (content := self.read(name)) is not None]

    def read(self, name: str) -> bytes | None:
        """What a file holds; None if there is no such file."""
        try:
            return (self.path / name).read_bytes()
        except OSError:
            return None

    def remove(self, name: str) -> None:
        with suppress(OSError):
            (self.path / name).unlink()

    def discard(self) -> None:
        """Remove everything. Who has it mapped keeps his pages."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.path)
        except OSError:
            return []


def discard_left(disk_id: str, path: str = "", *, but: ShmDirectory | None = None) -> None:
    """Take away what servers of this disk that were killed have left, and what is at `path`; that
    of a process that lives, and `but`, stay."""
    found = [path] if path else []
    with suppress(OSError):
        found += [str(one) for one in PLACE.glob(f"{_prefix(disk_id)}*")]
    for one in set(found):
        if but is None or one != str(but.path):
            with suppress(OSError):
                if (memory := ShmDirectory.find(one)) is not None and memory.lock():
                    memory.discard()


def _prefix(disk_id: str) -> str:
    return f"nbdmirror-state-{disk_id}_"


class ShmBitmap(DirtyBitmap):
    """One whose bits outlive the process, until it is closed."""

    __slots__ = ("_memory", "_name")

    def __init__(
        self, memory: ShmDirectory, name: str, size: int, granularity: int, pages: mmap.mmap
    ) -> None:
        super().__init__(size, granularity, pages)
        self._memory = memory
        self._name = name

    def close(self) -> None:
        self._memory.remove(self._name)
