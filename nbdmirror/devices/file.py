"""FileDevice: raw files and block devices.

FileDevice is on the guest's hot path, so a read or write is one system call and one comparison;
rarer cases are in helpers. All calls are for any thread, without a lock: requests name their
offset, and the file position, which SEEK_DATA and SEEK_HOLE move, is not used. The device remembers
what the medium cannot do and does not try again; two threads that learn this at once remember the
same.

Use `FileDevice.open`.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from contextlib import suppress
from functools import partial

from nbdmirror import syscalls as linux
from nbdmirror.devices.aligned import AlignedDevice
from nbdmirror.devices.base import BlockDevice, BlockSize, Buffer, Extent
from nbdmirror.devices.image_lock import lock_image
from nbdmirror.errors import ConfigError, DeviceError
from nbdmirror.identity import is_same_file

ZEROES_BYTES = 1 << 20
"""Zeroes are written in pieces of this size if no better way works."""

EXTENTS_MAX = 64
"""A call returns so many extents, or one more. Each is an lseek: 0.35 ms for all of them on a
fragmented ext4 file."""

PREFERRED_BYTES_MAX = 32 << 20
"""nbdkit's limit of the preferred block size; st_blksize of network file systems may be larger."""

_NOT_THIS_TIME = (errno.EINVAL, errno.EBUSY)
"""The call may work for another range: some file systems want whole blocks (QEMU has seen this on
GPFS), and a block device that is in use elsewhere refuses while its cache is dirty."""

_zeroes = memoryview(mmap.mmap(-1, ZEROES_BYTES, prot=mmap.PROT_READ))  # aligned; no memory used
_pread, _pwrite = os.preadv, os.pwrite


