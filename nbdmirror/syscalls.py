"""System calls that file.py needs and that Python does not offer.

They raise nothing: the result shows the error. For any thread; they release the GIL (fcntl.ioctl
too: another thread continued during a BLKZEROOUT of 1.2 s).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from dataclasses import dataclass
from os import fstat

# linux/falloc.h. KEEP_SIZE everywhere: no request may make a file longer.
ALLOCATE = 0x01
PUNCH_HOLE = 0x02 | ALLOCATE
ZERO_RANGE = 0x10 | ALLOCATE
DISCARD = 0x1277
"""Block devices only: BLKDISCARD of linux/fs.h, beside the modes of fallocate."""

UNSUPPORTED = (errno.ENOTSUP, errno.ENOSYS, errno.ENODEV, errno.ENOTTY)
"""The medium cannot do this. ENODEV: block devices before Linux 4.9."""

DIRECT_ALIGNMENT_DEFAULT = 4096
"""For O_DIRECT if the kernel does not report the alignment (before 6.1): a multiple of what usual
disks need. Test reads of 512 bytes would not show it either: a hole accepts every alignment."""

_BLKSSZGET = 0x1268  # linux/fs.h
_AT_EMPTY_PATH = 0x1000  # linux/fcntl.h
_AT_FDCWD = -100
_AT_STATX_DONT_SYNC = 0x4000
_STATX_BASIC = 0x7FF  # linux/stat.h
_STATX_BTIME = 0x800
_STATX_DIOALIGN = 0x2000
_STATX_MODE_AT = 0x1C  # of struct statx
_STATX_INODE_AT = 0x20
_STATX_BTIME_AT = 0x50
_STATX_RDEV_AT = 0x80
_STATX_DEV_AT = 0x88
_STATX_DIO_OFFSET_ALIGN_AT = 0x9C
_IN_MEMORY = (0x01021994, 0x858458F6)  # linux/magic.h: TMPFS_MAGIC, RAMFS_MAGIC
_ANSWER_BYTES = 256
"""struct statx; struct statfs is smaller."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)


def change(fd: int, what: int, offset: int, length: int) -> int:
    """Apply `what` (one of the constants above) to a range in bytes. Returns 0 or an errno."""
    if what == DISCARD:
        try:
            fcntl.ioctl(fd, DISCARD, struct.pack("QQ", offset, length))
        except OSError as error:
            return error.errno or errno.EIO
        return 0
    while _libc.fallocate(fd, what, offset, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            return code
    return 0


def reopen(fd: int, path: str, flags: int) -> int:
    """Another descriptor of the same file, with other flags, which dup(2) would share. `path`: the
    file's, for a system without /proc."""
    try:
        return os.open(f"/proc/self/fd/{fd}", flags)
    except FileNotFoundError:
        again = os.open(path, flags)
    if not os.path.samestat(os.fstat(fd), os.fstat(again)):
        os.close(again)
        raise OSError(errno.ESTALE, "was replaced meanwhile")
    return again


def node_of(number: int) -> str:
    """The kernel's node of the block device `number`, which is the same for all its names; "" if
    there is none."""
    try:
        link = os.readlink(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
        node = "/dev/" + os.path.basename(link).replace("!", "/")
        status = os.stat(node)
    except OSError:
        return ""
    return node if stat.S_ISBLK(status.st_mode) and status.st_rdev == number else ""


@dataclass(frozen=True, slots=True)
class KnownStatus:
    """What the kernel's memory has of a file: the fields of os.stat_result."""

    mode: int
    device: int
    inode: int
    number: int
    """Of a device (st_rdev)."""
    size: int


def known_status(path: str) -> KnownStatus | None:
    """The status of the file at `path`; None if not known. Uses only the kernel's memory: no
    storage is queried."""
    answer = ctypes.create_string_buffer(_ANSWER_BYTES)
    name = os.fsencode(path)
    if _libc.statx(_AT_FDCWD, name, _AT_STATX_DONT_SYNC, _STATX_BASIC, answer) != 0:
        return None
    (mode,) = struct.unpack_from("H", answer, _STATX_MODE_AT)
    inode, size = struct.unpack_from("QQ", answer, _STATX_INODE_AT)
    number, device = (
        os.makedev(*struct.unpack_from("II", answer, at)) for at in (_STATX_RDEV_AT, _STATX_DEV_AT)
    )
    return KnownStatus(mode, device, inode, number, size)


def birth_ns(path: str) -> int:
    """When the file at `path` was created, in nanoseconds since 1970; 0 if not known. Copies
    and files that get a deleted one's inode have other times; `touch` does not change them."""
    answer = ctypes.create_string_buffer(_ANSWER_BYTES)
    if _libc.statx(_AT_FDCWD, os.fsencode(path), 0, _STATX_BTIME, answer) != 0:
        return 0
    (mask,) = struct.unpack_from("I", answer)
    seconds, nanoseconds = struct.unpack_from("qI", answer, _STATX_BTIME_AT)
    return int(max(0, seconds * 10**9 + nanoseconds)) if mask & _STATX_BTIME else 0


def is_in_memory(fd: int) -> bool:
    """Whether the file is on tmpfs or ramfs."""
    answer = ctypes.create_string_buffer(_ANSWER_BYTES)
    if _libc.fstatfs(fd, answer) != 0:
        return False
    (kind,) = struct.unpack_from("l", answer)
    return kind in _IN_MEMORY


def sector_size(fd: int) -> int:
    """The logical sector size of a block device, in bytes."""
    try:
        (size,) = struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, bytes(struct.calcsize("i"))))
    except OSError:
        return 4096
    return int(size)


def direct_alignment(fd: int) -> int:
    """O_DIRECT's alignment of offsets and lengths, in bytes; 0 if this file does not support it."""
    if stat.S_ISBLK(fstat(fd).st_mode):
        return sector_size(fd)
    answer = ctypes.create_string_buffer(_ANSWER_BYTES)
    if _libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, answer) == 0:
        (mask,) = struct.unpack_from("I", answer)
        (alignment,) = struct.unpack_from("I", answer, _STATX_DIO_OFFSET_ALIGN_AT)
        if mask & _STATX_DIOALIGN:
            return max(int(alignment), 512) if alignment else 0
    return DIRECT_ALIGNMENT_DEFAULT
