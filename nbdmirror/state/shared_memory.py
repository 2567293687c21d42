"""ShmDirectory: memory that outlives the process: files in /dev/shm, mapped.

The content survives `kill -9`, without any system call or disk access, and is lost at a reboot. A
folder's name contains its disk's ID, so that the next server of that disk can remove what a killed
server has left, even without any record of it. The folder is locked while its process lives. All
memory is allocated at the beginning: a page that is not available later would end the process
(SIGBUS).

For any thread; a bitmap as DirtyBitmap.
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
    """A private folder, mode 0700, with files of memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_kept = False
        """No file is removed any more, except all by `discard`."""
        self._numbers = itertools.count()
        self._fd = -1

    @classmethod
    def create(cls, disk_id: str) -> ShmDirectory:
        """Create a folder for a disk's ID, with a name that cannot be guessed. Raises OSError."""
        memory = cls(Path(tempfile.mkdtemp(prefix=_prefix(disk_id), dir=PLACE)))
        memory.lock()
        return memory

    @classmethod
    def find(cls, path: str) -> ShmDirectory | None:
        """The folder that an earlier process of this user has left; None if it does not exist, or
        belongs to another user. Every user may create files in /dev/shm."""
        folder = Path(path)
        try:
            status = folder.lstat()
        except OSError:
            return None
        is_ours = status.st_uid == os.geteuid() or os.geteuid() == 0
        is_private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077
        return cls(folder) if folder.parent == PLACE and is_ours and is_private else None

    def lock(self) -> bool:
        """Take the lock until the process ends. Returns False if another process has it. Raises
        OSError."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self._fd = fd
        return True

    def map(self, name: str, length: int) -> mmap.mmap:
        """Map `length` bytes of zeroes under a new name. Raises OSError."""
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
        """A clean bitmap, perhaps one of several for `purpose`. Raises OSError."""
        name = f"{purpose}.{next(self._numbers)}"
        pages = self.map(name, bytes_of(size, granularity))
        return ShmBitmap(self, name, size, granularity, pages)

    def bits_of(self, purpose: str) -> list[bytes]:
        """The content of the bitmaps for `purpose`, as DirtyBitmap.to_bytes."""
        names = [name for name in self._names() if name.rpartition(".")[0] == purpose]
        return [content for name in names if (content := self.read(name)) is not None]

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if it does not exist."""
        try:
            return (self.path / name).read_bytes()
        except OSError:
            return None

    def remove(self, name: str) -> None:
        """Remove a file; existing mappings keep their pages."""
        if not self.is_kept:
            with suppress(OSError):
                (self.path / name).unlink()

    def discard(self) -> None:
        """Remove everything. Existing mappings keep their pages."""
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
    """Remove the folders that killed servers of this disk have left, and the one at `path`. Folders
    of live processes, and `but`, stay."""
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
    """A bitmap whose bits outlive the process, until it is closed."""

    __slots__ = ("_memory", "_name")

    def __init__(
        self, memory: ShmDirectory, name: str, size: int, granularity: int, pages: mmap.mmap
    ) -> None:
        super().__init__(size, granularity, pages)
        self._memory = memory
        self._name = name

    def close(self) -> None:
        self._memory.remove(self._name)