class FileDevice(BlockDevice):
    """A raw file or block device. Raises the system's OSError, or DeviceError with a clear text.

    The size is the one at opening. With O_DIRECT the device takes only whole units in aligned
    memory; `open` puts an AlignedDevice around it.
    """

    def __init__(self, fd: int, path: str, *, read_only: bool, alignment: int = 1) -> None:
        """Takes over `fd`. `alignment`: bytes, for a descriptor with O_DIRECT; else 1."""
        self.description = path
        self.size = os.lseek(fd, 0, os.SEEK_END)  # st_size is 0 for block devices
        self.read_only = read_only
        self.opened = status = os.fstat(fd)
        preferred = max(512, alignment, min(status.st_blksize, PREFERRED_BYTES_MAX))
        self.block_size = BlockSize(alignment, 1 << (preferred.bit_length() - 1))
        self._fd = fd
        self.read_part = partial(os.preadv, fd)
        if not read_only:
            self.write_part = partial(os.pwrite, fd)
        self._is_block = stat.S_ISBLK(status.st_mode)
        self.storage = status.st_rdev if self._is_block else status.st_dev
        """Device number of the file system, or of the block device: disks that hang together."""
        self._is_direct = alignment > 1
        self._sector = linux.sector_size(fd) if self._is_block else 1
        self._refused: set[int] = set()  # of what linux.change can do
        self._can_dsync = True
        self._now_flags = self._flags_for_reading_now()
        self._flush_errno = 0
        self._known_data = (0, 0)
        self._tells_holes = True

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, read_only: bool = False, direct: bool = False
    ) -> BlockDevice:
        """Open an existing disk. `direct`: bypass the page cache (O_DIRECT). Raises ConfigError."""
        path = os.fspath(path)
        flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC
        fd = _open(path, flags | (os.O_DIRECT if direct else 0))
        try:
            lock_image(fd, path, read_only=read_only)
            alignment = linux.direct_alignment(fd) if direct else 1
            if not alignment:
                raise OSError(errno.EINVAL, "no direct I/O (O_DIRECT) for this file")
            device = cls(fd, path, read_only=read_only, alignment=alignment)
            if not direct:
                return device
            tail = None
            if device.size % alignment:  # the same inode; dup() would share O_DIRECT
                tail_fd = linux.reopen(fd, path, flags)
                tail = cls(tail_fd, path, read_only=read_only)
            return AlignedDevice(device, bounce=True, tail=tail)
        except ConfigError:
            os.close(fd)
            raise
        except OSError as error:
            os.close(fd)
            raise ConfigError(f"{path}: cannot be opened: {error.strerror}") from error

    @property
    def fd(self) -> int:
        return self._fd

    def pread(self, buf: memoryview, offset: int) -> None:
        done = _pread(self._fd, (buf,), offset)
        if done != len(buf):
            self._read_rest(buf, offset, done)

    def pwrite(self, buf: Buffer, offset: int, fua: bool = False) -> None:
        if fua or self.read_only:  # one branch for the rare cases
            self._write_durably(buf, offset)
            return
        done = _pwrite(self._fd, buf, offset)
        if done != len(buf):
            self._write_rest(buf, offset, done)

    def zero(
        self,
        offset: int,
        length: int,
        *,
        may_trim: bool = False,
        fua: bool = False,
        fast: bool = False,
    ) -> None:
        self._refuse_if_read_only()
        self._known_data = (0, 0)
        start, end = self._whole_sectors(offset, length)
        if start < end and self._zero_at_once(start, end - start, may_trim, fast):
            self._write_zeroes(offset, start)
            self._write_zeroes(end, offset + length)
        elif fast:
            raise OSError(errno.ENOTSUP, f"{self.description}: has no fast zero")
        else:
            self._write_zeroes(offset, offset + length)
        if fua:
            self.flush()

    def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        self._refuse_if_read_only()
        self._known_data = (0, 0)
        start, end = self._whole_sectors(offset, length)
        try:
            if start < end:
                what = linux.DISCARD if self._is_block else linux.PUNCH_HOLE
                self._change(what, start, end - start)
        except OSError as error:
            if error.errno == errno.EIO:  # other errors only mean that the hint was ignored
                raise
        if fua:
            self.flush()

    def flush(self) -> None:
        """After a failure every flush fails until the file is opened again. Linux reports a failed
        write-back once and then treats the pages as clean, so the next fdatasync would succeed
        without the data. (QEMU's page_cache_inconsistent.)"""
        if self._flush_errno:
            raise OSError(self._flush_errno, f"{self.description}: an earlier flush failed")
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._cache_is_lost(error)
            raise

    def extents(self, offset: int, length: int) -> list[Extent]:
        """Extents as lseek reports them; most file systems report preallocated ranges as holes.

        The last data range is remembered, as in QEMU: SEEK_HOLE on tmpfs walks all pages up to the
        next hole (9 us for each MiB, so 0.9 s for 100 GiB, for each claim of the copier). The range
        may be out of date, since treating zeroes as data is never wrong; this device's zeroes and
        trims forget it.
        """
        if known := self.known_extents(offset, length):
            return known
        end = offset + length
        found: list[Extent] = []
        try:
            while offset < end and len(found) < EXTENTS_MAX:
                data = self._next_data(offset)
                if data > offset:
                    found.append(Extent(min(data, end) - offset, zero=True, hole=True))
                if data >= end:
                    break
                offset = os.lseek(self._fd, data, os.SEEK_HOLE)
                if offset <= data:  # a hole was punched in between
                    break
                self._known_data = (data, offset)
                found.append(Extent(min(offset, end) - data, zero=False, hole=False))
        except OSError as error:
            # EINVAL: block devices and some file systems. ENXIO: truncated; the read will fail.
            if error.errno not in (errno.EINVAL, errno.ENXIO, *linux.UNSUPPORTED):
                raise
            self._tells_holes = error.errno == errno.ENXIO
        return found or [Extent(length, zero=False, hole=False)]

    def known_extents(self, offset: int, length: int) -> list[Extent]:
        """The extents that are known without a query of the storage; empty if none are."""
        start, end = self._known_data
        if start <= offset < end:
            return [Extent(min(end - offset, length), zero=False, hole=False)]
        return [] if self._tells_holes else [Extent(length, zero=False, hole=False)]

    def cache(self, offset: int, length: int) -> None:
        if not self._is_direct:
            try:
                os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)
            except OSError:
                pass  # a hint

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def read_now(self, buf: memoryview, offset: int) -> int:
        """Fill as much of `buf` as is possible without waiting for storage. Returns the bytes."""
        if self._now_flags is None:
            return 0
        try:
            return os.preadv(self._fd, (buf,), offset, self._now_flags)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno not in (*linux.UNSUPPORTED, errno.EINVAL):
                raise
            self._now_flags = None
            return 0

    def is_whole_now(self) -> bool:
        """Whether the file is certainly as long as before: its last byte can be read without
        waiting for storage. (fstat(2) may ask another host.) False if this is not known."""
        if self._is_block or self._now_flags is None:
            return self._is_block
        try:
            return os.preadv(self._fd, (bytearray(1),), self.size - 1, self._now_flags) == 1
        except OSError:
            return False  # not in memory, or the kernel cannot say

    def check_whole(self) -> os.stat_result:
        """Raise DeviceError if the file is shorter than before. A later write may have left a hole
        behind the cut, which reads as zeroes. May wait for storage. Returns what fstat(2) says."""
        opened = os.fstat(self._fd)
        if not self._is_block and opened.st_size < self.size:
            raise self._truncated(opened.st_size)
        if self._now_flags is not None:
            with suppress(OSError):  # for `is_whole_now`
                os.pread(self._fd, 1, self.size - 1)
        return opened

    def change(self) -> str:
        """What happened to the file behind the open descriptor, in one line; "" if nothing did.
        Only for a thread that may wait for storage."""
        try:
            opened = self.check_whole()
            there = os.stat(self.description)
        except FileNotFoundError:
            what = "was moved or deleted" if opened.st_nlink else "was deleted"
        except DeviceError as error:
            return str(error)
        except OSError:
            return ""  # not known
        else:
            if is_same_file(opened, there):
                return ""
            what = "is another file now"
        return f"{self.description}: {what}; guests keep the file that was opened"

    def _truncated(self, size: int) -> DeviceError:
        return DeviceError(
            f"{self.description}: ends at {size}, not at {self.size}: it was truncated while in use"
        )

    def _flags_for_reading_now(self) -> int | None:
        """Flags for os.preadv that read only from memory; None if that is not possible.

        tmpfs and ramfs refuse RWF_NOWAIT (ENOTSUP, Linux 6.18), but all their data is in memory.
        O_DIRECT accepts the flag, and waits for the device all the same (0.4 ms seen).
        """
        if self._is_direct:
            return None
        return 0 if linux.is_in_memory(self._fd) else os.RWF_NOWAIT

    def _read_rest(self, buf: memoryview, offset: int, done: int) -> None:
        """Continue after `done` bytes: a signal, or a system limit, may have cut the read short."""
        while done < len(buf):
            count = _pread(self._fd, (buf[done:],), offset + done)
            if not count:
                raise self._truncated(offset + done)
            done += count

    def _write_rest(self, buf: Buffer, offset: int, done: int) -> None:
        """Continue after `done` bytes; typically this raises the reason, such as ENOSPC."""
        view = memoryview(buf)
        while done < len(view):
            count = _pwrite(self._fd, view[done:], offset + done)
            if not count:
                raise DeviceError(f"{self.description}: accepts no data at {offset + done}")
            done += count

    def _write_durably(self, buf: Buffer, offset: int) -> None:
        self._refuse_if_read_only()
        done = 0
        if self._can_dsync:
            try:
                done = os.pwritev(self._fd, (buf,), offset, os.RWF_DSYNC)
            except OSError as error:
                if error.errno not in linux.UNSUPPORTED:
                    if error.errno == errno.EIO:
                        # It may be an earlier write's failure, which no later flush reports.
                        self._cache_is_lost(error)
                    raise
                self._can_dsync = False
        if done != len(buf):
            self._write_rest(buf, offset, done)
            self.flush()

    def _cache_is_lost(self, error: OSError) -> None:
        if not self._is_direct:
            self._flush_errno = error.errno or errno.EIO

    def _refuse_if_read_only(self) -> None:
        if self.read_only:
            raise DeviceError(f"{self.description}: is read-only", errno.EROFS)

    def _whole_sectors(self, offset: int, length: int) -> tuple[int, int]:
        """The part that fallocate and ioctl accept: block devices refuse parts of sectors."""
        sector = self._sector
        return -(-offset // sector) * sector, (offset + length) // sector * sector

    def _zero_at_once(self, offset: int, length: int, may_trim: bool, fast: bool) -> bool:
        """Zero without writing, in the first way that works; False if none does.

        BLKZEROOUT is not needed: since Linux 4.9 ZERO_RANGE does the same on a block device. Both
        write zeroes if the disk cannot do better, so `fast` does not use them there (as in QEMU).
        """
        if may_trim and self._change(linux.PUNCH_HOLE, offset, length):
            return True
        if not (fast and self._is_block) and self._change(linux.ZERO_RANGE, offset, length):
            return True
        # tmpfs. Allocate first: this changes no content, so a refusal leaves everything as it was.
        return (
            self._change(linux.ALLOCATE, offset, length)
            and self._change(linux.PUNCH_HOLE, offset, length)
            and self._change(linux.ALLOCATE, offset, length)
        )

    def _write_zeroes(self, start: int, end: int) -> None:
        for offset in range(start, end, ZEROES_BYTES):
            self.pwrite(_zeroes[: min(ZEROES_BYTES, end - offset)], offset)

    def _change(self, what: int, offset: int, length: int) -> bool:
        """Whether the change was done; False if the medium cannot do it, or not for this range."""
        if what in self._refused:
            return False
        code = linux.change(self._fd, what, offset, length)
        if code in linux.UNSUPPORTED:
            self._refused.add(what)
        elif code and code not in _NOT_THIS_TIME:
            raise OSError(code, os.strerror(code), self.description)
        return not code

    def _next_data(self, offset: int) -> int:
        try:
            return os.lseek(self._fd, offset, os.SEEK_DATA)
        except OSError as error:
            # ENXIO means a hole up to the end, or that the end is before `offset`. A truncated
            # disk must not be mirrored as zeroes.
            if error.errno != errno.ENXIO or os.fstat(self._fd).st_size < self.size:
                raise
            return self.size


def _open(path: str, flags: int) -> int:
    """A descriptor of a regular file or block device. Raises ConfigError. A FIFO is not opened,
    since that would wait for its other end."""
    try:
        status = os.stat(path)
        kind = stat.S_IFMT(status.st_mode)
        if kind not in (stat.S_IFREG, stat.S_IFBLK):
            what = "a directory" if kind == stat.S_IFDIR else "a special file"
            raise ConfigError(f"{path}: is {what}, not a regular file or block device")
        if kind == stat.S_IFBLK and (node := linux.node_of(status.st_rdev)):
            # Locks belong to the node: a second node of the same device would not show them.
            with suppress(PermissionError):
                return os.open(node, flags)
        return os.open(path, flags)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: does not exist; create it first") from error
    except OSError as error:
        if flags & os.O_RDWR and os.access(path, os.R_OK) and not os.access(path, os.W_OK):
            raise ConfigError(f"{path}: is not writable: open it read-only") from error
        if flags & os.O_DIRECT and error.errno == errno.EINVAL:
            raise ConfigError(f"{path}: its file system has no direct I/O (O_DIRECT)") from error
        raise ConfigError(f"{path}: cannot be opened: {error.strerror}") from error
